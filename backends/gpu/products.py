"""Matrix products as the kernels of codegen/triton/products.py walk them, and their launches.

Taken: `linear` and `matmul` of floats, with batches, broadcasting and the 1-d forms; operands as
they lie in memory, whatever their strides. Convolutions are in convolution.py; what goes before and
after a product in anchored.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy

from effc.codegen.triton.kernel import Made, Schedule
from effc.codegen.triton.products import Products, Space, Walk, Window, joined, products
from effc.codegen.triton.products import accumulator as sum_type
from effc.codegen.triton.schedules import ANY, Choice, Device, Problem, schedules
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, floordiv, free_symbols, product
from effc.ir.types import Tensor, row_major

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.regions import broadcast
from .lowering import call, choose, note, ranked


@dataclass(frozen=True)
class Anchor:
    """A product: its axes, and where its operands have them.

    place: for each dimension of the result, the group of axes it is in. left: the same of the left
    factor. groups: into which channels are split. seen: the part of the left factor that is read,
    along all leading dimensions of the result.
    """

    node: Any
    space: Space
    place: tuple[str, ...]
    left: tuple[str, ...]
    right: Ref
    right_walk: Walk
    window: Window | None = None
    groups: int = 1
    seen: Callable[[Ref], Ref] = lambda ref: ref

    def spread(self, ref: Ref) -> Walk:
        """How a ref of the result's shape walks."""
        return _walk(self.grouped(ref), self.place)

    def factor(self, ref: Ref) -> Walk:
        """How a ref of the left factor walks."""
        return _walk(self.grouped(self.seen(ref)), self.left)

    def grouped(self, ref: Ref) -> Ref:
        """Channels as [groups, channels of one]."""
        if self.groups == 1:
            return ref
        (first, channels, *others), (far, step, *steps) = ref.shape, ref.strides
        each = floordiv(channels, self.groups)
        shape = (first, self.groups, each, *others)
        return ref.with_(shape=shape, strides=(far, step * each, step, *steps))


def _walk(ref: Ref, place: Sequence[str]) -> Walk:
    found: dict[str, tuple[Dim, ...]] = {"batch": (), "rows": (), "columns": (), "depth": ()}
    for group, stride in zip(place, ref.strides, strict=True):
        found[group] = (*found[group], stride)
    return Walk(ref.dtype, **found, offset=ref.offset)


def is_product(node: Op) -> Answer:
    """Whether the kernels multiply such elements."""
    dtype = node.tensor.dtype
    if not dtype.is_float:
        return no("{} of {}: tensor cores are used for floats only", node.name, dtype, at=node)
    return yes


def linear(b: Builder, node: Any, refs: Mapping[Op, Ref]) -> Anchor:
    w = refs[node.w]
    lead = len(node.shape) - 1
    space = Space((), node.shape[:-1], w.shape[:1], w.shape[1:])
    b.must_equal((node.x.shape[-1], w.shape[1]))
    walk = Walk(w.dtype, columns=w.strides[:1], depth=w.strides[1:], offset=w.offset)
    rows = ("rows",) * lead
    return Anchor(node, space, (*rows, "columns"), (*rows, "depth"), w, walk)


def matmul(b: Builder, node: Any, refs: Mapping[Op, Ref]) -> Anchor:
    """A leading dimension is one of rows where the right factor stands still, one of columns where
    the left one does, and of the batch else."""
    a, c = node.a.tensor, node.b.tensor
    rows, columns = (1 if a.rank > 1 else 0), (1 if c.rank > 1 else 0)
    b.must_equal((a.shape[-1], c.shape[-2] if columns else c.shape[-1]))
    lead = node.shape[: len(node.shape) - rows - columns]
    right = refs[node.b]
    if not columns:
        right = right.with_(shape=(*right.shape, 1), strides=(*right.strides, 0))
    right = broadcast(b, right, (*lead, *right.shape[-2:]))
    still = [_stands_still(a, len(lead), i) for i in range(len(lead))]
    groups = ["rows" if right.strides[i] == 0 else "columns" if s else "batch"
              for i, s in enumerate(still)]  # fmt: skip
    place = (*groups, *["rows"] * rows, *["columns"] * columns)
    sizes = {g: tuple(s for s, p in zip(node.shape, place) if p == g) for g in set(place)}
    depth = a.shape[-1:]
    space = Space(sizes.get("batch", ()), sizes.get("rows", ()), sizes.get("columns", ()), depth)
    walk = _walk(right, (*groups, "depth", "columns"))
    if not columns:
        walk = replace(walk, columns=walk.columns[:-1])
    walk = replace(walk, rows=())
    left = (*groups, *["rows"] * rows, "depth")

    def seen(ref: Ref) -> Ref:
        return broadcast(b, ref, (*lead, *ref.shape[len(ref.shape) - 1 - rows :]))

    return Anchor(node, space, place, left, right, walk, seen=seen)


def _stands_still(t: Tensor, lead: int, axis: int) -> bool:
    """Whether an operand has no dimension, or one of one element, at a leading axis."""
    at = axis - lead + t.rank - 2
    return at < 0 or t.shape[at] == 1


# ------------------------------------------------------------------ launches


def device(b: Builder) -> Device:
    """What schedules are made for: the target's GPU, or what fits all of them."""
    return getattr(b.target, "device", ANY)


GUESS = 128  # the extent of each symbol, where nothing better is known
FEW_ROWS = 16  # of the smallest tile
PAYS = 1.25  # times its own that few rows may take in launches for many, before they get their own


def guess(size: Dim, extent: int = GUESS) -> int:
    """A size that only a call knows is taken to be of this extent in each of its symbols."""
    if isinstance(size, int):
        return size
    return max(1, int(sympy.sympify(size).subs(dict.fromkeys(free_symbols(size), extent))))


