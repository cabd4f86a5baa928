"""Fused regions: the first way that can compute the body as one takes it."""

from __future__ import annotations

from typing import Any

from effc.ir import no
from effc.ir.rewrite import Answer

from ..cpu.builder import Builder
from ..cpu.fused import Way
from . import anchored, attention, group_norm, pointwise, rows
from .lowering import lowers

WAYS: list[Way] = [
    Way(attention.concerns, attention.check, attention.lower),
    Way(anchored.concerns, anchored.check, anchored.lower),
    Way(group_norm.concerns, group_norm.check, group_norm.lower),
    Way(rows.concerns, rows.check, rows.lower),
    Way(lambda node: True, pointwise.check, pointwise.lower),
]


def check(node: Any) -> Answer:
    for way in WAYS:
        if way.concerns(node):
            return way.check(node)
    return no("no kernel computes such a region", at=node)


@lowers("fused", check=check)
def lower(b: Builder, node: Any) -> None:
    next(way for way in WAYS if way.concerns(node)).lower(b, node)
