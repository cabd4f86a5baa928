"""Graphs: reading them, changing them into new ones, and when two are equal."""

from __future__ import annotations

import pytest
import sympy
import torch

from effc.ir import Graph, Input, Item, Op, Origin, Tensor, Weight, parse, symbol, verify
from effc.ir.ops.aten import Aten
from effc.ir.ops.region import Fused
from effc.ir.rewrite import op
from effc.ir.types import f32, f64

CHAIN = """\
def graph(x: f32[4]):
    y0: f32[4] = exp(x)
    y1: f32[4] = add(y0, x)
    y2: f32[4] = relu(y1)
    return y2,
"""

F4 = Tensor((4,), f32)


def x_of(key: str = "x") -> Input:
    return Input(key, F4)


def noise(x: Op) -> Op:
    return Aten("aten.rand_like.default", (x,), (), of=F4)


def chain() -> tuple[Graph, Op, Op, Op]:
    graph = parse(CHAIN)
    verify(graph)
    return (graph, *graph.nodes)


# ------------------------------------------------------------------ reading


def test_users_come_once_per_use_and_outputs_count_as_uses() -> None:
    x = x_of()
    e = op.exp(x)
    square, total = op.mul(e, e), op.add(e, x)
    graph = Graph.of((x,), (square, total, e))
    assert graph.users[e] == (square, square, total)
    assert graph.users[x] == (e, total) and graph.users[total] == ()
    assert graph.uses(e) == 4 and graph.uses(square) == 1 and graph.uses(x) == 2


def test_nodes_are_in_depth_first_order_operands_left_to_right() -> None:
    x = x_of()
    a, b = op.exp(x), op.sin(x)
    graph = Graph.of((x,), (op.sub(a, b),))
    assert [n.name for n in graph.nodes] == ["exp", "sin", "sub"]


def test_a_deep_graph_needs_no_deep_stack() -> None:
    x = x_of()
    y: Op = x
    for _ in range(5000):
        y = op.relu(y)
    graph = Graph.of((x,), (y,))
    assert len(graph.nodes) == 5000
    changed = graph.substitute({graph.nodes[0]: op.abs(x)})
    assert changed.nodes[0].name == "abs" and len(changed.nodes) == 5000


def test_weights_and_symbols() -> None:
    graph = parse(
        "def graph(x: f32[N, 4], s0: size):\n"
        '    w0: f32[4] = weight("w", digest="00112233")\n'
        "    y0 = add(x, w0)\n"
        "    y1 = expand(y0, to=(s0, 2*s0, N, 4))\n"
        "    return y1\n"
    )
    assert [w.key for w in graph.weights] == ["w"]
    assert graph.all_symbols == {symbol("N"), symbol("s0")}
    assert graph.free_symbols == {symbol("N")}


def test_constants_are_what_no_input_reaches() -> None:
    x = Input("x", Tensor((symbol("N"),), f32))
    w = Weight("w", F4, "00")
    doubled = op.mul(w, 2.0)
    steps = op.arange(4, f32)
    sized = op.arange(symbol("N"), f32)
    random = noise(w)
    after = op.relu(random)
    numbered = op.mul(w, symbol("N"))
    mixed = op.add(op.sum(x, (0,)), doubled)
    graph = Graph.of((x,), (doubled, steps, sized, after, numbered, mixed))
    assert graph.constants == {w, doubled, steps}


def test_cost_counts_no_constants() -> None:
    x, w = x_of(), Weight("w", F4, "00")
    free = Graph.of((x,), (op.add(x, w),)).cost()
    assert free == Graph.of((x,), (op.add(x, op.exp(op.exp(w))),)).cost()
    assert (free.flops, free.bytes) == (4, 48)
    n = symbol("N")
    x = Input("x", Tensor((n,), f32))
    assert Graph.of((x,), (op.exp(op.exp(x)),)).cost().bytes == 16 * n


# ------------------------------------------------------------------ rebuild


def test_rebuild_visits_nodes_with_their_operands_already_mapped() -> None:
    graph, exp, _, _ = chain()
    seen: list[str] = []

    def visit(node: Op) -> Op:
        seen.append(f"{node.name}({', '.join(o.name for o in node.operands)})")
        return op.sin(node.x) if node.name == "exp" else node

    changed = graph.rebuild(visit)
    assert seen == ["exp(input)", "add(sin, input)", "relu(add)"]
    assert changed.text == CHAIN.replace("exp", "sin")
    assert exp in graph.nodes and graph.text == CHAIN


def test_rebuild_that_changes_nothing_is_the_same_object() -> None:
    graph, *_ = chain()
    assert graph.rebuild(lambda n: n) is graph
    assert graph.rebuild(lambda n: n, name="graph") is graph
    assert graph.substitute({}) is graph
    renamed = graph.rebuild(lambda n: n, name="other")
    assert renamed.name == "other" and renamed.nodes == graph.nodes and renamed != graph


