"""Opens loops, and the fused regions that no one kernel takes: their nodes join the graph around
them.

What is computed stays the same. The result is what lowerings see; `origin` leads back to the nodes
that reports show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from effc.ir import Graph, Item, Op, Weight, names
from effc.ir.ops.region import Fused, Loop
from effc.ir.ops.shape import Reshape, Slice, Stack
from effc.ir.types import Tensor


@dataclass(frozen=True)
class Prepared:
    graph: Graph
    names: Mapping[Op, str]
    origin: Mapping[Op, Op]


def prepare(graph: Graph, keep: Callable[[Op], bool]) -> Prepared:
    """Open every loop, and every fused region that `keep` turns down."""
    graph = graph.live()
    shown = names(graph)
    opening = _Opening(keep)
    if not any(opening.opens(n) for n in graph.nodes):
        return Prepared(graph, shown, {})
    for i in graph.inputs:
        opening.new[i], opening.labels[i] = i, shown[i]
    for node in graph.nodes:
        opening.emit(node, opening.new, shown[node])
    outputs = tuple(_one(opening.new[o]) for o in graph.outputs)
    opened = Graph(graph.inputs, tuple(opening.nodes), outputs, graph.name).live()
    return Prepared(opened, opening.labels, opening.origin)


Results: TypeAlias = "Op | tuple[Op, ...]"


@dataclass
class _Opening:
    """A graph being made of another, whose regions become nodes of it."""

    keep: Callable[[Op], bool]
    nodes: list[Op] = field(default_factory=list)
    new: dict[Op, Results] = field(default_factory=dict)
    origin: dict[Op, Op] = field(default_factory=dict)
    labels: dict[Op, str] = field(default_factory=dict)
    kept: dict[Op, bool] = field(default_factory=dict)

    def opens(self, node: Op) -> bool:
        if isinstance(node, Fused):
            if node not in self.kept:
                tensors = all(isinstance(i.of, Tensor) for i in node.body.inputs)
                self.kept[node] = not tensors or self.keep(node)
            return not self.kept[node]
        return isinstance(node, Loop)

    def add(self, made: Op, old: Op, name: str) -> Op:
        self.nodes.append(made)
        self.origin[made] = old
        self.labels[made] = name
        return made

    def emit(self, node: Op, new: dict[Op, Results], name: str, region: Op | None = None) -> None:
        """Find or make what stands for a node of the graph, or of a region's body."""
        if isinstance(node, Item) and isinstance(new[node.x], tuple):
            new[node] = new[node.x][node.index]  # type: ignore[index]
            return
        made = node.map_operands(lambda o: _one(new[o]))
        if region is not None:
            made = _again(node) if made is node else made  # a body may serve several regions
            if not made.origins:
                made.from_(region)
        if not self.opens(made):
            new[node] = self.add(made, node, name)
        elif isinstance(made, Loop):
            new[node] = self.unrolled(made, node, name)
        else:
            results = self.inline(made.body, made.xs, node, name)
            new[node] = results[0] if len(results) == 1 else results

    def inline(self, body: Graph, values: Sequence[Op], region: Op, prefix: str) -> tuple[Op, ...]:
        """The nodes of a body applied to values; its results."""
        inner: dict[Op, Results] = dict(zip(body.inputs, values, strict=True))
        shown = names(body)
        for node in body.nodes:
            self.emit(node, inner, f"{prefix}.{shown[node]}", region)
        return tuple(_one(inner[o]) for o in body.outputs)

    def unrolled(self, loop: Loop, node: Op, name: str) -> Results:
        carries, kept = loop.carries, []
        for i in range(loop.trip):
            rows = (self.row(s, i, node, f"{name}.{i}") for s in loop.stacked)
            values = (*carries, *loop.shared, *rows)
            results = self.inline(loop.body, values, node, f"{name}.{i}")
            carries = results[: len(carries)]
            kept.append(results[len(carries) :])
        results = (*carries, *(value for column in zip(*kept) for value in column))
        return results[0] if len(results) == 1 else results

    def row(self, stacked: Op, i: int, loop: Op, prefix: str) -> Op:
        """Row i: the value that was stacked where that is at hand, else a view."""
        if isinstance(stacked, Stack):
            return stacked.xs[i]
        cut = self.add(Slice(stacked, 0, i, 1).from_(loop), loop, f"{prefix}.slice")
        return self.add(Reshape(cut, stacked.shape[1:]).from_(loop), loop, f"{prefix}.row")


def _one(value: Results) -> Op:
    assert isinstance(value, Op)
    return value


def _again(node: Op) -> Op:
    made = node.replace()
    if isinstance(node, Weight):
        object.__setattr__(made, "data", node.data)
    return made


__all__ = ["Prepared", "prepare"]
