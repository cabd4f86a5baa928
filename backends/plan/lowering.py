"""Which lowering takes which op. One registration an op: a check with its reason, and the work.

    @TARGET.lowers("softmax", check=...)
    def _softmax(b: Builder, node): ...

`check(node)` must say no for whatever `lower` cannot do. Nodes without a lowering, or refused by
it, run through ATen with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effc.ir import Op, Rates, no, yes
from effc.ir.rewrite import Answer
from effc.ir.types import Tensor

from .builder import Builder

ELEMENTS = ("f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "bool")


def _accept(node: Op) -> Answer:
    return yes


@dataclass(frozen=True)
class Lowering:
    """native: needs a compiler; otherwise it is a library routine. formats: whether it is asked
    about values of formats too; others are given dense ones only."""

    check: Callable[[Any], Answer]
    lower: Callable[[Builder, Any], None]
    native: bool = True
    formats: bool = False


# (b, node, out, x, note="", kind="copy"): out[...] = x[...]; fill takes a number for x.
Move = Callable[..., None]


class Lowerings:
    """What one target does with ops, by their names.

    name: at the head of its kernels. alignment: bytes that addresses of inputs and constants are
    multiples of, as kernels assume. base: what takes ops that this table does not name.
    """

    def __init__(self, name: str, alignment: int = 1, base: Lowerings | None = None) -> None:
        self.name, self.alignment, self.base = name, alignment, base
        self.table: dict[str, Lowering] = {}
        # set by the module that makes the target's copies
        self.copy_into: Move = _unset if base is None else base.copy_into
        self.fill: Move = _unset if base is None else base.fill

    @property
    def rates(self) -> Rates:
        """What the target's time goes by, for passes that weigh work against memory traffic."""
        return Rates() if self.base is None else self.base.rates

    def find(self, op: str) -> Lowering | None:
        """What takes ops of that name."""
        if op in self.table or self.base is None:
            return self.table.get(op)
        return self.base.find(op)

    def lowers(
        self, *ops: str, check: Callable[[Any], Answer] = _accept, native: bool = True,
        formats: bool = False,
    ) -> Callable[[Callable[[Builder, Any], None]], Callable[[Builder, Any], None]]:  # fmt: skip
        """Register a lowering for ops by name."""

        def register(fn: Callable[[Builder, Any], None]) -> Callable[[Builder, Any], None]:
            self.table.update(dict.fromkeys(ops, Lowering(check, fn, native, formats)))
            return fn

        return register

    def claim(self, node: Op) -> Answer:
        """Would a kernel or a library routine of ours take the node?"""
        if node.view and node.name in ("reshape", "permute", "expand", "slice", "item", "encoded"):
            return yes
        found = self.find(node.name)
        if found is None:
            return no("op {} has no kernel", getattr(node, "target", node.name), at=node)
        return (found.formats or dense_elements(node)) and found.check(node)


def _unset(*_: Any, **__: Any) -> None:
    raise NotImplementedError("the target's copies are not set")


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
