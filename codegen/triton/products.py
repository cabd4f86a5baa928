"""Matrix products and convolutions: sums over depth, tile by tile, and what follows on the sums.

    y[batch, rows, columns] = after(sum of a[batch, rows, depth] b[batch, depth, columns])

Each of the four is a group of axes. Rows of a linear layer are all dimensions of x but the last;
rows of a convolution are its pixels, its depth the window's taps and the channels (an implicit
GEMM: no picture is unfolded in memory), its batch the groups. An operand that walks a group in
equal steps is indexed by the group's flat index; the axes of another are split off it once a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from effc.codegen.cpp.loops import Nest
from effc.ir import DType, Op
from effc.ir.symbols import Dim, product
from effc.ir.types import f32, f64

from .image import Sampling, places, sampled
from .image import Window as Pooling
from .kernel import Made, Pointer, Schedule, cdiv, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .pointwise import loop_nest
from .scalar import register, storage
from .tile import Axis, Element, Operand, Tile, decoded, pointer

Strides = tuple[Dim, ...]
After = Callable[[Tile, list[Element]], Element]  # the sums -> what is stored


@dataclass(frozen=True)
class Space:
    """Sizes of the axes of each group. depth: taps of a window first, the channels last."""

    batch: tuple[Dim, ...]
    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    depth: tuple[Dim, ...]


@dataclass(frozen=True)
class Walk:
    """How an operand walks the axes; no strides in a group: it stands still there.

    rows of a windowed factor: strides of [images, *spatial] in its own memory, depth: of channels.
    offset: of its first element in memory that is aligned.
    """

    dtype: DType
    batch: Strides = ()
    rows: Strides = ()
    columns: Strides = ()
    depth: Strides = ()
    offset: Dim = 0


@dataclass(frozen=True)
class Window:
    """Where the taps of a convolution lie in pictures of these sizes."""

    sizes: tuple[Dim, ...]
    stride: tuple[int, ...]
    padding: tuple[Dim, ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Pooled:
    """A picture whose windows are pooled on the way to a factor. sizes: of that picture."""

    window: Pooling
    sizes: tuple[Dim, ...]


@dataclass(frozen=True)
class Factor:
    """The left factor: values that are loaded, and pointwise nodes on the way to the factor.

    pooled: the one leaf is the picture before pooling.
    """

    value: Any
    leaves: tuple[tuple[Any, Walk], ...]
    nodes: tuple[Op, ...] = ()
    pooled: Pooled | None = None


@dataclass(frozen=True)
class Sample:
    """A picture that is enlarged where what follows reads it. value: what it is enlarged to.

    rows of its walk: strides of [images, *spatial] in its own memory.
    """

    value: Any
    walk: Walk
    how: Sampling


@dataclass(frozen=True)
class Chain:
    """The first of two products: what its sums become is the left factor of the second one, whole
    in a tile, in the type of the factors. right: the second one's, `columns` wide."""

    right: Walk
    columns: int
    leaves: tuple[tuple[Any, Walk], ...]
    samples: tuple[Sample, ...]
    after: After


@dataclass(frozen=True)
class Products:
    """One kernel's work: a sum for each of `rights`, all over the same left factor.

    chain: there are two products, the first over `space`; what is stored is the second one's.
    """

    space: Space
    left: Factor
    rights: tuple[Walk, ...]
    out: Walk
    leaves: tuple[tuple[Any, Walk], ...]
    after: After
    dtype: DType  # of the factors
    precision: str = "highest"  # of float32 products
    window: Window | None = None
    samples: tuple[Sample, ...] = ()
    comment: tuple[str, ...] = ()
    chain: Chain | None = None


PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


def accumulator(dtype: DType) -> DType:
    return f64 if dtype == f64 else f32


# ------------------------------------------------------------------ axes in a program


