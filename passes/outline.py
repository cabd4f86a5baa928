"""Move groups of nodes into `fused` regions: building the bodies, and the graph around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from effc.ir import Graph, Input, Item, Op
from effc.ir.ops.region import Fused

from .analysis.grouping import operands_of, results_of
from .common import moved


def outline(graph: Graph, members: Sequence[Op], name: str = "r") -> Fused:
    """The members (in program order) as one region: inputs a0, a1, ... in order of first use."""
    operands = operands_of(members)
    inputs = tuple(Input(f"a{i}", o.type) for i, o in enumerate(operands))
    inner: dict[Op, Op] = dict(zip(operands, inputs, strict=True))
    for node in members:
        inner[node] = _copy(node.map_operands(inner.__getitem__), node)
    results = tuple(inner[n] for n in results_of(graph, members))
    body = Graph(inputs, tuple(inner[n] for n in members), results, name)
    return Fused(operands, body).from_(*members)


def _copy(mapped: Op, node: Op) -> Op:
    """Nodes without operands come back from map_operands as they are; a body has its own."""
    return node.replace() if mapped is node else mapped


def condense(graph: Graph, regions: Iterable[tuple[Sequence[Op], Fused]]) -> Graph:
    """The graph with each group of members replaced by its region.

    Groups must be free of cycles (see Grouping). Random ops keep their order. Structurally equal
    regions get the same name: r0, r1, ... in order of appearance.
    """
    builder = _Builder(graph)
    for members, region in regions:
        for node in members:
            builder.unit[node] = (tuple(members), region)
    for node in graph.nodes:
        builder.emit(node)
    inner = builder.unit.keys() - builder.results
    moved({old: new for old, new in builder.memo.items() if old not in inner}, builder.results)
    outputs = tuple(builder.memo[o] for o in graph.outputs)
    return Graph(graph.inputs, tuple(builder.nodes), outputs, graph.name)


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.unit: dict[Op, tuple[tuple[Op, ...], Fused]] = {}
        self.memo: dict[Op, Op] = {i: i for i in graph.inputs}
        self.nodes: list[Op] = []
        self.names: dict[object, str] = {}
        self.results: set[Op] = set()
        self.taken = {r.name for n in graph.nodes for r in n.regions}
        random = [n for n in graph.nodes if n.random]
        self.before = dict(zip(random[1:], random, strict=False))

    def waits_for(self, node: Op) -> list[Op]:
        members = self.unit[node][0] if node in self.unit else (node,)
        needed = [*operands_of(members), *(self.before[n] for n in members if n in self.before)]
        return [o for o in needed if o not in self.memo]

    def emit(self, node: Op) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [] if top in self.memo else self.waits_for(top)
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            if top not in self.memo:
                self.make(top)

    def make(self, node: Op) -> None:
        if node not in self.unit:
            self.memo[node] = node.map_operands(self.memo.__getitem__)
            self.nodes.append(self.memo[node])
            return
        members, region = self.unit[node]
        body = replace(region.body, name=self.name(region.body))
        made = Fused(tuple(self.memo[o] for o in region.xs), body).from_(*members)
        self.nodes.append(made)
        results = results_of(self.graph, members)
        self.results.update(results)
        for index, old in enumerate(results):
            new = made if len(results) == 1 else Item(made, index).from_(old)
            self.memo[old] = new
            if new is not made:
                self.nodes.append(new)
        for member in members:
            self.memo.setdefault(member, made)  # inner values; nothing outside reads them

    def name(self, body: Graph) -> str:
        key = replace(body, name="r").signature
        if key not in self.names:
            number = len(self.names)
            while f"r{number}" in self.taken:
                number += 1
            self.names[key] = f"r{number}"
            self.taken.add(self.names[key])
        return self.names[key]
