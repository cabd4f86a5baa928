"""Activations to codes: a program finds the range of a group, and stores its scale and codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from effc.ir import DType
from effc.ir.symbols import Dim

from .kernel import Made, Schedule, kernel, power_of_two
from .numbers import Numbers
from .scalar import storage
from .tile import pointer

WIDEST = 1 << 15  # elements of a group: a program of 32 warps holds them all
EACH = 16  # elements that a thread is to hold


@dataclass(frozen=True)
class Quantization:
    """`rows` of `depth` numbers, each split into `groups` of `size`; codes from least to largest.

    zero: its element type; None: the range is symmetric. tiny: the least scale. row, step: strides.
    """

    rows: Dim
    depth: int
    size: int
    groups: int
    least: int
    largest: int
    x: DType
    codes: DType
    scale: DType
    zero: DType | None
    tiny: float
    row: Dim
    step: Dim
    offset: Dim = 0


def quantization(q: Quantization, comment: Iterable[str] = ()) -> Made:
    """The kernel: pointers are those of the codes, of the scales, of the zeros if any, of x.

    (ABQ-LLM, section 2.1, with 0 always in the range.)
    """
    numbers, block = Numbers(), power_of_two(q.size)
    warps = min(32, max(1, power_of_two(block // (EACH * 32))))
    given = [pointer("yp", q.codes), pointer("sp", q.scale)]
    given += [pointer("zp", q.zero)] if q.zero is not None else []
    return kernel(
        "quantize", "codes_quantize", pointers=[*given, pointer("xp", q.x, q.offset)],
        numbers=numbers, schedule=Schedule(warps, 1), grid=[q.rows, q.groups], comment=comment,
        groups=str(q.groups), size=q.size, depth=q.depth, block=block, x_row=numbers.text(q.row),
        x_step=numbers.text(q.step), largest=q.largest, least=q.least, scale=storage(q.scale),
        zero=storage(q.zero) if q.zero is not None else "", tiny=repr(q.tiny),
        codes=storage(q.codes), at=" + group" if q.groups > 1 else "",
    )  # fmt: skip


__all__ = ["WIDEST", "Quantization", "quantization"]
