"""Pointwise ops as C++ expressions: what one element of the result is, with torch's meaning.

16-bit floats are computed in float and rounded where they are stored or cast, not between the ops
of one kernel. The functions are those of effc.h, which carry torch's names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effc.ir import DType, Op, no, yes
from effc.ir.ops.common import promote
from effc.ir.rewrite import Answer
from effc.ir.symbols import symbolic
from effc.ir.types import Tensor

STORAGE = {
    "f32": "float", "f64": "double", "bf16": "effc::bf16", "f16": "effc::half", "i64": "int64_t",
    "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "bool": "bool",
}  # fmt: skip
REGISTER = STORAGE | {"bf16": "float", "f16": "float"}  # what a loaded element is
LIMITS = {"i64": 63, "i32": 31, "i16": 15, "i8": 7, "u8": 8}
Number = Callable[[Any], str]  # a symbolic number known at the call -> the C++ that reads it


def storage(dtype: DType) -> str:
    return STORAGE[dtype.name]


def register(dtype: DType) -> str:
    return REGISTER[dtype.name]


def convert(text: str, source: DType, to: DType) -> str:
    """A loaded element of one type as one of another; bits are not yet rounded to 16-bit floats."""
    if register(source) == register(to):
        return text
    return f"effc::cast<{register(to)}>({text})"


# ------------------------------------------------------------------ numbers


def literal(value: Any, dtype: DType) -> str:
    """A Python number as a C++ literal of the element's register type."""
    kind = register(dtype)
    if kind in ("float", "double"):
        number = float(value)
        if math.isnan(number):
            return f"std::numeric_limits<{kind}>::quiet_NaN()"
        with np.errstate(over="ignore"):
            rounded = np.float32(number) if kind == "float" else np.float64(number)
        if math.isinf(rounded):
            return f"{'-' if rounded < 0 else ''}std::numeric_limits<{kind}>::infinity()"
        text = repr(rounded.item()) if kind == "double" else str(rounded)
        text = text if any(c in text for c in ".en") else f"{text}.0"
        return f"{text}f" if kind == "float" else text
    if kind == "bool":
        return "true" if value else "false"
    if int(value) == -(2**63):
        return "std::numeric_limits<int64_t>::min()"
    return f"{kind}({int(value)})"


def _number(value: Any, dtype: DType, number: Number) -> str:
    if not symbolic(value):
        return literal(value, dtype)
    return f"effc::cast<{register(dtype)}>({number(value)})"


def _fits(value: Any, dtype: DType) -> bool:
    """Torch refuses a number that an integer type cannot hold."""
    if dtype.kind != "int" or symbolic(value):
        return True
    top = 2 ** LIMITS[dtype.name]
    return (0 if dtype.name == "u8" else -top) <= value < top


# ------------------------------------------------------------------ the table

Expression = Callable[..., str]


def _call(name: str) -> Expression:
    return lambda node, c, *args: f"effc::{name}({', '.join(args)})"


def _compare(sign: str) -> Expression:
    return lambda node, c, a, b: f"({a} {sign} {b})"


def _truth(text: str, c: DType) -> str:
    return text if c.kind == "bool" else f"({text} != {literal(0, c)})"


def _logical(sign: str) -> Expression:
    return lambda node, c, a, b: f"({_truth(a, c)} {sign} {_truth(b, c)})"


def _bits(sign: str) -> Expression:
    return lambda node, c, a, b: f"static_cast<{register(c)}>({a} {sign} {b})"


def _only_floats(name: str) -> Expression:
    """Rounding does nothing to integers."""
    return lambda node, c, x: f"effc::{name}({x})" if c.is_float else x


def _attributes(name: str, *fields: str) -> Expression:
    def express(node: Any, c: DType, *args: str) -> str:
        given = [literal(getattr(node, f), c) for f in fields]
        return f"effc::{name}({', '.join([*args, *given])})"

    return express


def _pow(node: Any, c: DType, a: str, b: str) -> str:
    """torch computes these exponents by multiplication and square root; half without the roots."""
    exponent = node.b
    if c.is_float and isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        known = {
            0.5: f"effc::sqrt({a})", -0.5: f"effc::rsqrt({a})", 1.0: a, 2.0: f"({a} * {a})",
            3.0: f"({a} * {a} * {a})", -1.0: f"effc::reciprocal({a})",
            -2.0: f"effc::reciprocal({a} * {a})",
        }  # fmt: skip
        if float(exponent) in known and not (c.name == "f16" and abs(exponent) == 0.5):
            return known[float(exponent)]
    return f"effc::pow({a}, {b})"


def _clamp(node: Any, c: DType, x: str, *bounds: str) -> str:
    given = list(bounds)
    if node.low is not None:
        x = f"effc::maximum({x}, {given.pop(0)})"
    return f"effc::minimum({x}, {given.pop(0)})" if node.high is not None else x


