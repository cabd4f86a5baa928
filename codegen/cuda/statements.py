"""Where operands lie, as C++: addresses of rows, and which runs of elements move at once."""

from __future__ import annotations

from collections.abc import Sequence

from effc.codegen.cpp.loops import Operand
from effc.codegen.cpp.scalar import storage
from effc.ir.symbols import Dim

from .kernel import Numbers, Pointer


def whole_runs(
    pointer: Pointer, operand: Operand, size: Dim, width: int, more: Sequence[Dim] = ()
) -> bool:
    """Whether an operand lies in runs of `width` elements that a thread moves at once: each begins
    at a multiple of 16 bytes (or of its own size) and none is cut by the end of a row.

    The operand's last dimension has `size` elements; more: other offsets that are added.
    """
    if operand.strides[-1] != 1 or not pointer.aligned:
        return False
    unit = min(16 * 8 // operand.dtype.bits, width)
    return all(isinstance(s, int) and s % unit == 0 for s in (*operand.strides[:-1], *more)) and (
        isinstance(size, int) and size % width == 0
    )


def row_places(
    names: Sequence[str], operands: Sequence[Operand], sizes: Sequence[Dim], numbers: Numbers,
    index: str = "row",
) -> list[str]:  # fmt: skip
    """Statements `T* x0 = p_x0 + ...`: where each operand's row of a linear index begins.

    The operands' dimensions are those of `sizes`.
    """
    lines, axes = decoded(sizes, numbers, index)
    for name, operand in zip(names, operands, strict=True):
        const = "" if name[0] == "y" else "const "
        at = offset(f"p_{name}", axes, operand, numbers)
        lines.append(f"{const}{storage(operand.dtype)}* const {name} = {at};")
    return lines


def offset(pointer: str, axes: Sequence[str], operand: Operand, numbers: Numbers) -> str:
    """The address of an operand's element at a place, one index for each of its dimensions."""
    terms = [pointer]
    for axis, stride in zip(axes, operand.strides, strict=True):
        if stride != 0:
            terms.append(axis if stride == 1 else f"{axis} * {numbers.text(stride)}")
    return " + ".join(terms)


def decoded(
    sizes: Sequence[Dim], numbers: Numbers, index: str, stem: str = "i"
) -> tuple[list[str], list[str]]:
    """Statements that split a linear index into those of several dimensions, and their names."""
    if len(sizes) < 2:
        return [], [index] * len(sizes)
    lines, left = [], index
    names = [f"{stem}{a}" for a in range(len(sizes))]
    for a in reversed(range(1, len(sizes))):
        size = numbers.text(sizes[a])
        lines.append(f"const int64_t {names[a]} = {left} % {size};")
        over = names[0] if a == 1 else f"{stem}_{a}"
        lines.append(f"const int64_t {over} = {left} / {size};")
        left = over
    return lines, names


__all__ = ["decoded", "offset", "row_places", "whole_runs"]
