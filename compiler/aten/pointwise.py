"""Elementwise operators."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import Op, no
from effc.ir.rewrite import op


def _plain(made: Any, *targets: str) -> None:
    """Operators whose arguments are the op's operands."""

    @converts(*targets)
    def convert(call: Call, **operands: Any) -> Any:
        return made(*operands.values())


for _name in (
    "neg", "abs", "sign", "floor", "ceil", "trunc", "relu", "bitwise_not", "square", "exp", "exp2",
    "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
    "sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "log_sigmoid", "isnan", "isinf",
    "logical_not", "round",
):  # fmt: skip
    _plain(getattr(op, _name), f"aten.{_name}.default")

_BINARY = {
    "mul": "mul", "remainder": "remainder", "fmod": "fmod", "pow": "pow", "atan2": "atan2",
    "maximum": "maximum", "minimum": "minimum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "logical_and": "logical_and", "logical_or": "logical_or",
    "logical_xor": "logical_xor", "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "__and__": "bitwise_and", "__or__": "bitwise_or",
    "__xor__": "bitwise_xor", "floor_divide": "div_floor", "true_divide": "div",
}  # fmt: skip
_OVERLOADS = ("default", "Tensor", "Scalar", "Scalar_Tensor", "Tensor_Tensor", "Tensor_Scalar")
for _name, to in _BINARY.items():
    _plain(getattr(op, to), *(f"aten.{_name}.{o}" for o in _OVERLOADS))


@converts("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
def _add(call: Call, x: Any, other: Any, alpha: Any = 1) -> Any:
    made = op.add if ".add." in call.target else op.sub
    return made(x, scaled(other, alpha))


@converts("aten.rsub.Tensor", "aten.rsub.Scalar")
def _rsub(call: Call, x: Any, other: Any, alpha: Any = 1) -> Any:
    return op.sub(other, scaled(x, alpha))


def scaled(value: Any, factor: Any) -> Any:
    if factor == 1:
        return value
    return op.mul(value, factor) if isinstance(value, Op) else value * factor


@converts("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _div(call: Call, x: Any, other: Any, rounding_mode: str | None = None) -> Any:
    made = {None: op.div, "floor": op.div_floor, "trunc": op.div_trunc}[rounding_mode]
    return made(x, other)


@converts("aten.round.decimals")
def _round_decimals(call: Call, x: Op, decimals: int) -> Any:
    return op.round(x) if decimals == 0 else no("round to {} decimals", decimals)


@converts("aten.special_expit.default")
def _expit(call: Call, x: Op) -> Any:
    return op.sigmoid(x)


@converts("aten.gelu.default")
def _gelu(call: Call, x: Op, approximate: str) -> Any:
    return op.gelu(x, approximate=approximate)


@converts("aten.leaky_relu.default")
def _leaky_relu(call: Call, x: Op, negative_slope: float) -> Any:
    return op.leaky_relu(x, float(negative_slope))


@converts("aten.elu.default")
def _elu(call: Call, x: Op, alpha: float, scale: float, input_scale: float) -> Any:
    return op.elu(x, float(alpha), float(scale), float(input_scale))


@converts("aten.celu.default")
def _celu(call: Call, x: Op, alpha: float) -> Any:
    return op.elu(x, float(alpha), 1.0, 1.0 / float(alpha))


@converts("aten.softplus.default")
def _softplus(call: Call, x: Op, beta: float, threshold: float) -> Any:
    return op.softplus(x, float(beta), float(threshold))


@converts("aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.clip.Tensor")
def _clamp(call: Call, x: Op, min: Any, max: Any) -> Any:
    return op.clamp(x, min, max)


@converts("aten.clamp_min.default", "aten.clamp_min.Tensor")
def _clamp_min(call: Call, x: Op, min: Any) -> Any:
    return op.clamp(x, min, None)


@converts("aten.clamp_max.default", "aten.clamp_max.Tensor")
def _clamp_max(call: Call, x: Op, max: Any) -> Any:
    return op.clamp(x, None, max)


@converts("aten.hardtanh.default")
def _hardtanh(call: Call, x: Op, min_val: Any, max_val: Any) -> Any:
    return op.clamp(x, min_val, max_val)


@converts("aten.relu6.default")
def _relu6(call: Call, x: Op) -> Any:
    return op.clamp(x, 0, 6)


@converts("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(call: Call, condition: Op, x: Any, other: Any) -> Any:
    return op.where(condition, x, other)


@converts("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(call: Call, x: Op, mask: Op, value: Any) -> Any:
    if isinstance(value, Op) and value.dtype != x.dtype:
        value = op.cast(value, x.dtype)
    elif not isinstance(value, Op) and x.dtype.kind == "int":
        value = int(value)
    return op.where(mask, value, x)


@converts("aten.lerp.Scalar", "aten.lerp.Tensor")
def _lerp(call: Call, x: Op, end: Op, weight: Any) -> Any:
    return op.lerp(x, end, weight)


@converts("aten.addcmul.default")
def _addcmul(call: Call, x: Op, tensor1: Op, tensor2: Op, value: Any) -> Any:
    return op.add(x, op.mul(scaled(tensor1, value), tensor2))


@converts("aten.addcdiv.default")
def _addcdiv(call: Call, x: Op, tensor1: Op, tensor2: Op, value: Any) -> Any:
    return op.add(x, op.div(scaled(tensor1, value), tensor2))
