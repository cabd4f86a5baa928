"""Programs over rows in Triton: what is reduced together, lane by lane, and how lanes join.

The program is that of the cpu (codegen/cpp/program.py), said in Triton. A reduction has a state:
one number or two for each lane of a tile, or for each part of a row. Mean with variance, and
maximum with the sum of powers, are found together (Welford 1962; Milakov & Gimelshein 2018,
algorithm 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.codegen.cpp.program import F32, F64, Program, Value
from effc.ir import DType
from effc.ir.types import DTYPES

from .scalar import convert, express, register


@dataclass
class RowProgram(Program):
    """Statements in Triton. elements: of a row, as an expression.

    Reductions are also `mean`, and, after them on the same value: `squares` of what differs from
    the mean, `powers`, the sum of exp(x - amax).
    """

    elements: str = ""

    def count(self, dtype: DType) -> str:
        """The elements of a row as a float."""
        known = self.elements.isdecimal()
        return f"{self.elements}.0" if known else f"({self.elements}).to({register(dtype)})"

    def express(self, node: Any, args: list[Any]) -> str:
        return express(node, args, self.numbers.scalar)

    def convert(self, text: str, source: DType, to: DType) -> str:
        return convert(text, source, to)


LOWEST = {"i32": -(1 << 31), "i64": -(1 << 63)}
I32, I64 = DTYPES["i32"], DTYPES["i64"]
# how -> what joins two lanes, what joins all
JOINS = {
    "sum": ("{a} + {x}", "tl.sum({a}, 1, keep_dims=True)"),
    "mean": ("{a} + {x}", "tl.sum({a}, 1, keep_dims=True)"),
    "prod": ("{a} * {x}", "tl.reduce({a}, 1, fn.mul, keep_dims=True)"),
    "amax": ("fn.maximum({a}, {x})", "tl.reduce({a}, 1, fn.maximum, keep_dims=True)"),
    "amin": ("fn.minimum({a}, {x})", "tl.reduce({a}, 1, fn.minimum, keep_dims=True)"),
    "any": ("{a} | {x}", "tl.max({a}, 1, keep_dims=True)"),
    "all": ("{a} & {x}", "tl.min({a}, 1, keep_dims=True)"),
}


@dataclass(frozen=True)
class Fold:
    """Reductions that are found together.

    values: of one value x, the last of which says what the fold is. Its state is one number for
    each lane, or for each part of a row: (variable, element type, what it is of no elements).
    """

    values: tuple[Value, ...]
    program: RowProgram

    @property
    def how(self) -> str:
        return self.values[-1].reduction

    @property
    def x(self) -> Value:
        return self.values[-1].args[0]

    @property
    def part(self) -> DType:
        """In what type it is computed."""
        dtype = self.x.dtype
        if self.how in ("any", "all"):
            return I32
        if dtype.is_float:
            return F64 if dtype.name == "f64" else F32
        wide = self.how in ("sum", "prod") or dtype.name == "i64"
        return I64 if wide else I32

    @property
    def start(self) -> str:
        """What changes nothing."""
        if self.how in ("amax", "amin"):
            low = self.how == "amax"
            if self.part.is_float:
                return f'float("{"-" if low else ""}inf")'
            lowest = LOWEST[self.part.name]
            return f"tl.full((), {lowest if low else -(lowest + 1)}, {register(self.part)})"
        return "1" if self.how in ("prod", "all") else "0"

    @property
    def state(self) -> list[tuple[str, DType, str]]:
        names = [f"a{v.name}" for v in self.values]
        if self.how == "powers":
            return [(names[0], self.part, 'float("-inf")'), (names[1], self.part, "0")]
        return [(name, self.part, self.start) for name in names]

    def given(self) -> str:
        """x in the type that it is reduced in."""
        dtype = self.x.dtype
        if self.how in ("any", "all"):
            truth = self.x.name if dtype.kind == "bool" else f"({self.x.name} != 0)"
            return f"{truth}.to(tl.int32)"
        same = register(dtype) == register(self.part)
        return self.x.name if same else f"{self.x.name}.to({register(self.part)})"

    def step(self) -> str:
        """A tile joins the state, lane by lane."""
        names = self.names
        if self.how == "powers":
            return f"{names} = fn.join_powers({names}, {self.x.name}, inside)"
        if self.how == "squares":
            return f"{names} = fn.join_moments({names}, {self.x.name}, inside, turn)"
        x = f"tl.where(inside, {self.given()}, {self.start})"
        return f"{names} = {JOINS[self.how][0].format(a=names, x=x)}"

    def direct(self, seen: Callable[[str, str], str]) -> list[str]:
        """The values of rows that are there as a whole.

        seen(text, none): a tile's elements, or `none` where a row has no more of them.
        """
        first, join = self.values[0], JOINS[self.values[0].reduction][1]
        if self.how in JOINS:
            return [self._result(first, join.format(a=seen(self.given(), self.start)))]
        second, x = self.values[1], self.x.name
        value = self._result(first, join.format(a=seen(x, self.state[0][2])))
        rest = f"fn.{'exp' if self.how == 'powers' else 'square'}({x} - {first.name})"
        total = JOINS["sum"][1].format(a=seen(rest, "0"))
        return [value, f"{second.name} = {total}"]

    @property
    def names(self) -> str:
        return ", ".join(name for name, *_ in self.state)

    def merged(self, elements: str) -> str:
        """One state from those of all lanes, of `count` elements each and `elements` in all."""
        if self.how == "powers":
            return f"fn.joined_powers({self.names})"
        if self.how == "squares":
            return f"fn.joined_moments({self.names}, count, {elements})"
        return JOINS[self.how][1].format(a=self.names)

    def joined(self) -> str:
        """The values of rows from the states of all lanes."""
        text = self.merged(self.program.count(self.part))
        if self.how in JOINS:
            return self._result(self.values[0], text)
        return f"{', '.join(v.name for v in self.values)} = {text}"

    def _result(self, v: Value, text: str) -> str:
        if v.reduction == "mean":
            return f"{v.name} = fn.div({text}, {self.program.count(self.part)})"
        return f"{v.name} = {convert(text, self.part, v.dtype)}"


def folds(values: Sequence[Value], program: RowProgram) -> list[Fold]:
    """The reductions in groups that are found together."""
    needs = {"squares": "mean", "powers": "amax"}
    taken: dict[Value, list[Value]] = {}
    for v in values:
        before = [g for g in taken.values() if needs.get(v.reduction) == g[0].reduction
                  and g[0].args == v.args and len(g) == 1]  # fmt: skip
        if before:
            before[0].append(v)
        else:
            taken[v] = [v]
    return [Fold(tuple(group), program) for group in taken.values()]


__all__ = ["Fold", "RowProgram", "folds"]
