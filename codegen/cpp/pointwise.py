"""Kernels that compute each element from the operands' elements at the same place; and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.ir import Op
from effc.ir.symbols import Dim

from .kernel import Kernel, kernel
from .loops import Nest, Numbers, step
from .region import Statements, store
from .scalar import storage

SHARE = 40_000  # work in units of scalar.cost that is worth a thread: about 10 us


@dataclass(frozen=True)
class Made:
    """A kernel and the numbers that a call of it takes."""

    kernel: Kernel
    numbers: tuple[Dim, ...]


def pointwise(
    nest: Nest, leaves: Sequence[Op], nodes: Iterable[Op], outputs: Sequence[Op], *,
    kind: str = "pointwise", comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """outputs = nodes(leaves), element by element.

    The nest's operands are those of the outputs, then of the leaves; it has at least one dimension.
    """

    def body(s: Statements) -> list[Any]:
        for node in nodes:
            s.add(node)
        return [s.values[o] for o in outputs]

    return loop_nest(nest, leaves, len(outputs), body, kind=kind, comment=comment)


def transpose(nest: Nest, *, comment: Iterable[str] = ()) -> Made | None:
    """A copy in tiles, where result and operand are in order along different dimensions.

    nest: result, operand, of one element type; the result is in order along the last dimension.
    None where the plain loops are as good.
    """
    out, x = nest.operands
    last = nest.rank - 1
    along = [a for a in range(last) if x.kind(a) == 1]
    if out.dtype != x.dtype or last < 1 or out.kind(last) != 1 or x.kind(last) or not along:
        return None
    nest = nest.collapsed([a for a in range(last) if a != along[0]] + [along[0], last], keep=2)
    nest = nest.at_least(3)
    numbers, last = Numbers(), nest.rank - 1
    sizes = [numbers.add(("size", axis), nest.sizes[axis]) for axis in range(nest.rank)]
    operands, steps = [], []
    for i, (name, const) in enumerate((("y0", ""), ("x0", "const "))):
        strides = [numbers.stride(i, axis, nest) for axis in range(nest.rank)]
        row = "".join(step(f"i{axis}", s) for axis, s in enumerate(strides[:-2]))
        operands.append({"name": name, "qualified": f"{const}{storage(out.dtype)}", "row": row})
        steps.append(strides)
    made = kernel(
        "transpose", "transpose", numbers=list(numbers.text.values()),
        comment=comment, operands=operands, rows=sizes[-2], columns=sizes[-1],
        outer=[{"index": f"i{a}", "size": sizes[a]} for a in range(last - 1)],
        out_step=steps[0][-2], in_step=steps[1][-1], grain=max(1, SHARE // 2048),
    )  # fmt: skip
    return Made(made, tuple(numbers.values))


def loop_nest(
    nest: Nest, leaves: Sequence[Any], outs: int, body: Callable[[Statements], list[Any]], *,
    kind: str, comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """A nest whose statements `body` makes, once every leaf is loaded; it gives what to store."""
    nest = nest.at_least(1)
    numbers = Numbers()
    last = nest.rank - 1
    sizes = [numbers.add(("size", axis), nest.sizes[axis]) for axis in range(nest.rank)]
    names = [f"y{i}" for i in range(outs)] + [f"x{i}" for i in range(len(leaves))]
    suffix = "r" if last else ""
    operands, places = [], []
    for i, (name, operand) in enumerate(zip(names, nest.operands, strict=True)):
        strides = [numbers.stride(i, axis, nest) for axis in range(nest.rank)]
        row = "".join(step(f"i{axis}", s) for axis, s in enumerate(strides[:-1]))
        const = "" if i < outs else "const "
        text = f"{const}{storage(operand.dtype)}"
        operands.append({"name": name, "qualified": text, "row": row})
        places.append(f"{name}{suffix}{step('j', strides[-1])}")
    statements = Statements(numbers)
    for leaf, operand, place in zip(leaves, nest.operands[outs:], places[outs:], strict=True):
        statements.load(leaf, operand.dtype, place, operand.kind(last) != 0)
    results = body(statements)
    stores = [
        store(place, operand.dtype, value)
        for place, operand, value in zip(places, nest.operands[:outs], results, strict=False)
    ]
    total = sizes[0]
    for size in sizes[1:]:
        total = f"{total} * {size}"
    made = kernel(
        kind, "pointwise", numbers=list(numbers.text.values()),
        comment=comment, operands=operands, rank=nest.rank, inner=sizes[-1], total=total,
        outer=[{"index": f"i{a}", "size": sizes[a]} for a in range(last)],
        grain=max(1024, SHARE // (statements.work + len(names))),
        hoisted=statements.hoisted, body=[*statements.body, *stores],
        whole_rows=kind == "copy" and _in_order(nest),
    )  # fmt: skip
    return Made(made, tuple(numbers.values))


def _in_order(nest: Nest) -> bool:
    """A copy between elements of one type that lie together in both operands."""
    out, x = nest.operands
    return out.dtype == x.dtype and out.kinds[-1] == x.kinds[-1] == 1


__all__ = ["SHARE", "Made", "loop_nest", "pointwise", "transpose"]
