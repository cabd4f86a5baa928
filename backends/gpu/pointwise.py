"""Pointwise nodes and regions, and copies: one launch each."""

from __future__ import annotations

from functools import partial
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.triton import scalar
from effc.codegen.triton.pointwise import loop_nest, pointwise
from effc.codegen.triton.scalar import constant
from effc.codegen.triton.tile import Tile
from effc.ir import Op

from ..cpu import pointwise as cpu
from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.moves import MOVES, order_of
from ..plan.regions import Region, broadcast, layout_order
from .lowering import GPU, call, lowers, offsets

is_pointwise = partial(cpu.is_pointwise, language=scalar.TRITON)
check = partial(cpu.check, language=scalar.TRITON)


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    shape = region.outputs[0].shape
    leaves = {leaf: broadcast(b, ref, shape) for leaf, ref in region.refs(b).items()}
    outs = cpu.in_place(b, node, region, list(leaves.values())) or b.results(node)
    refs = [*outs, *leaves.values()]
    nest = Nest(shape, tuple(Operand(r.dtype, r.strides) for r in refs))
    made = pointwise(
        nest.collapsed(layout_order(region.outputs[0].tensor)), list(leaves), region.computed(),
        region.outputs, offsets=offsets(refs), comment=region.comment(b),
    )  # fmt: skip
    call(b, node, made, outs, list(leaves.values()))
    if isinstance(node.type, tuple):
        b.set_results(node, outs)
    else:
        b.set(node, outs[0])


for _name in scalar.EXPRESSIONS:
    lowers(_name, check=check)(lower)

# ------------------------------------------------------------------ copies


def copy_into(b: Builder, node: Op, out: Ref, x: Ref, note: str = "", kind: str = "copy") -> None:
    """out[...] = x[...], element types converted as torch does."""
    nest = Nest(out.shape, (Operand(out.dtype, out.strides), Operand(x.dtype, x.strides)))
    made = pointwise(nest.collapsed(order_of(out)), [node], [], [node], kind="copy",
                     offsets=offsets([out, x]), comment=Region.of(node).comment(b))  # fmt: skip
    call(b, node, made, [out], [x], kind=kind, note=note)


def fill(b: Builder, node: Op, out: Ref, value: Any) -> None:
    """out[...] = value."""

    def body(t: Tile, axes: Any) -> list[Any]:
        if hasattr(value, "free_symbols"):
            return [
                t.let(out.dtype, f"({t.numbers.scalar(value)}).to({scalar.register(out.dtype)})")
            ]
        return [t.let(out.dtype, constant(value, out.dtype))]

    nest = Nest(out.shape, (Operand(out.dtype, out.strides),)).collapsed(order_of(out))
    made = loop_nest(nest, [], 1, body, kind="fill", offsets=offsets([out]),
                     comment=Region.of(node).comment(b))  # fmt: skip
    call(b, node, made, [out], [])


GPU.copy_into, GPU.fill = copy_into, fill
for _name, _move in MOVES.items():
    lowers(_name)(_move)
