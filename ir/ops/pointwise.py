"""Elementwise ops: element i of the result reads element i of the (broadcast) operands.

One line a declaration. `result` says how the element type follows from the operands':
"same" (promoted), "float" (promoted, integers become floats) or "bool" (a comparison).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..op import Op, Operand, Value, op
from ..types import DType, Tensor, Type, boolean
from .common import as_float, broadcast, common_layout, promote, tensors


class Pointwise(Op):
    """Base of the family: types by broadcasting and promotion."""

    pointwise = True
    result: ClassVar[str] = "same"

    @property
    def values(self) -> tuple[Any, ...]:
        """Operands and numbers in field order, absent ones left out."""
        found = (getattr(self, f.name) for f in self.fields if f.kind == "operand")
        return tuple(v for v in found if v is not None)

    @property
    def compute_dtype(self) -> DType:
        """The element type in which operands meet before the operation."""
        dtype = promote(*self.values)
        return as_float(dtype) if self.result == "float" else dtype

    def result_dtype(self) -> DType:
        return boolean if self.result == "bool" else self.compute_dtype

    def infer(self) -> Type:
        types = tensors(*self.values)
        if not types:
            raise self.fail("no operand is a tensor")
        shape = broadcast(self, *(t.shape for t in types))
        return Tensor(shape, self.result_dtype(), common_layout(shape, *types))


def unary(name: str, fn: Callable[..., Any], result: str = "same") -> type[Pointwise]:
    def reference(self: Op, x: Any) -> Any:
        return fn(x)

    body = {
        "__annotations__": {"x": Value}, "__module__": __name__, "result": result,
        "reference": reference, "__doc__": f"y = {name}(x)",
    }  # fmt: skip
    return op(name)(type(_camel(name), (Pointwise,), body))


def binary(
    name: str,
    fn: Callable[..., Any],
    result: str = "same",
    *,
    commutative: bool = False,
    numbers: str = "ab",
) -> type[Pointwise]:
    """numbers: the operands that fn itself takes as a number."""

    def reference(self: Any, a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor) and "a" not in numbers:
            (a,) = _as_tensors(self.compute_dtype, a)
        if not isinstance(b, torch.Tensor) and "b" not in numbers:
            (b,) = _as_tensors(self.compute_dtype, b)
        return fn(a, b)

    body = {
        "__annotations__": {"a": Operand, "b": Operand}, "__module__": __name__,
        "result": result, "commutative": commutative, "reference": reference,
        "__doc__": f"y = {name}(a, b)",
    }  # fmt: skip
    return op(name)(type(_camel(name), (Pointwise,), body))


def _as_tensors(dtype: DType, *values: Any) -> list[Any]:
    """Numbers as 0-d tensors; tensors and absent operands as they are."""
    is_number = (int, float, complex)
    return [torch.tensor(v, dtype=dtype.torch) if isinstance(v, is_number) else v for v in values]


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


# name, meaning, element type of the result
for _name, _fn in (
    ("neg", torch.neg), ("abs", torch.abs), ("sign", torch.sign), ("floor", torch.floor),
    ("ceil", torch.ceil), ("trunc", torch.trunc), ("round", torch.round), ("relu", torch.relu),
    ("bitwise_not", torch.bitwise_not), ("square", torch.square),
):  # fmt: skip
    unary(_name, _fn)
for _name, _fn in (
    ("exp", torch.exp), ("exp2", torch.exp2), ("expm1", torch.expm1), ("log", torch.log),
    ("log2", torch.log2), ("log10", torch.log10), ("log1p", torch.log1p), ("sqrt", torch.sqrt),
    ("rsqrt", torch.rsqrt), ("reciprocal", torch.reciprocal), ("sin", torch.sin),
    ("cos", torch.cos), ("tan", torch.tan), ("asin", torch.asin), ("acos", torch.acos),
    ("atan", torch.atan), ("sinh", torch.sinh), ("cosh", torch.cosh), ("tanh", torch.tanh),
    ("asinh", torch.asinh), ("acosh", torch.acosh), ("atanh", torch.atanh), ("erf", torch.erf),
    ("erfc", torch.erfc), ("sigmoid", torch.sigmoid), ("silu", F.silu), ("mish", F.mish),
    ("hardswish", F.hardswish), ("hardsigmoid", F.hardsigmoid), ("log_sigmoid", F.logsigmoid),
):  # fmt: skip
    unary(_name, _fn, "float")
for _name in ("isnan", "isinf", "logical_not"):
    unary(_name, getattr(torch, _name), "bool")

for _name, _fn in (
    ("add", torch.add), ("mul", torch.mul), ("bitwise_and", torch.bitwise_and),
    ("bitwise_or", torch.bitwise_or), ("bitwise_xor", torch.bitwise_xor),
):  # fmt: skip
    binary(_name, _fn, commutative=True)
for _name in ("maximum", "minimum"):
    binary(_name, getattr(torch, _name), commutative=True, numbers="")
binary("sub", torch.sub)
binary("div", torch.div, "float")
binary("div_floor", lambda a, b: torch.div(a, b, rounding_mode="floor"))
binary("div_trunc", lambda a, b: torch.div(a, b, rounding_mode="trunc"))
binary("remainder", torch.remainder)
binary("fmod", torch.fmod, numbers="b")
binary("pow", torch.pow)
binary("atan2", torch.atan2, "float", numbers="")
for _name in ("eq", "ne"):
    binary(_name, getattr(torch, _name), "bool", commutative=True, numbers="b")
for _name in ("lt", "le", "gt", "ge"):
    binary(_name, getattr(torch, _name), "bool", numbers="b")
for _name in ("logical_and", "logical_or", "logical_xor"):
    binary(_name, getattr(torch, _name), "bool", commutative=True, numbers="")


@op("leaky_relu")
class LeakyRelu(Pointwise):
    """y = x where x > 0, else slope * x."""

    x: Value
    slope: float = 0.01

    def reference(self, x: Any) -> Any:
        return F.leaky_relu(x, self.slope)


@op("elu")
class Elu(Pointwise):
    """y = scale * x where x > 0, else scale * alpha * (exp(input_scale * x) - 1)."""

    x: Value
    alpha: float = 1.0
    scale: float = 1.0
    input_scale: float = 1.0

    def reference(self, x: Any) -> Any:
        return torch.ops.aten.elu(x, self.alpha, self.scale, self.input_scale)


@op("gelu")
class Gelu(Pointwise):
    """Gaussian error linear unit; approximate is "none" (erf) or "tanh"."""

    x: Value
    approximate: str = "none"

    def reference(self, x: Any) -> Any:
        return F.gelu(x, approximate=self.approximate)


@op("softplus")
class Softplus(Pointwise):
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""

    x: Value
    beta: float = 1.0
    threshold: float = 20.0

    def reference(self, x: Any) -> Any:
        return F.softplus(x, self.beta, self.threshold)


@op("clamp")
class Clamp(Pointwise):
    """min(max(x, low), high); a bound may be absent, a number or a tensor. NaN stays NaN."""

    x: Value
    low: Operand | None = None
    high: Operand | None = None

    def infer(self) -> Type:
        if self.low is None and self.high is None:
            raise self.fail("neither low nor high is given")
        return super().infer()

    def reference(self, x: Any, low: Any, high: Any) -> Any:
        if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
            low, high = _as_tensors(self.compute_dtype, low, high)
        return torch.clamp(x, low, high)


@op("where")
class Where(Pointwise):
    """a where the condition holds, else b."""

    cond: Value
    a: Operand
    b: Operand

    @property
    def compute_dtype(self) -> DType:
        return promote(self.a, self.b)

    def infer(self) -> Type:
        if self.cond.dtype.name not in ("bool", "u8"):
            raise self.fail(f"the condition is {self.cond.dtype}, not bool")
        return super().infer()

    def reference(self, cond: Any, a: Any, b: Any) -> Any:
        dtype = self.compute_dtype
        a, b = _as_tensors(dtype, a, b)
        return torch.where(cond.bool(), a.to(dtype.torch), b.to(dtype.torch))


@op("cast")
class Cast(Pointwise):
    """The same values in another element type."""

    x: Value
    dtype_: DType

    def result_dtype(self) -> DType:
        return self.dtype_

    def reference(self, x: Any) -> Any:
        return x.to(self.dtype_.torch)


@op("lerp")
class Lerp(Pointwise):
    """a + t (b - a)."""

    a: Value
    b: Value
    t: Operand

    def reference(self, a: Any, b: Any, t: Any) -> Any:
        return torch.lerp(a, b, t)
