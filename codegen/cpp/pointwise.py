"""Kernels that compute each element from the operands' elements at the same place; and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.ir import Op
from effc.ir.symbols import Dim

from .kernel import Kernel, kernel
from .loops import Nest, Numbers, in_floats, step
from .program import F32
from .region import Statements, store
from .scalar import cost, storage

SHARE = 40_000  # work in units of scalar.cost that is worth a thread: about 10 us
NEVER = 1 << 62  # bytes no result has
LIGHT = 5  # work for each operand up to which a kernel waits for memory


@dataclass(frozen=True)
class Made:
    """A kernel and the numbers that a call of it takes."""

    kernel: Kernel
    numbers: tuple[Dim, ...]


def pointwise(
    nest: Nest, leaves: Sequence[Op], nodes: Iterable[Op], outputs: Sequence[Op], *,
    kind: str = "pointwise", comment: Iterable[str] = (), far: int = NEVER,
) -> Made:  # fmt: skip
    """outputs = nodes(leaves), element by element.

    The nest's operands are those of the outputs, then of the leaves; it has at least one dimension.
    far: bytes of a result from which on it is written past the caches, by a kernel that would wait
    for memory otherwise.
    """
    nodes = list(nodes)
    if sum(map(cost, nodes)) > LIGHT * len(nest.operands):
        far = NEVER

    def body(s: Statements) -> list[Any]:
        for node in nodes:
            s.add(node)
        return [s.values[o] for o in outputs]

    return loop_nest(nest, leaves, len(outputs), body, kind=kind, comment=comment, far=far)


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


def update(nest: Nest, last: Dim, step: Dim, *, comment: Iterable[str] = ()) -> Made:
    """A copy (as `pointwise` makes one) to a place known at the call.

    The kernel's pointers are result, operand, the error word, and the number of steps from the
    result's address to the place; more than `last` of them, or fewer than 0, set the error word.
    """

    def body(s: Statements) -> list[Any]:
        return [s.values["new"]]

    return loop_nest(nest, ["new"], 1, body, kind="update", comment=comment, start=(last, step))


def loop_nest(
    nest: Nest, leaves: Sequence[Any], outs: int, body: Callable[[Statements], list[Any]], *,
    kind: str, comment: Iterable[str] = (), far: int = NEVER,
    start: tuple[Dim, Dim] | None = None,
) -> Made:  # fmt: skip
    """A nest whose statements `body` makes, once every leaf is loaded; it gives what to store.

    start: where the first result begins is read when the kernel runs; see `update`.
    """
    nest = nest.at_least(1)
    numbers = Numbers()
    last = nest.rank - 1
    sizes = [numbers.add(("size", axis), nest.sizes[axis]) for axis in range(nest.rank)]
    names = [f"y{i}" for i in range(outs)] + [f"x{i}" for i in range(len(leaves))]
    suffix = "r" if last else ""
    whole_rows = kind in ("copy", "update") and _in_order(nest)
    operands, places, types = [], [], []
    for i, (name, operand) in enumerate(zip(names, nest.operands, strict=True)):
        strides = [numbers.stride(i, axis, nest) for axis in range(nest.rank)]
        row = "".join(step(f"i{axis}", s) for axis, s in enumerate(strides[:-1]))
        const = "" if i < outs else "const "
        text = f"{const}{storage(operand.dtype)}"
        result = i < outs and far != NEVER and operand.dtype == F32 and operand.kind(last) == 1
        blocked = not whole_rows and (in_floats(operand, last) or result)
        operands.append({"name": name, "qualified": text, "row": row, "at": name + suffix,
                         "blocked": blocked})  # fmt: skip
        block = f"{name}{'b' if i < outs else 'h'} + k"
        places.append(block if blocked else f"{name}{suffix}{step('j', strides[-1])}")
        types.append(F32 if blocked else operand.dtype)
    statements = Statements(numbers)
    for i, leaf in enumerate(leaves, outs):
        operand = nest.operands[i]
        statements.load(leaf, operand.dtype, places[i], operand.kind(last) != 0)
    results = body(statements)
    stores = [store(places[i], types[i], value) for i, value in enumerate(results)]
    blocks = [o for o in operands if o["blocked"]]
    far_text = numbers.add("far", far) if blocks else ""
    extra, begin = [], {}
    if start is not None:
        extra = [{"name": "error", "qualified": "int64_t"},
                 {"name": "start", "qualified": "const int64_t"}]  # fmt: skip
        begin = {"last_start": numbers.add("last", start[0]),
                 "start_step": numbers.add("step", start[1])}  # fmt: skip
    total = sizes[0]
    for size in sizes[1:]:
        total = f"{total} * {size}"
    made = kernel(
        kind, "pointwise", numbers=list(numbers.text.values()),
        comment=comment, operands=operands, rank=nest.rank, inner=sizes[-1], total=total,
        outer=[{"index": f"i{a}", "size": sizes[a]} for a in range(last)],
        grain=max(1024, SHARE // (statements.work + len(names))),
        hoisted=statements.hoisted, body=[*statements.body, *stores],
        whole_rows=whole_rows, blocked=blocks, far=far_text, extra=extra, **begin,
    )  # fmt: skip
    return Made(made, tuple(numbers.values))


def _in_order(nest: Nest) -> bool:
    """A copy between elements of one type that lie together in both operands."""
    out, x = nest.operands
    return out.dtype == x.dtype and out.kinds[-1] == x.kinds[-1] == 1


__all__ = ["NEVER", "SHARE", "Made", "loop_nest", "pointwise", "transpose", "update"]
