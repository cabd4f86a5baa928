"""Gathers, made tensors, and rotary position embedding. Copies are those of the cpu's MOVES."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.triton.index import embedding
from effc.codegen.triton.pointwise import loop_nest, update
from effc.codegen.triton.scalar import register
from effc.codegen.triton.tile import Tile

from ..plan.builder import Builder
from ..plan.memory import whole
from ..plan.moves import full, order_of, real_value, rope_check, rope_pairs, updated
from ..plan.regions import Region
from .lowering import call, lowers, offsets

lowers("full", check=real_value)(full)


@lowers("update")
def _update(b: Builder, node: Any) -> None:
    """A copy to where `start` says, into the memory of x."""
    out, place, new, (last, step) = updated(b, node)
    nest = Nest(new.shape, (Operand(out.dtype, out.strides), Operand(new.dtype, new.strides)))
    made = update(
        nest.collapsed(order_of(place)), last, step, offsets=offsets([place, new]),
        comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, [place], [new, whole(b.error_word()), b.ref(node.start)])
    b.set(node, out)


@lowers("embedding")
def _embedding(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    table, ids = b.ref(node.table), b.ref(node.ids)
    operands = (Operand(out.dtype, out.strides), Operand(ids.dtype, (*ids.strides, 0)))
    made = embedding(
        Nest(node.shape, operands), table.shape[0], Operand(table.dtype, table.strides),
        offsets=offsets([out, table, ids]), comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, [out, whole(b.error_word())], [table, ids])
    b.set(node, out)


@lowers("arange", check=real_value)
def _arange(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    wide = "tl.float64" if node.dtype.is_float else "tl.int64"

    def number(t: Tile, value: Any) -> str:
        if hasattr(value, "free_symbols"):
            return f"({t.numbers.scalar(value)}).to({wide})"
        return repr(value)

    def body(t: Tile, axes: Any) -> list[Any]:
        steps = f"{axes[-1].index}.to({wide}) * {number(t, node.step)} + {number(t, node.start)}"
        return [t.let(node.dtype, f"({steps}).to({register(node.dtype)})")]

    made = loop_nest(Nest(node.shape, (Operand(out.dtype, out.strides),)), [], 1, body,
                     kind="arange", comment=Region.of(node).comment(b))  # fmt: skip
    call(b, node, made, [out], [])
    b.set(node, out)


@lowers("rope", check=rope_check)
def _rope(b: Builder, node: Any) -> None:
    """Two elements at a time: (x1 c1 - x2 s1, x2 c2 + x1 s2)."""
    out, outs, refs = rope_pairs(b, node)

    def body(t: Tile, axes: Any) -> list[Any]:
        v = {name: t.values[name][0] for name in refs}
        return [
            t.let(node.dtype, f"{v['x1']} * {v['c1']} - {v['x2']} * {v['s1']}"),
            t.let(node.dtype, f"{v['x2']} * {v['c2']} + {v['x1']} * {v['s2']}"),
        ]

    ins = list(refs.values())
    nest = Nest(outs[0].shape, tuple(Operand(r.dtype, r.strides) for r in (*outs, *ins)))
    made = loop_nest(
        nest.collapsed(), list(refs), 2, body, kind="rope", offsets=offsets([*outs, *ins]),
        comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, outs, ins)
    b.set(node, out)
