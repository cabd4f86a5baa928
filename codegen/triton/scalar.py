"""Pointwise ops as Triton expressions; the functions are those of functions.py."""

from __future__ import annotations

import math
from typing import Any

from effc.ir import DType

from ..scalar import Language, infix

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


def storage(dtype: DType) -> str:
    return STORAGE[dtype.name]


def register(dtype: DType) -> str:
    return REGISTER[dtype.name]


def convert(text: str, source: DType, to: DType) -> str:
    """A loaded element of one type as one of another; bits are not yet rounded to 16-bit floats."""
    if register(source) == register(to):
        return text
    return TRITON.truth(text, source) if to.kind == "bool" else f"({text}).to({register(to)})"


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


TRITON = Language(
    "Triton", "fn.", literal, constant=constant, convert=convert, rounded=rounded,
    number=lambda text, to: f"({text}).to({register(to)})",
    more={
        "where": lambda node, c, cond, a, b: f"tl.where({cond}, {a}, {b})",
        "isinf": lambda node, c, x: f"fn.isinf({x})" if c.is_float else f"({x} != {x})",
        "logical_not": lambda node, c, x: f"({TRITON.truth(x, c)} == 0)",
        "bitwise_and": infix("&"),
        "bitwise_or": infix("|"),
        "bitwise_xor": infix("^"),
        "bitwise_not": lambda node, c, x: f"({x} == 0)" if c.kind == "bool" else f"(~{x})",
    },
)  # fmt: skip
TRITON.expressions["div"] = TRITON.call("div")
TRITON.expressions["logical_xor"] = TRITON.logical("^")
EXPRESSIONS, express, check = TRITON.expressions, TRITON.express, TRITON.check

__all__ = [
    "EXPRESSIONS", "POINTER", "TRITON", "check", "constant", "convert", "express", "literal",
    "register", "rounded", "storage",
]  # fmt: skip
