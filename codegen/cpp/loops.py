"""Iteration spaces: how kernel operands walk memory, and which dimensions are one.

A loop nest is described by the size of each dimension and, for each operand, the stride in each.
Text depends only on classes of strides (0, 1, other), so one kernel serves every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effc.ir import DType
from effc.ir.symbols import Dim, dim

if TYPE_CHECKING:
    import sympy

Strides = tuple[Dim, ...]


@dataclass(frozen=True)
class Operand:
    """One pointer of a kernel: element type, and its stride in each dimension of the nest."""

    dtype: DType
    strides: Strides

    def kind(self, axis: int) -> int | None:
        """0 or 1 where the stride is known to be that; None where it is an argument."""
        step = self.strides[axis]
        return step if isinstance(step, int) and step in (0, 1) else None

    @property
    def kinds(self) -> tuple[int | None, ...]:
        return tuple(self.kind(axis) for axis in range(len(self.strides)))


@dataclass(frozen=True)
class Nest:
    """Sizes outermost first, and the operands that walk them."""

    sizes: tuple[Dim, ...]
    operands: tuple[Operand, ...]

    @property
    def rank(self) -> int:
        return len(self.sizes)

    def collapsed(self, order: Sequence[int] | None = None, keep: int = 0) -> Nest:
        """Fewer dimensions: those of one element dropped, neighbours merged where all operands
        step through them as through one. The last `keep` stay apart from the others."""
        order = list(range(self.rank) if order is None else order)
        split = len(order) - keep
        parts = [self._merge(order[:split]), self._merge(order[split:])]
        axes = [*parts[0], *parts[1]]
        sizes = tuple(size for size, _ in axes)
        strides = [tuple(steps[i] for _, steps in axes) for i in range(len(self.operands))]
        operands = (Operand(o.dtype, s) for o, s in zip(self.operands, strides, strict=True))
        return Nest(sizes, tuple(operands))

    def _merge(self, order: Sequence[int]) -> list[tuple[Dim, Strides]]:
        axes: list[tuple[Dim, Strides]] = []
        for axis in order:
            size = self.sizes[axis]
            if size == 1:
                continue
            steps = tuple(o.strides[axis] for o in self.operands)
            if axes and all(
                same(outer, inner * size) for outer, inner in zip(axes[-1][1], steps, strict=True)
            ):
                axes[-1] = (times(axes[-1][0], size), steps)
            else:
                axes.append((size, steps))
        return axes

    def at_least(self, rank: int) -> Nest:
        """With outer dimensions of one element added."""
        more = rank - self.rank
        if more <= 0:
            return self
        zeros = (0,) * more
        operands = tuple(Operand(o.dtype, (*zeros, *o.strides)) for o in self.operands)
        return Nest(((1,) * more) + self.sizes, operands)


def in_floats(operand: Operand, axis: int) -> bool:
    """Whether a row of it is converted to float, or results from it, as a whole: 16-bit floats that
    lie together along the axis."""
    return operand.dtype.is_float and operand.dtype.bits == 16 and operand.kind(axis) == 1


def same(a: Dim, b: Dim) -> bool:
    """Known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    import sympy

    return a == b or sympy.expand(sympy.sympify(a) - b) == 0


def times(a: Dim, b: Dim) -> Dim:
    return a * b if isinstance(a, int) and isinstance(b, int) else dim(a * b)


class Numbers:
    """The integer arguments of a kernel: sizes, strides and scalars, in order of first use."""

    def __init__(self) -> None:
        self.values: list[Dim] = []
        self.text: dict[object, str] = {}

    def add(self, key: object, value: Dim) -> str:
        """The C++ name of an argument; the same key gives the same argument."""
        if key not in self.text:
            self.text[key] = f"n{len(self.values)}"
            self.values.append(value)
        return self.text[key]

    def scalar(self, value: sympy.Expr) -> str:
        """A number known at the call, as an expression over its argument."""
        name = self.add(("scalar", value), value)
        return name if value.is_integer else f"effc::bit_cast<double>({name})"

    def stride(self, operand: int, axis: int, nest: Nest) -> str:
        """The stride as text: "0", "1" or an argument."""
        kind = nest.operands[operand].kind(axis)
        value = nest.operands[operand].strides[axis]
        return str(kind) if kind is not None else self.add(("stride", operand, axis), value)


def step(index: str, stride: str) -> str:
    """`+ index * stride` as short as it can be; empty where the stride is 0."""
    if stride == "0":
        return ""
    return f" + {index}" if stride == "1" else f" + {index} * {stride}"