def test_what_a_change_does_not_touch_is_shared() -> None:
    graph, exp, added, relu = chain()
    changed = graph.substitute({relu: op.neg(added)})
    assert changed.nodes[0] is exp and changed.nodes[1] is added


def test_a_new_type_is_carried_to_the_users() -> None:
    graph, *_ = chain()
    x = graph.inputs[0]
    changed = graph.rebuild(lambda n: op.cast(n, f64) if n.name == "exp" else n)
    assert [str(n.type) for n in changed.nodes] == ["f32[4]", "f64[4]", "f64[4]", "f64[4]"]
    assert changed.inputs == (x,)
    verify(changed)


# ------------------------------------------------------------------ substitute


def test_a_replacement_may_wrap_what_it_replaces() -> None:
    graph, exp, *_ = chain()
    changed = graph.substitute({exp: op.neg(op.sqrt(exp))})
    assert (
        changed.text
        == """\
def graph(x: f32[4]):
    y0: f32[4] = exp(x)
    y1: f32[4] = sqrt(y0)
    y2: f32[4] = neg(y1)
    y3: f32[4] = add(y2, x)
    y4: f32[4] = relu(y3)
    return y4,
"""
    )


def test_an_input_may_be_wrapped() -> None:
    graph, *_ = chain()
    x = graph.inputs[0]
    changed = graph.substitute({x: op.copy(x)})
    assert [f"{n.name} {n.operands[0].name}" for n in changed.nodes] == [
        "copy input", "exp copy", "add exp", "relu add",
    ]  # fmt: skip
    assert changed.inputs == (x,) and changed.nodes[2].b.name == "copy"
    through = Graph((x,), (), (x,)).substitute({x: op.copy(x)})
    assert through.outputs[0].name == "copy"


def test_replacements_are_written_in_terms_of_old_nodes() -> None:
    """Both values are replaced; the second replacement names the old first one."""
    graph, exp, added, relu = chain()
    changed = graph.substitute({exp: op.sin(graph.inputs[0]), relu: op.mul(exp, added)})
    assert [n.name for n in changed.nodes] == ["sin", "add", "mul"]
    assert changed.nodes[2].operands == changed.nodes[:2]


def test_a_replacement_may_name_a_later_value() -> None:
    x = x_of()
    first, later = op.exp(x), op.sin(noise(op.cos(x)))
    graph = Graph.of((x,), (first, later))
    base = op.cos(x)
    changed = graph.substitute({graph.nodes[1]: base, first: op.neg(later)})
    assert [n.name for n in changed.nodes].count("aten") == 1  # drawn once, read twice
    neg, sin = changed.outputs
    assert neg.x is sin and sin.operands[0].operands[0] is base
    verify(changed)


def test_a_replacement_may_name_a_later_value_that_reads_it() -> None:
    x = x_of()
    y = op.exp(x)
    inner, other = op.relu(y), op.neg(y)
    graph = Graph.of((x,), (other, inner))
    changed = graph.substitute({y: op.mul(y, inner)})  # inner goes on reading the old y
    verify(changed)
    assert [n.name for n in changed.nodes] == ["exp", "relu", "mul", "neg"]
    assert changed.outputs[1] is inner and changed.outputs[0].x.operands == (y, inner)


def test_two_values_may_share_a_new_one() -> None:
    x = x_of()
    a, b = op.exp(x), op.sin(x)
    graph = Graph.of((x,), (a, b))
    both = op.cos(x)
    changed = graph.substitute({a: op.neg(both), b: op.abs(both)})
    assert [n.name for n in changed.nodes] == ["cos", "neg", "abs"]


def test_outputs_follow_and_may_become_inputs() -> None:
    graph, *_, relu = chain()
    changed = graph.substitute({relu: graph.inputs[0]})
    assert changed.outputs == graph.inputs and changed.nodes == ()


# ------------------------------------------------------------------ immutability and origins


def test_the_old_graph_prints_the_same_after_any_change() -> None:
    graph, exp, added, relu = chain()
    where = Origin("m", "model.py:1")
    relu.at(where)
    before = graph.text
    graph.substitute({relu: graph.inputs[0]})
    graph.substitute({relu: exp})  # an old node that has no origin of its own
    graph.rebuild(lambda n: n.x if n.name == "relu" else n)
    graph.rebuild(lambda n: op.neg(n))
    assert graph.text == before and not exp.origins and not added.origins


def test_a_new_node_takes_the_origin_of_what_it_replaces() -> None:
    graph, _, added, relu = chain()
    relu.at(Origin("act", "model.py:7"))
    changed = graph.substitute({relu: op.abs(added)})
    assert changed.nodes[-1].where == "act  model.py:7"
    rebuilt = graph.rebuild(lambda n: op.sin(n.x) if n.name == "exp" else n)
    assert rebuilt.nodes[-1].where == "act  model.py:7"  # mapped copies keep theirs


def test_a_weight_keeps_its_values() -> None:
    w = Weight.holding("w", torch.ones(4))
    again = w.replace(key="v")
    assert again.key == "v" and again.data is w.data and again.content == w.content


