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
    """concerns: whether a region is this way's to take or to refuse."""

    concerns: Callable[[Op], bool]
    check: Callable[[Any], Answer]
    lower: Callable[[Builder, Any], None]


@dataclass(frozen=True)
class Ways:
    """Of those given, the first that a region concerns takes it, or says why not."""

    ways: tuple[Way, ...]

    def check(self, node: Any) -> Answer:
        way = self._of(node)
        return no("no kernel computes such a region", at=node) if way is None else way.check(node)

    def lower(self, b: Builder, node: Any) -> None:
        way = self._of(node)
        assert way is not None
        way.lower(b, node)

    def _of(self, node: Any) -> Way | None:
        return next((way for way in self.ways if way.concerns(node)), None)


WAYS = Ways((
    Way(anchored.concerns, anchored.check, anchored.lower),
    Way(group_norm.concerns, group_norm.check, group_norm.lower),
    Way(rows.concerns, rows.check, rows.lower),
    Way(lambda node: True, pointwise.check, pointwise.lower),
))  # fmt: skip
lowers("fused", check=WAYS.check)(WAYS.lower)
