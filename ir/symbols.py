"""Symbolic sizes: sympy expressions over named positive integers.

A size is a Python int whenever its value is known, else a sympy expression. Integer division and
remainder are torch's own sympy functions, so captured sizes need no translation. sympy is imported
by the first size that is none; `symbolic` tells the two apart without it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, Union

import torch

from .errors import ParseError

if TYPE_CHECKING:
    import sympy

Dim: TypeAlias = Union[int, "sympy.Expr"]


def symbolic(value: object) -> TypeGuard[sympy.Basic]:
    """Whether a size or number is an expression of sympy's."""
    basic = getattr(sys.modules.get("sympy"), "Basic", None)
    return basic is not None and isinstance(value, basic)


@cache
def symbol(name: str) -> sympy.Symbol:
    """The size called `name`; a non-negative integer."""
    import sympy

    return sympy.Symbol(name, integer=True, nonnegative=True)


@cache
def real_symbol(name: str) -> sympy.Symbol:
    """A Python float that is known only when the compiled module is called."""
    import sympy

    return sympy.Symbol(name, real=True)


def dim(value: object) -> Dim:
    """Normalise to int where the value is known, else to a sympy expression."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or symbolic(value)):
        raise TypeError(f"a size must be an int or a sympy expression, not {value!r}")
    if isinstance(value, int):
        return value
    return int(value) if value.is_Integer else value  # type: ignore[return-value]


def floordiv(a: Dim, b: Dim) -> Dim:
    """a // b, rounded down; exact quotients of products simplify."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    from . import expressions

    return dim(expressions.floordiv(a, b))


def product(dims: tuple[Dim, ...]) -> Dim:
    result: Dim = 1
    for d in dims:
        result = result * d
    return dim(result) if symbolic(result) else result


def free_symbols(value: object) -> set[sympy.Symbol]:
    """Symbols in a size, or in any nesting of tuples and lists of them."""
    if isinstance(value, (tuple, list)):
        return set().union(*map(free_symbols, value)) if value else set()
    return set(value.free_symbols) if symbolic(value) else set()


def evaluate(value: object, env: Mapping[sympy.Symbol, int | float]) -> object:
    """Replace symbols by numbers, inside tuples too; what has no symbols comes back unchanged."""
    if symbolic(value):
        import sympy

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


def dim_text(value: object) -> str:
    """Python source of a size or number expression."""
    if not symbolic(value):
        return repr(value)
    from .expressions import expression_text

    return expression_text(value)


def parse_dim(node: ast.expr, reals: frozenset[str] = frozenset()) -> Dim:
    """Python syntax tree -> size. Names in `reals` are float symbols, all others are sizes."""
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.Name(id=name):
            return real_symbol(name) if name in reals else symbol(name)
    return _parse_expression(node, reals)


def _parse_expression(node: ast.expr, reals: frozenset[str]) -> Dim:
    import sympy

    from .expressions import BINARY, RELATION, function

    match node:
        case ast.Constant(value=float() as value):
            return sympy.Float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return dim(-sympy.sympify(parse_dim(operand, reals)))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return sympy.Not(parse_dim(operand, reals))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            value = BINARY[type(op)](parse_dim(left, reals), parse_dim(right, reals))
            return value if isinstance(value, int) else dim(value)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in RELATION:
            return RELATION[type(op)](parse_dim(left, reals), parse_dim(right, reals))
        case ast.Call(func=ast.Name(id=name), args=args):
            if (made := function(name)) is not None:
                return dim(made(*(sympy.sympify(parse_dim(a, reals)) for a in args)))
    raise ParseError(f"not a size: {ast.unparse(node)}", where=f"line {node.lineno}")


def from_torch(value: int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool) -> object:
    """torch's symbolic number -> ours; symbols keep their names and lose torch's assumptions."""
    if isinstance(value, (int, float, bool)):
        return value
    import sympy

    expr = value.node.expr
    ours = {s: symbol(s.name) if s.is_integer else real_symbol(s.name) for s in expr.free_symbols}
    result = expr.xreplace(ours)
    if result in (sympy.true, sympy.false):
        return bool(result)
    if result.is_number:
        return int(result) if isinstance(value, torch.SymInt) else float(result)
    return result
