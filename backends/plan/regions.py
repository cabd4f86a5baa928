"""Single nodes and fused regions seen alike: leaves read from memory, nodes computed, outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from effc.ir import Op, Weight, no, yes
from effc.ir.ops.region import Fused
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, dim_text
from effc.ir.types import Tensor

from .builder import VIEWS, Builder
from .memory import Ref, expanded


@dataclass(frozen=True)
class Region:
    """`nodes` over `leaves`; leaf i reads the outer value `operands[i]`."""

    node: Op
    operands: tuple[Op, ...]
    leaves: tuple[Op, ...]
    nodes: tuple[Op, ...]
    outputs: tuple[Op, ...]

    @staticmethod
    def of(node: Op) -> Region:
        if isinstance(node, Fused):
            body = node.body
            return Region(node, node.xs, body.inputs, body.nodes, body.outputs)
        operands = tuple(dict.fromkeys(node.operands))
        return Region(node, operands, operands, (node,), (node,))

    def views(self) -> dict[Op, Op]:
        """View nodes over leaves -> what they view: they are leaves of another shape."""
        found: dict[Op, Op] = {}
        for n in self.nodes:
            if n.name in VIEWS and (n.operands[0] in self.leaves or n.operands[0] in found):
                found[n] = n.operands[0]
        return found

    def refs(self, b: Builder, read: Iterable[Op] | None = None) -> dict[Op, Ref]:
        """Memory behind every leaf, and every view of one, that a node reads; or of those given.

        Nothing else is touched: memory of a constant that nobody reads is never filled.
        """
        if read is None:
            read = [*(o for n in self.computed() for o in n.operands), *self.outputs]
        outer, views = dict(zip(self.leaves, self.operands, strict=True)), self.views()
        found: dict[Op, Ref] = {}

        def find(leaf: Op) -> Ref:
            if leaf not in found:
                if leaf in views:
                    source = find(views[leaf])
                    found[leaf] = b.viewed(leaf, source) or b.repacked(leaf, source)
                else:
                    found[leaf] = b.ref(outer[leaf])
            return found[leaf]

        wanted = set(read)
        return {leaf: find(leaf) for leaf in (*outer, *views) if leaf in wanted}

    def computed(self) -> list[Op]:
        views = self.views()
        return [n for n in self.nodes if n not in views]

    def comment(self, b: Builder) -> list[str]:
        """What a reader of the kernel wants to know: the nodes, and where they come from."""
        shown = b.names.get(self.node, self.node.name)
        calls = " ".join(n.name for n in self.computed())
        lines = [f"{b.target.name}  {shown}: {self.node.name}: {calls or 'copy'}"]
        places = dict.fromkeys(str(o) for n in (self.node, *self.nodes) for o in n.origins)
        return lines + [f"     {place}" for place in list(places)[:4] if place]


def check_body(region: Region, allowed: Callable[[Op], Answer]) -> Answer:
    """yes if all nodes are allowed, or views of leaves."""
    views = region.views()
    for n in region.nodes:
        if isinstance(n, Weight):
            return no("weight {} inside the region", n.key, at=n)
        if n in views:
            continue
        if n.name in VIEWS:
            return no("{} of a value computed in the region", n.name, at=n)
        if isinstance(n.type, tuple):
            return no("{} has several results", n.name, at=n)
        answer = allowed(n)
        if not answer:
            return answer
    for o in region.outputs:
        if o in region.leaves or o in views:
            return no("an output of the region is one of its inputs", at=region.node)
    return yes


def same_shapes(region: Region) -> Answer:
    """yes if every output has one shape: the iteration space of one loop nest."""
    first = region.outputs[0].shape
    for o in region.outputs[1:]:
        if o.shape != first:
            shown = [f"[{', '.join(map(dim_text, s))}]" for s in (first, o.shape)]
            return no("outputs have shapes {} and {}", *shown, at=o)
    return yes


def broadcast(b: Builder, ref: Ref, shape: tuple[Dim, ...]) -> Ref:
    """The ref walked along `shape`: sizes of 1 stand still."""
    lead = len(shape) - len(ref.shape)
    b.must_equal(*((a, s) for a, s in zip(ref.shape, shape[lead:], strict=True) if a != 1))
    return expanded(ref, shape)


def layout_order(t: Tensor) -> tuple[int, ...]:
    """Dimensions of a packed value, outermost in memory first."""
    return t.layout.order(t.rank)


def distinct(refs: Iterable[Ref]) -> list[Ref]:
    return list(dict.fromkeys(refs))
