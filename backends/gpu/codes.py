"""Products that read compressed weights: `linear(x, decode(w))`, w a constant of codes in groups.

The codes are packed for the kernels of codegen/triton/codes.py when weights are bound; nobody asks
for the dense weight. Where x is `decode(quantize(...))` of a scale a row, the kernel reads its
codes too, and tensor cores multiply integers. What goes before and after a product is that of
anchored.py. What is not taken here reads the dense weight, and its launch says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any

import sympy
import torch

from effc.codegen.triton.codes import ROW, UNIT, Coded, CodedProducts, coded_products
from effc.codegen.triton.codes_schedules import FEW, Problem, schedules
from effc.codegen.triton.kernel import Schedule
from effc.codegen.triton.products import Factor, Space, Walk, joined
from effc.codegen.triton.schedules import Choice
from effc.codegen.triton.tile import Element, Tile
from effc.ir import DType, No, Op, Weight, no, yes
from effc.ir.formats import Encoded, GroupQuant, code_range, decoded
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, floordiv, product
from effc.ir.types import DTYPES, Tensor, f32, row_major

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.regions import Region
from . import anchored, quantize
from .anchored import Parts, left_of
from .lowering import GPU, call, choose, note, ranked
from .products import GUESS, KINDS, Anchor, device, extents, guarded, guess, precision

U8 = DTYPES["u8"]
_SCALE, _ROWS = "scale", "rows"  # among the leaves of a product: of a right factor, of the left one
FACTORS = ("f16", "bf16", "f32")
LONGEST = (1 << 31) // (1 << 14) - 1  # products of two bytes that a sum of 32 bits holds


# ------------------------------------------------------------------ what is stored


def stored(w: Any) -> Any:
    """The `encoded` constant behind `decode(...)`; None where there is none."""
    held = w.x if w.name == "decode" else None
    return held if held is not None and held.name == "encoded" and _known(held) else None


def _known(node: Op) -> bool:
    """Whether it is made of weights alone."""
    return isinstance(node, Weight) or (bool(node.operands) and all(map(_known, node.operands)))


def is_taken(w: Any) -> Answer:
    """Whether kernels read such a weight."""
    t = w.x.tensor
    f = t.format
    if not isinstance(f, GroupQuant):
        return no("codes in {} are read by no kernel", type(f).__name__, at=w)
    if t.rank != 2 or not all(isinstance(s, int) and s for s in t.shape):
        return no("a weight of {} has no kernel", t, at=w)
    if f.scale.name not in FACTORS or (f.zero is not None and f.zero.bits > 32):
        return no("scales of {} and zeros of {} have no kernel", f.scale, f.zero, at=w)
    return yes


@dataclass(frozen=True)
class Stored:
    """How a weight's codes are packed; `of` is its type."""

    of: Tensor

    @property
    def format(self) -> GroupQuant:
        assert isinstance(self.of.format, GroupQuant)
        return self.of.format

    @property
    def least(self) -> int:
        return code_range(self.of.dtype)[0]

    @property
    def walk(self) -> Coded:
        f, size = self.format, self.of.shape[1]
        low, high = code_range(self.of.dtype)
        zero: int | DType = -low
        if f.zero is not None:
            zero = U8 if f.zero == self.of.dtype else f32
        group = None if f.group is None or f.group >= size else f.group
        plain = f.zero is None and self.of.dtype.name == "i8"
        bits = (high - low).bit_length()
        return Coded(f32, (), (), (1,), (1,), 0, bits, group, f.scale, 0 if plain else zero, size,
                     plain)  # fmt: skip

    def codes(self, value: Encoded, whole_rows: bool = True) -> torch.Tensor:
        """int32, from 0 on; whole_rows: filled up as kernels of matrices read them."""
        types = self.format.parts(self.of)
        codes = decoded(types["codes"], value["codes"], torch.int32)
        if not self.walk.plain:
            codes = codes - self.least
        return torch.nn.functional.pad(codes, (0, -codes.shape[1] % ROW)) if whole_rows else codes

    def words(self, part: int, value: Encoded, whole_rows: bool = True) -> torch.Tensor:
        """A part of every unit."""
        codes, walk = self.codes(value, whole_rows), self.walk
        to = walk.words[part]
        if walk.bits == 8:
            return codes.to(to.torch).flatten()
        bits, below = walk.parts[part], sum(walk.parts[:part])
        units = codes.unflatten(1, (-1, UNIT)) >> below & (1 << bits) - 1
        words = torch.zeros_like(units[..., 0])
        for j in range(UNIT):
            words |= units[..., j] << j * bits
        return words.to(to.torch).flatten()  # the lowest bits stay

    def scale(self, value: Encoded) -> torch.Tensor:
        return value["scale"].flatten().contiguous()

    def zero(self, value: Encoded) -> torch.Tensor:
        zero = value["zero"].float() - self.least
        return zero.to(U8.torch if self.walk.zero is U8 else torch.float32).flatten()

    def refs(self, b: Builder, node: Op) -> tuple[list[Ref], Ref | None]:
        """What kernels read of the constant, in their order; and the scale of each whole row."""
        rows, walk = self.of.shape[0], self.walk
        found = []
        for j, dtype in enumerate(walk.words):
            what = f"{walk.bits}-bit codes, part {j} of {len(walk.words)}"
            make = partial(self.words, j)
            found.append(b.derived_ref(node, what, make, rows * walk.row(j), GPU.name, dtype))
        each = rows * walk.groups
        scale = b.derived_ref(node, "scales", self.scale, each, GPU.name, walk.scale)
        if walk.group is not None:
            found.append(scale)
        if isinstance(walk.zero, DType):
            found.append(b.derived_ref(node, "zeros", self.zero, each, GPU.name, walk.zero))
        return found, scale if walk.group is None else None