# ------------------------------------------------------------------ order and dead code


def test_random_ops_keep_their_place_and_their_count() -> None:
    x = x_of()
    first, second = noise(x), noise(x)
    late = op.add(second, first)  # reads the second draw first
    graph = Graph((x,), (first, second, late), (late,))
    assert [graph.rebuild(lambda n: n).nodes.index(n) for n in (first, second)] == [0, 1]
    changed = graph.substitute({late: op.relu(second)})
    assert [n.name for n in changed.nodes] == ["aten", "aten", "relu"]
    assert changed.nodes[:2] == (first, second)  # nothing reads the first, it is drawn all the same
    assert changed.live() is changed
    wrapped = graph.substitute({first: op.neg(first)})
    assert [n.name for n in wrapped.nodes] == ["aten", "neg", "aten", "add"]


def test_a_region_that_draws_is_random() -> None:
    x, a = x_of(), x_of("a")
    drawn = Fused((x,), Graph.of((a,), (noise(a),), "body"))
    graph = Graph((x,), (drawn,), (x,))
    assert graph.live() is graph and not graph.constants


def test_live_drops_what_nothing_needs() -> None:
    graph, exp, added, relu = chain()
    x = graph.inputs[0]
    dead = Graph(graph.inputs, (exp, op.sin(exp), added, op.cos(x), relu), graph.outputs)
    assert dead.live() == graph and dead.live().nodes == graph.nodes
    assert graph.live() is graph
    assert dead.rebuild(lambda n: n) is dead  # nothing changed, nothing is dropped
    assert len(dead.substitute({relu: added}).nodes) == 2


def test_with_outputs_and_with_nodes() -> None:
    graph, exp, added, _ = chain()
    assert graph.with_outputs((added, exp)).nodes == (exp, added)
    x = graph.inputs[0]
    a, b = op.sin(x), op.cos(x)
    both = Graph.of((x,), (a, b))
    assert both.with_nodes((b, a)).nodes == (b, a) and both.with_nodes((b, a)).outputs == (a, b)


# ------------------------------------------------------------------ equality


@pytest.mark.parametrize(
    "change",
    [
        ("exp", "sin"), ("add(y0, x)", "add(x, y0)"), ("add(y0, x)", "add(y0, 1)"),
        ("return y2,", "return y1,"), ("return y2,", "return y2, y2"),
        ("def graph", "def other"), ("f32[4]", "f32[5]"), ("f32", "f64"),
        ("(y1)", "(y0)"),
    ],
    ids=" -> ".join,
)  # fmt: skip
def test_graphs_differ_by_anything_that_text_shows(change: tuple[str, str]) -> None:
    graph = parse(CHAIN)
    other = parse(CHAIN.replace(*change))
    assert graph != other and graph == parse(CHAIN) and hash(graph) == hash(parse(CHAIN))
    assert Graph.of((x_of("x"),), ()) != Graph.of((x_of("z"),), ())


def test_numbers_of_different_kind_are_different() -> None:
    x = x_of()
    graphs = [Graph.of((x,), (op.add(x, n),)) for n in (1, 1.0, True, float("nan"), 1 + 0j)]
    assert len(set(graphs)) == 5
    assert graphs[3] == Graph.of((x,), (op.add(x, float("nan")),))


def test_origins_and_the_name_of_a_region_do_not_count() -> None:
    x, a = x_of(), x_of("a")
    one = Graph.of((x,), (Fused((x,), Graph.of((a,), (op.relu(a),), "one")).at(Origin("m")),))
    two = Graph.of((x,), (Fused((x,), Graph.of((a,), (op.relu(a),), "two")),))
    three = Graph.of((x,), (Fused((x,), Graph.of((a,), (op.neg(a),), "one")),))
    assert one == two and hash(one) == hash(two) and one != three


def test_weights_are_equal_by_content() -> None:
    def holding(data: torch.Tensor) -> Graph:
        return Graph.of((), (Weight.holding("w", data),))

    assert holding(torch.ones(3)) == holding(torch.ones(3))
    assert holding(torch.ones(3)) != holding(torch.zeros(3))
    changed = torch.ones(3)
    graph = holding(changed)
    changed.mul_(2)
    assert graph.weights[0].content == holding(torch.full((3,), 2.0)).weights[0].content


def test_sizes_are_equal_by_text() -> None:
    n = symbol("N")
    x = Input("x", Tensor((n,), f32))
    one = Graph.of((x,), (op.add(x, sympy.Max(n, 3)),))
    assert one == parse(one.text)


def test_items_of_a_node_of_several_results() -> None:
    x = x_of()
    many = Aten(
        "aten.split_with_sizes.default",
        (x, (1, 3)),
        (),
        of=(F4.with_(shape=(1,)), F4.with_(shape=(3,))),
    )
    graph = Graph.of((x,), (Item(many, 1), Item(many, 0)))
    assert [str(o.type) for o in graph.outputs] == ["f32[3]", "f32[1]"]
    assert graph.cost().flops == 0 and verify(graph) is graph
