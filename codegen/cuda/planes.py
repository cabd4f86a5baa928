"""Products of codes on binary tensor cores: each bit of a code in a plane of its own.

For few rows of x, whose planes are columns of the matrix instruction; w is read once. Nothing is
rounded before the epilogue, which is of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.codegen.cpp.loops import Nest
from effc.codegen.cpp.region import Statements, store
from effc.ir import DType
from effc.ir.symbols import Dim
from effc.ir.types import DTYPES

from .kernel import WARP, Made, Numbers, Schedule, kernel, pointer
from .statements import row_places

STEP = 256  # codes of a matrix instruction
TILE, BLOCK = 16, 8  # rows of w and planes of x in one
WIDEST = 64  # planes of x: sums of more take registers that loads in flight need
WARPS = 4
F32, I32 = DTYPES["f32"], DTYPES["i32"]

Body = Callable[[Statements, tuple[str, DType, bool]], tuple[str, DType, bool]]


@dataclass(frozen=True)
class BitProduct:
    """rows of p-bit codes of x, `columns` rows of q-bit codes of w, `depth` codes in each.

    signed: in two's complement. zero: the element type of the zeros of x; None: it has none.
    """

    rows: int
    columns: int
    depth: int
    p: int
    q: int
    x_signed: bool
    w_signed: bool
    scales: tuple[DType, DType]  # of x, of w
    x_zero: DType | None = None
    w_zero: bool = False

    @property
    def steps(self) -> int:
        return -(-self.depth // STEP)

    @property
    def blocks(self) -> int:
        return -(-self.rows * self.p // BLOCK)

    @property
    def fits(self) -> bool:
        """Whether every sum is a number of 32 bits."""
        return self.depth * ((1 << self.p) - 1) * ((1 << self.q) - 1) < 1 << 31

    @property
    def x_words(self) -> int:
        """32-bit words that the planes of x lie in."""
        return self.blocks * self.steps * WARP * 2


def packed_planes(planes: torch.Tensor) -> torch.Tensor:
    """[bits, rows, words] of ir.formats.BitPlanes -> the fragments of w, flat."""
    bits, rows, words = planes.shape
    padded = torch.nn.functional.pad(planes, (0, -words % 8, 0, -rows % TILE))
    # plane, tile, half of the rows, row g; step, half of the words, word t
    parts = padded.reshape(bits, -1, 2, 8, padded.shape[2] // 8, 2, 4)
    return parts.permute(1, 0, 4, 3, 6, 5, 2).flatten().contiguous()


def planes_of(s: BitProduct, codes: DType, stride: Dim, comment: Iterable[str] = ()) -> Made:
    """Codes of x as planes. A call's pointers: the planes, the sum of each row, the codes."""
    numbers = Numbers()
    return kernel(
        "planes_pack", "planes_pack", numbers=numbers, schedule=Schedule(WARPS, 1),
        shared=4 * WARPS,
        pointers=[pointer("planes", I32, written=True), pointer("sums", I32, written=True),
                  pointer("codes", codes)],
        grid=[s.rows], comment=comment, P=s.p, WARPS=WARPS, stride=numbers.text(stride),
        depth=s.depth, steps=s.steps,
    )  # fmt: skip


def bit_product(
    s: BitProduct, nest: Nest, leaves: Sequence[Any], body: Body, *, offsets: Sequence[Dim] = (),
    comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """The sums with scales and zeros, and what follows.

    nest: the result's dimensions, its columns last; operands are the result's, then those of the
    leaves, with offsets likewise. A call's pointers: the result, planes of x, fragments of w,
    scales of x and w; with zeros of x those and the sums of w's rows; with zeros of w those (i32)
    and the sums of x's rows; the leaves.
    """
    numbers = Numbers()
    outer = Nest(nest.sizes[:-1], tuple(type(o)(o.dtype, o.strides[:-1]) for o in nest.operands))
    outer = outer.collapsed().at_least(1)
    names = ["y0", *(f"x{i}" for i in range(len(leaves)))]
    statements = Statements(numbers)  # type: ignore[arg-type]
    for leaf, name, operand in zip(leaves, names[1:], nest.operands[1:], strict=True):
        at = numbers.text(operand.strides[-1])
        statements.load(leaf, operand.dtype, f"{name} + column * {at}", True)
    value = body(statements, ("sum", F32, True))
    y = nest.operands[0]
    last = store(f"y0 + column * {numbers.text(y.strides[-1])}", y.dtype, value)
    places = row_places(names, outer.operands, outer.sizes, numbers)
    own = [pointer(f"p_{n}", o.dtype, at, written=n == "y0") for n, o, at in
           zip(names, nest.operands, list(offsets) or [0] * len(names), strict=True)]  # fmt: skip
    factors = [pointer("x", I32), pointer("w", I32), pointer("x_scale", s.scales[0]),
               pointer("w_scale", s.scales[1])]  # fmt: skip
    if s.x_zero is not None:
        factors += [pointer("x_zero", s.x_zero), pointer("w_sums", I32)]
    if s.w_zero:
        factors += [pointer("w_zero", I32), pointer("x_sums", I32)]
    return kernel(
        "planes", "planes", pointers=[own[0], *factors, *own[1:]], numbers=numbers,
        schedule=Schedule(WARPS, 1), shared=WARPS * s.blocks * BLOCK * TILE * 4,
        grid=[-(-s.columns // TILE)], comment=comment, P=s.p, Q=s.q, BLOCKS=s.blocks, WARPS=WARPS,
        x_signed=_flag(s.x_signed), w_signed=_flag(s.w_signed), steps=s.steps, rows=s.rows,
        columns=s.columns, depth=s.depth, x_zero=s.x_zero is not None, w_zero=s.w_zero,
        places=places, body=[*statements.hoisted, *statements.body, last],
    )  # fmt: skip


def _flag(value: bool) -> str:
    return "true" if value else "false"


__all__ = ["WIDEST", "BitProduct", "bit_product", "packed_planes", "planes_of"]