# ------------------------------------------------------------------ what is taken


def outer(region: Region) -> dict[Op, Any]:
    """The value outside that each leaf of a region reads."""
    return dict(zip(region.leaves, region.operands, strict=True))


def concerns(node: Op) -> bool:
    """A product in it reads a compressed weight that kernels read."""
    region = Region.of(node)
    found = outer(region)
    linears: list[Any] = [n for n in region.nodes if n.name == "linear"]
    return any(stored(found.get(n.w, n.w)) for n in linears)


def check(node: Op) -> Answer:
    """Whether the codes are read; else the dense weight is."""
    region = Region.of(node)
    if not (answer := anchored.check(node)):
        return answer
    parts, found = Parts.of(region), outer(region)
    for anchor in parts.anchors:
        if anchor.name != "linear" or not stored(found.get(anchor.w, anchor.w)):
            return no("the {} beside reads no codes", anchor.name, at=anchor)
        if not (answer := is_taken(found[anchor.w])):
            return answer
        if anchor.tensor.dtype.name not in FACTORS:
            return no("codes are not multiplied with {}", anchor.tensor.dtype, at=anchor)
    read = {o for n in (*parts.before, *parts.rest) for o in n.operands}
    if any(a.w in read for a in parts.anchors):
        return no("the weight is also read as numbers", at=node)
    return yes


