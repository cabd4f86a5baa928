"""Lowerings of `quantize` and `decode`: codes of activations, numbers for who reads no codes."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import loop_nest
from effc.codegen.cpp.products import F32, core
from effc.codegen.cpp.region import Statements
from effc.ir import Tensor, no, yes
from effc.ir.formats import GroupQuant, code_range
from effc.ir.rewrite import Answer
from effc.ir.types import Dense

from ..plan.builder import Builder
from ..plan.host import fallback
from ..plan.memory import sliced, whole
from ..plan.regions import Region
from . import codes
from .codes import KINDS, UNIT
from .lowering import lowers
from .operands import lined_up, up


@lowers("quantize", check=codes.quantised, formats=True)
def _quantize(b: Builder, node: Any) -> None:
    """Codes in rows of whole units, filled up with zeros, as products of codes read them."""
    t, f = node.tensor, node.format
    types = f.parts(t)
    held = codes.holder(t.dtype)
    size = t.shape[-1]
    room = b.own(node, Tensor((*t.shape[:-1], up(size, UNIT)), held))
    scale = b.own(node, types["scale"])
    found = [sliced(whole(room), t.rank - 1, 0, size), whole(scale)]
    if f.zero is not None:
        found.append(whole(b.own(node, types["zero"])))
    x, rows = lined_up(b, node.x)
    numbers = (
        rows.sizes[0], size, rows.operands[0].strides[0], up(size, UNIT), *code_range(t.dtype),
        KINDS[f.scale], f.group or 0, int(f.zero is not None), KINDS[x.dtype],
    )  # fmt: skip
    b.kernel(core("quantize"), node, [found[0], found[1], found[-1]], [x], numbers,
             note=f"{t.dtype} codes")  # fmt: skip
    b.set_results(node, found)


def _takes_decode(node: Any) -> Answer:
    f, t = node.x.tensor.format, node.x.tensor
    if node.x.name not in ("quantize", "encoded") or not isinstance(f, GroupQuant):
        return no("{} is decoded in a way of its own", f, at=node)
    if not isinstance(f.codes, Dense) or node.dtype not in KINDS:
        return no("{} of {} is decoded in a way of its own", node.dtype, f, at=node)
    if node.x.name == "quantize":
        return codes.quantised(node.x)
    if t.dtype.is_code or (f.zero is not None and f.zero.is_code):
        return no("{} lie a byte each", t.dtype, at=node)
    return yes


@lowers("decode", check=_takes_decode, formats=True)
def _decode(b: Builder, node: Any) -> None:
    """Nothing where all who read it read the codes; else scale * (code - zero)."""
    users = b.graph.users[node]
    if node not in b.graph.outputs and all(codes.reads_codes(b, u, node) for u in users):
        return
    f, size = node.x.tensor.format, node.shape[-1]
    if f.group is not None and (not isinstance(size, int) or size % f.group):
        fallback(b, node, no("groups of {} do not fill a row", f.group, at=node))
        return
    parts = [b.part(node.x, i) for i in range(2 + (f.zero is not None))]
    out = whole(b.own(node, node.tensor))
    by_group = size if f.group is None else f.group
    groups = 1 if f.group is None else size // f.group
    shape = (*node.shape[:-1], groups, by_group)
    operands = []
    for ref in (out, parts[0]):
        *lead, last = ref.strides
        operands.append(Operand(ref.dtype, (*lead, last * by_group, last)))
    operands += [Operand(ref.dtype, (*ref.strides, 0)) for ref in parts[1:]]

    def body(s: Statements) -> list[Any]:
        v = [s.values[i][0] for i in range(len(parts))]
        code = f"float({v[0]})" if len(v) == 2 else f"(float({v[0]}) - float({v[2]}))"
        return [s.let(F32, f"{code} * {v[1]}", True)]

    nest = Nest(shape, tuple(operands)).collapsed()
    made = loop_nest(
        nest, list(range(len(parts))), 1, body, kind="decode", comment=Region.of(node).comment(b)
    )
    b.kernel(made.kernel, node, [out], parts, made.numbers)
    b.set(node, out)


__all__: list[str] = []
