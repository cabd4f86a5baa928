"""Sizes replaced by numbers and by other sizes, everywhere in a graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effc.ir import Graph, Input, Number, OpError, Tensor, interpret, parse, symbol, verify
from effc.ir.rewrite import op
from effc.ir.specialise import specialise
from effc.ir.types import f32
from tests.ir.strategies import LEAST, graphs, inputs_for, profile

PROGRAM = """
def graph(x: f32[N, T, 4], k: State[f32[N, C, 4]], past: i64[()]):
    w0: f32[4, 4] = weight("w", digest="00000000")
    y0: f32[N*T, 4] = reshape(x, to=(N*T, 4))
    y1: f32[N*T, 4] = linear(y0, w0)
    y2: f32[N, T, 4] = reshape(y1, to=(N, T, 4))
    y3: f32[N, C, 4] = update(k, y2, past, dim=1)
    def body(a: f32[N, T, 4]):
        y0: f32[N, T, 4] = mul(a, T)
        return y0,
    y4: f32[N, T, 4] = fused((x,), body=body)
    y5: i64[N, T] = aten.randint.default(9, (N, T))
    return y4, y5, y3
"""


def test_every_size_is_replaced() -> None:
    graph = parse(PROGRAM)
    some = verify(specialise(graph, {"T": 1, symbol("C"): symbol("M")}))
    assert {s.name for s in some.all_symbols} == {"N", "M"}
    assert str(some.inputs[1].of) == "f32[N, M, 4]" and some.states == (some.inputs[1],)
    assert some.nodes[1].to == (symbol("N"), 4) and some.nodes[-1].args == (9, (symbol("N"), 1))
    whole = verify(specialise(some, {"N": 3, "M": 8}))
    assert not whole.all_symbols
    assert whole.weights == graph.weights  # the node itself: its values come along
    assert specialise(graph, {"Z": 3}) == graph


def test_sizes_may_be_expressions() -> None:
    n = symbol("N")
    graph = verify(specialise(parse(PROGRAM), {"T": 2 * n}))
    assert str(graph.outputs[0].type) == "f32[N, 2*N, 4]"


def test_a_size_that_cannot_be_is_refused() -> None:
    graph = parse("def graph(x: f32[T], y: f32[3]):\n    z = add(x, y)\n    return z,\n")
    with pytest.raises(OpError, match="do not broadcast"):
        specialise(graph, {"T": 2})


def test_a_number_of_the_call_stays_an_input() -> None:
    x, s = Input("x", Tensor((symbol("T"),), f32)), Input("s", Number())
    graph = verify(specialise(Graph.of((x, s), (op.mul(x, symbol("s")),)), {"T": 2}))
    assert [i.key for i in graph.inputs] == ["x", "s"]


@profile
@given(graphs(states=True), st.integers(0, 99))
def test_the_values_are_those_of_the_general_graph(graph: Graph, seed: int) -> None:
    sizes = {s.name: LEAST[s.name] for s in graph.all_symbols}
    inputs = inputs_for(graph, seed, sizes)
    numbers = {i.key for i in graph.inputs if isinstance(i.of, Number)}
    one = verify(specialise(graph, {k: v for k, v in sizes.items() if k not in numbers}))
    for got, want in zip(interpret(one, inputs), interpret(graph, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
