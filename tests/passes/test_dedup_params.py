"""dedup-params: weights that are equal bit for bit become one, and what happens when they change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import effc
from effc.backends import find_backend
from effc.ir import InputError, Weight, parse
from effc.ir.graph import same_bits
from effc.passes.base import Context, Pipeline

DEDUP = "dedup-params"
PROGRAM = """
def graph(x: f32[2, 3]):
    a: f32[3, 3] = weight("a")
    b: f32[3, 3] = weight("b")
    y0 = linear(x, a)
    y1 = linear(y0, b)
    return y1,
"""


def of(values: dict[str, torch.Tensor], text: str = PROGRAM):
    return parse(text, values)


def dedup(graph):
    ctx = Context()
    [p] = Pipeline.parse(DEDUP)
    return p.run(graph, ctx), ctx


# ------------------------------------------------------------------ hits and near misses


def test_equal_weights_become_one(run):
    w = torch.randn(3, 3)
    ran = run(of({"a": w, "b": w.clone()}), DEDUP)
    [kept] = ran.after.weights
    assert (kept.key, kept.also) == ("a", ("b",))
    assert ran.hits("ShareEqualWeights") == 1
    assert ran.ctx.notes == ["36 bytes are stored once less"]


def test_the_text_has_the_names_and_comes_back():
    w = torch.randn(3, 3)
    made, _ = dedup(of({"a": w, "b": w.clone()}))
    assert 'weight("a", digest=' in made.text and ', also=("b",))' in made.text
    again = parse(made.text, {"a": w})
    assert again == made and again.text == made.text and again.weights[0].also == ("b",)
    assert dedup(made)[0] is made


@pytest.mark.parametrize(
    ("value", "other"), [(0.0, -0.0), (1.0, math.nextafter(1.0, 2.0) + 1e-7), (math.nan, 0.0)]
)
def test_one_bit_keeps_weights_apart(run, value, other):
    a = torch.zeros(3, 3)
    a[1, 2] = value
    b = a.clone()
    b[1, 2] = other
    ran = run(of({"a": a, "b": b}), DEDUP)
    assert ran.unchanged and ran.ctx.notes == ["no two weights are equal"]


def test_what_no_sample_sees_is_compared_in_full(run):
    text = PROGRAM.replace("3]", "300]").replace("[3, ", "[300, ")
    a = torch.zeros(300, 300)
    b = a.clone()
    b[299, 298] = 1.0
    assert run(of({"a": a, "b": b}, text), DEDUP).unchanged


def test_nan_of_the_same_bits_is_equal(run):
    w = torch.full((3, 3), math.nan)
    assert len(run(of({"a": w, "b": w.clone()}), DEDUP).after.weights) == 1


def test_types_and_shapes_keep_weights_apart():
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert same_bits(torch.zeros(0), torch.zeros(0))
    turned = torch.arange(6.0).reshape(2, 3)
    assert same_bits(turned, turned.T.contiguous().T)


def test_weights_that_the_caller_gets_stay_apart(run):
    w = torch.randn(3)
    text = (
        'def graph(x: f32[3]):\n    a: f32[3] = weight("a")\n    b: f32[3] = weight("b")\n'
        "    y = add(x, a)\n    return y, a, b,\n"
    )
    ran = run(of({"a": w, "b": w.clone()}, text), DEDUP)
    assert ran.unchanged
    assert "is given back to the caller" in ran.reasons("ShareEqualWeights")[0]


def test_weights_without_values_are_left():
    graph = parse(PROGRAM)
    made, ctx = dedup(graph)
    assert made is graph
    assert ctx.stats["ShareEqualWeights"].misses[0].reason == "a has no values here"


def test_small_weights_stay_apart_where_asked(run):
    w = torch.randn(3, 3)
    values = {"a": w, "b": w.clone()}
    ran = run(of(values), "dedup-params{bytes=37}")
    assert ran.unchanged
    assert "a has 36 bytes, fewer than 37" in ran.reasons("ShareEqualWeights")
    assert not run(of(values), "dedup-params{bytes=36}").unchanged


def test_three_of_four():
    one, two = torch.randn(3, 3), torch.randn(3, 3)
    text = "def graph(x: f32[2, 3]):\n" + "".join(
        f'    {n}: f32[3, 3] = weight("{n}")\n' for n in "abcd"
    )
    text += "    y0 = linear(x, a)\n    y1 = linear(y0, b)\n    y2 = linear(y1, c)\n"
    text += "    y3 = linear(y2, d)\n    return y3,\n"
    made, _ = dedup(of({"a": one, "b": two, "c": one.clone(), "d": one.clone()}, text))
    assert [(w.key, w.also) for w in made.weights] == [("a", ("c", "d")), ("b", ())]


# ------------------------------------------------------------------ weights that change later


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_binding_looks_whether_they_are_still_equal(target):
    w = torch.randn(3, 3)
    graph = of({"a": w, "b": w.clone()})
    made, _ = dedup(graph)
    compiled = find_backend(target).compile(made, None)
    x = torch.randn(2, 3)
    new = torch.randn(3, 3)
    [got] = compiled.bind({"a": new, "b": new.clone()})([x])
    torch.testing.assert_close(got, x @ new.T @ new.T)
    for weights in ({"a": new, "b": w}, {"b": new}):
        with pytest.raises(InputError, match="'a' and 'b' are not equal any more"):
            compiled.bind(weights)
    [got] = compiled.bind()([x])
    torch.testing.assert_close(got, x @ w.T @ w.T)


class Tied(nn.Module):
    """Two parameters of the same values, as a checkpoint with a copy of its embedding has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_parameter_changed_in_place_is_never_computed_with_the_other():
    torch._dynamo.reset()
    net, x = Tied().eval(), torch.randn(3, 8)
    with torch.no_grad():
        fast = torch.compile(net, backend="effc", options={"pipeline": f"{DEDUP},default"})
        torch.testing.assert_close(fast(x), net(x))
        [record] = effc.explain(fast).records
        assert len(record.stages[-1].graph.weights) == 1
        net.a.weight.mul_(3)
        with pytest.raises(InputError, match="are not equal any more") as e:
            fast(x)
        assert "compile the model again" in str(e.value)
        net.b.weight.mul_(3)  # equal again: the call goes on with the new values
        torch.testing.assert_close(fast(x), net(x))


def test_a_saved_model_holds_them_once(tmp_path):
    net, x = Tied().eval(), torch.randn(3, 8)
    with torch.no_grad():
        fast = effc.compile(net, recipe=f"{DEDUP},default", example_inputs=(x,))
        want = fast(x)
        fast.save(tmp_path / "tied.effc")
        assert torch.equal(effc.load(tmp_path / "tied.effc")(x), want)
        net.a.weight.add_(1)
        with pytest.raises(InputError, match="are not equal any more"):
            fast.save(tmp_path / "apart.effc")


def test_a_replaced_weight_keeps_its_other_names():
    w = Weight.holding("a", torch.zeros(2)).replace(also=("b",))
    assert w.replace(key="c").also == ("b",) and w.replace(key="c").data is w.data
