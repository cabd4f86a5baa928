"""Copies between two ways to walk memory, made tensors, and rotary embedding."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import loop_nest, pointwise, transpose, update
from effc.codegen.cpp.region import Statements
from effc.codegen.cpp.scalar import literal, register
from effc.ir import Op

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.moves import (
    MOVES,
    full,
    order_of,
    real_value,
    rope_check,
    rope_pairs,
    updated,
)
from ..plan.regions import Region
from .lowering import CPU, lowers

# ------------------------------------------------------------------ copies


def copy_into(b: Builder, node: Op, out: Ref, x: Ref, note: str = "", kind: str = "copy") -> None:
    """out[...] = x[...], element types converted as torch does."""
    nest = Nest(out.shape, (Operand(out.dtype, out.strides), Operand(x.dtype, x.strides)))
    nest = nest.collapsed(order_of(out))
    comment = Region.of(node).comment(b)
    made = transpose(nest, comment=comment)
    made = made or pointwise(nest, [node], [], [node], kind="copy", comment=comment)
    b.kernel(made.kernel, node, [out], [x], made.numbers, kind=kind, note=note)


def fill(b: Builder, node: Op, out: Ref, value: Any) -> None:
    """out[...] = value."""

    def body(s: Statements) -> list[Any]:
        text = s.numbers.scalar(value) if hasattr(value, "free_symbols") else None
        if text is None:
            return [s.let(out.dtype, literal(value, out.dtype), False)]
        return [s.let(out.dtype, f"effc::cast<{register(out.dtype)}>({text})", False)]

    nest = Nest(out.shape, (Operand(out.dtype, out.strides),)).collapsed(order_of(out))
    made = loop_nest(nest, [], 1, body, kind="fill", comment=Region.of(node).comment(b))
    b.kernel(made.kernel, node, [out], [], made.numbers)


CPU.copy_into, CPU.fill = copy_into, fill
for _name, _move in MOVES.items():
    lowers(_name)(_move)


@lowers("update")
def _update(b: Builder, node: Any) -> None:
    """A copy to where `start` says, into the memory of x."""
    out, place, new, (last, step) = updated(b, node)
    nest = Nest(new.shape, (Operand(out.dtype, out.strides), Operand(new.dtype, new.strides)))
    made = update(nest.collapsed(order_of(place)), last, step, comment=Region.of(node).comment(b))
    b.kernel(made.kernel, node, [place], [new, whole(b.error_word()), b.ref(node.start)],
             made.numbers)  # fmt: skip
    b.set(node, out)


# ------------------------------------------------------------------ made tensors


lowers("full", check=real_value)(full)


@lowers("arange", check=real_value)
def _arange(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    wide = "double" if node.dtype.is_float else "int64_t"

    def number(s: Statements, value: Any) -> str:
        if hasattr(value, "free_symbols"):
            return f"effc::cast<{wide}>({s.numbers.scalar(value)})"
        return f"{wide}({value!r})"

    def body(s: Statements) -> list[Any]:
        text = f"{wide}(j) * {number(s, node.step)} + {number(s, node.start)}"
        return [s.let(node.dtype, f"effc::cast<{register(node.dtype)}>({text})", True)]

    nest = Nest(node.shape, (Operand(out.dtype, out.strides),))
    made = loop_nest(nest, [], 1, body, kind="arange", comment=Region.of(node).comment(b))
    b.kernel(made.kernel, node, [out], [], made.numbers)
    b.set(node, out)


# ------------------------------------------------------------------ rotary embedding


@lowers("rope", check=rope_check)
def _rope(b: Builder, node: Any) -> None:
    """Two elements at a time: (x1 c1 - x2 s1, x2 c2 + x1 s2)."""
    out, outs, refs = rope_pairs(b, node)

    def body(s: Statements) -> list[Any]:
        v = {name: s.values[name][0] for name in refs}
        s.work += 4
        return [
            s.let(node.dtype, f"{v['x1']} * {v['c1']} - {v['x2']} * {v['s1']}", True),
            s.let(node.dtype, f"{v['x2']} * {v['c2']} + {v['x1']} * {v['s2']}", True),
        ]

    operands = tuple(Operand(r.dtype, r.strides) for r in (*outs, *refs.values()))
    nest = Nest(outs[0].shape, operands).collapsed()
    made = loop_nest(nest, list(refs), 2, body, kind="rope", comment=Region.of(node).comment(b))
    b.kernel(made.kernel, node, outs, list(refs.values()), made.numbers)
    b.set(node, out)


__all__ = ["copy_into", "fill"]
