"""Pointwise ops as C++ expressions; the functions are those of effc.h."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from effc.ir import DType

from ..scalar import Expression, Language, Number, cost

STORAGE = {
    "f32": "float", "f64": "double", "bf16": "effc::bf16", "f16": "effc::half", "i64": "int64_t",
    "i32": "int32_t", "i16": "int16_t", "i8": "int8_t", "u8": "uint8_t", "bool": "bool",
}  # fmt: skip
REGISTER = STORAGE | {"bf16": "float", "f16": "float"}  # what a loaded element is


def storage(dtype: DType) -> str:
    return STORAGE[dtype.name]


def register(dtype: DType) -> str:
    return REGISTER[dtype.name]


def convert(text: str, source: DType, to: DType) -> str:
    """A loaded element of one type as one of another; bits are not yet rounded to 16-bit floats."""
    return text if register(source) == register(to) else cast(text, to)


def cast(text: str, to: DType) -> str:
    return f"effc::cast<{register(to)}>({text})"


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


def _bits(sign: str) -> Expression:
    return lambda node, c, a, b: f"static_cast<{register(c)}>({a} {sign} {b})"


CPP = Language(
    "C++", "effc::", literal, constant=literal, number=cast, convert=convert,
    rounded=lambda text, to: f"effc::round_to<{storage(to)}>({text})",
    more={
        "div": lambda node, c, a, b: f"({a} / {b})",
        "where": lambda node, c, cond, a, b: f"({cond} ? {a} : {b})",
        "isinf": lambda node, c, x: f"effc::isinf({x})" if c.is_float else "false",
        "logical_not": lambda node, c, x: f"!{CPP.truth(x, c)}",
        "bitwise_and": _bits("&"),
        "bitwise_or": _bits("|"),
        "bitwise_xor": _bits("^"),
        "bitwise_not": lambda node, c, x: (
            f"!{x}" if c.kind == "bool" else f"static_cast<{register(c)}>(~{x})"
        ),
    },
)  # fmt: skip
EXPRESSIONS, express, check = CPP.expressions, CPP.express, CPP.check

__all__ = [
    "CPP", "EXPRESSIONS", "Number", "check", "convert", "cost", "express", "literal", "register",
    "storage",
]  # fmt: skip
