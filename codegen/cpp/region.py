"""The statements of a kernel: a region's nodes in order, as C++ over named variables.

Every statement knows which loop index it depends on, so that what does not change in the innermost
loop is computed before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effc.ir import DType, Op

from .loops import Numbers
from .scalar import cost, express, register, storage


@dataclass(frozen=True)
class Statement:
    name: str
    type: str
    text: str
    varies: bool  # along the innermost loop

    def __str__(self) -> str:
        return f"const {self.type} {self.name} = {self.text};"


@dataclass
class Statements:
    """Collects statements; values are variables with element types."""

    numbers: Numbers
    lines: list[Statement] = field(default_factory=list)
    values: dict[Any, tuple[str, DType, bool]] = field(default_factory=dict)
    work: int = 0

    def let(
        self, dtype: DType, text: str, varies: bool, stem: str = "v"
    ) -> tuple[str, DType, bool]:
        name = f"{stem}{len(self.lines)}"
        self.lines.append(Statement(name, register(dtype), text, varies))
        return name, dtype, varies

    def load(self, value: Any, dtype: DType, text: str, varies: bool) -> None:
        """The value is an operand, read by the expression `text`."""
        self.values[value] = self.let(dtype, f"effc::load({text})", varies)

    def add(self, node: Any) -> tuple[str, DType, bool]:
        """A pointwise node whose operands are there."""
        args = [self.values[a][:2] if isinstance(a, Op) else a for a in node.values]
        varies = any(self.values[a][2] for a in node.values if isinstance(a, Op))
        text = express(node, args, self.numbers.scalar)
        self.work += cost(node) if varies else 0
        self.values[node] = self.let(node.dtype, text, varies)
        return self.values[node]

    @property
    def hoisted(self) -> list[str]:
        return [str(s) for s in self.lines if not s.varies]

    @property
    def body(self) -> list[str]:
        return [str(s) for s in self.lines if s.varies]


def store(target: str, dtype: DType, value: tuple[str, DType, bool]) -> str:
    """The statement that writes a value to memory of an element type."""
    text, source, _ = value
    if source.name == dtype.name or (dtype.bits == 16 and dtype.is_float):
        return f"effc::store({target}, {text});"
    return f"effc::store({target}, effc::cast<{storage(dtype)}>({text}));"


__all__ = ["Statement", "Statements", "store"]
