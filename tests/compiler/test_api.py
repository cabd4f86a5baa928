"""effc.compile: ahead of the first call, with the calling convention of the model."""

import json

import pytest
import torch
from torch import nn

import effc
from effc.ir import EffcError, InputError, OptionError, PipelineError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, *, mask=None, scale=1.0):
        y = self.b(torch.nn.functional.gelu(self.a(x))) * scale
        return {"y": y if mask is None else y * mask, "rest": (x + 1, None)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def close(got, want):
    torch.testing.assert_close(got["y"], want["y"])
    torch.testing.assert_close(got["rest"][0], want["rest"][0])
    assert got["rest"][1] is None


def test_compiled_before_the_first_call_and_called_like_the_model(net):
    x = torch.randn(3, 6)
    c = effc.compile(net, example_inputs=(x,))
    assert isinstance(c, nn.Module)
    (record,) = effc.explain(c).records
    assert record.executable is not None
    with torch.no_grad():
        y = torch.randn(3, 6)
        close(c(y), net(y))


def test_keyword_arguments(net):
    x, mask = torch.randn(3, 6), torch.rand(3, 6)
    c = effc.compile(net, example_inputs=(x,), example_kwargs={"mask": mask})
    with torch.no_grad():
        close(c(x, mask=mask), net(x, mask=mask))
        with pytest.raises(InputError, match="not arranged as in the example call"):
            c(x)


def test_dynamic_shapes_serve_all_sizes(net):
    x = torch.randn(3, 6)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    c = effc.compile(net, example_inputs=(x,), dynamic_shapes=shapes)
    with torch.no_grad():
        for n in (2, 5, 17):
            y = torch.randn(n, 6)
            close(c(y), net(y))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.randn(4, 6), "got size 4 in dimension 0"),
        (torch.randn(3, 6, dtype=torch.float64), "float64"),
        (torch.randn(3), "must be f32[3, 6]"),
    ],
    ids=["size", "type", "rank"],
)
def test_inputs_that_do_not_fit_are_named(net, bad, said):
    c = effc.compile(net, example_inputs=(torch.randn(3, 6),))
    with torch.no_grad(), pytest.raises(InputError) as caught:
        c(bad)
    assert "input x must be f32[3, 6]" in str(caught.value) and said in str(caught.value)


def test_every_pass_is_measured_on_the_example(net):
    c = effc.compile(net, example_inputs=(torch.randn(3, 6),))
    report = json.loads(effc.explain(c).json())
    stages = report["graphs"][0]["stages"] if "graphs" in report else report["reports"][0]["stages"]
    assert all(s["error"] is not None for s in stages[1:])
    assert all(s["error"]["relative_l2"] <= 1e-5 for s in stages[1:])


def test_gradients_and_training_run_the_model_itself(net):
    c = effc.compile(net, example_inputs=(torch.randn(3, 6),))
    c(torch.randn(5, 6))["y"].sum().backward()
    assert net.a.weight.grad is not None
    assert c.train().module.training


def test_parameters_are_listed_once_and_changes_are_seen(net):
    x = torch.randn(3, 6)
    for c in (effc.compile(net, example_inputs=(x,)), effc.compile(net)):
        assert set(c.state_dict()) == {f"module.{k}" for k in net.state_dict()}
        with torch.no_grad():
            close(c(x), net(x))
            net.a.weight.mul_(1.5)
            close(c(x), net(x))


def test_without_an_example_the_first_call_compiles(net):
    c = effc.compile(net)
    with pytest.raises(InputError, match="no compiled graph yet"):
        effc.explain(c)
    with torch.no_grad():
        close(c(torch.ones(2, 6)), net(torch.ones(2, 6)))
    assert effc.explain(c).records


def test_a_function_and_a_single_tensor():
    c = effc.compile(lambda x: torch.softmax(x * 2, -1), example_inputs=torch.randn(4, 5))
    x = torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(c(x), torch.softmax(x * 2, -1))


def test_what_cannot_be_exported_says_so_and_names_the_way_out():
    def branch(x):
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(EffcError, match="cannot capture") as caught:
        effc.compile(branch, example_inputs=(torch.randn(3),))
    assert "leave out example_inputs" in str(caught.value)


def test_a_recipe_is_a_pipeline(net):
    x = torch.randn(3, 6)
    c = effc.compile(net, recipe="simplify", example_inputs=(x,))
    assert [s.name for s in effc.explain(c).records[0].stages] == ["capture", "simplify"]
    with pytest.raises(PipelineError, match="unknown pass"):
        effc.compile(net, recipe="quantise", example_inputs=(x,))
    with pytest.raises(OptionError, match="both name the passes"):
        effc.compile(net, recipe="simplify", pipeline="simplify", example_inputs=(x,))
