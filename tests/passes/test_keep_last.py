"""keep-last: the last position alone, where nothing else is asked for."""

from __future__ import annotations

import pytest
import torch

from effc.ir import Graph, PassError, interpret, parse, verify
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline

# two layers, so that the first is needed whole; a head; a mask that the queries look up
MODEL = """
def graph(x: f32[2, T, 8], past: i64[()], k0: State[f32[2, 2, C, 4]], v0: State[f32[2, 2, C, 4]], k1: State[f32[2, 2, C, 4]], v1: State[f32[2, 2, C, 4]]):
    w0: f32[8, 8] = weight("q", digest="")
    w1: f32[8, 8] = weight("k", digest="")
    w2: f32[9, 8] = weight("head", digest="")
    a0: f32[2, T, 8] = linear(x, w0)
    a1: f32[2, T, 2, 4] = reshape(a0, to=(2, T, 2, 4))
    a2: f32[2, 2, T, 4] = permute(a1, dims=(0, 2, 1, 3))
    a3: f32[2, 2, C, 4] = update(k0, a2, past, dim=2)
    a4: f32[2, 2, C, 4] = update(v0, a2, past, dim=2)
    a5: f32[2, 2, T, 4] = attention(a2, a3, a4, causal=True, past=past)
    a6: f32[2, T, 2, 4] = permute(a5, dims=(0, 2, 1, 3))
    a7: f32[2, T, 8] = reshape(a6, to=(2, T, 8))
    b0: f32[2, T, 8] = add(x, a7)
    b1: f32[2, T, 8] = linear(b0, w1)
    b2: f32[2, T, 2, 4] = reshape(b1, to=(2, T, 2, 4))
    b3: f32[2, 2, T, 4] = permute(b2, dims=(0, 2, 1, 3))
    b4: f32[2, T, 8] = linear(b0, w0)
    b5: f32[2, T, 2, 4] = reshape(b4, to=(2, T, 2, 4))
    b6: f32[2, 2, T, 4] = permute(b5, dims=(0, 2, 1, 3))
    b7: f32[2, 2, C, 4] = update(k1, b3, past, dim=2)
    b8: f32[2, 2, C, 4] = update(v1, b3, past, dim=2)
    m0: i64[T] = arange(size=T, dtype_=i64)
    m1: i64[T] = add(m0, past)
    m2: i64[T, 1] = reshape(m1, to=(T, 1))
    m3: i64[C] = arange(size=C, dtype_=i64)
    m4: i64[T, C] = sub(m2, m3)
    m5: bool[T, C] = lt(m4, 3)
    b9: f32[2, 2, T, 4] = attention(b6, b7, b8, m5, causal=True, past=past)
    c0: f32[2, T, 2, 4] = permute(b9, dims=(0, 2, 1, 3))
    c1: f32[2, T, 8] = reshape(c0, to=(2, T, 8))
    c2: f32[2, T, 8] = add(b0, c1)
    c3: f32[2, T, 9] = linear(c2, w2)
    return c3, a3, a4, b7, b8
"""


def model() -> Graph:
    torch.manual_seed(0)
    weights = {"q": torch.randn(8, 8), "k": torch.randn(8, 8), "head": torch.randn(9, 8)}
    return parse(MODEL, weights)


def kept(graph: Graph) -> Graph:
    (_, stage) = run_pipeline(graph, Pipeline.parse("keep-last"))
    verify(stage.graph)
    return stage.graph


def test_text(golden):
    assert kept(model()).text == golden


@pytest.mark.parametrize(("n", "past"), [(1, 0), (5, 0), (4, 7), (1, 11)])
def test_the_last_row_and_all_states(n, past):
    graph = model()
    inputs = [torch.randn(2, n, 8), torch.tensor(past), *torch.randn(4, 2, 2, 12, 4)]
    result, *states = interpret(graph, inputs)
    last, *same = interpret(kept(graph), inputs)
    torch.testing.assert_close(last, result[:, -1:])
    assert all(a.equal(b) for a, b in zip(states, same))


def test_rows_that_depend_on_each_other_are_computed_whole():
    graph = parse(
        """
def graph(x: f32[2, T, 8], past: i64[()], k0: State[f32[2, C, 8]]):
    y0: f32[2, C, 8] = update(k0, x, past, dim=1)
    y1: f32[2, T, 8] = attention(x, y0, y0, causal=True, past=past)
    y2: f32[2, T, 8] = softmax(y1, dim=1)
    y3: f32[2, T, 8] = relu(y2)
    return y3, y0
"""
    )
    x, k0 = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    result, _ = interpret(graph, [x, torch.tensor(1), k0])
    made = kept(graph)
    torch.testing.assert_close(interpret(made, [x, torch.tensor(1), k0])[0], result[:, -1:])
    assert "softmax(y1, dim=1)" in made.text and "slice" in made.text


def test_a_graph_without_a_cache():
    with pytest.raises(PassError, match="has no cache"):
        kept(parse("def graph(x: f32[2, T]):\n    y0: f32[2, T] = relu(x)\n    return y0\n"))
