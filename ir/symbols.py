"""Symbolic sizes: sympy expressions over named positive integers.

A size is a Python int whenever its value is known, else a sympy expression. Integer division and
remainder are torch's own sympy functions, so captured sizes need no translation.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions as torch_functions

from .errors import ParseError

Dim: TypeAlias = int | sympy.Expr


@cache
def symbol(name: str) -> sympy.Symbol:
    """The size called `name`; a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@cache
def real_symbol(name: str) -> sympy.Symbol:
    """A Python float that is known only when the compiled module is called."""
    return sympy.Symbol(name, real=True)


def dim(value: object) -> Dim:
    """Normalise to int where the value is known, else to a sympy expression."""
    if isinstance(value, bool) or not isinstance(value, (int, sympy.Basic)):
        raise TypeError(f"a size must be an int or a sympy expression, not {value!r}")
    if isinstance(value, int):
        return value
    return int(value) if value.is_Integer else value  # type: ignore[return-value]


def floordiv(a: Dim, b: Dim) -> Dim:
    """a // b, rounded down; exact quotients of products simplify."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return dim(torch_functions.FloorDiv(sympy.sympify(a), sympy.sympify(b)))


def product(dims: tuple[Dim, ...]) -> Dim:
    result: Dim = 1
    for d in dims:
        result = result * d
    return dim(result) if isinstance(result, sympy.Basic) else result


def free_symbols(value: object) -> set[sympy.Symbol]:
    """Symbols in a size, or in any nesting of tuples and lists of them."""
    if isinstance(value, sympy.Basic):
        return set(value.free_symbols)
    if isinstance(value, (tuple, list)):
        return set().union(*map(free_symbols, value)) if value else set()
    return set()


def evaluate(value: object, env: Mapping[sympy.Symbol, int | float]) -> object:
    """Replace symbols by numbers, inside tuples too; what has no symbols comes back unchanged."""
    if isinstance(value, sympy.Basic):
        result = value.subs(env) if value.free_symbols else value
        if getattr(result, "is_Integer", False):
            return int(result)
        if result in (sympy.true, sympy.false):
            return bool(result)
        if getattr(result, "is_number", False):
            number = float(result)
            return int(number) if result.is_integer else number
        missing = ", ".join(sorted(map(str, result.free_symbols)))
        raise ValueError(f"{value} needs values for {missing}")
    if isinstance(value, tuple):
        return tuple(evaluate(v, env) for v in value)
    if isinstance(value, list):
        return [evaluate(v, env) for v in value]
    return value


# ------------------------------------------------------------------ Python text, both ways


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


def dim_text(value: object) -> str:
    """Python source of a size or number expression."""
    return repr(value) if not isinstance(value, sympy.Basic) else _expression_text(value)


@lru_cache(maxsize=4096)
def _expression_text(value: sympy.Basic) -> str:
    return _PythonPrinter().doprint(value)


_BINARY: dict[type, Any] = {
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
_RELATION: dict[type, Any] = {
    ast.Eq: sympy.Eq, ast.NotEq: sympy.Ne, ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le, ast.Gt: sympy.Gt, ast.GtE: sympy.Ge,
}  # fmt: skip


def parse_dim(node: ast.expr, reals: frozenset[str] = frozenset()) -> Dim:
    """Python syntax tree -> size. Names in `reals` are float symbols, all others are sizes."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value if isinstance(value, int) else sympy.Float(value)
        case ast.Name(id=name):
            return real_symbol(name) if name in reals else symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return dim(-sympy.sympify(parse_dim(operand, reals)))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return sympy.Not(parse_dim(operand, reals))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](parse_dim(left, reals), parse_dim(right, reals))
            return value if isinstance(value, int) else dim(value)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _RELATION:
            return _RELATION[type(op)](parse_dim(left, reals), parse_dim(right, reals))
        case ast.Call(func=ast.Name(id=name), args=args):
            function = getattr(torch_functions, name, None) or getattr(sympy, name, None)
            if isinstance(function, type) and issubclass(function, sympy.Basic):
                return dim(function(*(sympy.sympify(parse_dim(a, reals)) for a in args)))
    raise ParseError(f"not a size: {ast.unparse(node)}", where=f"line {node.lineno}")


def from_torch(value: int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool) -> object:
    """torch's symbolic number -> ours; symbols keep their names and lose torch's assumptions."""
    if isinstance(value, (int, float, bool)):
        return value
    expr = value.node.expr
    ours = {s: symbol(s.name) if s.is_integer else real_symbol(s.name) for s in expr.free_symbols}
    result = expr.xreplace(ours)
    if result in (sympy.true, sympy.false):
        return bool(result)
    if result.is_number:
        return int(result) if isinstance(value, torch.SymInt) else float(result)
    return result
