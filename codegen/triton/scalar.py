"""Pointwise ops as Triton expressions: what one element of the result is, with torch's meaning.

The functions are those of functions.py, which carry torch's names. 16-bit floats are computed in
float32 and rounded where they are stored or cast, not between the ops of one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from effc.codegen.cpp.scalar import check as _exactly_sayable
from effc.ir import DType, no
from effc.ir.rewrite import Answer

POINTER = {
    "f32": "*fp32", "f64": "*fp64", "bf16": "*bf16", "f16": "*fp16", "i64": "*i64", "i32": "*i32",
    "i16": "*i16", "i8": "*i8", "u8": "*u8", "bool": "*i1",
}  # fmt: skip
STORAGE = {
    "f32": "tl.float32", "f64": "tl.float64", "bf16": "tl.bfloat16", "f16": "tl.float16",
    "i64": "tl.int64", "i32": "tl.int32", "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8",
    "bool": "tl.int1",
}  # fmt: skip
REGISTER = STORAGE | {"bf16": "tl.float32", "f16": "tl.float32"}  # what a loaded element is
Number = Callable[[sympy.Expr], str]  # a number known at the call -> the expression that reads it


def storage(dtype: DType) -> str:
    return STORAGE[dtype.name]


def register(dtype: DType) -> str:
    return REGISTER[dtype.name]


def convert(text: str, source: DType, to: DType) -> str:
    """A loaded element of one type as one of another; bits are not yet rounded to 16-bit floats."""
    if register(source) == register(to):
        return text
    return _truth(text, source) if to.kind == "bool" else f"({text}).to({register(to)})"


def rounded(text: str, to: DType) -> str:
    """A float32 value as it is after a store in a 16-bit type."""
    return f"({text}).to({storage(to)}).to(tl.float32)"


def literal(value: Any, dtype: DType) -> str:
    """A Python number as Triton takes it beside elements of the type."""
    if dtype.is_float:
        number = float(value)
        return repr(number) if math.isfinite(number) else f'float("{number}")'
    return str(bool(value)) if dtype.kind == "bool" else str(int(value))


def constant(value: Any, dtype: DType) -> str:
    """A number as an element that has a type of its own."""
    return f"tl.full((), {literal(value, dtype)}, {register(dtype)})"


def _number(value: Any, dtype: DType, number: Number) -> str:
    if isinstance(value, sympy.Basic):
        return f"({number(value)}).to({register(dtype)})"
    return constant(value, dtype)


def _truth(text: str, c: DType) -> str:
    return text if c.kind == "bool" else f"({text} != 0)"


# ------------------------------------------------------------------ the table

Expression = Callable[..., str]


def _call(name: str) -> Expression:
    return lambda node, c, *args: f"fn.{name}({', '.join(args)})"


def _infix(sign: str) -> Expression:
    return lambda node, c, a, b: f"({a} {sign} {b})"


def _logical(sign: str) -> Expression:
    return lambda node, c, a, b: f"({_truth(a, c)} {sign} {_truth(b, c)})"


def _only_floats(name: str) -> Expression:
    return lambda node, c, x: f"fn.{name}({x})" if c.is_float else x


def _attributes(name: str, *fields: str) -> Expression:
    def express(node: Any, c: DType, *args: str) -> str:
        given = [literal(getattr(node, f), c) for f in fields]
        return f"fn.{name}({', '.join([*args, *given])})"

    return express


def _pow(node: Any, c: DType, a: str, b: str) -> str:
    """torch computes these exponents by multiplication and square root; half without the roots."""
    exponent = node.b
    if c.is_float and isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        known = {
            0.5: f"fn.sqrt({a})", -0.5: f"fn.rsqrt({a})", 1.0: a, 2.0: f"({a} * {a})",
            3.0: f"({a} * {a} * {a})", -1.0: f"fn.reciprocal({a})",
            -2.0: f"fn.reciprocal({a} * {a})",
        }  # fmt: skip
        if float(exponent) in known and not (c.name == "f16" and abs(exponent) == 0.5):
            return known[float(exponent)]
    return f"fn.pow({a}, {b})"


def _clamp(node: Any, c: DType, x: str, *bounds: str) -> str:
    given = list(bounds)
    if node.low is not None:
        x = f"fn.maximum({x}, {given.pop(0)})"
    return f"fn.minimum({x}, {given.pop(0)})" if node.high is not None else x


EXPRESSIONS: dict[str, Expression] = {
    name: _call(name)
    for name in (
        "abs acos acosh add asin asinh atan atan2 atanh cos cosh div erf erfc exp exp2 expm1 fmod "
        "hardsigmoid hardswish lerp log log10 log1p log2 log_sigmoid maximum minimum mish mul neg "
        "reciprocal relu remainder rsqrt sigmoid sign silu sin sinh sqrt square sub tan tanh"
    ).split()
}
EXPRESSIONS |= {name: _only_floats(name) for name in ("floor", "ceil", "trunc", "round")}
EXPRESSIONS |= {
    name: _infix(sign)
    for name, sign in (
        ("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="),
        ("bitwise_and", "&"), ("bitwise_or", "|"), ("bitwise_xor", "^"),
    )
}  # fmt: skip
EXPRESSIONS |= {
    "div_floor": _call("floor_divide"),
    "div_trunc": _call("trunc_divide"),
    "pow": _pow,
    "clamp": _clamp,
    "where": lambda node, c, cond, a, b: f"tl.where({cond}, {a}, {b})",
    "cast": lambda node, c, x: x,
    "gelu": lambda node, c, x: f"fn.{'gelu_tanh' if node.approximate == 'tanh' else 'gelu'}({x})",
    "leaky_relu": _attributes("leaky_relu", "slope"),
    "elu": _attributes("elu", "alpha", "scale", "input_scale"),
    "softplus": _attributes("softplus", "beta", "threshold"),
    "isnan": lambda node, c, x: f"({x} != {x})",
    "isinf": lambda node, c, x: f"fn.isinf({x})" if c.is_float else f"({x} != {x})",
    "logical_not": lambda node, c, x: f"({_truth(x, c)} == 0)",
    "logical_and": _logical("&"),
    "logical_or": _logical("|"),
    "logical_xor": _logical("^"),
    "bitwise_not": lambda node, c, x: f"({x} == 0)" if c.kind == "bool" else f"(~{x})",
}


def express(node: Any, args: Sequence[tuple[str, DType] | Any], number: Number) -> str:
    """The expression of one element; args are (variable, element type) or numbers."""
    c = node.compute_dtype
    if node.name == "cast":
        (text, source), to = args[0], node.dtype_
        text = convert(text, source, to)
        if to.bits == 16 and to.is_float and source != to:
            return rounded(text, to)
        return text
    texts = []
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            text, source = arg
            condition = node.name == "where" and i == 0
            texts.append(_truth(text, source) if condition else convert(text, source, c))
        elif node.result == "bool" and c.bits == 16 and c.is_float:
            texts.append(rounded(_number(arg, c, number), c))  # compared as an element
        else:
            texts.append(_number(arg, c, number))
    return EXPRESSIONS[node.name](node, c, *texts)


def check(node: Any) -> Answer:
    """Whether a pointwise node can be said in Triton with torch's exact meaning."""
    if node.name not in EXPRESSIONS:
        return no("op {} has no Triton expression", node.name, at=node)
    return _exactly_sayable(node)


__all__ = [
    "POINTER", "check", "constant", "convert", "express", "literal", "register",
    "rounded", "storage",
]  # fmt: skip
