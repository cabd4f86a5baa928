"""Products of few rows with a matrix of which only some groups of codes are stored.

All groups that are kept are one list, cut into tasks of equal length whatever rows they belong to:
no program waits for the fullest row. A program sums its groups by runs, the groups of one row in
one task; a second launch adds the runs of each row in order, so that every call gives the same
bits, and computes what follows. (GQSA, section 3.3)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from effc.ir import DType
from effc.ir.symbols import Dim
from effc.ir.types import DTYPES, f32

from .codes import MAGIC, UNIT, Coded, code, number
from .kernel import Made, Schedule, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .products import Products, Program
from .tile import pointer

WARPS = 4
I16, I32 = DTYPES["i16"], DTYPES["i32"]


@dataclass(frozen=True)
class Tasks:
    """codes: of a group; its `size` and `group` are the group's. kept: groups of `rows` rows.

    groups: of a task.
    """

    codes: Coded
    kept: int
    rows: int
    groups: int

    @property
    def count(self) -> int:
        return -(-self.kept // self.groups)

    @property
    def runs(self) -> int:
        """Runs at most."""
        return self.rows + self.count


def sparse_sums(
    t: Tasks, x: DType, rows: int, row: Dim, step: Dim, offset: Dim = 0,
    comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """Sums of runs, [rows of x, runs]. Pointers: the sums, x, places, the first run of each task,
    scales, words, zeros if there are any.

    A place is that of a group in its row, times 2, and 1 more where a run begins.
    """
    c, numbers = t.codes, Numbers()
    units = c.size // UNIT
    wide = ".to(tl.int64)" if is_wide(t.count * t.groups * units) else ""
    lines = []
    for j in range(len(c.words)):  # a unit a lane, as elements of x are
        address = f"word{j} + g[:, None] * {units} + u[None, :]"
        lines.append(f"w{j} = tl.load(tl.max_contiguous({address}, [1, 1])).to(tl.int32)")
    zero = repr(c.zero + MAGIC) if isinstance(c.zero, int) else "z"
    if isinstance(c.zero, DType):
        shift = "" if c.zero.is_float else f" + {MAGIC}"
        lines.append(f"z = tl.load(zero + g)[:, None].to(tl.float32){shift}")
    words = [f"w{j}" for j in range(len(c.words))]
    lines += [f"c{j} = {number(c, code(c, words, j), zero)}" for j in range(UNIT)]
    given = [pointer("y", f32), pointer("xp", x, offset), pointer("at", I16), pointer("first", I32),
             pointer("scale", c.scale)]  # fmt: skip
    given += [pointer(f"word{j}", word) for j, word in enumerate(c.words)]
    given += [pointer("zero", c.zero)] if isinstance(c.zero, DType) else []
    places = [numbers.text(row * r) for r in range(rows)]
    return kernel(
        "sparse", "codes_sparse", pointers=given, numbers=numbers, schedule=Schedule(WARPS, 1),
        grid=[t.count], comment=comment, groups=t.groups, units=units, size=c.size, wide=wide,
        unpack=indent(lines, 4), rows=rows, places=places, step=numbers.text(step), runs=t.runs,
    )  # fmt: skip


def joined_runs(work: Products, runs: int) -> Made:
    """The sums of every row's runs, in order, then what follows. Pointers: the result, the sums,
    where the runs of each row begin, leaves. work: one right factor, of which nothing is read."""
    rows, columns = work.space.rows, work.space.columns
    assert all(isinstance(s, int) for s in (*rows, *columns))
    count = 1
    for s in rows:
        count *= s  # type: ignore[operator]
    blocks = (("rows", power_of_two(count)), ("columns", 64), ("depth", 1), ("splits", 1),
              ("dot", 1), ("flat", 0), ("programs", 0), ("group", 1))  # fmt: skip
    schedule = Schedule(2, 1, blocks)
    p = Program(work, schedule)
    after = p.finish(["sum0"])
    sides = (p.rows.mask, "[:, None]"), (p.columns.mask, "[None, :]")
    inside = "".join(f"{mask}{suffix} & " for mask, suffix in sides if mask)
    given = [pointer("y", work.out.dtype, work.out.offset), pointer("sums", f32),
             pointer("start", I32), *p.pointers()]  # fmt: skip
    return kernel(
        "runs", "codes_runs", pointers=given, numbers=p.numbers, schedule=schedule,
        grid=[p.programs], comment=work.comment, place=indent(p.place.lines, 4),
        n_mask=f", mask={p.columns.mask}, other=0" if p.columns.mask else "", inside=inside,
        shape=(p.blocks["rows"], p.blocks["columns"]), runs=runs, after=indent(after, 4),
    )  # fmt: skip


__all__ = ["Tasks", "joined_runs", "sparse_sums"]
