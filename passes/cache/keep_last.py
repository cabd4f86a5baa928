"""keep-last: of the results over new positions, only the last position is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from effc.ir import Graph, No, Op
from effc.ir.rewrite import op as ops
from effc.ir.specialise import resized
from effc.passes.analysis.roles import Positions, operand_demands
from effc.passes.base import Context, Numerics, Pass, exact

from .insert_kv_cache import cache_of


@dataclass(frozen=True)
class KeepLast(Pass):
    """Compute results for the last new position alone, as far up as nothing else needs the others.

    Whoever continues a text reads the logits after its last token. The head, which may cost as much
    as all layers, then runs on one row; so does all that follows the keys and values of the last
    layer.

    rewrite:
        y = linear(x, w)                                # [B, T, vocabulary]
        -->
        y = linear(slice(x, dim=1, start=T - 1, size=1), w)
    """

    name: ClassVar[str] = "keep-last"
    numerics: ClassVar[Numerics] = exact("rounding")
    changes_interface: ClassVar[bool] = True

    def run(self, g: Graph, ctx: Context) -> Graph:
        cache = cache_of(g)
        rows = _LastRows(g, Positions(cache.size))
        count = len(g.outputs) - len(cache.states)
        results = [rows.of(o) for o in g.outputs[:count]]
        made = Graph.of(g.inputs, (*results, *g.outputs[count:]), g.name).with_nodes(
            [*g.nodes, *rows.made.values()]
        )
        ctx.counted("LastRow", "f(x)[last] => f(x[last])", rows.moved)
        return made.live()


class _LastRows:
    """Values for the last position; moved: of how many nodes only that is computed."""

    def __init__(self, g: Graph, p: Positions) -> None:
        self.p, self.made, self.moved = p, dict[Op, Op](), 0
        self.whole: set[Op] = set()  # needed at every new position, by the states
        waiting: list[Op] = list(g.outputs[len(g.outputs) - len(g.states) :])
        while waiting:
            node = waiting.pop()
            if node not in self.whole:
                self.whole.add(node)
                waiting += node.operands

    def of(self, value: Op) -> Op:
        waiting = [value]
        while waiting:
            top = waiting[-1]
            operands = self._moves(top) if self._over(top) else []
            missing = [o for o in operands if self._over(o) and o not in self.made]
            if top in self.made or not missing:
                waiting.pop()
                if self._over(top) and top not in self.made:
                    self.made[top] = self._make(top)
            waiting += missing
        return self.made.get(value, value)

    def _over(self, value: Op) -> bool:
        return any(self.p.in_shape(value))

    def _moves(self, node: Any) -> list[Op]:
        """Operands of which the last position is enough; none where it is taken of the result."""
        if node in self.whole or not node.operands:
            return []
        if node.name == "attention" and node.past is not None:
            return [node.q, *([] if node.mask is None else [node.mask])]
        axis = getattr(node, "dim", None)
        if isinstance(axis, int) and node.name != "embedding" and self.p.in_shape(node)[axis]:
            return []  # a part of the positions, or something along them
        needs = operand_demands(self.p, node, self.p.demand(node))
        if isinstance(needs, No) or any(r not in (0, None) for d in needs for r in d):
            return []
        return list(node.operands)

    def _make(self, node: Any) -> Op:
        operands = self._moves(node)
        size = self.p.size
        if not operands:
            for axis, over in enumerate(self.p.in_shape(node)):
                if over:
                    node = ops.slice(node, axis, size - 1, 1).from_(node)
            return node
        self.moved += 1
        if node.name != "attention":
            new = {o: self.made.get(o, o) for o in node.operands}
            return resized(node, {size: 1}, new)
        mask = node.mask
        return node.replace(
            q=self.made[node.q], mask=None if mask is None else self.made.get(mask, mask),
            past=ops.add(node.past, size - 1),
        )  # fmt: skip


__all__ = ["KeepLast"]
