"""What symbolic sizes need of sympy: their Python text, and the operators that text may have.

Imported when the first symbolic size is met: importing sympy takes a third of a second, which a
model of known sizes does not pay.
"""

from __future__ import annotations

import ast
import operator
from functools import lru_cache
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions as torch_functions

# ------------------------------------------------------------------ printing

_ATOM = PRECEDENCE["Atom"]


class _PythonPrinter(StrPrinter):
    """Sizes as Python source: // and % instead of function names, floats to the last digit."""

    printmethod = "_effc_text"  # not _sympystr, by which FloorDiv would print its own parentheses

    def _binary(self, expr: sympy.Basic, sign: str) -> str:
        left, right = (self.parenthesize(a, _ATOM - 0.5) for a in expr.args)
        return f"{left} {sign} {right}"

    def _print_FloorDiv(self, expr: sympy.Basic) -> str:
        return self._binary(expr, "//")

    def _print_CleanDiv(self, expr: sympy.Basic) -> str:
        return self._binary(expr, "//")

    def _print_Mod(self, expr: sympy.Basic) -> str:
        return self._binary(expr, "%")

    def _print_PythonMod(self, expr: sympy.Basic) -> str:
        return self._binary(expr, "%")

    def _print_Float(self, expr: sympy.Basic) -> str:
        return repr(float(expr))

    def _print_Relational(self, expr: sympy.Basic) -> str:
        return f"({self._print(expr.args[0])} {expr.rel_op} {self._print(expr.args[1])})"


@lru_cache(maxsize=4096)
def expression_text(value: sympy.Basic) -> str:
    """Python source of a size or number."""
    return _PythonPrinter().doprint(value)


# ------------------------------------------------------------------ making

BINARY: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: lambda a, b: torch_functions.FloorDiv(sympy.sympify(a), sympy.sympify(b)),
    ast.Mod: lambda a, b: torch_functions.PythonMod(sympy.sympify(a), sympy.sympify(b)),
    ast.Div: lambda a, b: sympy.sympify(a) / sympy.sympify(b),
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
}
RELATION: dict[type, Any] = {
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne, ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge,
}  # fmt: skip


def function(name: str) -> Any:
    """The sympy class of that name, torch's own before sympy's; None where there is none."""
    found = getattr(torch_functions, name, None) or getattr(sympy, name, None)
    return found if isinstance(found, type) and issubclass(found, sympy.Basic) else None


def floordiv(a: Any, b: Any) -> sympy.Basic:
    """a // b, rounded down; exact quotients of products simplify."""
    return torch_functions.FloorDiv(sympy.sympify(a), sympy.sympify(b))


__all__ = ["BINARY", "RELATION", "expression_text", "floordiv", "function"]
