"""Kernels that compute each element from the operands' elements at the same place; and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from effc.codegen.cpp.loops import Nest
from effc.ir import Op
from effc.ir.symbols import Dim, product
from effc.ir.types import i64

from .kernel import Made, Schedule, cdiv, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .tile import Axis, Element, Tile, decoded, pointer

BLOCK = 1024  # elements of a program, eight for each of its threads
SIDE = 64  # of a square tile, where operands lie in different orders


def pointwise(
    nest: Nest, leaves: Sequence[Op], nodes: Iterable[Op], outputs: Sequence[Op], *,
    offsets: Sequence[Dim] = (), kind: str = "pointwise", comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """outputs = nodes(leaves), element by element.

    nest: operands are those of the outputs, then of the leaves. offsets: of their pointers.
    """

    def body(t: Tile, axes: Sequence[Axis]) -> list[Element]:
        for node in nodes:
            t.add(node)
        return [t.values[o] for o in outputs]

    return loop_nest(nest, leaves, len(outputs), body, offsets=offsets, kind=kind, comment=comment)


def update(nest: Nest, last: Dim, step: Dim, *, offsets: Sequence[Dim] = (),
           comment: Iterable[str] = ()) -> Made:  # fmt: skip
    """A copy (as `pointwise` makes one) to a place known at the call.

    The kernel's pointers are result, operand, the error word, and the number of steps from the
    result's address to the place; more than `last` of them, or fewer than 0, set the error word.
    """

    def body(t: Tile, axes: Sequence[Axis]) -> list[Element]:
        return [t.values["new"]]

    return loop_nest(
        nest, ["new"], 1, body, offsets=offsets, kind="update", comment=comment, start=(last, step)
    )


def loop_nest(
    nest: Nest, leaves: Sequence[Any], outs: int,
    body: Callable[[Tile, Sequence[Axis]], list[Element]], *,
    offsets: Sequence[Dim] = (), kind: str, comment: Iterable[str] = (),
    start: tuple[Dim, Dim] | None = None,
) -> Made:  # fmt: skip
    """A nest whose statements `body` makes, once every leaf is loaded; it gives what to store.

    start: where the first result begins is read when the kernel runs; see `update`.
    """
    nest = nest.at_least(1)
    tile = Tile(Numbers())
    rows = _crossing(nest)
    axes, schedule, grid = _linear(tile, nest) if rows is None else _square(tile, nest, rows)
    names = [f"y{i}" for i in range(outs)] + [f"x{i}" for i in range(len(leaves))]
    places = list(zip(names, nest.operands, strict=True))
    if start is not None:
        last, step = map(tile.numbers.text, start)
        tile.when = "fits"
        tile.lines += [
            "at = tl.load(start)",
            f"fits = (at >= 0) & (at <= {last})",
            "tl.store(error, 1, mask=fits == 0)",
            f"y0 += at * {step}",
        ]
    for leaf, (name, operand) in zip(leaves, places[outs:], strict=True):
        tile.load(leaf, name, operand, axes)
    for (name, operand), value in zip(places[:outs], body(tile, axes), strict=True):
        tile.store(name, operand, axes, value)
    shifts = [*offsets, *(0 for _ in names[len(offsets) :])]
    pointers = [pointer(n, o.dtype, s) for (n, o), s in zip(places, shifts, strict=True)]
    if start is not None:
        pointers += [pointer("error", i64), pointer("start", i64)]
    return kernel(
        kind, "pointwise", pointers=pointers, numbers=tile.numbers, schedule=schedule, grid=[grid],
        comment=comment, body=indent(tile.lines, 4),
    )  # fmt: skip


def _linear(tile: Tile, nest: Nest) -> tuple[list[Axis], Schedule, Dim]:
    """One run over all elements."""
    total = product(nest.sizes)
    block = BLOCK if not isinstance(total, int) else min(BLOCK, max(128, power_of_two(total)))
    wide = ".to(tl.int64)" if is_wide(total) else ""
    tile.lines.append(f"i = tl.program_id(0){wide} * {block} + tl.arange(0, {block})")
    mask = ""
    if not isinstance(total, int) or total % block:
        tile.lines.append(f"inside = i < {_product(tile, nest.sizes)}")
        mask = "inside"
    names = [f"i{a}" for a in range(nest.rank)]
    sizes = [tile.numbers.text(s) for s in nest.sizes]
    tile.lines += decoded(sizes, "i", names)
    axes = [Axis(n, s, mask) for n, s in zip(names, nest.sizes, strict=True)]
    return axes, Schedule(4 if block >= 512 else block // 128 or 1, 2), cdiv(total, block)


def _product(tile: Tile, sizes: Sequence[Dim]) -> str:
    known = product(tuple(sizes))
    return str(known) if isinstance(known, int) else " * ".join(map(tile.numbers.text, sizes))


def _crossing(nest: Nest) -> int | None:
    """The axis along which an operand lies in order, where the result does along the last one."""
    last = nest.rank - 1
    if last < 1 or nest.operands[0].kind(last) != 1:
        return None
    for operand in nest.operands[1:]:
        along = [a for a in range(last) if operand.kind(a) == 1]
        if along and operand.kind(last) is None:
            return along[0]
    return None


def _square(tile: Tile, nest: Nest, rows: int) -> tuple[list[Axis], Schedule, Dim]:
    """Square tiles over two axes: each operand is read in the order in which it lies."""
    last = nest.rank - 1
    tall, broad = nest.sizes[rows], nest.sizes[last]
    others = [a for a in range(last) if a != rows]
    down, across = cdiv(tall, SIDE), cdiv(broad, SIDE)
    grid = product((down, across, *(nest.sizes[a] for a in others)))
    wide = ".to(tl.int64)" if is_wide(grid) else ""
    tile.lines.append(f"program = tl.program_id(0){wide}")
    names = [*(f"i{a}" for a in others), "down", "across"]
    sizes = [tile.numbers.text(s) for s in (*(nest.sizes[a] for a in others), down, across)]
    tile.lines += decoded(sizes, "program", names)
    tile.lines.append(f"i{rows} = down * {SIDE} + tl.arange(0, {SIDE})[:, None]")
    tile.lines.append(f"i{last} = across * {SIDE} + tl.arange(0, {SIDE})[None, :]")
    axes = [Axis(f"i{a}", s) for a, s in enumerate(nest.sizes)]
    for a, size in ((rows, tall), (last, broad)):
        if not isinstance(size, int) or size % SIDE:
            axes[a] = Axis(f"i{a}", size, f"(i{a} < {tile.numbers.text(size)})")
    return axes, Schedule(8, 2), grid


__all__ = ["loop_nest", "pointwise", "update"]
