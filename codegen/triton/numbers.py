"""Sizes and strides in a kernel's text: literals where the graph knows them, else arguments."""

from __future__ import annotations

import sympy

from effc.ir.symbols import Dim


class Numbers:
    """The number arguments of a kernel (i64), in order of first use."""

    def __init__(self) -> None:
        self.values: list[Dim] = []
        self.names: list[str] = []
        self._known: dict[object, str] = {}

    def text(self, value: Dim) -> str:
        """A literal, or the argument that holds the value; equal values are one argument."""
        if isinstance(value, int):
            return str(value)
        if value not in self._known:
            self._known[value] = f"n{len(self.values)}"
            self.names.append(self._known[value])
            self.values.append(value)
        return self._known[value]

    def scalar(self, value: sympy.Expr | float) -> str:
        """A number known at the call, as an expression over its argument."""
        if not isinstance(value, float) and value.is_integer:
            return self.text(value)
        return f"({self.text(value)}).to(tl.float64, bitcast=True)"


def is_wide(extent: Dim) -> bool:
    """Whether offsets up to `extent` need 64 bits, as far as is known."""
    return not isinstance(extent, int) or extent >= 1 << 31


__all__ = ["Numbers", "is_wide"]
