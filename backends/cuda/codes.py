"""`linear(decode(quantize(x)), decode(w))` of few rows on binary tensor cores.

Codes of 1 to 8 bits with a scale a row, and zeros or none, in w as in x; the sums are exact and
become floats where scales are multiplied in. Reading p-bit codes of T rows by q-bit ones takes
p T q matrix instructions for each 16 x 256 codes of w, which pass while those come from memory as
long as p T is at most WIDEST. Newer devices than sm_90 emulate the instruction: there, and for
whatever else is refused here, the GPU's product of codes is taken.
"""

from __future__ import annotations

from typing import Any

import torch

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.region import Statements
from effc.codegen.cuda.planes import (
    STEP,
    TILE,
    WIDEST,
    BitProduct,
    bit_product,
    packed_planes,
    planes_of,
)
from effc.ir import DType, Op, Tensor, no, yes
from effc.ir.formats import BitPlanes, Encoded, code_range, decoded, encode
from effc.ir.rewrite import Answer
from effc.ir.symbols import product
from effc.ir.types import DTYPES, row_major

from ..cpu.pointwise import is_pointwise
from ..gpu import codes as gpu
from ..gpu.anchored import Parts
from ..gpu.quantize import holder, takes_quantize
from ..plan.builder import Builder
from ..plan.lowering import Lowering
from ..plan.memory import Ref, whole
from ..plan.regions import Region, broadcast, check_body
from ..plan.steps import KernelCall
from . import fused, products  # noqa: F401  (they fill the table first)
from .lowering import CUDA, call

NATIVE = ("any", "sm_80", "sm_86", "sm_89", "sm_90")  # devices that have the instruction
I32 = DTYPES["i32"]
_BIAS: Any = "bias"  # stands for the anchor's bias among leaves, which are nodes


def check(node: Op) -> Answer:
    """Whether binary tensor cores multiply the codes."""
    if not gpu.concerns(node):
        return no("no product reads codes", at=node)
    if not (answer := gpu.check(node)):
        return answer
    region = Region.of(node)
    parts, found = Parts.of(region), gpu.outer(region)
    if len(parts.anchors) > 1 or parts.before or parts.stores:
        return no("only what follows one product is computed in the kernel of planes", at=node)
    anchor: Any = parts.anchors[0]
    x: Any = found[anchor.x]
    if x.name != "decode" or x.x.name != "quantize":
        return no("the left factor is no decode(quantize(...))", at=node)
    if any(anchor.x in n.operands for n in parts.rest):
        return no("its left factor is also read as numbers", at=node)
    if not (answer := takes_quantize(x.x)):
        return answer
    w: Any = found[anchor.w].x
    answer = _whole_rows(x.x.tensor, holder(x.x.dtype)) and _whole_rows(w.tensor, w.dtype)
    if not answer:
        return answer
    rows = product(anchor.shape[:-1])
    if not isinstance(rows, int) or not rows or rows * x.x.dtype.bits > WIDEST:
        return no("{} rows of {} are more than {} planes", rows, x.x.dtype, WIDEST, at=node)
    if not (s := _product(anchor, found)).fits:
        return no(
            "{} codes of {} and {} bits are summed to more than 32", s.depth, s.p, s.q, at=node
        )
    if parts.result.tensor.layout != row_major:
        return no("a result in another layout has no CUDA kernel", at=parts.result)
    return check_body(region, lambda n: yes if n is anchor else is_pointwise(n))


def _whole_rows(t: Tensor, zeros: DType) -> Answer:
    """One scale a row, and zeros that are codes: also held as `zeros`, where they are made here."""
    f: Any = t.format
    if t.dtype.run != (1, 0):
        return no("five levels are no planes of bits")
    if f.group is not None and f.group < t.shape[-1]:
        return no("planes are counted along whole rows; {} has groups of {}", t.dtype, f.group)
    if f.zero is not None and f.zero not in (t.dtype, zeros):
        return no("zeros of {} are no codes", f.zero)
    return yes


def _product(anchor: Any, found: dict[Op, Any]) -> BitProduct:
    x: Any = found[anchor.x].x
    w: Any = found[anchor.w].x
    f, g = x.format, w.tensor.format
    columns, depth = anchor.w.shape
    return BitProduct(
        product(anchor.shape[:-1]), columns, depth, x.dtype.bits, w.dtype.bits,
        code_range(x.dtype)[0] < 0, code_range(w.dtype)[0] < 0, (f.scale, g.scale),
        None if f.zero is None else holder(f.zero), g.zero is not None,
    )  # fmt: skip


