"""Fused regions: products and rows by CUDA kernels where they take them, else as on any GPU."""

from __future__ import annotations

from typing import Any

from effc.ir import no
from effc.ir.rewrite import Answer

from ..cpu.builder import Builder
from ..cpu.fused import Way
from . import products, rows
from .lowering import prefer

WAYS = [
    Way(products.concerns, products.check, products.lower),
    Way(rows.concerns, rows.check, rows.lower),
]


def check(node: Any) -> Answer:
    for way in WAYS:
        if way.concerns(node):
            return way.check(node)
    return no("no CUDA kernel computes such a region", at=node)


def lower(b: Builder, node: Any) -> None:
    next(way for way in WAYS if way.concerns(node)).lower(b, node)


prefer("fused", check, lower)
