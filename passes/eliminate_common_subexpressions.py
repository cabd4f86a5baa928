"""Compute equal values once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, Weight, no

from .analysis.aliases import shown_values
from .base import Context, Pass, exact
from .common import missed

RULE, TITLE = "MergeEqual", "f(x), f(x) => one f(x)"


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge nodes that compute the same from the same operands.

    rewrite:
        y = exp(x); z = exp(x); return add(y, z)
        -->
        y = exp(x); return add(y, y)

    Random ops are never merged, nor are two values that two outputs show: eager PyTorch gives each
    of them memory of its own. Weights with equal values stay apart: they may be changed in place.
    """

    name, numerics = "eliminate-common-subexpressions", exact()

    def run(self, g: Graph, ctx: Context) -> Graph:
        shown = shown_values(g)
        first: dict[object, Op] = {}  # structure -> the node that stays
        visible: set[Op] = set()  # nodes that stay and that an output shows
        old = iter(g.nodes)
        merged = 0

        def visit(node: Op) -> Op:
            nonlocal merged
            before = next(old)
            if node.random or isinstance(node, Weight):
                return node
            key = structure(node)
            stays = first.setdefault(key, node)
            is_shown = before in shown
            if stays is not node and is_shown and stays in visible:
                why = no("eager gives two outputs memory of their own", at=before)
                missed(ctx, RULE, TITLE, g, before, why)
                return node
            merged += stays is not node
            if is_shown:
                visible.add(stays)
            return stays

        result = g.rebuild(visit)
        if merged:
            ctx.counted(RULE, TITLE, merged)
        elif RULE not in ctx.stats:
            ctx.note("no two nodes compute the same")
        return result


def structure(node: Op) -> tuple[object, ...]:
    """What makes two nodes equal: op, type, operands by identity, attributes, regions."""
    values = ((f.kind, getattr(node, f.name)) for f in node.fields)
    return (
        node.name,
        str(node.type),
        *(v.signature if k == "region" else _key(v) for k, v in values),
    )


def _key(value: Any) -> object:
    if isinstance(value, Op):
        return value
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    return (type(value).__name__, repr(value))  # 1, 1.0 and True are equal, nan is not
