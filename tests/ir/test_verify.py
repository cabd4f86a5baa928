"""The verifier: each invariant broken by hand, and what it says."""

from __future__ import annotations

import re

import pytest
import torch

from effc.ir import Graph, Input, Number, Origin, Tensor, VerifyError, Weight, parse, symbol, verify
from effc.ir.ops.region import Fused
from effc.ir.rewrite import op
from effc.ir.types import f32, f64

N = symbol("N")
F4 = Tensor((4,), f32)
X = Input("x", F4)


def said(graph: Graph) -> str:
    with pytest.raises(VerifyError) as e:
        verify(graph)
    return str(e.value)


def test_a_good_graph_comes_back() -> None:
    graph = parse(
        "def graph(x: f32[N], s0: size):\n    y0 = expand(x, to=(s0, N))\n    return y0\n"
    )
    assert verify(graph) is graph


# ------------------------------------------------------------------ 1. inputs


def test_inputs_are_input_nodes() -> None:
    bad = Graph((op.full((4,), 0.0, f32),), (), ())
    assert said(bad) == "graph: <full: f32[4]> stands among the inputs"


def test_inputs_have_distinct_names() -> None:
    assert said(Graph.of((X, Input("x", F4)), ())) == "graph: two inputs are called 'x'"


def test_an_input_is_not_called_as_a_size() -> None:
    bad = Graph.of((Input("N", Tensor((N,), f32)),), ())
    assert said(bad) == "graph: 'N' names an input and a size"
    verify(Graph.of((Input("N", Number()), Input("x", Tensor((N,), f32))), ()))


# ------------------------------------------------------------------ 2. operands


def test_an_operand_is_computed_before() -> None:
    y = op.exp(X).at(Origin("m.act", "model.py:3"))
    z = op.relu(y).at(Origin("m.out", "model.py:4"))
    assert said(Graph((X,), (z, y), (z,))) == (
        "graph: invalid relu\n"
        "  where m.out  model.py:4\n"
        "  node  y0: f32[4] = relu(y1)  # m.out  model.py:4\n"
        "  why   operand <exp: f32[4]  m.act  model.py:3> is not computed before it\n"
        "  > y0: f32[4] = relu(y1)  # m.out  model.py:4\n"
        "    y1: f32[4] = exp(x)  # m.act  model.py:3"
    )


def test_an_operand_that_is_nowhere() -> None:
    z = op.relu(op.exp(X))
    assert said(Graph((X,), (z,), (z,))) == (
        "graph: invalid relu\n"
        "  node  <relu: f32[4]>\n"
        "  why   operand <exp: f32[4]> is not computed before it\n"
        "  > <relu: f32[4]>"
    )


def test_a_node_appears_once_and_is_no_input() -> None:
    y = op.exp(X)
    assert "why   the node appears twice" in said(Graph((X,), (y, y), (y,)))
    assert "why   an input stands among the nodes" in said(Graph((), (X,), ()))


# ------------------------------------------------------------------ 3. outputs


def test_an_output_is_a_value_of_the_graph() -> None:
    bad = Graph((X,), (), (op.exp(X),))
    assert said(bad) == "graph: output <exp: f32[4]> is not computed by the graph"


# ------------------------------------------------------------------ 4. types


def test_a_node_carries_the_type_that_infer_gives() -> None:
    y = op.exp(X)
    object.__setattr__(y, "type", Tensor((5,), f32))
    assert said(Graph((X,), (y,), (y,))) == (
        "graph: invalid exp\n"
        "  node  y0: f32[5] = exp(x)\n"
        "  why   it carries f32[5], infer says f32[4]\n"
        "  > y0: f32[5] = exp(x)"
    )


def test_infer_may_refuse_a_node_that_was_changed_behind_its_back() -> None:
    y = op.permute(Input("a", Tensor((2, 3), f32)), (1, 0))
    object.__setattr__(y, "dims", (0, 0))
    graph = Graph.of((y.x,), (y,))
    assert "why   permute(f32[2, 3]): (0, 0) is not a permutation of 2 dimensions" in said(graph)


# ------------------------------------------------------------------ 5. sizes


