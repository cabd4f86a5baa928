"""Groups of nodes that can each run as one: no path leaves a group and comes back into it.

Starts with every node alone. Merging is refused where it would make two groups wait for each other.
Random ops keep their order, as if each read the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable

from effc.ir import Graph, Op


class Grouping:
    """Groups over the nodes of one graph that need an input. Constants belong to no group."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.reads: dict[Op, tuple[Op, ...]] = {}  # operands that are in some group
        self.group: dict[Op, int] = {}
        self.members: dict[int, list[Op]] = {}
        self.above: dict[int, int] = {}  # group -> set of groups it waits for, as bits
        before: tuple[Op, ...] = ()
        for node in graph.nodes:
            if node in graph.constants:
                continue
            reads = tuple(o for o in node.operands if o in self.group)
            if node.random:
                reads, before = reads + before, (node,)
            self.reads[node] = reads
            number = self.position[node]
            self.group[node] = number
            self.members[number] = [node]
            above = 0
            for operand in reads:
                above |= self.above[self.group[operand]] | 1 << self.group[operand]
            self.above[number] = above

    def of(self, node: Op) -> list[Op]:
        """The members of a node's group, in program order; empty for constants and inputs."""
        return self.members[self.group[node]] if node in self.group else []

    def can_merge(self, groups: Iterable[int]) -> bool:
        """No path between two of the groups runs through a third."""
        wanted = set(groups)
        mask = sum(1 << g for g in wanted)
        return not any(
            self.above[other] & mask
            for g in wanted
            for node in self.members[g]
            for other in (self.group[o] for o in self.reads[node])
            if other not in wanted
        )

    def merge(self, groups: Iterable[int]) -> int:
        """One group of several; returns its number."""
        wanted = sorted(set(groups))
        if len(wanted) == 1:
            return wanted[0]
        mask = sum(1 << g for g in wanted)
        above = 0
        for g in wanted:
            above |= self.above.pop(g)
        above &= ~mask
        merged = sorted(
            (n for g in wanted for n in self.members.pop(g)), key=self.position.__getitem__
        )
        first = wanted[0]
        self.members[first], self.above[first] = merged, above
        for node in merged:
            self.group[node] = first
        for g, others in self.above.items():
            if others & mask:
                self.above[g] = others | mask | above
        return first

    def merge_nodes(self, nodes: Iterable[Op]) -> int:
        return self.merge({self.group[n] for n in nodes})


def operands_of(members: Iterable[Op]) -> tuple[Op, ...]:
    """Values that the members read from outside, in order of first use."""
    members = list(members)
    inside = set(members)
    return tuple(dict.fromkeys(o for n in members for o in n.operands if o not in inside))


def results_of(graph: Graph, members: Iterable[Op]) -> tuple[Op, ...]:
    """Members that are read outside, or are outputs of the graph, in the order given."""
    members = list(members)
    inside, outputs = set(members), set(graph.outputs)
    return tuple(n for n in members if n in outputs or any(u not in inside for u in graph.users[n]))
