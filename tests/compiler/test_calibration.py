"""Calibration data on its way from effc.compile to a pass."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import effc
from effc.calibration import argument_sets, flattened, progress
from effc.ir import InputError, OptionError
from effc.passes.base import PASSES, Pass, lossy

SEEN = []


@pytest.fixture
def look():
    """A pass that keeps what it is given."""

    @dataclass(frozen=True)
    class LookAtData(Pass):
        """Keep the calibration data."""

        name, numerics = "look-at-data", lossy("relative_l2")
        blind: bool = False

        @property
        def calibrated(self):
            return not self.blind

        def run(self, g, ctx):
            SEEN.append(ctx.calibration)
            return g

    SEEN.clear()
    yield "look-at-data"
    del PASSES["look-at-data"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, scale=None, half=False):
        y = self.layer(x if scale is None else x * scale)
        return y / 2 if half else y


def test_sets_reach_the_pass_in_the_order_of_the_graphs_inputs(look):
    x, s = torch.randn(2, 4), torch.randn(4)
    sets = ({"scale": s + i, "x": x + i, "half": True} for i in range(3))
    effc.compile(Net(), recipe=look, calibrate=sets, target="reference")
    (given,) = SEEN
    assert len(given) == 3
    graph_order = {tuple(v.shape) for v in given[0]}
    assert graph_order == {(2, 4), (4,)}
    for i, values in enumerate(given):
        by_shape = {tuple(v.shape): v for v in values}
        assert torch.equal(by_shape[2, 4], x + i) and torch.equal(by_shape[4,], s + i)


def test_the_first_set_is_the_example(look):
    x = torch.randn(2, 4)
    net = Net()
    compiled = effc.compile(net, recipe=look, calibrate=[(x,), [x + 1]], target="reference")
    assert torch.equal(compiled(x), net(x))
    effc.compile(net, recipe=look, calibrate=[x], example_inputs=(x,), target="reference")
    assert len(SEEN) == 2 and len(SEEN[1]) == 1


def test_data_that_no_pass_reads_is_refused_and_data_that_one_needs_is_asked_for(look):
    x = torch.randn(2, 4)
    with pytest.raises(OptionError, match="no pass of this pipeline does"):
        effc.compile(Net(), calibrate=[x])
    with pytest.raises(OptionError, match="no pass of this pipeline does"):
        effc.compile(Net(), recipe="look-at-data{blind=True}", calibrate=[x])
    with pytest.raises(OptionError, match="look-at-data needs calibration data"):
        effc.compile(Net(), recipe=look, example_inputs=(x,))


@pytest.mark.parametrize(
    ("calibrate", "said"),
    [
        ([], "no set of arguments"),
        (torch.zeros(2, 4), "must be an iterable"),
        ({"x": 1}, "must be an iterable"),
        (7, "must be an iterable"),
        ([7], "an item of calibrate is a int"),
    ],
)
def test_what_is_no_data_is_refused(look, calibrate, said):
    with pytest.raises(OptionError, match=said):
        effc.compile(Net(), recipe=look, calibrate=calibrate)


def test_sets_that_differ_from_the_example_are_refused(look):
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="set 1 of calibrate differs"):
        effc.compile(Net(), recipe=look, calibrate=[(x,), (x, torch.ones(4))])
    with pytest.raises(InputError, match="input x must be"):
        effc.compile(Net(), recipe=look, calibrate=[(x,), (torch.randn(3, 4),)])
    assert not SEEN


def test_names_may_come_in_any_order_and_constants_must_agree():
    x = torch.randn(1)
    sets = argument_sets([{"a": x, "b": None}, {"b": None, "a": x}])
    assert len(flattened(sets, sets[0])) == 2
    words = argument_sets([{"a": x, "b": "mean"}, {"a": x, "b": "sum"}])
    with pytest.raises(InputError, match="'sum', the example 'mean'"):
        flattened(words, words[0])


def test_progress_gives_every_step_and_ends_where_its_reader_does():
    assert list(progress(range(5), "counting")) == list(range(5))
    steps = iter(progress(range(5), "counting"))
    assert next(steps) == 0