def test_a_size_can_be_read_off_the_inputs() -> None:
    y = op.expand(X, (N, 4))
    assert said(Graph.of((X,), (y,))) == (
        "graph: invalid expand\n"
        "  node  y0: f32[N, 4] = expand(x, to=(N, 4))\n"
        "  why   size N cannot be read off the inputs\n"
        "  > y0: f32[N, 4] = expand(x, to=(N, 4))"
    )
    verify(Graph.of((X, Input("N", Number())), (y,)))
    verify(Graph.of((X, Input("z", Tensor((N,), f32))), (y,)))


def test_a_size_inside_an_expression_is_not_read_off() -> None:
    bad = Graph.of((Input("x", Tensor((2 * N,), f32)),), ())
    assert said(bad) == ("graph: input x is f32[2*N]\n  why   size N cannot be read off the inputs")


def test_a_region_knows_the_sizes_around_it() -> None:
    x, a = Input("x", Tensor((N,), f32)), Input("a", Tensor((N,), f32))
    good = Fused((x,), Graph.of((a,), (op.add(a, N),), "body"))
    verify(Graph.of((x,), (good,)))
    bad = Fused((x,), Graph.of((a,), (op.add(a, symbol("H")),), "body"))
    assert "why   size H cannot be read off the inputs" in said(Graph.of((x,), (bad,)))


# ------------------------------------------------------------------ 6. regions


def test_a_region_takes_the_types_of_its_operands() -> None:
    a = Input("a", Tensor((4,), f64))
    bad = Fused((X,), Graph.of((a,), (op.relu(a),), "body"))
    assert said(Graph.of((X,), (bad,))) == (
        "graph: invalid fused\n"
        "  node  y0: f64[4] = fused((x,), body=body)\n"
        "  why   its region takes (f64[4]), operands are (f32[4])\n"
        "  > y0: f64[4] = fused((x,), body=body)"
    )


def test_a_region_is_valid_itself_two_deep() -> None:
    a, b = Input("a", F4), Input("b", F4)
    y = op.exp(b)
    object.__setattr__(y, "type", Tensor((5,), f32))
    inner = Graph((b,), (y,), (y,), "inner")
    outer = Graph.of((a,), (Fused((a,), inner),), "outer")
    assert said(Graph.of((X,), (Fused((X,), outer),))).startswith(
        "inner: invalid exp\n  node  y0: f32[5] = exp(b)\n  why   it carries f32[5]"
    )


# ------------------------------------------------------------------ 7. weights


def test_data_of_a_weight_is_what_the_node_declares() -> None:
    for data in (torch.zeros(5), torch.zeros(4, dtype=torch.float64)):
        w = Weight.holding("w", data, F4)
        assert re.search(
            r"why   its data is torch\.float(32\[5\]|64\[4\])$", said(Graph.of((), (w,))), re.M
        )
    verify(Graph.of((), (Weight("w", F4, "00"), Weight.holding("v", torch.zeros(4)))))


# ------------------------------------------------------------------ 8. states


def test_the_new_values_of_states_are_the_last_outputs() -> None:
    k, v = Input("k", F4, state=True), Input("v", Tensor((4,), f64), state=True)
    verify(Graph.of((k, X, v), (X, op.add(k, X), v)))
    assert said(Graph.of((k, X, v), (v,))) == (
        "graph: 2 states and 1 outputs\n  why   the last outputs are the new values of the states"
    )
    assert said(Graph.of((k, X, v), (X, v, k))) == (
        "graph: output 1 is f64[4]\n  why   it is the new value of k, f32[4]"
    )


def test_a_region_has_no_states() -> None:
    a = Input("a", F4, state=True)
    bad = Fused((X,), Graph.of((a,), (op.relu(a),), "body"))
    assert "why   its region has a state, a" in said(Graph.of((X,), (bad,)))


# ------------------------------------------------------------------ the window


def test_ten_lines_either_side_are_shown() -> None:
    y = X
    for _ in range(30):
        y = op.relu(y)
    graph = Graph.of((X,), (y,))
    object.__setattr__(graph.nodes[15], "type", Tensor((5,), f32))
    lines = said(graph).splitlines()
    shown = lines[lines.index(next(at for at in lines if "why" in at)) + 1 :]
    assert shown[0].strip().startswith("y5:") and shown[-1].strip().startswith("y25:")
    assert [at for at in shown if at.startswith("  >")] == ["  > y15: f32[5] = relu(y14)"]
