"""Reductions, softmax and norms with what is pointwise around them, where rows lie in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cuda.rows import Body, row_kernel
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer

from ..cpu import rows
from ..cpu.rows import ROW_OPS, Space, concerns, space_of
from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.regions import Region, layout_order
from .lowering import call as launch
from .lowering import prefer


def check(node: Op) -> Answer:
    answer = rows.check(node)
    if not answer:
        return answer
    main = next(n for n in Region.of(node).nodes if n.name in ROW_OPS)
    reduced = space_of(main).reduced
    order = layout_order(main.operands[0].tensor)
    if set(order[-len(reduced) :]) != set(reduced):
        return no("elements of a row do not lie together", at=main)
    return yes


def lower(b: Builder, node: Op) -> None:
    rows.lower_region(b, node, rows.emit, call)


def call(
    b: Builder, node: Op, space: Space, shown: Sequence[Ref], outs: Sequence[Ref],
    leaves: Sequence[tuple[Any, bool]], refs: Sequence[Ref], order: Sequence[int], body: Body,
    comment: list[str],
) -> None:  # fmt: skip
    """Make the row kernel over `space` and launch it."""
    every = (*shown, *refs)
    nest = Nest(space.shape, tuple(Operand(r.dtype, r.strides) for r in every))
    made = row_kernel(nest, leaves, len(outs), space.reduced, order, body,
                      offsets=[r.offset for r in every], comment=comment)  # fmt: skip
    launch(b, node, made, outs, refs)


for _name in ROW_OPS:
    prefer(_name, check, lower, lambda node: False)

__all__ = ["check", "concerns", "lower"]