@dataclass
class _Group:
    """A group of axes inside a program: a flat index, and axes split off it as operands need."""

    tile: Tile
    index: str
    sizes: tuple[Dim, ...]
    mask: str = ""
    suffix: str = ""  # that places the index along its side of the tile
    known: dict[tuple[Dim, ...], list[str]] = field(default_factory=dict)

    def axes(self, strides: Strides) -> tuple[list[Axis], list[Dim]]:
        """The axes along which an operand moves, as few as its strides allow."""
        nest = Nest(self.sizes if strides else (), (Operand(f32, strides),)).collapsed()
        if nest.rank == 0:
            return [], []
        steps = list(nest.operands[0].strides)
        names = [self.index] if nest.rank == 1 else self.split(nest.sizes)
        mask = self.mask and self.mask + self.suffix
        return [Axis(n + self.suffix, s, mask) for n, s in zip(names, nest.sizes)], steps

    def split(self, sizes: tuple[Dim, ...]) -> list[str]:
        """Variables that hold the index split into dimensions of these sizes."""
        if sizes not in self.known:
            stem = f"{self.index}{'abcdefgh'[len(self.known)]}"
            names = [f"{stem}{i}" for i in range(len(sizes))]
            lines = decoded([self.tile.numbers.text(s) for s in sizes], self.index, names)
            self.tile.lines += [line.replace("left", f"{stem}_") for line in lines]
            self.known[sizes] = names
        return self.known[sizes]


