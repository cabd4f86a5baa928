"""Symbolic sizes at run time: every expression of a plan compiled once to plain Python.

sympy is far too slow to ask at a call. A plan collects its expressions here and evaluates all of
them in one compiled function, once for each new set of input sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.ir import evaluate
from effc.ir.symbols import dim_text, symbolic

if TYPE_CHECKING:
    import sympy


def _exact(value: float) -> int | float:
    """A quotient that is a whole number as an int."""
    return int(value) if value == int(value) else value


_KNOWN: dict[str, Any] = {
    "_exact": _exact,
    "Max": max, "Min": min, "Abs": abs, "floor": math.floor, "ceiling": math.ceil,
    "CeilToInt": math.ceil, "FloorToInt": math.floor, "True": True, "False": False,
    "IntTrueDiv": lambda a, b: a / b, "FloatTrueDiv": lambda a, b: a / b,
    "ToFloat": float, "TruncToInt": math.trunc, "sqrt": math.sqrt,
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z_]\w*")


class Sizes:
    """The distinct symbolic expressions of a plan, numbered."""

    def __init__(self) -> None:
        self.index: dict[sympy.Basic, int] = {}
        self._compiled: Callable[[Mapping[sympy.Symbol, Any]], tuple[Any, ...]] | None = None

    def add(self, value: Any) -> Any:
        """Note every expression in a nesting of tuples, lists and nodes; returns the value."""
        if symbolic(value):
            if value not in self.index:
                self.index[value] = len(self.index)
                self._compiled = None
        elif isinstance(value, (tuple, list)):
            for v in value:
                self.add(v)
        return value

    def evaluate(self, env: Mapping[sympy.Symbol, Any]) -> tuple[Any, ...]:
        """The numbers, in the order of `index`."""
        if self._compiled is None:
            self._compiled = compile_exprs(tuple(self.index))
        return self._compiled(env)


def compile_exprs(
    exprs: tuple[sympy.Basic, ...],
) -> Callable[[Mapping[sympy.Symbol, Any]], tuple[Any, ...]]:
    """One function of the symbols' values for all expressions."""
    if not exprs:
        return lambda env: ()
    symbols = sorted({s for e in exprs for s in e.free_symbols}, key=str)
    texts, rest = [], {}
    known: dict[str, Any] = dict(_KNOWN)
    renamed = {str(s): f"_{i}" for i, s in enumerate(symbols)}
    for i, e in enumerate(exprs):
        text = dim_text(e)
        names = set(_NAME.findall(text)) - {"and", "or", "not", "if", "else"}
        if names - renamed.keys() - known.keys():
            rest[i] = e  # a torch function without a Python twin: sympy evaluates it
            text = f"_rest[{i}]"
        else:
            text = _NAME.sub(lambda m: renamed.get(m[0], m[0]), text)
            if "/" in text.replace("//", ""):
                text = f"_exact({text})"
        texts.append(text)
    source = f"lambda {', '.join(['_rest', *renamed.values()])}: ({', '.join(texts)},)"
    function = eval(source, {"__builtins__": {}, **known})

    def run(env: Mapping[sympy.Symbol, Any]) -> tuple[Any, ...]:
        slow = {i: evaluate(e, env) for i, e in rest.items()}
        return function(slow, *(env[s] for s in symbols))

    return run


class Numbers:
    """The sizes of one call: looks up any size or nesting of sizes that the plan collected."""

    def __init__(self, sizes: Sizes, env: Mapping[sympy.Symbol, Any]) -> None:
        self.env, self.index = env, sizes.index
        self.values = sizes.evaluate(env)

    @cached_property
    def integers(self) -> np.ndarray:
        """The values as an array; 0 where one is no integer."""
        return np.array([v if isinstance(v, int) else 0 for v in self.values], dtype=np.int64)

    def __call__(self, value: Any) -> Any:
        if symbolic(value):
            at = self.index.get(value)
            return evaluate(value, self.env) if at is None else self.values[at]
        if isinstance(value, (tuple, list)):
            return type(value)(map(self, value))
        return value


def has_symbols(value: Any) -> bool:
    """True if a nesting of tuples and lists holds an expression."""
    if isinstance(value, (tuple, list)):
        return any(map(has_symbols, value))
    return symbolic(value)


__all__ = ["Numbers", "Sizes", "compile_exprs", "has_symbols"]
