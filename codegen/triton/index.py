"""Rows of a table by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from effc.codegen.cpp.loops import Nest, Operand
from effc.ir.symbols import Dim, product
from effc.ir.types import i64

from .kernel import Made, Schedule, cdiv, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .tile import Axis, Tile, decoded, pointer

TILE = 1024  # elements


def embedding(
    nest: Nest, rows: Dim, table: Operand, *, offsets: Sequence[Dim], comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """y[..., :] = table[ids[...], :]; an index outside sets the error word, as torch raises.

    nest: of y and ids, the last dimension along rows of the table. The kernel's pointers are y, the
    error word, the table, ids; offsets: of all but the error word.
    """
    nest = nest.collapsed(keep=1) if nest.sizes[-1] != 1 else nest
    nest = nest.at_least(2)
    y, ids = nest.operands
    *lead, size = nest.sizes
    count = product(tuple(lead))
    block = min(TILE, power_of_two(size)) if isinstance(size, int) and size else TILE
    tall = TILE // block
    tile = Tile(Numbers())
    text = tile.numbers.text
    wide = ".to(tl.int64)" if is_wide(count) else ""
    names = [f"i{a}" for a in range(len(lead))]
    tile.lines += [
        f"row = tl.program_id(0){wide} * ROWS + tl.arange(0, ROWS)[:, None]",
        f"of_rows = row < {' * '.join(map(text, lead))}",
        *decoded([*map(text, lead)], "row", names),
        "k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]",
        f"inside = k < {text(size)}",
    ]
    axes = [*(Axis(n, s, "of_rows") for n, s in zip(names, lead, strict=True)),
            Axis("k", size, "inside")]  # fmt: skip
    tile.lines += [
        f"id = {tile.read('x1', ids, axes)}.to(tl.int64)",
        f"known = (id >= 0) & (id < {text(rows)})",
        "# The flag; a row that is not there is not read.",
        "tl.store(error + row * 0, 1, mask=of_rows & (known == 0))",
    ]
    places = [Axis("id", rows, "known & of_rows"), Axis("k", size, "inside")]
    value = tile.let(table.dtype, tile.read("x0", table, places), "x")
    tile.store("y0", y, axes, value)
    shifts = {"y0": (y, offsets[0]), "x0": (table, offsets[1]), "x1": (ids, offsets[2])}
    pointers = [pointer(n, o.dtype, s) for n, (o, s) in shifts.items()]
    return kernel(
        "embedding", "rows", pointers=[pointers[0], pointer("error", i64), *pointers[1:]],
        numbers=tile.numbers, grid=[cdiv(count, tall), cdiv(size, block)], comment=comment,
        schedule=Schedule(4, 2, (("ROWS", tall), ("BLOCK", block))), body=indent(tile.lines, 4),
    )  # fmt: skip


__all__ = ["embedding"]
