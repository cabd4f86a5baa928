"""Products whose right factor is stored in codes: y = after(sum of a[row, k] scale (code - zero)).

Codes lie packed along k, in units of UNIT; a code of 3 bits is one of 2 and one of 1, each among
its equals, so that every part of a unit is one integer:

    bits       1   2   3     4    5     6      7         8
    a unit in  i8  i16 i16 i8 i32 i32 i8 i32 i16 i32 i16 i8 8 x u8

A program unpacks a unit into UNIT tiles [columns, units] in registers. For few rows they are
multiplied right there (a thread reads nothing twice); for many they are joined along k to the tile
that `tl.dot` takes. Sums of codes of 8 bits or less on both sides are integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from effc.ir import DType
from effc.ir.types import DTYPES, f32

from .kernel import Made, Schedule, indent, kernel
from .products import PRECISION, Products, Program, Walk, accumulator
from .scalar import register, storage
from .tile import Axis, Operand, pointer

UNIT = 8  # codes
ROW = 128  # codes of which rows are multiples: every part of a row begins at a multiple of 16 bytes
WORDS = {1: DTYPES["i8"], 2: DTYPES["i16"], 4: DTYPES["i32"]}  # of a unit, by bits of a code's part
I8, U8 = DTYPES["i8"], DTYPES["u8"]
MAGIC, MAGIC_BITS = 8388608.0, 0x4B000000  # 2^23: its lowest bits are those of a number added to it


@dataclass(frozen=True)
class Coded(Walk):
    """A right factor in codes. dtype: of the numbers that they stand for.

    bits: of a code as it is stored: 0 stands for the least one. group: of how many codes of a row
    each has its scale; None: all, whose scale is applied to the sums. zero: the code of 0 where it
    is one number, else the element type of the zeros, one a group.
    """

    bits: int = 4
    group: int | None = None
    scale: DType = f32
    zero: int | DType = 0
    size: int = 0  # codes of a row
    plain: bool = False  # bytes that are the numbers themselves, with a sign

    @property
    def parts(self) -> tuple[int, ...]:
        """Bits of each part of a code, from its lowest ones on."""
        return (8,) if self.bits == 8 else tuple(n for n in (4, 2, 1) if self.bits & n)

    @property
    def by_unit(self) -> bool:
        """Whether the codes of a unit share a scale."""
        return self.bits < 8 and (self.group is None or self.group % UNIT == 0)

    @property
    def groups(self) -> int:
        return 1 if self.group is None else -(-self.size // self.group)

    @property
    def words(self) -> list[DType]:
        """Element types of the parts in memory."""
        return [I8 if self.plain else WORDS.get(n, U8) for n in self.parts]

    @property
    def memory(self) -> list[DType]:
        """Of all that a kernel reads of it, in the order of its pointers."""
        scales = [] if self.group is None else [self.scale]
        return [*self.words, *scales, *([self.zero] if isinstance(self.zero, DType) else [])]

    def row(self, part: int) -> int:
        """Elements of a row of a part in memory."""
        codes = -(-self.size // ROW) * ROW
        return codes if self.parts[part] == 8 else codes // UNIT


@dataclass(frozen=True)
class CodedProducts(Products):
    """rights are Coded. whole: the left factor is codes as well, and sums are of integers."""

    whole: bool = False


class _Program(Program):
    """Collects the text of a kernel."""

    work: CodedProducts

    def __init__(self, work: CodedProducts, schedule: Schedule) -> None:
        super().__init__(work, schedule)
        self.codes = [w for w in work.rights if isinstance(w, Coded)]
        self.by_unit = all(c.by_unit for c in self.codes)
        self.whole = work.whole and bool(self.blocks["dot"])
        # The sums of a group are integers, the sum over groups is none.
        self.flush = self.whole and any(c.group is not None for c in self.codes)

    def loads(self) -> list[str]:
        t = self.inner
        if self.blocks["dot"]:
            self.left(self.depth_groups()("[None, :]"))
            if self.by_unit:
                self.units()
        else:
            self.by_rows()
        for i, c in enumerate(self.codes):
            self.factor_of(i, c)
        return t.lines

    # -------------------------------------------------------------- lanes

    def by_rows(self) -> None:
        """r0, r1, ...: the rows of the left factor, a tile [1, depth] each; by units a0_0 ... a0_7
        and so on, the first, the second ... element of every unit.

        A thread then holds one unit of every row and column of its tile, whatever it was loaded
        as: else Triton exchanges elements between threads, by way of shared memory, at each step.
        """
        lines, depth, groups, rows = self.inner.lines, None, self.rows, self.blocks["rows"]
        depth = self.depth_groups()
        at = next(i for i, line in enumerate(lines) if line.startswith("k ="))
        lines[at] = f"k = tl.max_contiguous({lines[at][4:]}, {UNIT})"
        if self.by_unit:
            self.units()
        for r in range(rows):
            name, mask = f"m{r}", ""
            self.place.lines.append(f"{name} = down * {rows} + {r}")
            if groups.mask:
                mask = f"{name}_in"
                self.place.lines.append(f"{mask} = {name} < {self.text(self.total['rows'])}")
            self.rows = replace(groups, index=name, suffix="", mask=mask, known={})
            self.blocks = self.blocks | {"rows": 1}
            self.left(depth("[None, :]"))
            lines.append(f"r{r} = a.to(tl.float32)")
            if self.by_unit:
                self.split(r)
        self.rows, self.blocks = groups, self.blocks | {"rows": rows}

    # -------------------------------------------------------------- indices

    def units(self) -> None:
        block, lines = self.blocks["depth"] // UNIT, self.inner.lines
        (size,) = {-(-c.size // UNIT) for c in self.codes}
        lines.append(f"u = step * {block} + tl.arange(0, {block})")
        self.units_in = "" if size % block == 0 else "u_in"
        if self.units_in:
            lines.append(f"u_in = u < {size}")
        self.unit_count = size

    def axes(self) -> list[Axis]:
        columns = self.columns.mask and f"{self.columns.mask}[:, None]"
        n = Axis("n[:, None]", self.total["columns"], columns)
        if self.by_unit:
            inside = self.units_in and "u_in[None, :]"
            return [n, Axis("u[None, :]", self.unit_count, inside)]
        (size,) = self.work.space.depth
        known = any(line.startswith("k_in =") for line in self.inner.lines)
        return [n, Axis("k[None, :]", size, "k_in[None, :]" if known else "")]

    def split(self, r: int) -> None:
        lines, units = self.inner.lines, self.blocks["depth"] // UNIT
        lines.append(f"even, odd = tl.split(tl.reshape(r{r}, (1, {units}, 2, 2, 2)))")
        lines += [f"{n}e, {n}o = tl.split({n})" for n in ("even", "odd")]
        for first, name in enumerate(("evene", "odde", "eveno", "oddo")):
            lines.append(f"a{r}_{first}, a{r}_{first + 4} = tl.split({name})")

    # -------------------------------------------------------------- one right factor

    def factor_of(self, i: int, c: Coded) -> None:
        """Statements that add this step's products with factor i to its sum."""
        t, dot, axes = self.inner, self.blocks["dot"], self.axes()
        scale = self.scale(i, c) if c.group is not None and not self.flush else ""
        zero = self.zero(i, c)
        words = []
        for j, dtype in enumerate(c.words):
            operand = Operand(dtype, (c.row(j), 1))
            address, mask = t.place(f"b{i}w{j}", operand, axes if c.parts[0] == 8 or self.by_unit
                                    else self.by_eighth(axes))  # fmt: skip
            wide = "" if c.plain else ".to(tl.int32)"
            t.lines.append(
                f"w{j} = {self.read_of(address, mask, UNIT if c.parts == (8,) else 1)}{wide}"
            )
            words.append(f"w{j}")
        if not self.by_unit:
            value = number(c, code(c, words), zero, self.whole)
            t.lines.append(f"b = {self.narrow(f'({value}) * s' if scale else value)}")
            self.add(i, "b")
            return
        for j in range(UNIT):
            t.lines.append(f"c{j} = {number(c, code(c, words, j), zero, self.whole)}")
        if not dot:
            for r in range(self.blocks["rows"]):
                t.lines.append(f"p = c0 * a{r}_0")
                t.lines += [f"p += c{j} * a{r}_{j}" for j in range(1, UNIT)]
                t.lines.append(f"sum{i}_{r} += p * s" if scale else f"sum{i}_{r} += p")
            return
        for j in range(UNIT):
            t.lines.append(f"c{j} = {self.narrow(f'c{j} * s' if scale else f'c{j}')}")
        for j in range(4):
            t.lines.append(f"d{j} = tl.join(c{j}, c{j + 4})")
        t.lines += ["e0 = tl.join(d0, d2)", "e1 = tl.join(d1, d3)"]
        shape = f"({self.blocks['columns']}, {self.blocks['depth']})"
        t.lines.append(f"b = tl.reshape(tl.join(e0, e1), {shape})")
        self.add(i, "b")

    def by_eighth(self, axes: Sequence[Axis]) -> list[Axis]:
        """The unit of every code of a tile."""
        n, k = axes
        return [n, Axis(f"({k.index} // {UNIT})", k.size, k.mask)]

    def scale(self, i: int, c: Coded) -> str:
        self.inner.lines.append(f"s = {self.of_group(f'b{i}s', c, c.scale)}.to(tl.float32)")
        return "s"

    def zero(self, i: int, c: Coded) -> str:
        """A number, or the tile of zeros; with MAGIC where codes become floats by it."""
        shift = 0.0 if self.whole else MAGIC
        if isinstance(c.zero, int):
            return repr(c.zero + shift) if shift else str(c.zero)
        if c.group is None:
            mask = f", mask={self.columns.mask}, other=0" if self.columns.mask else ""
            read = f"tl.load(b{i}z + n{mask})[:, None]"
        else:
            read = self.of_group(f"b{i}z", c, c.zero)
        to = "tl.int32" if self.whole else "tl.float32"
        whole = not c.zero.is_float and not self.whole
        self.inner.lines.append(f"z = {read}.to({to})" + (f" + {MAGIC}" if whole else ""))
        return "z"

    def of_group(self, name: str, c: Coded, dtype: DType) -> str:
        """What each unit, or code, of a tile shares with its group."""
        assert c.group is not None
        n, k = self.axes()
        each = c.group // UNIT if self.by_unit else c.group
        at = k.index if each == 1 else f"({k.index} // {each})"
        operand = Operand(dtype, (c.groups, 1))
        address, mask = self.inner.place(name, operand, [n, Axis(at, c.groups, k.mask)])
        return self.read_of(address, mask, 1)

    def read_of(self, address: str, mask: str, run: int) -> str:
        """A tile of the right factor, `run` elements in order; `by_rows` a thread holds a unit."""
        if not self.blocks["dot"]:
            each = 1 if self.by_unit else min(run, UNIT)
            address = f"tl.max_contiguous({address}, [1, {each}])"
        return f"tl.load({address}{f', mask={mask}, other=0' if mask else ''})"

    def narrow(self, text: str) -> str:
        """As `tl.dot` takes it."""
        if not self.blocks["dot"]:
            return text
        to = "tl.int8" if self.whole else storage(self.work.dtype)
        return f"({text}).to({to})"  # no instruction where it is of the type

    def add(self, i: int, b: str) -> None:
        t, c = self.inner, self.codes[i]
        if not self.blocks["dot"]:
            for r in range(self.blocks["rows"]):
                t.lines.append(f"sum{i}_{r} += r{r} * {b}")
            return
        kept = "tl.int32" if self.whole else register(accumulator(self.work.dtype))
        how = [f'input_precision="{PRECISION[self.work.precision]}"'] if self.floats else []
        how.append(f"out_dtype={kept}")
        if not self.flush:
            t.lines.append(f"sum{i} = tl.dot(a, tl.trans({b}), sum{i}, {', '.join(how)})")
            return
        if c.group is None:  # its scale comes with the sums
            t.lines.append(f"sum{i} += tl.dot(a, tl.trans({b}), {how[-1]}).to(tl.float32)")
            return
        assert c.group % self.blocks["depth"] == 0, "a step of the sums is inside a group"
        mask = f", mask={self.columns.mask}, other=0" if self.columns.mask else ""
        at = f"b{i}s + n * {c.groups} + step // {c.group // self.blocks['depth']}"
        t.lines += [
            f"s = tl.load({at}{mask}).to(tl.float32)",
            f"sum{i} += tl.dot(a, tl.trans({b}), {how[-1]}).to(tl.float32) * s[None, :]",
        ]

    @property
    def floats(self) -> bool:
        return self.work.dtype == f32 and not self.whole


