"""Depthwise convolutions: each result reads the taps of one channel, so no tiles are multiplied.

A program holds pixels x channels and adds one tap after the other.
"""

from __future__ import annotations

from itertools import product as every

from effc.ir.symbols import Dim

from .kernel import Made, Schedule, kernel, power_of_two
from .products import Products, Program, Walk, accumulator
from .scalar import convert, register
from .tile import Axis, Operand, pointer

TAPS = 64  # written out one by one; a longer loop is no place for this kernel
TILE = 1024  # results of a program: eight for each of its threads


def blocks(rows: int, channels: int, along_channels: bool) -> Schedule:
    """Pixels and channels of a program; the longer side lies along memory."""
    if along_channels:
        wide = min(64, power_of_two(channels))
        tall = min(power_of_two(rows), TILE // wide)
    else:
        tall = min(256, power_of_two(rows))
        wide = min(power_of_two(channels), TILE // tall)
    warps = max(1, min(4, tall * wide // 256))
    names = {"rows": tall, "columns": wide, "splits": 1, "group": 1, "programs": 0}
    return Schedule(warps, 2, tuple(names.items()))


def depthwise(work: Products, schedule: Schedule, multiplier: int = 1) -> Made:
    """work: depth is the window's taps and a channel of one element; columns are the channels.

    Pointers: the result, the picture, the weight, the leaves and samples of what follows.
    """
    p = Program(work, schedule)
    ((_, picture),) = work.left.leaves
    (weight,) = work.rights
    kept = accumulator(work.dtype)
    p.by_tap = True
    *taps, _ = work.space.depth
    lines = p.inner.lines
    for tap in every(*(range(t) for t in taps if isinstance(t, int))):
        p.taps = lambda tap=tap: [*map(str, tap), "0"]
        axes, strides = p.window(picture)
        index = "n[None, :]" if multiplier == 1 else f"(n // {multiplier})[None, :]"
        mask = p.columns.mask and f"{p.columns.mask}[None, :]"
        axes[-1] = Axis(index, work.space.columns[0], mask)
        x = p.inner.read("a0p", Operand(picture.dtype, tuple(strides)), axes, "0.0")
        w = p.inner.read(f"b0p + {_at(p, weight, tap)}", *_columns(p, weight), "0.0")
        x, w = (convert(text, work.dtype, kept) for text in (x, w))
        lines.append(f"sum0 += {x} * {w}")
    after = p.finish(["sum0"])
    pointers = [pointer("y", work.out.dtype, work.out.offset),
                pointer("a0p", picture.dtype, picture.offset),
                pointer("b0p", weight.dtype, weight.offset), *p.pointers()]  # fmt: skip
    shape = p.blocks["rows"], p.blocks["columns"]
    return kernel(
        "depthwise", "depthwise", pointers=pointers, numbers=p.numbers, schedule=schedule,
        grid=[p.programs], comment=work.comment, place=p.place.lines, shape=shape,
        total=register(kept), taps=lines, after=after,
    )  # fmt: skip


def _at(p: Program, weight: Walk, tap: tuple[int, ...]) -> str:
    """Where a tap's weights begin."""
    at: Dim = sum((t * s for t, s in zip(tap, weight.depth)), 0)
    return p.text(at)


def _columns(p: Program, weight: Walk) -> tuple[Operand, list[Axis]]:
    axes, strides = p.columns.axes(weight.columns)
    return Operand(weight.dtype, tuple(strides)), axes


__all__ = ["TAPS", "blocks", "depthwise"]
