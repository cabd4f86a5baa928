"""What one program of a kernel computes: statements over a tile, and how it walks operands.

An iteration space has axes. In a program each axis is a block of indices (`Axis.index`), shaped so
that those of all axes broadcast to the tile: [BLOCK] in a kernel over one run of elements,
[ROWS, 1] and [1, COLUMNS] in one over rows, a scalar where a program stays at one place. An operand
that stands still along an axis is loaded once for it, and broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from effc.codegen.cpp.loops import Operand
from effc.ir import DType, Op
from effc.ir.symbols import Dim

from .kernel import ALIGNED, POINTER, Pointer
from .numbers import Numbers, is_wide
from .scalar import convert, express, register, storage


@dataclass(frozen=True)
class Axis:
    """A dimension of the space inside a program. mask: which indices are inside; "": all."""

    index: str
    size: Dim
    mask: str = ""


Element = tuple[str, DType]  # a variable, and the element type that it stands for


@dataclass
class Tile:
    """Collects the statements of a program. when: a condition of the program's; else it stores
    nothing."""

    numbers: Numbers
    lines: list[str] = field(default_factory=list)
    values: dict[Any, Element] = field(default_factory=dict)
    when: str = ""

    def let(self, dtype: DType, text: str, stem: str = "v") -> Element:
        """A variable of its own for an expression."""
        name = f"{stem}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name, dtype

    # -------------------------------------------------------------- memory

    def place(self, pointer: str, operand: Operand, axes: Sequence[Axis]) -> tuple[str, str]:
        """(address, mask) of an operand's elements; the mask is "" where all are inside."""
        wide = is_wide(extent(operand, [a.size for a in axes]))
        text, masks = pointer, []
        for axis, stride in zip(axes, operand.strides, strict=True):
            if stride == 0:
                continue
            index = f"({axis.index}).to(tl.int64)" if wide else axis.index
            text += f" + {index}" if stride == 1 else f" + {index} * {self.numbers.text(stride)}"
            if axis.mask:
                masks.append(axis.mask)
        return text, " & ".join(dict.fromkeys(masks))

    def read(self, pointer: str, operand: Operand, axes: Sequence[Axis], other: str = "") -> str:
        """The expression that loads elements in their register type; other: outside the mask."""
        address, mask = self.place(pointer, operand, axes)
        given = [f"mask={mask}"] if mask else []
        given += [f"other={other}"] if mask and other else []
        text = f"tl.load({', '.join([address, *given])})"
        return text if register(operand.dtype) == storage(operand.dtype) else (
            f"{text}.to({register(operand.dtype)})"
        )  # fmt: skip

    def load(self, value: Any, pointer: str, operand: Operand, axes: Sequence[Axis]) -> Element:
        """The value is an operand; its elements are loaded here."""
        self.values[value] = self.let(operand.dtype, self.read(pointer, operand, axes), "u")
        return self.values[value]

    def store(self, pointer: str, operand: Operand, axes: Sequence[Axis], value: Element) -> None:
        """Write elements; an operand that stands still along an axis must not vary there."""
        address, inside = self.place(pointer, operand, axes)
        mask = " & ".join(m for m in (inside, self.when) if m)
        given = [f"mask={mask}"] if mask else []
        text = convert(value[0], value[1], operand.dtype)
        self.lines.append(f"tl.store({', '.join([address, text, *given])})")

    # -------------------------------------------------------------- nodes

    def add(self, node: Any) -> Element:
        """A pointwise node whose operands are there."""
        args = [self.values[a] if isinstance(a, Op) else a for a in node.values]
        self.values[node] = self.let(node.dtype, express(node, args, self.numbers.scalar))
        return self.values[node]


def extent(operand: Operand, sizes: Sequence[Dim]) -> Dim:
    """Elements from the first to the last that an operand reaches."""
    reach: Dim = 1
    for size, stride in zip(sizes, operand.strides, strict=True):
        reach = reach + (size - 1) * (abs(stride) if isinstance(stride, int) else stride)
    return reach


def pointer(name: str, dtype: DType, offset: Dim = 0) -> Pointer:
    """An argument that points `offset` elements into memory that is aligned."""
    aligned = isinstance(offset, int) and offset * dtype.bits // 8 % ALIGNED == 0
    return Pointer(name, POINTER[dtype.name], aligned)


def decoded(sizes: Sequence[str], index: str, names: Sequence[str]) -> list[str]:
    """Statements that split a linear index into those of several dimensions, last one fastest."""
    lines, left = [], index
    for i in reversed(range(1, len(names))):
        lines.append(f"{names[i]} = {left} % {sizes[i]}")
        rest = f"{left} // {sizes[i]}"
        left = names[0] if i == 1 else f"left{i}"
        lines.append(f"{left} = {rest}")
    return lines if len(names) > 1 else [f"{names[0]} = {index}"]


__all__ = ["Axis", "Element", "Operand", "Tile", "decoded", "extent", "pointer"]