def code(c: Coded, words: Sequence[str], j: int | None = None) -> str:
    """Code j of every unit, from the words of its parts; None: code k of a tile of codes."""
    if c.parts == (8,):
        return words[0]
    found, at = [], 0
    for word, bits in zip(words, c.parts, strict=True):
        shift = f"(k[None, :] % {UNIT} * {bits})" if j is None else str(j * bits)
        text = f"(({word} >> {shift}) & {(1 << bits) - 1})"
        found.append(f"({text} << {at})" if at else text)
        at += bits
    return " | ".join(found)


def number(c: Coded, code: str, zero: str, whole: bool = False) -> str:
    """code - zero, a float, or whole. Of zeros that are no floats: with MAGIC added already."""
    if c.plain:
        return code if whole else f"{code}.to(tl.float32)"
    if whole:
        return f"({code}) - {zero}"
    exact = f"(({code}) | {MAGIC_BITS}).to(tl.float32, bitcast=True)"
    if isinstance(c.zero, DType) and c.zero.is_float:
        return f"({exact} - {MAGIC}) - {zero}"
    return f"{exact} - {zero}"


def coded_products(work: CodedProducts, schedule: Schedule) -> Made:
    """The kernel: pointers are those of the result (or of the parts), of the left factor's leaves,
    of each right factor its words, scales and zeros, of the leaves of what follows (not where
    depth is split)."""
    p = _Program(work, schedule)
    sums = [f"sum{i}" for i in range(len(work.rights))]
    first, last = p.steps()
    step = p.loads()
    blocks, split = p.blocks, p.blocks["splits"] > 1
    after = p.finish(sums)
    kept = accumulator(work.dtype)
    tile = [blocks["rows"], blocks["columns"]]
    if not blocks["dot"]:
        tile = [blocks["columns"], blocks["depth"] // (UNIT if p.by_unit else 1)]
    pointers = [pointer("y", kept) if split else pointer("y", work.out.dtype, work.out.offset)]
    pointers += [pointer(f"a{i}p", w.dtype, w.offset) for i, (_, w) in enumerate(work.left.leaves)]
    for i, c in enumerate(p.codes):
        names = [f"b{i}w{j}" for j in range(len(c.words))] + ([f"b{i}s"] if c.group else [])
        names += [f"b{i}z"] if isinstance(c.zero, DType) else []
        pointers += [pointer(n, t) for n, t in zip(names, c.memory, strict=True)]
    if not split:
        pointers += p.pointers()
    whole = p.whole and not p.flush
    return kernel(
        "codes", "codes", pointers=pointers, numbers=p.numbers, schedule=schedule,
        grid=[p.programs, blocks["splits"]], comment=work.comment,
        place=indent(p.place.lines, 4), sums=sums, shape=tuple(tile),
        total="tl.int32" if whole else "tl.float32", first=first, last=last,
        step=indent(step, 8), after=indent(after, 4),
    )  # fmt: skip


__all__ = ["MAGIC", "ROW", "UNIT", "Coded", "CodedProducts", "code", "coded_products", "number"]
