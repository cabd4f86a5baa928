"""Kernels that reduce along some dimensions and compute with the results: softmax, norms, sums.

The program is that of the cpu (codegen/cpp/program.py): values are one an element or one a row,
and level k of them needs k reductions one after the other. A launch's program has ROWS rows:

    whole    a row fits a tile: it is loaded once and stays in registers
    looped   a loop over the row for each level, reductions kept lane by lane until it ends
    split    as looped, for rows too few to fill a GPU: one launch reduces PARTS parts of each row,
             the next joins them, and goes on with a part

A norm or softmax reads a long row twice, as reductions.py finds its two reductions together. Rows
that lie side by side (`columns`) are the lanes of a warp, so that memory is read in order either
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.program import Value
from effc.codegen.cpp.rows import by_columns
from effc.ir import DType
from effc.ir.symbols import Dim, product

from .kernel import Made, Schedule, cdiv, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .reductions import Fold, RowProgram, folds
from .scalar import register
from .tile import Axis, Tile, decoded, pointer

SHORT = 1024  # elements of a tile of several short rows
WHOLE = 16384  # of the longest row that stays in registers: 32 for each of 512 threads
LOOP = 4096  # of a tile in a loop
UNKNOWN = 1024  # of one along rows whose length, which may be small, only a call knows
SIDE_BY_SIDE = 32  # neighbouring rows of a tile where rows lie side by side: 128 bytes of float32
BUSY = 128  # programs that fill a GPU
FULL = 512  # programs that keep one full to the end
PARTS = 128  # of a row at most

Body = Callable[[RowProgram], Sequence[Value]]


@dataclass(frozen=True)
class Rows:
    """The launches of a program over rows.

    first: reduces parts of rows; it writes `buffers`, (element type, elements) each, which `made`
    takes as its last pointers.
    """

    made: Made
    first: Made | None = None
    buffers: tuple[tuple[DType, Dim], ...] = ()


def row_kernels(
    nest: Nest, leaves: Sequence[tuple[Any, bool]], outs: int, reduced: Sequence[int],
    order: Sequence[int], body: Body, *, offsets: Sequence[Dim] = (), few: bool = False,
    kind: str = "rows", comment: Iterable[str] = (),
) -> Rows:  # fmt: skip
    """Kernels of a program over `nest`; arguments are those of codegen.cpp.rows.row_kernel.

    offsets: of the pointers of outputs and leaves. few: rows are, also where their number is not
    known, as those of group_norm.
    """
    kept = [a for a in order if a not in reduced]
    outer = nest.collapsed(kept).at_least(1)
    inner = nest.collapsed([a for a in order if a in reduced]).at_least(1)
    job = _Job(outer, inner, tuple(leaves), outs, body, tuple(offsets), kind, tuple(comment))
    shape = _shape(job, few)
    if shape.parts == 1:
        return Rows(_Writer(job, shape).made())
    first = _Writer(job, shape, "first")
    made = first.made()
    count = product((*outer.sizes, shape.parts))
    buffers = tuple((dtype, count) for _, dtype in first.states())
    return Rows(_Writer(job, shape, "second").made(), made, buffers)


@dataclass(frozen=True)
class _Job:
    """outer, inner: how operands (outputs, then leaves) walk rows, and the elements of a row."""

    outer: Nest
    inner: Nest
    leaves: tuple[tuple[Any, bool], ...]
    outs: int
    body: Body
    offsets: tuple[Dim, ...]
    kind: str
    comment: tuple[str, ...]

    @property
    def elements(self) -> Dim:
        return product(self.inner.sizes)

    def operand(self, i: int) -> Operand:
        across, along = self.outer.operands[i], self.inner.operands[i]
        return Operand(across.dtype, (*across.strides, *along.strides))

    def program(self, numbers: Numbers) -> tuple[RowProgram, list[Value]]:
        """The program, and what it stores."""
        known = self.elements
        sizes = [known] if isinstance(known, int) else self.inner.sizes
        program = RowProgram(numbers, elements=" * ".join(map(numbers.text, sizes)))
        for i, (leaf, full) in enumerate(self.leaves):
            dtype = self.outer.operands[self.outs + i].dtype
            program.nodes[leaf] = program.leaf(dtype, f"x{i}", full)
        return program, list(self.body(program))


# ------------------------------------------------------------------ how a kernel is spread


@dataclass(frozen=True)
class _Shape:
    """A tile of [rows, block]. whole: the block is a row. parts: programs that share a row.

    each: elements of a thread.
    """

    rows: int
    block: int
    columns: bool
    whole: bool
    parts: int = 1
    each: int = 16

    @property
    def schedule(self) -> Schedule:
        warps = min(16, max(1, self.rows * self.block // (32 * self.each)))
        blocks = [("ROWS", self.rows), ("BLOCK", self.block)]
        return Schedule(warps, 2, (*blocks, *([("PARTS", self.parts)] * (self.parts > 1))))


def _shape(job: _Job, few: bool) -> _Shape:
    program, _ = job.program(Numbers())
    columns = by_columns(job.outer, job.inner, job.outs) and _at_least(job.outer.sizes[-1], 8)
    words = 2 if any(v.full and v.dtype.bits == 64 for v in program.values) else 1
    elements = job.elements
    if isinstance(elements, int):
        tiles = words * _alive(program.values)
        fits = WHOLE if tiles <= 3 else WHOLE // 2 if tiles <= 7 else WHOLE // 4
        shape = _whole(job, columns, power_of_two(max(elements, 1)), fits)
        if shape is not None:
            return shape
    if columns:
        rows = 2 * SIDE_BY_SIDE
    else:
        # Rows that take turns in memory, as channels of groups do where channels lie together.
        run, turn = job.inner.sizes[-1], job.outer.operands[job.outs].strides[-1]
        interleaved = turn == run and isinstance(run, int) and run < SIDE_BY_SIDE
        rows = SIDE_BY_SIDE // 2 if interleaved and _at_least(job.outer.sizes[-1], 2) else 1
    known = isinstance(elements, int)
    block = (LOOP if known else UNKNOWN) // words // rows
    parts = _parts(job, program, rows, block, few)
    return _Shape(rows, block, columns, False, parts, 16 if known else 8)


def _at_least(size: Dim, least: int) -> bool:
    """As far as is known."""
    return not isinstance(size, int) or size >= least


def _alive(values: Sequence[Value]) -> int:
    """Tiles that are needed at the same time."""
    last = {a: i for i, v in enumerate(values) for a in v.args}
    most, alive = 1, set[Value]()
    for i, v in enumerate(values):
        alive |= {a for a in (*v.args, v) if a.full and v.kind != "leaf"}
        most = max(most, len(alive))
        alive = {a for a in alive if last.get(a, i) > i}
    return most


def _whole(job: _Job, columns: bool, block: int, fits: int) -> _Shape | None:
    """The tile of rows of `block` elements at most, of which `fits` stay in registers, or None."""
    if columns:
        rows = max(SIDE_BY_SIDE, min(4 * SIDE_BY_SIDE, 2 * SHORT // block))
        if isinstance(job.outer.sizes[-1], int):
            rows = min(rows, power_of_two(job.outer.sizes[-1]))
        return _Shape(rows, block, True, True) if rows * block <= fits // 2 else None
    if block > fits:
        return None
    rows, count = max(1, SHORT // block), product(job.outer.sizes)
    while rows > 1 and isinstance(count, int) and count < rows * BUSY:
        rows //= 2
    return _Shape(rows, block, False, True)


def _parts(job: _Job, program: RowProgram, rows: int, block: int, few: bool) -> int:
    """Programs for each row, where there are too few rows for one each to fill a GPU."""
    known = product(tuple(s for s in job.outer.sizes if isinstance(s, int)))
    assert isinstance(known, int)
    elements, count = job.elements, product(job.outer.sizes)
    sure = few or isinstance(count, int) or isinstance(elements, int)
    programs = max(1, known // rows)
    if not sure or programs >= BUSY or max(v.level for v in program.values) != 1:
        return 1
    parts = min(PARTS, power_of_two(FULL // programs))
    return min(parts, power_of_two(elements // block)) if isinstance(elements, int) else parts


# ------------------------------------------------------------------ text


@dataclass
class _Writer:
    """One launch. stage: "first" and "second" of those that share rows, "" of one alone."""

    job: _Job
    shape: _Shape
    stage: str = ""
    tile: Tile = field(default_factory=lambda: Tile(Numbers()))

    def __post_init__(self) -> None:
        self.program, self.results = self.job.program(self.tile.numbers)
        self.places = {v: self.job.outs + i for i, v in enumerate(self._leaves())}

    def _leaves(self) -> list[Value]:
        return [v for v in self.program.values if v.kind == "leaf"]

    def states(self) -> list[tuple[str, DType]]:
        """What a launch leaves for the next one."""
        folds = self._folds(0)
        return [(name, dtype) for fold in folds for name, dtype, _ in fold.state]

    def made(self) -> Made:
        job, shape = self.job, self.shape
        grid = self._rows()
        if shape.whole:
            self._whole()
        elif self.stage == "first":
            self._part()
            self._row_values((0,))
            self._loop(0, [])
            self._merge()
            for i, (name, _) in enumerate(self.states()):
                self.say(f"tl.store({self._buffer(i, 'part')}, {name}{self._masked()})")
        elif self.stage == "second":
            self._join_parts()
            self._levels(1)
        else:
            self.say("# A row is longer than a tile: each loop is one walk along it.")
            self.say(f"begin, end = 0, {self.program.elements}")
            self._levels(0)
        along = any(v.full for v in self.results) or self.stage == "first"
        parts = [shape.parts] if shape.parts > 1 and along else []
        return kernel(
            job.kind, "rows", pointers=self._pointers(), numbers=self.tile.numbers,
            schedule=shape.schedule, grid=[grid, *parts], comment=job.comment,
            body=indent(self.tile.lines, 4),
        )  # fmt: skip

    def say(self, *lines: str) -> None:
        self.tile.lines += lines

    def _pointers(self) -> list[Any]:
        job = self.job
        names = [f"y{i}" for i in range(job.outs)] + [f"x{i}" for i in range(len(job.leaves))]
        shifts = [*job.offsets, *[0] * (len(names) - len(job.offsets))]
        given = [pointer(n, o.dtype, s)
                 for n, o, s in zip(names, job.outer.operands, shifts, strict=True)]  # fmt: skip
        states = [pointer(f"s{i}", dtype) for i, (_, dtype) in enumerate(self.states())]
        match self.stage:
            case "first":
                return [*states, *given[job.outs :]]
            case "second":
                return [*given, *states]
        return given

    # -------------------------------------------------------------- places

    def _rows(self) -> Dim:
        """Which rows a program has; gives the grid."""
        sizes, text = self.job.outer.sizes, self.tile.numbers.text
        names, last = [f"i{a}" for a in range(len(sizes))], sizes[-1]
        total = product(sizes)
        lanes = "tl.arange(0, ROWS)[:, None]"
        program = f"tl.program_id(0){'.to(tl.int64)' if is_wide(total) else ''}"
        self.inside_rows = ""
        if self.shape.columns:
            blocks = cdiv(last, self.shape.rows)
            self.say(f"program = {program}")
            self.say(*decoded([*map(text, sizes[:-1]), text(blocks)], "program",
                              [*names[:-1], "block"]))  # fmt: skip
            self.say(f"{names[-1]} = block * ROWS + {lanes}")
            if self.stage:
                self.say(f"row = program // {text(blocks)} * {text(last)} + {names[-1]}")
            limit, index, grid = last, names[-1], product((*sizes[:-1], blocks))
        else:
            self.say(f"row = {program} * ROWS + {lanes}")
            if len(names) > 1:
                self.say(*decoded([*map(text, sizes)], "row", names))
            else:
                names = ["row"]
            limit, index, grid = total, "row", cdiv(total, self.shape.rows)
        if not isinstance(limit, int) or limit % self.shape.rows:
            bound = text(last) if self.shape.columns else " * ".join(map(text, sizes))
            self.inside_rows = "of_rows"
            self.say(f"of_rows = {index} < {bound}")
        self.outer = [Axis(n, s, self.inside_rows) for n, s in zip(names, sizes, strict=True)]
        return grid

    def _row_of(self, inside: str) -> list[str]:
        """Where the elements k of a row are; decides the axes of whatever is loaded."""
        sizes = self.job.inner.sizes
        if len(sizes) == 1:
            self.axes = [*self.outer, Axis("k", sizes[0], inside)]
            return []
        names = [f"k{a}" for a in range(len(sizes))]
        self.axes = [*self.outer, *(Axis(n, s, inside) for n, s in zip(names, sizes, strict=True))]
        return decoded([*map(self.tile.numbers.text, sizes)], "k", names)

    # -------------------------------------------------------------- values

    def _text(self, v: Value) -> str:
        if v.kind == "leaf":
            return self.tile.read(v.text, self.job.operand(self.places[v]), self._axes(v))
        return v.text.format(*(a.name for a in v.args))

    def _element(self, v: Value, done: set[Value]) -> None:
        """What a loop computes to have v, an element."""
        if v in done or not v.full:
            return
        done.add(v)
        for a in v.args:
            self._element(a, done)
        self.say(f"{v.name} = {self._text(v)}")

    def _store(self, i: int, v: Value) -> None:
        operand = self.job.operand(i)
        if not v.full and all(s == 0 for s in operand.strides):  # one value: still a tile to Triton
            operand = Operand(operand.dtype, (1, *operand.strides[1:]))
        self.tile.store(f"y{i}", operand, self._axes(v), (v.name, v.dtype))

    def _axes(self, v: Value) -> list[Axis]:
        return self.axes if v.full else [*self.outer, *(Axis("0", s) for s in self.job.inner.sizes)]

    def _folds(self, level: int) -> list[Fold]:
        values = [v for v in self.program.values
                  if v.kind == "reduce" and v.args[0].level == level]  # fmt: skip
        return folds(values, self.program)

    # -------------------------------------------------------------- whole rows

    def _whole(self) -> None:
        self.say("# A tile is whole rows, which stay in registers: memory is read once.")
        self.say("k = tl.arange(0, BLOCK)[None, :]")
        inside = ""
        if self.job.elements != self.shape.block:
            inside = "inside"
            self.say(f"inside = k < {self.program.elements}")
        self.say(*self._row_of(inside))
        folds = {f.values[0]: f for level in self._all_levels() for f in self._folds(level)}

        def seen(x: Value) -> Callable[[str, str], str]:
            if inside:
                return lambda text, none: f"tl.where(inside, {text}, {none})"
            if self._is_along(x):
                return lambda text, none: text
            return lambda text, none: f"tl.broadcast_to({text}, (ROWS, BLOCK))"

        later = self.shape.block > WHOLE // 4  # registers are few: load where it is needed
        done: set[Value] = set()

        def define(v: Value) -> None:
            if v in done:
                return
            done.add(v)
            for a in v.args:
                define(a)
            if v.kind != "reduce":
                self.say(f"{v.name} = {self._text(v)}")
            elif v in folds:
                self.say(*folds[v].direct(seen(folds[v].x)))

        for v in self.program.values:
            if v.kind != "leaf" or not later:
                define(v)
            for i, result in enumerate(self.results):
                if result is v:  # at once: it may be needed no more
                    self._store(i, v)

    def _is_along(self, v: Value) -> bool:
        """Whether it has a place for every element, and not one that stands for all."""
        if v.kind == "leaf":
            return any(s != 0 for s in self.job.inner.operands[self.places[v]].strides)
        return v.kind == "let" and any(map(self._is_along, v.args))

    def _all_levels(self) -> range:
        return range(max((v.level for v in self.program.values), default=0) + 1)

    # -------------------------------------------------------------- loops

    def _levels(self, first: int) -> None:
        """The program from a level on: what is below is stored with it."""
        for level in self._all_levels()[first:]:
            here = range(level + 1) if level == first else (level,)
            self._row_values(here)
            stored = [(i, v) for i, v in enumerate(self.results) if v.level in here]
            for i, v in stored:
                if not v.full:
                    self._store(i, v)
            self._loop(level, [(i, v) for i, v in stored if v.full])

    def _row_values(self, levels: Iterable[int]) -> None:
        for v in self.program.values:
            if not v.full and v.kind != "reduce" and v.level in levels:
                self.say(f"{v.name} = {self._text(v)}")

    def _loop(self, level: int, stored: list[tuple[int, Value]]) -> None:
        """One walk along the rows: reductions of a level, and what is stored."""
        folds = self._folds(level)
        if not folds and not stored:
            return
        for fold in folds:
            for name, dtype, start in fold.state:
                self.say(f"{name} = tl.full((ROWS, BLOCK), {start}, {register(dtype)})")
        outside, self.tile.lines = self.tile.lines, []
        self.say("k = at + tl.arange(0, BLOCK)[None, :]", "inside = k < end")
        self.say(*self._row_of("inside"))
        done: set[Value] = set()
        for v in [f.x for f in folds] + [v for _, v in stored]:
            self._element(v, done)
        if any(f.how == "squares" for f in folds):
            self.say("turn = (at - begin) // BLOCK + 1")
        self.say(*(fold.step() for fold in folds))
        for i, v in stored:
            self._store(i, v)
        body, self.tile.lines = self.tile.lines, outside
        self.say("for at in range(begin, end, BLOCK):", indent(body, 4))
        if folds:
            self.say("# Lanes kept results of their own, so that threads wait for each other once.")
        if any(f.how == "squares" for f in folds):
            self.say("count = (end - begin - tl.arange(0, BLOCK)[None, :] + BLOCK - 1) // BLOCK")
        if self.stage != "first":
            self.say(*(fold.joined() for fold in folds))

    # -------------------------------------------------------------- parts of rows

    def _part(self) -> None:
        """Which elements a program has; those of the last parts may be none."""
        elements = self.program.elements
        wide = ".to(tl.int64)" if is_wide(self.job.elements) else ""
        self.say(
            "# Rows are too few to fill a GPU: programs take PARTS parts of each, in whole tiles.",
            f"part = tl.program_id(1){wide}",
            f"share = ({elements} + PARTS * BLOCK - 1) // (PARTS * BLOCK) * BLOCK",
            f"begin = tl.minimum(part * share, {elements})",
            f"end = tl.minimum(begin + share, {elements})",
        )

    def _buffer(self, i: int, part: str) -> str:
        return f"s{i} + row * PARTS + {part}"

    def _masked(self) -> str:
        return f", mask={self.inside_rows}" if self.inside_rows else ""

    def _merge(self) -> None:
        """What the lanes of a part came to."""
        folds = self._folds(0)
        if any(f.how == "squares" for f in folds):
            self.say("of_part = tl.maximum(end - begin, 1)")
        for fold in folds:
            elements = f"of_part.to({register(fold.part)})"
            self.say(f"{fold.names} = {fold.merged(elements)}")

    def _join_parts(self) -> None:
        self._part()
        self.say("# What the parts of the row came to in the launch before.")
        self.say("every = tl.arange(0, PARTS)[None, :]")
        for i, (name, _) in enumerate(self.states()):
            self.say(f"{name} = tl.load({self._buffer(i, 'every')}{self._masked()})")
        folds = self._folds(0)
        if any(f.how == "squares" for f in folds):
            elements = self.program.elements
            self.say(f"count = tl.maximum(tl.minimum({elements} - every * share, share), 0)")
        self.say(*(fold.joined() for fold in folds))


__all__ = ["RowProgram", "Rows", "row_kernels"]
