"""Which values an output may share memory with, through ops that only look at memory another way.

Eager PyTorch gives every computed value memory of its own; a pass that merges two values, or drops
a copy, must not let a caller see one memory where there were two.
"""

from __future__ import annotations

from effc.ir import Graph, Item, Op

from . import analysis


def viewed(node: Op) -> Op | None:
    """The value whose memory `node` may show, one step; None where it has memory of its own."""
    if isinstance(node, Item) and not node.x.view:
        return (
            None  # results of one op are distinct, unless the op itself is a view (split, unbind)
        )
    return node.operands[0] if node.view and node.operands else None


def root_of(node: Op) -> Op:
    """The value, input or weight whose memory `node` may show."""
    while (source := viewed(node)) is not None:
        node = source
    return node


@analysis
def alias_roots(graph: Graph) -> tuple[Op, ...]:
    """For each output, the input, weight or computed value whose memory it may share."""
    return tuple(map(root_of, graph.outputs))


@analysis
def shown_values(graph: Graph) -> frozenset[Op]:
    """Every value whose memory some output may show: the outputs and what they are views of."""
    shown: set[Op] = set()
    for output in graph.outputs:
        node: Op | None = output
        while node is not None and node not in shown:
            shown.add(node)
            node = viewed(node)
    return frozenset(shown)