# ------------------------------------------------------------------ what is read of the constant


def _planes(value: Encoded) -> torch.Tensor:
    t, codes = value.type, value["codes"]
    if not isinstance(codes, Encoded):
        codes = encode(codes, t.with_(format=BitPlanes()))
    return packed_planes(codes["planes"])


def _sums(value: Encoded) -> torch.Tensor:
    t = value.type
    types = t.format.parts(t)
    return decoded(types["codes"], value["codes"], torch.int64).sum(1).to(torch.int32)


def _scale(value: Encoded) -> torch.Tensor:
    return value["scale"].flatten().contiguous()


def _zero(value: Encoded) -> torch.Tensor:
    return value["zero"].flatten().to(torch.int32)


# ------------------------------------------------------------------ lowering


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    parts, found = Parts.of(region), gpu.outer(region)
    anchor: Any = parts.anchors[0]
    x: Any = found[anchor.x].x
    w: Any = found[anchor.w].x
    s, shape, comment = _product(anchor, found), anchor.shape, region.comment(b)
    read = {o for n in region.computed() for o in n.operands} - {anchor.x, anchor.w}
    refs = region.refs(b, read)
    after = {o for n in parts.rest for o in n.operands}
    leaves: dict[Any, Ref] = {k: broadcast(b, r, shape) for k, r in refs.items() if k in after}
    if anchor.bias is not None:
        strides = (0,) * (len(shape) - 1) + refs[anchor.bias].strides
        leaves[_BIAS] = refs[anchor.bias].with_(shape=shape, strides=strides)
    planes, sums = _packed(b, node, s, b.part(x, 0), comment)
    rows, columns = s.columns, -(-s.columns // TILE) * TILE
    words = columns * s.steps * STEP * s.q // 32
    fragments = b.derived_ref(w, f"{s.q} planes of bits", _planes, words, "cuda", I32)
    scale = b.derived_ref(w, "scales", _scale, rows, "cuda", s.scales[1])
    ins = [planes, fragments, b.part(x, 1), scale]
    if s.x_zero is not None:
        ins += [b.part(x, 2), b.derived_ref(w, "sums of rows", _sums, rows, "cuda", I32)]
    if s.w_zero:
        ins += [b.derived_ref(w, "zeros", _zero, rows, "cuda", I32), sums]
    (out,) = b.results(node)
    walked = (out, *leaves.values())

    def body(t: Statements, total: Any) -> Any:
        text = total[0] if anchor.bias is None else f"{total[0]} + {t.values[_BIAS][0]}"
        t.values[anchor] = t.let(anchor.dtype, text, True)
        for n in parts.rest:
            t.add(n)
        return t.values[parts.result]

    made = bit_product(
        s, Nest(shape, tuple(Operand(r.dtype, r.strides) for r in walked)), list(leaves), body,
        offsets=[r.offset for r in walked], comment=comment,
    )  # fmt: skip
    call(b, node, made, [out], [*ins, *leaves.values()])
    b.set(node, out)


def _packed(
    b: Builder, node: Op, s: BitProduct, codes: Ref, comment: list[str]
) -> tuple[Ref, Ref]:  # fmt: skip
    """Planes of the codes and the sums of their rows, made once for all products that read them."""
    stride = codes.strides[-2] if len(codes.shape) > 1 else 0
    made = planes_of(s, codes.dtype, stride, comment)
    for step in b.steps:
        if isinstance(step, KernelCall) and step.kernel.name == made.kernel.name:
            if step.refs[-1] == codes:
                return step.refs[0], step.refs[1]
    planes, sums = (
        whole(b.new_root("arena", node, Tensor((n,), I32))) for n in (s.x_words, s.rows)
    )
    call(b, node, made, [planes, sums], [codes])
    return planes, sums


def _reads(b: Builder, node: Op) -> Answer:
    """What `decode` asks: whether the codes of x are read."""
    return (_here(b) and check(node)) or gpu.whole_codes(node)


def _here(b: Builder) -> Answer:
    name = b.target.device.name
    return yes if name in NATIVE else no("{} emulates binary tensor cores", name)


def _register(op: str) -> None:
    """Ours where `check` says yes and the device has the instruction, else what was there."""
    other = CUDA.table[op]

    def lower_one(b: Builder, node: Op) -> None:
        (lower if _here(b) and check(node) else other.lower)(b, node)

    CUDA.table[op] = Lowering(other.check, lower_one)


for _name in ("linear", "fused"):
    _register(_name)
gpu.READERS[CUDA.name] = _reads

__all__ = ["check", "lower"]