EXPRESSIONS: dict[str, Expression] = {
    name: _call(name)
    for name in (
        "abs acos acosh add asin asinh atan atan2 atanh cos cosh erf erfc exp exp2 expm1 fmod "
        "hardsigmoid hardswish lerp log log10 log1p log2 log_sigmoid maximum minimum mish mul neg "
        "reciprocal relu remainder rsqrt sigmoid sign silu sin sinh sqrt square sub tan tanh"
    ).split()
}
EXPRESSIONS |= {name: _only_floats(name) for name in ("floor", "ceil", "trunc", "round")}
EXPRESSIONS |= {
    name: _compare(sign)
    for name, sign in (
        ("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")
    )
}  # fmt: skip
EXPRESSIONS |= {
    "div": lambda node, c, a, b: f"({a} / {b})",
    "div_floor": _call("floor_divide"),
    "div_trunc": _call("trunc_divide"),
    "pow": _pow,
    "clamp": _clamp,
    "where": lambda node, c, cond, a, b: f"({cond} ? {a} : {b})",
    "cast": lambda node, c, x: x,
    "gelu": lambda node, c, x: (
        f"effc::{'gelu_tanh' if node.approximate == 'tanh' else 'gelu'}({x})"
    ),
    "leaky_relu": _attributes("leaky_relu", "slope"),
    "elu": _attributes("elu", "alpha", "scale", "input_scale"),
    "softplus": _attributes("softplus", "beta", "threshold"),
    "isnan": lambda node, c, x: f"({x} != {x})",
    "isinf": lambda node, c, x: f"effc::isinf({x})" if c.is_float else "false",
    "logical_not": lambda node, c, x: f"!{_truth(x, c)}",
    "logical_and": _logical("&"),
    "logical_or": _logical("|"),
    "logical_xor": _logical("!="),
    "bitwise_and": _bits("&"),
    "bitwise_or": _bits("|"),
    "bitwise_xor": _bits("^"),
    "bitwise_not": lambda node, c, x: (
        f"!{x}" if c.kind == "bool" else f"static_cast<{register(c)}>(~{x})"
    ),
}

# In units of a vector multiply-add, roughly: decides how much work is worth a second thread.
_COSTS = dict.fromkeys(("div", "sqrt", "rsqrt", "reciprocal"), 4)
_COSTS |= dict.fromkeys(
    "exp exp2 expm1 log log2 log10 log1p tanh sigmoid silu gelu erf sin cos mish".split(), 12
)
_COSTS |= dict.fromkeys("pow atan2 fmod remainder div_floor tan asin acos atan erfc".split(), 60)


def cost(node: Op) -> int:
    return _COSTS.get(node.name, 1)


def express(node: Any, args: Sequence[tuple[str, DType] | Any], number: Number) -> str:
    """The C++ expression of one element; args are (variable, element type) or numbers."""
    c = node.compute_dtype
    if node.name == "cast":
        (text, source), to = args[0], node.dtype_
        text = convert(text, source, to)
        if to.bits == 16 and to.is_float and source != to:
            return f"effc::round_to<{storage(to)}>({text})"
        return text
    texts = []
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            text, source = arg
            condition = node.name == "where" and i == 0
            texts.append(_truth(text, source) if condition else convert(text, source, c))
        elif node.result == "bool" and c.bits == 16 and c.is_float:
            rounded = f"effc::round_to<{storage(c)}>({_number(arg, c, number)})"
            texts.append(rounded)  # a comparison sees the number as an element
        else:
            texts.append(_number(arg, c, number))
    return EXPRESSIONS[node.name](node, c, *texts)


# ------------------------------------------------------------------ what has an expression


def check(node: Any) -> Answer:
    """Whether a pointwise node can be said in C++ with torch's exact meaning."""
    if node.name not in EXPRESSIONS:
        return no("op {} has no scalar expression", node.name, at=node)
    types = [v.tensor for v in node.values if isinstance(v, Op)]
    for t in (*types, node.tensor):
        if not isinstance(t, Tensor) or t.dtype.name not in STORAGE:
            return no("{} is not taken", t.dtype, at=node)
    c = promote(*node.values) if node.name != "where" else node.compute_dtype
    for value in node.values:
        if isinstance(value, complex) or (
            symbolic(value) and (value.is_Boolean or value.is_Relational)
        ):
            return no("operand {} is neither a tensor nor a real number", value, at=node)
        if not isinstance(value, Op) and not _fits(value, c):
            return no("{} does not fit {}", value, c, at=node)
    if node.name.startswith("bitwise") and c.is_float:
        return no("{} of {}", node.name, c, at=node)
    if node.compute_dtype.kind == "bool" and node.name in ("sub", "neg", "square", "abs", "div"):
        return no("{} of bool", node.name, at=node)
    if node.name in ("div_floor", "div_trunc", "remainder", "fmod") and not c.is_float:
        if not isinstance(node.b, (int, float)) or node.b == 0:
            return no("torch raises on a zero among integer divisors", at=node)
    if node.name == "pow" and c.kind in ("int", "bool"):
        if not isinstance(node.b, int) or node.b < 0 or c.kind == "bool":
            return no("torch raises on a negative integer power", at=node)
    return yes
