"""Fused regions: the first way that can compute the body as one takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effc.ir import Op, no
from effc.ir.rewrite import Answer

from . import anchored, group_norm, pointwise, rows
from .builder import Builder
from .lowering import lowers


@dataclass(frozen=True)
class Way:
    """concerns: whether its reason is the one to tell when no way fits."""

    concerns: Callable[[Op], bool]
    check: Callable[[Any], Answer]
    lower: Callable[[Builder, Any], None]


WAYS: list[Way] = [
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
