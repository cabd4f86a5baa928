"""What several passes ask about operands, and how a pass without the rule engine reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from effc.ir import DType, Graph, NearMiss, No, Op, Tensor, no, yes
from effc.ir.rewrite import Answer, Journal

from .base import Context


def is_number(value: Any) -> bool:
    """A plain int or float (not a bool, not a size that only a call knows)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def power_of_two(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and math.frexp(value)[0] in (0.5, -0.5)


def holds(wide: DType, narrow: DType) -> bool:
    """Every value of `narrow` is a value of `wide`."""
    if wide == narrow or (narrow.kind == "bool" and wide.kind != "bool"):
        return True
    mantissa = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}
    if narrow.name in mantissa:
        fits = {"bf16": ("f32", "f64"), "f16": ("f32", "f64"), "f32": ("f64",)}
        return wide.name in fits.get(narrow.name, ())
    if narrow.kind != "int" or narrow.bits < 8:
        return False
    unsigned = narrow.name.startswith("u")
    if wide.name in mantissa:
        return narrow.bits - (not unsigned) <= mantissa[wide.name]
    if wide.kind != "int":
        return False
    if wide.name.startswith("u"):
        return unsigned and wide.bits > narrow.bits
    return wide.bits > narrow.bits


def reassociates(dtype: DType) -> Answer:
    """Whether a different order of operations stays at rounding level in this element type.

    In 16 bits a rounding is 2**-9 or 2**-11, far above what `exact("rounding")` promises.
    """
    if dtype.is_float and dtype.bits < 32:
        return no("a different order of roundings shows in {}", dtype)
    return yes


def dense_constants(graph: Graph, *values: Op | None) -> Answer:
    """All given values are constants of the graph with plainly stored elements; None is fine."""
    for value in values:
        if value is None:
            continue
        if value not in graph.constants:
            return no("{} is computed from inputs", value.name, at=value)
        if not isinstance(value.type, Tensor) or value.type.format.__class__.__name__ != "Dense":
            return no("{} is stored as {}", value.name, value.type, at=value)
        if value.name == "decode":  # changed, it would be stored dense again
            return no("it is stored as {}", value.x.type, at=value)  # type: ignore[attr-defined]
    return yes


def missed(
    ctx: Context, rule: str, title: str, graph: Graph, node: Op, why: Answer, near: int = 1
) -> None:
    """Record that a pass which does its own matching decided against a rewrite at `node`.

    near: how many nodes of the rewrite were there; the report keeps the nearest misses.
    """
    if isinstance(why, No):
        ctx.missed(rule, title, NearMiss(rule, graph, node, near, True, why))


def moved(new: Mapping[Op, Op], rewritten: Iterable[Op]) -> None:
    """Tell an open journal where values went, for a pass that builds its graph by itself."""
    journal = Journal.current()
    if journal is not None:
        journal.moves.append(dict(new))
        journal.replaced.update(rewritten)
