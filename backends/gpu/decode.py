"""`decode` of a value made while a plan runs, for whoever reads its numbers and not its codes."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.triton.pointwise import loop_nest
from effc.codegen.triton.tile import Element, Tile
from effc.ir import no, yes
from effc.ir.rewrite import Answer
from effc.ir.types import f32

from ..plan.builder import Builder
from ..plan.regions import Region
from .codes import reads_codes
from .lowering import call, lowers, offsets
from .quantize import FLOATS, held_as, takes, takes_quantize


def check(node: Any) -> Answer:
    t = node.x.tensor
    if node.x.name not in ("quantize", "encoded"):
        return no("what {} gives is decoded in one piece", node.x.name, at=node)
    if not (answer := takes(t)):
        return answer
    if node.x.name == "quantize" and not (answer := takes_quantize(node.x)):
        return answer
    group = t.format.group
    if group is not None and not (isinstance(t.shape[-1], int) and t.shape[-1] % group == 0):
        return no("groups of {} do not fill a row of {}", group, t.shape[-1], at=node)
    return yes if node.dtype.name in FLOATS else no("{} is decoded by no kernel", node.dtype)


@lowers("decode", check=check, formats=True)
def decode(b: Builder, node: Any) -> None:
    """Nothing where all who read it read the codes; else scale * (code - zero)."""
    users = b.graph.users[node]
    if node not in b.graph.outputs and all(reads_codes(b, u, node) for u in users):
        return
    f, size = node.x.tensor.format, node.shape[-1]
    parts = [b.part(node.x, i) for i in range(2 + (f.zero is not None))]
    (out,) = b.results(node)
    group = size if f.group is None else f.group
    shape = (*node.shape[:-1], 1 if f.group is None else size // group, group)
    walked = [
        Operand(held_as(r.dtype), (*r.strides[:-1], r.strides[-1] * group, r.strides[-1]))
        for r in (out, parts[0])
    ]
    walked += [Operand(held_as(r.dtype), (*r.strides, 0)) for r in parts[1:]]

    def body(t: Tile, axes: Any) -> list[Element]:
        code, scale, *zero = (f"{t.values[i][0]}.to(tl.float32)" for i in range(len(parts)))
        return [t.let(f32, f"({code} - {zero[0]}) * {scale}" if zero else f"{code} * {scale}")]

    made = loop_nest(
        Nest(shape, tuple(walked)).collapsed(), list(range(len(parts))), 1, body,
        offsets=offsets([out, *parts]), kind="decode", comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, [out], parts, note="its numbers are read, not its codes")
    b.set(node, out)


__all__ = ["check", "decode"]
