"""Reductions, softmax and norms, alone or with pointwise ops around them: row kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.program import Value
from effc.codegen.triton.rows import Body, RowProgram, row_kernels
from effc.ir import Op, Tensor
from effc.ir.rewrite import Answer

from ..cpu import rows
from ..cpu.rows import ROW_OPS, Space, concerns
from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from .lowering import call as launch
from .lowering import lowers, offsets
from .pointwise import is_pointwise


def check(node: Op) -> Answer:
    return rows.check(node, is_pointwise)


def lower(b: Builder, node: Op) -> None:
    rows.lower_region(b, node, emit, call)


def call(
    b: Builder, node: Op, space: Space, shown: Sequence[Ref], outs: Sequence[Ref],
    leaves: Sequence[tuple[Any, bool]], refs: Sequence[Ref], order: Sequence[int], body: Body,
    comment: list[str], few: bool = False,
) -> None:  # fmt: skip
    """Make the kernels over `space` and launch them."""
    operands = tuple(Operand(r.dtype, r.strides) for r in (*shown, *refs))
    made = row_kernels(
        Nest(space.shape, operands), leaves, len(outs), space.reduced, order, body,
        offsets=offsets([*shown, *refs]), few=few, comment=comment,
    )  # fmt: skip
    if made.first is None:
        launch(b, node, made.made, outs, refs)
        return
    parts = [whole(b.new_root("arena", node, Tensor((n,), dtype))) for dtype, n in made.buffers]
    launch(b, node, made.first, parts, refs, note="parts of rows")
    launch(b, node, made.made, outs, [*refs, *parts])


# ------------------------------------------------------------------ what each op does to a row


def _reduced(p: RowProgram, node: Any, x: Value) -> Value:
    return p.reduce(node.name, x, node.dtype)


def _softmax(p: RowProgram, x: Value, work: Any, log: bool) -> Value:
    top = p.reduce("amax", x, work)
    total = p.reduce("powers", x, work)
    if log:
        return p.let(work, "({0} - {1}) - {2}", x, top, p.let(work, "fn.log({0})", total))
    share = p.let(work, "fn.reciprocal({0})", total)
    return p.let(work, "fn.exp({0} - {1}) * {2}", x, top, share)


def normalised(
    p: RowProgram, x: Value, work: Any, eps: float, centred: bool, weight: Value | None,
    bias: Value | None,
) -> Value:  # fmt: skip
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias; without a mean: rms."""
    if centred:
        mean = p.reduce("mean", x, work)
        squares = p.reduce("squares", x, work)
        x = p.let(work, "{0} - {1}", x, mean)
    else:
        squares = p.reduce("sum", p.let(work, "{0} * {0}", x), work)
    scale = p.let(work, f"fn.rsqrt(fn.div({{0}}, {p.count(work)}) + {eps!r})", squares)
    y = p.let(work, "{0} * {1}", x, scale)
    if weight is not None:
        y = p.let(work, "{0} * {1}", y, p.cast(weight, work))
    return y if bias is None else p.let(work, "{0} + {1}", y, p.cast(bias, work))


emit = rows.emitter(_reduced, _softmax, normalised)

for _name in ROW_OPS:
    lowers(_name, check=check)(lower)

__all__ = ["call", "check", "concerns", "emit", "lower", "normalised"]