def whole_codes(node: Op) -> Answer:
    """Whether the left factor's codes are read as well: of such a product that `check` takes."""
    region = Region.of(node)
    parts, found = Parts.of(region), outer(region)
    x = found.get(parts.anchors[0].x)
    if parts.before or x is None or x.name != "decode" or x.x.name != "quantize":
        return no("the left factor is no decode(quantize(...))", at=node)
    if any(parts.anchors[0].x in n.operands for n in parts.rest):
        return no("its left factor is also read as numbers", at=node)
    t = x.x.tensor
    f = t.format
    if not (answer := quantize.takes_quantize(x.x)):
        return answer
    if not isinstance(f, GroupQuant) or f.group is not None or f.zero is not None:
        return no("only codes of one scale a row, without zeros, are multiplied", at=x)
    if code_range(t.dtype)[0] >= 0:
        return no("{} has no sign", t.dtype, at=x)
    rows = product(parts.anchors[0].shape[:-1])
    if isinstance(rows, int) and rows <= FEW:  # lanes multiply numbers
        return yes
    for anchor in parts.anchors:
        walk = Stored(found[anchor.w].x.type).walk
        if walk.size > LONGEST:
            return no("a sum of {} products may leave 32 bits", walk.size, at=anchor)
        if not walk.plain and (walk.bits > 7 or walk.zero is f32):
            return no("code - zero of {} is no int8", walk, at=anchor)
        if walk.group is not None and walk.group % 32:
            return no("tensor cores add 32 codes, a group has {}", walk.group, at=anchor)
    return yes


READERS: dict[str, Callable[[Builder, Any], Answer]] = {}  # target -> whether x's codes are read


def reads_codes(b: Builder, user: Any, value: Op) -> bool:
    """Whether all that a node does with a decoded value is a product that reads its codes."""
    if user.name not in ("linear", "fused") or not b.target.claim(user) or not concerns(user):
        return False
    (leaf,) = (k for k, v in outer(Region.of(user)).items() if v is value)
    if Parts.of(Region.of(user)).anchors[0].x is not leaf or not check(user):
        return False
    asked = READERS.get(b.target.name)
    return bool(whole_codes(user) if asked is None else asked(b, user))


# ------------------------------------------------------------------ lowering


def lower(b: Builder, node: Op, why: No | None = None) -> None:
    """why: the codes are not to be read."""
    if not concerns(node):
        anchored.lower(b, node)
        return
    if product(node.shape) == 0:
        (out,) = b.results(node)
        b.target.fill(b, node, out, 0.0)
        b.set(node, out)
        return
    answer = check(node) if why is None else why
    if not answer:
        at = len(b.steps)
        anchored.lower(b, node)
        note(b, at, f"reads the dense weight: {answer}")
        return
    region = Region.of(node)
    parts, found = Parts.of(region), outer(region)
    weights: list[Any] = [found[a.w] for a in parts.anchors]
    left: Any = found[parts.anchors[0].x] if whole_codes(node) else None
    skipped = {a.w for a in parts.anchors} | ({parts.anchors[0].x} if left is not None else set())
    read = {o for n in region.computed() for o in n.operands}
    refs = region.refs(b, read - skipped)
    (out,) = b.results(node)
    walks = [Stored(w.x.type).walk for w in weights]
    shape = parts.anchors[0].shape
    leaves: dict[Any, Ref] = anchored.leaves_of(b, parts, refs)
    memory: list[Ref] = []
    for i, w in enumerate(weights):
        own, scale = Stored(w.x.type).refs(b, w.x)
        memory += own
        if scale is not None:
            leaves[_SCALE, i] = scale.with_(shape=shape, strides=(0,) * (len(shape) - 1) + (1,))
    anchor = anchor_of(b, parts.anchors[0], memory[0])
    if left is not None:
        codes, scales = (b.part(left.x, i) for i in range(2))
        factors = {parts.anchors[0].x: codes}
        leaves[_ROWS] = scales.with_(shape=shape, strides=(*scales.strides[:-1], 0))
    else:
        factors = anchored.left_refs(anchor, b, parts, refs)
    walked = tuple((value, anchor.factor(ref)) for value, ref in factors.items())
    work = CodedProducts(
        anchor.space, Factor(left_of(anchor.node), walked, parts.before),
        tuple(walks), anchor.spread(out),
        tuple((leaf, anchor.spread(ref)) for leaf, ref in leaves.items()),
        partial(scaled, parts=parts), anchor.node.dtype, precision(b),
        comment=tuple(region.comment(b)), whole=left is not None,
    )  # fmt: skip
    _launch(b, node, work, out, [*factors.values(), *memory], list(leaves.values()))
    b.set(node, out)


