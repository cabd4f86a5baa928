"""Programs over rows: values that are one an element or one a row, and what they need.

The text of a value has {0}, {1} ... for its arguments; `rows.py` decides where each is computed.
The texts are C++; another language says `express` and `convert` its own way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effc.ir import DType, Op
from effc.ir.types import DTYPES

from .scalar import cost, express, register

F32, F64 = DTYPES["f32"], DTYPES["f64"]


@dataclass(eq=False)
class Value:
    """A variable of the program."""

    kind: str  # "leaf" | "let" | "reduce"
    dtype: DType
    text: str
    args: tuple[Value, ...] = ()
    full: bool = True  # one an element; else one a row
    level: int = 0  # the pass in which it can be computed first
    work: int = 1
    name: str = ""
    reduction: str = ""


@dataclass
class Program:
    """Statements over rows, in order."""

    numbers: Any
    values: list[Value] = field(default_factory=list)
    nodes: dict[Any, Value] = field(default_factory=dict)  # by node, or by another name

    def leaf(self, dtype: DType, text: str, full: bool) -> Value:
        return self._add(Value("leaf", dtype, text, full=full))

    def let(self, dtype: DType, text: str, *args: Value, work: int = 1) -> Value:
        full, level = any(a.full for a in args), max((a.level for a in args), default=0)
        return self._add(Value("let", dtype, text, args, full, level, work))

    def reduce(self, how: str, x: Value, dtype: DType) -> Value:
        """how: sum | prod | amax | amin | any | all, of the elements of a row."""
        made = Value("reduce", dtype, "", (x,), False, x.level + 1, 1, reduction=how)
        return self._add(made)

    def pointwise(self, node: Any) -> Value:
        """A pointwise node whose operands are there."""
        given = tuple(self.nodes[a] for a in node.values if isinstance(a, Op))
        marks = iter(range(len(given)))
        args = [
            (f"\0{next(marks)}\0", self.nodes[a].dtype) if isinstance(a, Op) else a
            for a in node.values
        ]
        text = self.express(node, args)
        parts = text.replace("{", "{{").replace("}", "}}").split("\0")
        text = "".join(f"{{{p}}}" if i % 2 else p for i, p in enumerate(parts))
        self.nodes[node] = self.let(node.dtype, text, *given, work=cost(node))
        return self.nodes[node]

    def cast(self, x: Value, dtype: DType) -> Value:
        """x as another element type, where that changes what is computed."""
        if register(x.dtype) == register(dtype):
            return x
        return self.let(dtype, self.convert("{0}", x.dtype, dtype), x)

    def express(self, node: Any, args: list[Any]) -> str:
        """A pointwise op's expression."""
        return express(node, args, self.numbers.scalar)

    def convert(self, text: str, source: DType, to: DType) -> str:
        return f"effc::cast<{register(to)}>({text})"

    def _add(self, value: Value) -> Value:
        value.name = f"v{len(self.values)}"
        self.values.append(value)
        return value
