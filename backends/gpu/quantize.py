"""`quantize` as a kernel of rows.

A quantised value is its parts in memory: codes, a byte each, scales, and zeros if there are any.
"""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.triton.codes_quantize import WIDEST, Quantization, quantization
from effc.ir import DType, no, yes
from effc.ir.formats import GroupQuant, code_range, least_scale
from effc.ir.rewrite import Answer
from effc.ir.symbols import product
from effc.ir.types import DTYPES, Dense, Tensor, row_major

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.moves import packed_ref
from ..plan.regions import Region
from .lowering import call, lowers

FLOATS = ("f16", "bf16", "f32")


def holder(dtype: DType) -> DType:
    """What a code is held in while a plan runs: a byte."""
    return DTYPES["i8" if code_range(dtype)[0] < 0 else "u8"]


def takes(t: Tensor) -> Answer:
    """Whether kernels make, and decode, such a value."""
    f: Any = t.format
    if not isinstance(f, GroupQuant) or not isinstance(f.codes, Dense) or t.dtype.bits > 8:
        return no("{} of {} have no kernel", f, t.dtype)
    if f.scale.name not in FLOATS:
        return no("scales of {} have no kernel", f.scale)
    if f.zero is not None and f.zero.name not in (*FLOATS, "i32") and f.zero.bits > 8:
        return no("zeros of {} have no kernel", f.zero)
    return yes


def takes_quantize(node: Any) -> Answer:
    t, size = node.tensor, node.shape[-1]
    if not (answer := takes(t)):
        return answer
    if node.x.dtype.name not in FLOATS:
        return no("{} has no kernel that quantises it", node.x.dtype, at=node)
    if not isinstance(size, int) or not 0 < min(size, t.format.group or size) <= WIDEST:
        return no("a group of {} numbers; a program holds {}", size, WIDEST, at=node)
    return yes


def held_as(dtype: DType) -> DType:
    """The element type of a part in memory."""
    return holder(dtype) if dtype.is_code else dtype


@lowers("quantize", check=takes_quantize, formats=True)
def quantize(b: Builder, node: Any) -> None:
    t, f, depth = node.tensor, node.format, node.shape[-1]
    parts = f.parts(t).values()
    outs = [whole(b.own(node, Tensor(p.shape, held_as(p.dtype)))) for p in parts]
    x = b.ref(node.x)
    rows = lead_of(x)
    if rows.rank > 1:
        x = packed_ref(b, node.x, x, row_major)
        rows = lead_of(x)
    if product(node.shape) != 0:
        least, largest = code_range(t.dtype)
        q = Quantization(
            product(node.shape[:-1]), depth, min(depth, f.group or depth), outs[1].shape[-1],
            least, largest, x.dtype, outs[0].dtype, f.scale,
            outs[2].dtype if f.zero is not None else None, least_scale(f.scale),
            rows.operands[0].strides[0] if rows.rank else 0, x.strides[-1], x.offset,
        )  # fmt: skip
        made = quantization(q, Region.of(node).comment(b))
        call(b, node, made, outs, [x], note=f"{t.dtype} codes")
    b.set_results(node, outs)


def lead_of(x: Ref) -> Nest:
    """Everything but the last dimension, in as few dimensions as its strides allow."""
    return Nest(x.shape[:-1], (Operand(x.dtype, x.strides[:-1]),)).collapsed()


__all__ = ["FLOATS", "held_as", "holder", "lead_of", "quantize", "takes", "takes_quantize"]
