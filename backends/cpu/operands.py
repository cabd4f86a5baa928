"""What calls of cores have in common: the operands of a product as they lie, and its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effc.codegen.cpp.kernel import Kernel
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.products import TILES, Tile
from effc.ir import Op
from effc.ir.symbols import Dim
from effc.ir.types import row_major

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from .features import CpuFeatures, detect
from .movers import copy_into

BLOCK = 96  # rows of a block: whole tiles of every instruction set


@dataclass(frozen=True)
class Product:
    """A call of a core, without its epilogue."""

    core: Kernel
    refs: tuple[Ref, ...]  # what the core reads
    numbers: tuple[Dim, ...]
    note: str = ""
    strides: tuple[Dim, ...] | None = None  # of its result; None: packed in the layout of its type


def tile() -> Tile:
    cpu = detect()
    return TILES[cpu.level if isinstance(cpu, CpuFeatures) else "default"]


def up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def lined_up(b: Builder, value: Op) -> tuple[Ref, Nest]:
    """The value with rows at equal steps, copied where it does not lie so."""
    x = b.ref(value)
    rows = _rows(x)
    if rows.rank > 1 or not unit(x, -1):
        x = _packed(b, value, x)
        rows = _rows(x)
    return x, rows


def _rows(x: Ref) -> Nest:
    """Everything but the last dimension, in as few dimensions as its strides allow."""
    return Nest(x.shape[:-1], (Operand(x.dtype, x.strides[:-1]),)).collapsed().at_least(1)


def _packed(b: Builder, value: Op, ref: Ref) -> Ref:
    """A copy with rows in order: a small part of the time of a product over them."""
    root = b.new_root("arena", value, value.tensor.with_(layout=row_major))
    copy_into(b, value, whole(root), ref, note="packed for a product")
    return whole(root)


def known(sizes: Sequence[Dim]) -> tuple[int, ...]:
    """Sizes that a check before found to be numbers."""
    found = tuple(n for n in sizes if isinstance(n, int))
    assert len(found) == len(sizes)
    return found


def unit(ref: Ref, axis: int) -> bool:
    return ref.strides[axis] == 1 or ref.shape[axis] == 1


__all__ = ["BLOCK", "Product", "known", "lined_up", "tile", "unit", "up"]
