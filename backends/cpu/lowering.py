"""Which lowering takes which op. One registration an op: a check with its reason, and the work.

    @lowers("softmax", check=...)
    def _softmax(b: Builder, node): ...

`check(node)` must say no for whatever `lower` cannot do. Nodes without a lowering, or refused by
it, run through ATen with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.types import Tensor

from .builder import Builder

ELEMENTS = ("f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "bool")


def _accept(node: Op) -> Answer:
    return yes


@dataclass(frozen=True)
class Lowering:
    """native: needs a compiler; otherwise it is a library routine."""

    check: Callable[[Any], Answer]
    lower: Callable[[Builder, Any], None]
    native: bool = True


LOWERINGS: dict[str, Lowering] = {}


def lowers(
    *ops: str, check: Callable[[Any], Answer] = _accept, native: bool = True
) -> Callable[[Callable[[Builder, Any], None]], Callable[[Builder, Any], None]]:
    """Register a lowering for ops by name."""

    def register(fn: Callable[[Builder, Any], None]) -> Callable[[Builder, Any], None]:
        LOWERINGS.update(dict.fromkeys(ops, Lowering(check, fn, native)))
        return fn

    return register


def dense_elements(node: Op) -> Answer:
    """Operands and results are plain tensors of element types that kernels know."""
    for value in (*node.operands, node):
        types = value.type if isinstance(value.type, tuple) else (value.type,)
        for t in types:
            if not isinstance(t, Tensor):
                return no("{} has a result that is no tensor", value.name, at=node)
            if t.dtype.name not in ELEMENTS:
                return no("{} is not taken", t.dtype, at=node)
            if t.format.__class__.__name__ != "Dense":
                return no("format {} is not taken", t.format, at=node)
    return yes


def claim(node: Op) -> Answer:
    """Would a kernel or a library routine of ours take the node?"""
    if node.view and node.name in ("reshape", "permute", "expand", "slice", "item"):
        return yes
    found = LOWERINGS.get(node.name)
    if found is None:
        return no("op {} has no kernel", getattr(node, "target", node.name), at=node)
    return dense_elements(node) and found.check(node)
