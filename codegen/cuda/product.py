"""Matrix products in half and bf16 on the tensor cores, with what follows computed on the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.region import Statements
from effc.codegen.cpp.scalar import convert, register, storage
from effc.ir import DType
from effc.ir.symbols import Dim
from effc.ir.types import DTYPES

from .kernel import Made, Numbers, Pointer, Schedule, cdiv, kernel, pointer
from .statements import row_places, whole_runs

F32 = DTYPES["f32"]
RUN = 8  # elements of a row that a thread finishes at once
SHARED_LIMIT = 99 * 1024  # bytes of a block on the smallest GPU that is meant (sm_86, sm_89)

Body = Callable[[Statements, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Matrix:
    """An operand of a product: rows whose elements lie together, `stride` from one to the next.

    offset: of its first element, in elements; turned: k is the number of rows, not of columns.
    """

    dtype: DType
    stride: Dim
    offset: Dim = 0
    turned: bool = False

    @property
    def vector(self) -> int:
        """Elements that one asynchronous copy may move: every row begins at a multiple."""
        for width in (8, 4, 2):
            if all(isinstance(n, int) and n % width == 0 for n in (self.stride, self.offset)):
                return width
        return 1


def tile(m: int, n: int, k: int, down: int, across: int, stages: int) -> Schedule:
    """Blocks of m x n sums, k of each operand at a time, by down x across warps."""
    blocks = {"BM": m, "BN": n, "BK": k, "WM": down, "WN": across, "STAGES": stages}
    return Schedule(down * across, stages, tuple(blocks.items()))


# From the largest. A warp's part is 64 x 32 or 32 x 32: many products for each fragment's load.
SCHEDULES = (
    tile(128, 128, 32, 2, 4, 4),
    tile(128, 64, 32, 2, 2, 4),
    tile(64, 64, 64, 2, 2, 3),
    tile(32, 64, 64, 1, 4, 4),
    tile(16, 64, 128, 1, 4, 3),
)
MULTIPROCESSORS = 108  # of the GPU that the choice is made for, where none is told: an A100's


def schedule(rows: Dim, columns: Dim, units: int = MULTIPROCESSORS) -> Schedule:
    """The largest blocks that still fill the GPU; the smallest that waste few rows where rows are
    few. An unknown number of rows counts as many."""
    m = rows if isinstance(rows, int) else 4096
    n = columns if isinstance(columns, int) else 4096
    for s in SCHEDULES:
        blocks = dict(s.blocks)
        fits = m > blocks["BM"] // 2
        if fits and -(-m // blocks["BM"]) * -(-n // blocks["BN"]) >= units:
            return s
    small = [s for s in SCHEDULES[2:] if m > dict(s.blocks)["BM"] // 2]
    return small[0] if small else SCHEDULES[-1]


def schedule_of(nest: Nest, units: int = MULTIPROCESSORS) -> Schedule:
    """The schedule of a product with a result of these dimensions, columns last."""
    return schedule(_rows(nest), nest.sizes[-1], units)


def shared_bytes(s: Schedule) -> int:
    """Of the stages, or of the sums that later lie in their place."""
    b = dict(s.blocks)
    stages = b["STAGES"] * (b["BM"] + b["BN"]) * b["BK"] * 2
    return max(stages, b["BM"] * (b["BN"] + 8) * 4)


def product(
    nest: Nest, depth: Dim, a: Matrix, b: Matrix, leaves: Sequence[Any], body: Body, *,
    offsets: Sequence[Dim] = (), by: Schedule | None = None, comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """y = body(a b): the sums over `depth`, then statements on each.

    nest: the result's dimensions in order of memory, its columns last; operands are the result's,
    then those of the leaves, with offsets likewise. A call's pointers: y, a, b, leaves.
    """
    numbers = Numbers()
    by = by or schedule_of(nest)
    outer, columns = _split(nest)
    names = ["y0", *(f"x{i}" for i in range(len(leaves)))]
    given = list(offsets) or [0] * len(names)
    pointers = [pointer(f"p_{n}", o.dtype, at, written=n == "y0")
                for n, o, at in zip(names, nest.operands, given, strict=True)]  # fmt: skip
    sources = [pointer("a", a.dtype, a.offset), pointer("b", b.dtype, b.offset)]
    statements = Statements(numbers)  # type: ignore[arg-type]
    total = ("sum[j]", F32, True)
    places = row_places(names, outer.operands, outer.sizes, numbers)
    runs = _loads(statements, names, leaves, nest, outer, pointers, columns, numbers)
    value = body(statements, total)
    y = nest.operands[0]
    blocks = dict(by.blocks)
    rows = _rows(nest)
    return kernel(
        "product", "product", pointers=[pointers[0], *sources, *pointers[1:]], numbers=numbers,
        schedule=by, shared=shared_bytes(by), comment=comment,
        grid=[cdiv(rows, blocks["BM"]) * cdiv(nest.sizes[-1], blocks["BN"])],
        element=storage(a.dtype), a_vector=a.vector, b_vector=b.vector,
        turned="true" if b.turned else "false", a_stride=numbers.text(a.stride),
        b_stride=numbers.text(b.stride), rows=_text(outer.sizes, numbers),
        columns=numbers.text(nest.sizes[-1]), depth=numbers.text(depth),
        y_type=register(y.dtype), places=places, hoisted=statements.hoisted, runs=runs,
        body=[*statements.body, f"y[j] = {convert(value[0], value[1], y.dtype)};"],
        whole=_flag(whole_runs(pointers[0], _with(outer.operands[0], y), columns, RUN)),
    )  # fmt: skip


def _loads(
    s: Statements, names: Sequence[str], leaves: Sequence[Any], nest: Nest, outer: Nest,
    pointers: Sequence[Pointer], columns: Dim, numbers: Numbers,
) -> list[str]:  # fmt: skip
    """Statements that read what a run needs of each leaf; its elements become the leaf's values."""
    lines = []
    for i, leaf in enumerate(leaves, start=1):
        operand, step = nest.operands[i], nest.operands[i].strides[-1]
        name = names[i]
        if step == 0:
            s.load(leaf, operand.dtype, name, False)
            continue
        whole = whole_runs(pointers[i], _with(outer.operands[i], operand), columns, RUN)
        lines.append(f"{register(operand.dtype)} {name}v[{RUN}] = {{}};")
        if step == 1:
            lines.append(
                f"effc::load_run<{_flag(whole)}>({name}v, {name} + column, columns - column);"
            )
        else:
            at = f"{name} + (column + j) * {numbers.text(step)}"
            lines.append(f"for (int j = 0; j < {RUN} && column + j < columns; ++j) "
                         f"{name}v[j] = effc::load({at});")  # fmt: skip
        s.values[leaf] = (f"{name}v[j]", operand.dtype, True)
    return lines


def _split(nest: Nest) -> tuple[Nest, Dim]:
    """The rows' dimensions merged where all operands step through them as through one."""
    rows = Nest(nest.sizes[:-1], tuple(Operand(o.dtype, o.strides[:-1]) for o in nest.operands))
    return rows.collapsed().at_least(1), nest.sizes[-1]


def _with(outer: Operand, whole: Operand) -> Operand:
    return Operand(outer.dtype, (*outer.strides, whole.strides[-1]))


def _rows(nest: Nest) -> Dim:
    total: Dim = 1
    for size in nest.sizes[:-1]:
        total = total * size
    return total


def _text(sizes: Sequence[Dim], numbers: Numbers) -> str:
    if all(isinstance(s, int) for s in sizes):
        total = 1
        for s in sizes:
            total *= s  # type: ignore[operator]
        return str(total)
    return " * ".join(numbers.text(s) for s in sizes)


def _flag(value: bool) -> str:
    return "true" if value else "false"


__all__ = [
    "SCHEDULES",
    "SHARED_LIMIT",
    "Matrix",
    "product",
    "schedule",
    "schedule_of",
    "shared_bytes",
    "tile",
]
