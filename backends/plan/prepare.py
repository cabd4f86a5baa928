"""Opens the fused regions that no one kernel takes: their nodes join the graph around them.

What is computed stays the same. The result is what lowerings see; `origin` leads back to the nodes
that reports show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from effc.ir import Graph, Item, Op, Weight, names
from effc.ir.ops.region import Fused
from effc.ir.types import Tensor


@dataclass(frozen=True)
class Prepared:
    graph: Graph
    names: Mapping[Op, str]
    origin: Mapping[Op, Op]


def prepare(graph: Graph, keep: Callable[[Op], bool]) -> Prepared:
    """Open every fused region that `keep` turns down."""
    graph = graph.live()
    shown = names(graph)
    opened = [n for n in graph.nodes if isinstance(n, Fused) and _opens(n) and not keep(n)]
    if not opened:
        return Prepared(graph, shown, {})
    new: dict[Op, Op | tuple[Op, ...]] = {i: i for i in graph.inputs}
    nodes: list[Op] = []
    origin: dict[Op, Op] = {}
    labels: dict[Op, str] = {i: shown[i] for i in graph.inputs}

    def add(made: Op, old: Op, name: str) -> Op:
        nodes.append(made)
        origin[made] = old
        labels[made] = name
        return made

    for node in graph.nodes:
        if node in opened:
            new[node] = _inline(node, new, add, shown[node])
        elif isinstance(node, Item) and isinstance(new[node.x], tuple):
            new[node] = new[node.x][node.index]  # type: ignore[index]
        else:
            made = node.map_operands(lambda o: _one(new[o]))
            new[node] = add(made, node, shown[node])
    outputs = tuple(_one(new[o]) for o in graph.outputs)
    return Prepared(Graph(graph.inputs, tuple(nodes), outputs, graph.name), labels, origin)


def _opens(node: Fused) -> bool:
    return all(isinstance(i.of, Tensor) for i in node.body.inputs)


def _one(value: Op | tuple[Op, ...]) -> Op:
    assert isinstance(value, Op)
    return value


def _inline(
    node: Fused,
    outer: Mapping[Op, Op | tuple[Op, ...]],
    add: Callable[[Op, Op, str], Op],
    prefix: str,
) -> Op | tuple[Op, ...]:
    inner: dict[Op, Op] = {
        i: _one(outer[x]) for i, x in zip(node.body.inputs, node.xs, strict=True)
    }
    shown = names(node.body)
    for body_node in node.body.nodes:
        made = body_node.map_operands(inner.__getitem__)
        if made is body_node:
            made = _again(body_node)  # the body may serve several nodes; each gets its own
        if not made.origins:
            made.from_(node)
        inner[body_node] = add(made, body_node, f"{prefix}.{shown[body_node]}")
    results = tuple(inner[o] for o in node.body.outputs)
    return results[0] if len(results) == 1 else results


def _again(node: Op) -> Op:
    made = node.replace()
    if isinstance(node, Weight):
        object.__setattr__(made, "data", node.data)
    return made


__all__ = ["Prepared", "prepare"]
