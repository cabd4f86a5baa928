"""Which values are one memory: view ops lead from a value to the one it shows."""

from __future__ import annotations

from collections.abc import Iterator

from effc.ir import Graph, Item, Op


def viewed(node: Op) -> Op | None:
    """The value whose memory the node shows, one step; None where it has its own."""
    if isinstance(node, Item) and not node.x.view:
        return None  # results of one op are distinct, unless the op itself is a view
    return node.operands[0] if node.view and node.operands else None


def alias_root(node: Op) -> Op:
    """The value, input or weight whose memory the node may show."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def memories(node: Op) -> Iterator[Op]:
    """Every value whose memory the node may show: a value of parts shows all of them."""
    while (source := viewed(node)) is not None:
        if node.name == "encoded":
            for part in node.operands:
                yield from memories(part)
            return
        node = source
    yield node


def escaping(graph: Graph) -> frozenset[Op]:
    """Values whose memory the caller gets to see: outputs and what they are views of. New values of
    states are none of them: they end in the memory of the old ones."""
    found: set[Op] = set()
    for output in graph.outputs[: len(graph.outputs) - len(graph.states)]:
        node: Op | None = output
        while node is not None and node not in found:
            found.add(node)
            node = viewed(node)
    return frozenset(found)


def consumers(graph: Graph) -> dict[Op, list[Op]]:
    """Memory -> the nodes that read it, directly or through view ops, in program order."""
    found: dict[Op, list[Op]] = {}
    for node in graph.nodes:
        if viewed(node) is None:
            for operand in dict.fromkeys(m for o in node.operands for m in memories(o)):
                found.setdefault(operand, []).append(node)
    return found