def precision(b: Builder) -> str:
    """Of float32 products: what is allowed, where the device has it."""
    return b.precision if KINDS[b.precision] in device(b).peak else "highest"


KINDS = {"highest": "f32", "high": "tf32x3", "medium": "tf32"}


def problem_of(work: Products) -> Problem:
    """The product as far as its time depends on it."""
    s = work.space
    *taps, deep = s.depth
    batch, rows, columns = (guess(product(v)) for v in (s.batch, s.rows, s.columns))
    kind = KINDS[work.precision] if work.dtype.name == "f32" else work.dtype.name
    chain = work.chain
    leaves = (*work.leaves, *(chain.leaves if chain else ()))
    full = [w for _, w in leaves if any(w.rows) and any(w.columns)]
    pooled = product(work.left.pooled.window.kernel) if work.left.pooled else 1
    # Two launches would be one more than pooling and enlarging here are to save.
    may_split = not work.samples and pooled == 1 and chain is None
    return Problem(
        max(1, batch), max(1, rows), max(1, columns), max(1, guess(deep)),
        guess(product(tuple(taps))), kind, len(work.rights), bool(work.left.nodes),
        len(full), may_split, len(work.samples) + len(chain.samples if chain else ()), pooled,
        chain.columns if chain else 0,
    )  # fmt: skip


def pick(b: Builder, work: Products) -> Choice:
    """The schedule that the model predicts to be the fastest."""
    return schedules(problem_of(work), device(b))[0]


@dataclass(frozen=True)
class _Range:
    """Some numbers of rows, and what is launched for them.

    guard: 1 where a call has so many, else 0: then nothing is launched. most: rows, where that is
    known. extents: of symbols, for a call with so many.
    """

    problem: Problem
    guard: Dim = 1
    most: int | None = None
    extents: Mapping[Any, int] = field(default_factory=dict)


def _ranges(work: Products, device: Device) -> list[_Range]:
    """All numbers of rows, apart where only a call knows whether there are few.

    A call with few rows reads weights and little else; tiles for many rows would leave most of a
    GPU idle meanwhile.
    """
    p, rows = problem_of(work), product(work.space.rows)
    pictures = work.window is not None or work.samples or work.chain is not None
    if isinstance(rows, int) or pictures or guess(rows, 1) > FEW_ROWS:
        return [_Range(p)]
    few = replace(p, rows=FEW_ROWS)
    # What is best for many rows takes for few of them at most what it takes for many.
    if schedules(p, device)[0].seconds <= PAYS * schedules(few, device)[0].seconds:
        return [_Range(p)]
    many = sympy.Min(1, floordiv(rows, FEW_ROWS + 1))
    # Parts of the depth take memory for every row, of which there may be very many.
    p = replace(p, may_split=False)
    return [_Range(few, 1 - many, FEW_ROWS, extents(rows, FEW_ROWS)), _Range(p, many)]


def extents(size: Dim, most: int) -> dict[Any, int]:
    """Of its symbols, so that a size is as large as it can be up to `most`."""
    fits = max((n for n in range(1, most + 1) if guess(size, n) <= most), default=1)
    return dict.fromkeys(free_symbols(size), fits)


def launch(
    b: Builder, node: Op, work: Products, out: Ref, factors: Sequence[Ref], leaves: Sequence[Ref],
    schedule: Schedule | None = None,
) -> None:  # fmt: skip
    """One launch, or two where depth is split: the parts into memory of their own, then their sums
    in order, so that every call gives the same bits."""

    def by(r: _Range, schedule: Schedule) -> Callable[[Builder], None]:
        return lambda b: _launch(b, node, work, out, factors, leaves, schedule, r)

    if schedule is None:
        for r in _ranges(work, device(b)):
            found = schedules(r.problem, device(b))
            choose(b, ranked(found, partial(by, r), _method), GUESS, r.extents)
        return
    at = len(b.steps)
    by(_Range(problem_of(work)), schedule)(b)
    note(b, at, "a schedule that was asked for")


def _method(choice: Choice) -> str:
    blocks = dict(choice.schedule.blocks)
    if not blocks["dot"]:
        return "lanes"
    if blocks["splits"] > 1:
        return "tiles of split depth"
    return "tiles in a loop" if blocks["programs"] else "tiles"


def _launch(
    b: Builder, node: Op, work: Products, out: Ref, factors: Sequence[Ref], leaves: Sequence[Ref],
    schedule: Schedule, r: _Range,
) -> None:  # fmt: skip
    splits = dict(schedule.blocks)["splits"]
    made = guarded(products(work, schedule), r.guard)
    said = [f"for at most {r.most} rows"] if r.most else []
    if splits == 1:
        call(b, node, made, [out], [*factors, *leaves], note="; ".join(said))
        return
    s = work.space
    kept = sum_type(work.dtype)
    rows = s.rows if r.most is None else (r.most,)
    count = product((len(work.rights) * splits, *s.batch, *rows, *s.columns))
    parts = whole(b.new_root("arena", node, Tensor((count,), kept, row_major)))
    said.append(f"{splits} parts of the depth")
    call(b, node, made, [parts], list(factors), note="; ".join(said))
    sums = guarded(joined(work, splits), r.guard)
    call(b, node, sums, [out], [parts, *leaves], note="sums of the parts")


def guarded(made: Made, guard: Dim) -> Made:
    """The launch with a grid of nothing where the guard is 0."""
    first, *others = made.numbers
    return replace(made, numbers=(first * guard, *others))


__all__ = [
    "GUESS", "KINDS", "PAYS", "Anchor", "device", "extents", "guarded", "guess", "is_product",
    "launch", "linear", "matmul", "pick", "precision", "problem_of",
]  # fmt: skip
