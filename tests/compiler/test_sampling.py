"""Export by sample: the same graph as the export of every call, from as many traces as calls differ."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effc.aten  # noqa: F401  (registers the converters)
import effc.capture as capture
from effc.capture import Captured, Refusal, capture_dynamo, capture_exported
from effc.importer import Imported, import_captured


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def exports(monkeypatch):
    """Calls in each graph that torch was given to export."""
    counts, whole = [], capture._export_whole

    def count(gm, inputs, casts=False):
        counts.append(sum(n.op.startswith("call_") for n in gm.graph.nodes))
        return whole(gm, inputs, casts)

    monkeypatch.setattr(capture, "_export_whole", count)
    return counts


def dynamo(fn, *args, dynamic=None) -> Captured | Refusal:
    got = []

    def backend(gm, inputs):
        got.append(capture_dynamo(gm, inputs))
        return gm.forward

    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return got[0]


def graph(captured):
    imported = import_captured(captured)
    assert isinstance(imported, Imported), imported
    return imported.graph


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(2, 5, 8))
        a, b = (x + y).chunk(2, dim=-1)
        best = y.max(dim=-1, keepdim=True)
        return torch.cat((a, b), dim=-1) * 2.0 + best.values


def model(depth: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(depth))).eval()


X = torch.rand(2, 5, 8)


@pytest.mark.parametrize(
    "way", [dynamo, lambda m, x: capture_exported(torch.export.export(m, (x,)))]
)
def test_the_same_graph_as_without_a_sample(way, monkeypatch):
    net = model(3)
    sampled = way(net, X)
    monkeypatch.setattr(capture, "sampled", lambda gm, export: None)
    torch._dynamo.reset()
    whole = way(net, X)
    assert graph(sampled).text == graph(whole).text  # lines and modules of the user's included
    assert graph(sampled) == graph(whole)


def test_a_literal_is_one_weight_however_often_it_is_written():
    def fn(x):
        return x + torch.tensor([2.0]), x * torch.tensor([2.0]), x - torch.tensor([3.0])

    captured = dynamo(fn, X)
    assert [i.kind for i in captured.inputs] == ["user", "weight", "weight"]
    weights = [i.tensor for i in captured.inputs[1:]]
    torch.testing.assert_close(captured.graph_module(X, *weights), list(fn(X)), check_dtype=False)


def test_a_deeper_model_takes_no_more_traces(exports):
    dynamo(model(2), X)
    torch._dynamo.reset()
    dynamo(model(6), X)
    shallow, deep = exports
    assert shallow == deep < 40


def test_results_share_memory_as_in_eager():
    captured = dynamo(lambda x: (x.view(-1), x.t(), x.view(-1)[1:], x + 1, x.contiguous()), X[0])
    values = [o.value.meta["val"].untyped_storage()._cdata for o in captured.outputs]
    x = captured.inputs[0].node.meta["val"].untyped_storage()._cdata
    assert [v == x for v in values] == [True, True, True, False, True]


def test_equal_calls_with_unequal_arguments_are_told_apart():
    def fn(x):
        return x * 1, x * True, x * 0.0, x * -0.0, x.sum(0), x.sum(1), x[0:2], x[1:3]

    captured = dynamo(fn, X[0])
    for value, want in zip(captured.graph_module(X[0]), fn(X[0]), strict=True):
        torch.testing.assert_close(value, want)
        assert torch.equal(torch.signbit(value), torch.signbit(want))


def test_random_numbers_come_in_the_same_order():
    def fn(x):
        return x + torch.rand(3), torch.rand(3), F.dropout(x, 0.5), torch.rand(3)

    captured = dynamo(fn, torch.ones(3))
    torch.manual_seed(1)
    want = fn(torch.ones(3))
    torch.manual_seed(1)
    for value, eager in zip(captured.graph_module(torch.ones(3)), want, strict=True):
        torch.testing.assert_close(value, eager, rtol=0, atol=0)


def writes(x):
    y = x + 1
    y.mul_(2)
    return y * 3, y * 3


def asserts(x):
    torch._assert_async((x > -1).all())
    return x * 3, x * 4


WHOLE = {
    "a write": (writes, None),
    "an effect without a result": (asserts, None),
    "sizes known at a call": (lambda x: (x * 2, x.reshape(-1) * 2), True),
}


@pytest.mark.parametrize("name", WHOLE)
def test_graphs_that_a_sample_cannot_tell_are_exported_whole(name, exports):
    fn, dynamic = WHOLE[name]
    captured = dynamo(fn, torch.rand(3, 4), dynamic=dynamic)
    assert isinstance(captured, Captured)
    assert exports[-1] >= 3  # the last export is the whole one
    targets = [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    assert operator.getitem not in targets


def test_what_the_sample_writes_is_seen_in_its_signature(exports):
    """A tensor made in inference mode has no version counter that would tell of the write."""
    with torch.inference_mode():
        x = torch.rand(3)
        captured = dynamo(lambda x: (x.relu_(), x + 1, x + 1), x)
    assert isinstance(captured, Captured) and captured.written == (0,)


def test_arguments_that_share_a_placeholder_keep_their_places():
    """relu's argument stands for both of sub's in the sample, which takes them the other way."""

    def fn(x, y):
        a = x.relu()
        return y.sub(x) * 2 + a, torch.sub(x, x)

    x, y = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 7.0])
    captured = dynamo(fn, x, y)
    for value, want in zip(captured.graph_module(x, y), fn(x, y), strict=True):
        torch.testing.assert_close(value, want)