def anchor_of(b: Builder, node: Any, right: Ref) -> Anchor:
    """The product's axes; its right factor walks none of them."""
    (columns, depth), lead = node.w.shape, len(node.shape) - 1
    b.must_equal((node.x.shape[-1], depth))
    space = Space((), node.shape[:-1], (columns,), (depth,))
    rows = ("rows",) * lead
    return Anchor(node, space, (*rows, "columns"), (*rows, "depth"), right, Walk(node.dtype))


def scaled(t: Tile, sums: list[Element], parts: Parts) -> Element:
    """What follows, on sums times the scales that whole rows of the factors share."""
    made = []
    for i, (name, kept) in enumerate(sums):
        for key in ((_SCALE, i), _ROWS):
            if key in t.values:
                name, _ = t.let(kept, f"{name} * {t.values[key][0]}")
        made.append((name, kept))
    return anchored.after(t, made, parts)


# ------------------------------------------------------------------ launches

FEW_ROWS = 16


def _problem(work: CodedProducts) -> Problem:
    coded: Any = work.rights
    (columns,) = work.space.columns
    kind = "i8" if work.whole else KINDS[work.precision] if work.dtype == f32 else work.dtype.name
    runs = [c.group for c in coded if c.group is not None] if work.whole else []
    full = [w for _, w in work.leaves if any(w.rows) and any(w.columns)]
    return Problem(
        guess(product(work.space.rows)), columns, coded[0].size, kind, coded[0].bits,
        len(coded), all(c.by_unit for c in coded), gcd(*runs) if runs else 0, len(full),
    )  # fmt: skip


def _launch(
    b: Builder, node: Op, work: CodedProducts, out: Ref, factors: Sequence[Ref],
    leaves: Sequence[Ref],
) -> None:  # fmt: skip
    """One launch, or two where depth is split; apart for few rows and for many where only a call
    knows how many there are."""
    rows, p = product(work.space.rows), _problem(work)
    ranges: list[tuple[Problem, Dim, Mapping[Any, int]]] = [(p, 1, {})]
    if not isinstance(rows, int) and guess(rows, 1) <= FEW_ROWS:
        many = sympy.Min(1, floordiv(rows, FEW_ROWS + 1))
        few = replace(p, rows=FEW_ROWS, may_split=False)
        ranges = [(few, 1 - many, extents(rows, FEW_ROWS)), (replace(p, may_split=False), many, {})]
    for one, guard, known in ranges:

        def by(schedule: Schedule, guard: Dim = guard) -> Callable[[Builder], None]:
            return lambda b: _by(b, node, work, out, factors, leaves, schedule, guard)

        found = schedules(one, device(b))
        choose(b, ranked(found, by, _method), GUESS, known)


def _by(
    b: Builder, node: Op, work: CodedProducts, out: Ref, factors: Sequence[Ref],
    leaves: Sequence[Ref], schedule: Schedule, guard: Dim,
) -> None:  # fmt: skip
    splits = dict(schedule.blocks)["splits"]
    made = guarded(coded_products(work, schedule), guard)
    if splits == 1:
        call(b, node, made, [out], [*factors, *leaves])
        return
    s = work.space
    count = product((len(work.rights) * splits, *s.rows, *s.columns))
    parts = whole(b.new_root("arena", node, Tensor((count,), f32, row_major)))
    call(b, node, made, [parts], list(factors), note=f"{splits} parts of the depth")
    sums = guarded(joined(work, splits), guard)
    call(b, node, sums, [out], [parts, *leaves], note="sums of the parts")


def _method(choice: Choice) -> str:
    return "tiles of codes" if dict(choice.schedule.blocks)["dot"] else "lanes of codes"


__all__ = [
    "FACTORS", "READERS", "Stored", "anchor_of", "check", "concerns", "lower", "outer",
    "reads_codes", "scaled", "stored", "whole_codes",
]  # fmt: skip