class Program:
    """Collects the text of a kernel."""

    def __init__(self, work: Products, schedule: Schedule) -> None:
        self.work, self.schedule = work, schedule
        self.blocks = dict(schedule.blocks)
        self.numbers = Numbers()
        self.place, self.inner, self.outer = (Tile(self.numbers) for _ in range(3))
        s = work.space
        self.total = {name: product(getattr(s, name)) for name in ("batch", "rows", "columns")}
        self.down = cdiv(self.total["rows"], self.blocks["rows"])
        self.across = cdiv(self.total["columns"], self.blocks["columns"])
        self.programs = product((self.down, self.across, self.total["batch"]))
        self.start()

    def text(self, value: Dim) -> str:
        return self.numbers.text(value)

    # -------------------------------------------------------------- which tile

    def start(self) -> None:
        lines, s = self.place.lines, self.work.space
        tiles = product((self.down, self.across))
        wide = ".to(tl.int64)" if is_wide(self.programs) else ""
        tile, batch = f"program{wide}", ""
        if self.total["batch"] != 1:
            lines.append(f"tile = program{wide} % {self.text(tiles)}")
            lines.append(f"batch = program{wide} // {self.text(tiles)}")
            tile, batch = "tile", "batch"
        self.order(tile)
        self.batch = _Group(self.place, batch, s.batch)
        self.rows = self.side("m", "down", "rows", "[:, None]")
        self.columns = self.side("n", "across", "columns", "[None, :]")

    def order(self, tile: str) -> None:
        """Tiles that run together share rows and columns, which then come from the L2 cache."""
        lines, group = self.place.lines, self.blocks["group"]
        if self.down == 1 or self.across == 1:
            one, other = ("down", "across") if self.down == 1 else ("across", "down")
            lines += [f"{one} = 0", f"{other} = {tile}"]
            return
        if group == 1:
            across = self.text(self.across)
            lines += [f"down = {tile} // {across}", f"across = {tile} % {across}"]
            return
        band = f"({group} * {self.text(self.across)})"
        lines += [
            f"first = {tile} // {band} * {group}",
            f"tall = min({self.text(self.down)} - first, {group})",
            f"down = first + {tile} % {band} % tall",
            f"across = {tile} % {band} // tall",
        ]

    def side(self, index: str, at: str, name: str, suffix: str) -> _Group:
        block, size, lines = self.blocks[name], self.total[name], self.place.lines
        lines.append(f"{index} = {at} * {block} + tl.arange(0, {block})")
        mask = ""
        if not isinstance(size, int) or size % block:
            mask = f"{index}_in"
            lines.append(f"{mask} = {index} < {self.text(size)}")
        return _Group(self.place, index, getattr(self.work.space, name), mask, suffix)

    # -------------------------------------------------------------- the sums

    def steps(self) -> tuple[str, str]:
        """The first and the last step of this program; a part of them where depth is split."""
        *taps, deep = self.work.space.depth
        block = self.blocks["depth"]
        self.by_tap = self.work.window is not None and not self.blocks["flat"]
        if self.by_tap:
            self.turns = cdiv(deep, block)
            steps = product((*taps, self.turns))
        else:
            steps = cdiv(product((*taps, deep)), block)
        splits = self.blocks["splits"]
        if splits == 1:
            return "0", self.text(steps)
        each = self.text(cdiv(steps, splits))
        self.place.lines += [
            "part = tl.program_id(1)",
            f"begin = part * {each}",
            f"end = min(begin + {each}, {self.text(steps)})",
        ]
        return "begin", "end"

    def loads(self) -> list[str]:
        """Statements that put a block of each factor into `a` and b0, b1, ..."""
        lines, dot = self.inner.lines, self.blocks["dot"]
        left, right = "[None, :]", "[:, None]" if dot else "[None, :]"
        depth = self.depth_groups()
        columns = _Group(self.place, "n", self.work.space.columns, self.columns.mask,
                         "[None, :]" if dot else "[:, None]", self.columns.known)  # fmt: skip
        self.left(depth(left))
        for i, walk in enumerate(self.work.rights):
            strides, axes = [], []
            groups = [(self.batch, walk.batch), (columns, walk.columns)]
            for group, own in (*groups, *depth(right)(walk)):
                more, steps = group.axes(own)
                axes, strides = axes + more, strides + steps
            operand = Operand(walk.dtype, tuple(strides))
            sides = ("depth", "columns") if dot else ("columns", "depth")
            self.factor(f"b{i}", f"b{i}p", operand, axes, sides)
        return lines

    def factor(
        self, name: str, pointer: str, operand: Operand, axes: Sequence[Axis],
        sides: tuple[str, str], masks: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Load a block as tl.dot takes it: whole, in the type that it has in memory.

        masks: hold also along axes where the operand stands still.
        """
        self.block(self.inner, name, pointer, operand, axes, [self.blocks[s] for s in sides], masks)

    def block(
        self, t: Tile, name: str, pointer: str, operand: Operand, axes: Sequence[Axis],
        sides: Sequence[int], masks: Sequence[str] = (),
    ) -> None:  # fmt: skip
        address, mask = t.place(pointer, operand, axes)
        mask = self.all_of([mask, *masks])
        if not all(side in address for side in ("[:, None]", "[None, :]")):
            # Of the addresses: Triton 3.9 fails to compile a product of broadcast elements.
            address = f"tl.broadcast_to({address}, ({', '.join(map(str, sides))}))"
        given = f", mask={mask}, other=0.0" if mask else ""
        t.lines.append(f"{name} = tl.load({address}{given})")

    def depth_groups(self) -> Callable[[str], Callable[[Walk], list[tuple[_Group, Strides]]]]:
        """Emits this step's indices of depth; gives the groups of a factor that lies along it."""
        *taps, deep = self.work.space.depth
        block, lines = self.blocks["depth"], self.inner.lines
        arange = f"tl.arange(0, {block})"
        if not self.by_tap:
            lines.append(f"k = step * {block} + {arange}")
            total = product((*taps, deep))
            mask = self.masked("k", total, block)
            known: dict[tuple[Dim, ...], list[str]] = {}

            def flat(suffix: str) -> Callable[[Walk], list[tuple[_Group, Strides]]]:
                group = _Group(self.inner, "k", self.work.space.depth, mask, suffix, known)
                return lambda walk: [(group, walk.depth)]

            self.taps = lambda: _Group(self.inner, "k", (*taps, deep), mask, "", known).split(
                (*taps, deep)
            )
            return flat
        turns = self.text(self.turns)
        one = self.turns == 1
        lines.append("tap = step" if one else f"tap = step // {turns}")
        lines.append(f"c = {arange}" if one else f"c = step % {turns} * {block} + {arange}")
        mask = self.masked("c", deep, block)
        tap = _Group(self.inner, "tap", tuple(taps))
        self.taps = lambda: [*tap.split(tuple(taps)), "c"]

        def apart(suffix: str) -> Callable[[Walk], list[tuple[_Group, Strides]]]:
            channel = _Group(self.inner, "c", (deep,), mask, suffix)
            return lambda walk: [(tap, walk.depth[:-1]), (channel, walk.depth[-1:])]

        return apart

    def masked(self, index: str, size: Dim, block: int) -> str:
        if isinstance(size, int) and size % block == 0:
            return ""
        self.inner.lines.append(f"{index}_in = {index} < {self.text(size)}")
        return f"{index}_in"

    def left(self, depth: Callable[[Walk], list[tuple[_Group, Strides]]]) -> None:
        factor, sides = self.work.left, ("rows", "depth")
        masks: list[str] = []
        for i, (leaf, walk) in enumerate(factor.leaves):
            axes, strides = self.window(walk) if self.work.window else ([], [])
            if not self.work.window:
                groups = [(self.batch, walk.batch), (self.rows, walk.rows), *depth(walk)]
                for group, own in groups:
                    more, steps = group.axes(own)
                    axes, strides = axes + more, strides + steps
            operand = Operand(walk.dtype, tuple(strides))
            # What is beside a picture is 0, also of one that is the same all along a side.
            always = [a.mask for a in axes] if self.work.window else []
            if factor.pooled is not None:
                self.pooled(f"a{i}p", operand, axes, factor.pooled, always)
                return
            if not factor.nodes:
                self.factor("a", f"a{i}p", operand, axes, sides, always)
                return
            self.inner.load(leaf, f"a{i}p", operand, axes)
            masks.append(self.inner.place("", operand, axes)[1])
        for node in factor.nodes:
            self.inner.add(node)
        shape = ", ".join(str(self.blocks[s]) for s in sides)
        text = f"tl.broadcast_to({self.inner.values[factor.value][0]}, ({shape}))"
        self.computed(text, masks)

    def computed(self, text: str, masks: Sequence[str]) -> None:
        """The left factor is an expression, and 0 outside of the masks: an op need not give 0 where
        nothing was loaded."""
        if mask := self.all_of(masks):
            text = f"tl.where({mask}, {text}, 0.0)"
        text += f".to({storage(self.work.dtype)})" if self.work.dtype.bits == 16 else ""
        self.inner.lines.append(f"a = {text}")

    def pooled(
        self, pointer: str, operand: Operand, axes: Sequence[Axis], pooled: Pooled,
        masks: Sequence[str],
    ) -> None:  # fmt: skip
        """The left factor is pooled as it is loaded."""
        assert self.work.window is not None
        t, w, axes = self.inner, pooled.window, list(axes)
        first = len(axes) - 1 - len(pooled.sizes)  # pixels come before the channels
        suffix = "[:, None]" if self.by_tap else ""
        lines, bounds = [], []
        for d, size in enumerate(pooled.sizes):
            at = f"from{d}"
            tap = f"{'rs'[d]} * {w.dilation[d]} - {w.padding[d]}"
            lines.append(f"{at} = at{d} * {w.stride[d]} + ({tap})")
            if not w.within(d, self.work.window.sizes[d], size):
                bounds.append(f"(({at} >= 0) & ({at} < {self.text(size)})){suffix}")
            axes[first + d] = Axis(at + suffix, size, axes[first + d].mask)
        start = 'float("-inf")' if w.maximum else "0.0"
        address, mask = t.place(pointer, operand, axes)
        mask = self.all_of([mask, *masks, *bounds])
        given = f", mask={mask}, other={start}" if mask else ""
        real = register(operand.dtype)
        lines.append(f"x = tl.load({address}{given}).to({real})")
        lines.append(f"window = {'fn.maximum(window, x)' if w.maximum else 'window + x'}")
        shape = ", ".join(str(self.blocks[side]) for side in ("rows", "depth"))
        down, across = w.kernel
        t.lines += [
            f"window = tl.full(({shape}), {start}, {real})",
            f"for r in tl.static_range({down}):",
            f"    for s in tl.static_range({across}):",
            *(f"        {line}" for line in lines),
        ]
        mean = f"fn.div(window, {w.divisor or down * across}.0)"
        self.computed("window" if w.maximum else mean, masks)

    def all_of(self, masks: Sequence[str]) -> str:
        parts = [p for m in masks for p in m.split(" & ") if p]
        return " & ".join(dict.fromkeys(parts))

    def window(self, walk: Walk) -> tuple[list[Axis], list[Dim]]:
        """Axes of a picture under a window: pixel times stride plus tap times dilation."""
        w, lines = self.work.window, self.inner.lines
        assert w is not None
        image, *pixels = self.rows.split(self.work.space.rows)
        *taps, channel = self.taps()
        axes, strides = self.batch.axes(walk.batch)
        axes.append(Axis(f"{image}[:, None]", self.work.space.rows[0], self.rows.mask and
                         f"{self.rows.mask}[:, None]"))  # fmt: skip
        strides.append(walk.rows[0])
        for d, (pixel, tap) in enumerate(zip(pixels, taps, strict=True)):
            at = f"at{d}"
            shift = f"({tap} * {w.dilation[d]} - {self.text(w.padding[d])})"
            if self.by_tap:
                lines.append(f"{at} = {pixel} * {w.stride[d]} + {shift}")
            else:
                lines.append(f"{at} = ({pixel} * {w.stride[d]})[:, None] + {shift}[None, :]")
            suffix = "[:, None]" if self.by_tap else ""
            inside = f"in{d}"
            lines.append(f"{inside} = ({at} >= 0) & ({at} < {self.text(w.sizes[d])})")
            axes.append(Axis(at + suffix, w.sizes[d], inside + suffix))
            strides.append(walk.rows[1 + d])
        mask = "c_in" if self.by_tap else "k_in"
        deep = mask + "[None, :]" if any(line.startswith(f"{mask} =") for line in lines) else ""
        axes.append(Axis(f"{channel}[None, :]", self.work.space.depth[-1], deep))
        strides.append(walk.depth[-1])
        return axes, strides

    # -------------------------------------------------------------- what follows

    def spread(self, walk: Walk) -> tuple[Operand, list[Axis]]:
        """An operand of the result's shape, and the axes it walks."""
        axes, strides = [], []
        for group, own in ((self.batch, walk.batch), (self.rows, walk.rows),
                           (self.columns, walk.columns)):  # fmt: skip
            more, steps = group.axes(own)
            axes, strides = axes + more, strides + steps
        return Operand(walk.dtype, tuple(strides)), axes

    def finish(self, sums: Sequence[str]) -> list[str]:
        work, t = self.work, self.outer
        kept = accumulator(work.dtype)
        if self.blocks["splits"] > 1:
            self.parts(sums, kept)
            return t.lines
        if work.chain is not None:
            sums = [self.chained(sums, work.chain)]
        self.read("x", work.leaves, "s", work.samples)
        result = work.after(t, [(s, kept) for s in sums])
        t.store("y", *self.stored(work.out), result)
        return t.lines

    def read(
        self, stem: str, leaves: Sequence[tuple[Any, Walk]], other: str, samples: Sequence[Sample]
    ) -> None:  # fmt: skip
        for i, (leaf, walk) in enumerate(leaves):
            self.outer.load(leaf, f"{stem}{i}p", *self.spread(walk))
        for i, sample in enumerate(samples):
            self.sample(f"{other}{i}", sample)

    def chained(self, sums: Sequence[str], chain: Chain) -> str:
        """The second product; from then on its columns are those of the tile."""
        t, deep, lines = self.outer, self.blocks["columns"], self.place.lines
        assert self.across == 1, "the second product sums over all columns of the first"
        self.read("m", chain.leaves, "t", chain.samples)
        middle, _ = chain.after(t, [(s, accumulator(self.work.dtype)) for s in sums])
        columns, depth = self.columns, replace(self.columns, suffix="[:, None]")
        if columns.mask:  # an op need not give 0 where nothing was summed
            middle = f"tl.where({columns.mask}{columns.suffix}, {middle}, 0.0)"
        block = max(16, power_of_two(chain.columns))
        lines.append(f"o = tl.arange(0, {block})")
        mask = "o_in" if chain.columns % block else ""
        if mask:
            lines.append(f"{mask} = o < {chain.columns}")
        self.columns = _Group(self.place, "o", (chain.columns,), mask, "[None, :]")
        self.total["columns"] = chain.columns
        self.blocks = self.blocks | {"columns": block}
        axes, strides = depth.axes(chain.right.depth)
        more, steps = self.columns.axes(chain.right.columns)
        operand = Operand(chain.right.dtype, (*strides, *steps))
        self.block(t, "c0", "c0p", operand, [*axes, *more], [deep, block])
        narrow = storage(self.work.dtype)
        kept = register(accumulator(self.work.dtype))
        t.lines.append(f"left = ({middle}).to({narrow})")
        t.lines.append(f"total = tl.dot(left, c0, out_dtype={kept})")
        return "total"

    def sample(self, name: str, sample: Sample) -> None:
        """A value that lies between the pixels of a picture, as `interpolate` computes it."""
        t, how, walk = self.outer, sample.how, sample.walk
        real, down = register(walk.dtype), self.rows.suffix
        image, *at = self.rows.split(self.work.space.rows)
        places(t, how, (at[0], at[1]), real, name)
        axes, strides = self.batch.axes(walk.batch)
        more, steps = self.columns.axes(walk.columns)
        inside = self.rows.mask and self.rows.mask + down
        operand = Operand(walk.dtype, (*strides, *steps, *walk.rows))

        def pixel(row: str, column: str) -> str:
            sizes = (self.work.space.rows[0], how.height, how.width)
            own = (Axis(n + down, s, inside) for n, s in zip((image, row, column), sizes))
            return t.read(f"{name}p", operand, [*axes, *more, *own])

        t.lines += sampled(how, pixel, name, name, down)
        t.values[sample.value] = name, walk.dtype

    def pointers(self) -> list[Pointer]:
        """Of what follows, behind those of the factors: of a chain its right factor, leaves and
        samples; then the leaves and samples of what is stored."""
        named: list[tuple[str, Walk]] = []
        if (chain := self.work.chain) is not None:
            named.append(("c0p", chain.right))
            named += [(f"m{i}p", w) for i, (_, w) in enumerate(chain.leaves)]
            named += [(f"t{i}p", s.walk) for i, s in enumerate(chain.samples)]
        named += [(f"x{i}p", w) for i, (_, w) in enumerate(self.work.leaves)]
        named += [(f"s{i}p", s.walk) for i, s in enumerate(self.work.samples)]
        return [pointer(name, w.dtype, w.offset) for name, w in named]

    def stored(self, walk: Walk) -> tuple[Operand, list[Axis]]:
        """Where results go: along both sides of the tile, if it holds more than one of a side."""
        operand, axes = self.spread(walk)
        strides = operand.strides
        for group, name in ((self.rows, "rows"), (self.columns, "columns")):
            if self.total[name] == 1 and self.blocks[name] > 1:
                axes.append(Axis(group.index + group.suffix, 1, group.mask + group.suffix))
                strides = (*strides, 1)
        return Operand(operand.dtype, strides), axes

    def parts(self, sums: Sequence[str], kept: DType) -> None:
        """Store the sums of a part of the depth: [sum, part, batch, rows, columns]."""
        count, whole = self.part_strides()
        for i, name in enumerate(sums):
            operand, axes = self.stored(whole)
            at = f"({i * self.blocks['splits']} + part).to(tl.int64) * {self.text(count)}"
            self.outer.store(f"y + {at}", operand, axes, (name, kept))

    def part_strides(self) -> tuple[Dim, Walk]:
        return _part(self.work.space, accumulator(self.work.dtype))


def _part(space: Space, dtype: DType) -> tuple[Dim, Walk]:
    """Elements of one part's sums, and how they lie."""
    sizes = (*space.batch, *space.rows, *space.columns)
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step = step * size
    strides.reverse()
    b, r = len(space.batch), len(space.batch) + len(space.rows)
    walk = Walk(dtype, tuple(strides[:b]), tuple(strides[b:r]), tuple(strides[r:]))
    return product(sizes), walk


def products(work: Products, schedule: Schedule, kind: str = "product") -> Made:
    """The kernel: pointers are those of the result (or of the parts), of the left factor's leaves,
    of the right factors, of the leaves and samples of what follows (not where depth is split)."""
    p = Program(work, schedule)
    sums = [f"sum{i}" for i in range(len(work.rights))]
    first, last = p.steps()
    load = p.loads()
    blocks, split = p.blocks, p.blocks["splits"] > 1
    after = p.finish(sums)
    kept = accumulator(work.dtype)
    how = [f'input_precision="{PRECISION[work.precision]}"'] if work.dtype == f32 else []
    how += [f"out_dtype={register(kept)}"]
    shape = [blocks["rows"], blocks["columns"]] + ([] if blocks["dot"] else [blocks["depth"]])
    pointers = [pointer("y", kept) if split else pointer("y", work.out.dtype, work.out.offset)]
    pointers += [pointer(f"a{i}p", w.dtype, w.offset) for i, (_, w) in enumerate(work.left.leaves)]
    pointers += [pointer(f"b{i}p", w.dtype, w.offset) for i, w in enumerate(work.rights)]
    if not split:
        pointers += p.pointers()
    persistent = blocks["programs"] > 0
    grid: Dim = p.programs
    if persistent:
        grid = min(grid, blocks["programs"]) if isinstance(grid, int) else blocks["programs"]
    return kernel(
        kind, "product", pointers=pointers, numbers=p.numbers, schedule=schedule,
        grid=[grid, blocks["splits"]], comment=work.comment, place="\n".join(p.place.lines),
        sums=sums, shape=tuple(shape), total=register(kept), first=first, last=last,
        load=indent(load, 4), how=", ".join(how), after="\n".join(after), persistent=persistent,
        programs=p.text(p.programs),
    )  # fmt: skip


def joined(work: Products, splits: int) -> Made:
    """The second launch where depth is split: adds the parts in order, then what follows.

    Pointers: the result, the parts, the leaves.
    """
    s = work.space
    kept = accumulator(work.dtype)
    count, whole = _part(s, kept)
    sums = range(len(work.rights))
    walks = [work.out, whole, *(w for _, w in work.leaves)]
    operands = tuple(Operand(w.dtype, _all(s, w)) for w in walks)
    nest = Nest((*s.batch, *s.rows, *s.columns), operands).collapsed()

    def body(t: Tile, axes: Sequence[Axis]) -> list[Element]:
        parts, (first, _) = nest.at_least(1).operands[1], t.values["parts"]
        found = []
        for i in sums:
            text = first if i == 0 else ""
            for j in range(splits):
                if i or j:
                    at = f"x0 + {t.numbers.text(count * (i * splits + j))}"
                    read = t.read(at, parts, axes)
                    text = t.let(kept, f"{text} + {read}" if text else read)[0]
            found.append((text, kept))
        return [work.after(t, found)]

    leaves = ["parts", *(leaf for leaf, _ in work.leaves)]
    return loop_nest(nest, leaves, 1, body, offsets=[w.offset for w in walks], kind="sums",
                     comment=work.comment)  # fmt: skip


def _all(space: Space, w: Walk) -> Strides:
    groups = ((w.batch, space.batch), (w.rows, space.rows), (w.columns, space.columns))
    return tuple(step for own, sizes in groups for step in (own or (0,) * len(sizes)))


__all__ = [
    "Chain", "Factor", "Pooled", "Pooling", "Products", "Program", "Sample", "Space", "Walk",
    "Window", "accumulator", "joined", "products",
]  # fmt: skip
