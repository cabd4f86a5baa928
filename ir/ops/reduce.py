"""Reductions over dimensions, and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..op import Cost, Op, Value, numel, op
from ..types import DType, Tensor, Type, boolean, i64
from .common import axis_of


class Reduction(Op):
    """Base: `dims` are non-negative and sorted; with keepdim they stay as size 1."""

    result: ClassVar[str] = "same"
    x: Value
    dims: tuple[int, ...]
    keepdim: bool

    def result_dtype(self) -> DType:
        dtype = self.x.dtype
        if self.result == "bool":
            return boolean
        if self.result == "wide" and not dtype.is_float and dtype.kind != "complex":
            return i64
        return dtype

    def infer(self) -> Type:
        t = self.x.tensor
        axes = {axis_of(self, d, t.rank) for d in self.dims}
        if tuple(sorted(axes)) != self.dims:
            raise self.fail(f"dimensions {self.dims} must be distinct, sorted and non-negative")
        if self.result == "float" and t.dtype.kind not in ("float", "complex"):
            raise self.fail(f"mean of {t.dtype}")
        sizes = [None if i in axes else s for i, s in enumerate(t.shape)]
        shape = (1 if s is None else s for s in sizes if self.keepdim or s is not None)
        return Tensor(tuple(shape), self.result_dtype())

    def cost(self) -> Cost:
        return Cost(numel(self.x.type), self.bytes_moved())


def _reduction(name: str, fn: Callable[..., Any], result: str = "same") -> type[Reduction]:
    def reference(self: Any, x: Any) -> Any:
        if not x.dim() or not self.dims:  # torch takes () for all dimensions
            return fn(x.unsqueeze(-1), (x.dim(),), False)
        return fn(x, self.dims, self.keepdim)

    body = {
        "__annotations__": {"x": Value, "dims": tuple[int, ...], "keepdim": bool},
        "keepdim": False, "result": result, "reference": reference, "__module__": __name__,
        "__doc__": f"{name} over dimensions.",
    }  # fmt: skip
    return op(name)(type(name.capitalize(), (Reduction,), body))


def _prod(x: Any, dims: tuple[int, ...], keepdim: bool) -> Any:
    for d in reversed(dims):
        x = torch.prod(x, d, keepdim)
    return x


_reduction("sum", lambda x, d, k: torch.sum(x, d, k), "wide")
_reduction("prod", _prod, "wide")
_reduction("mean", lambda x, d, k: torch.mean(x, d, k), "float")
_reduction("amax", lambda x, d, k: torch.amax(x, d, k))
_reduction("amin", lambda x, d, k: torch.amin(x, d, k))
_reduction("any", lambda x, d, k: torch.any(x.bool(), d, k), "bool")  # torch gives u8 for u8
_reduction("all", lambda x, d, k: torch.all(x.bool(), d, k), "bool")


class RowOp(Op):
    """Base of ops that normalise along one dimension."""

    x: Value
    dim: int

    def infer(self) -> Type:
        t = self.x.tensor
        axis_of(self, self.dim, t.rank)
        if not t.dtype.is_float:
            raise self.fail(f"x is {t.dtype}, not a float type")
        return t

    def cost(self) -> Cost:
        return Cost(5 * self.tensor.numel, self.bytes_moved())


@op("softmax")
class Softmax(RowOp):
    """exp(x - max) / sum(exp(x - max)) along `dim`."""

    x: Value
    dim: int

    def reference(self, x: Any) -> Any:
        return torch.softmax(x, self.dim)


@op("log_softmax")
class LogSoftmax(RowOp):
    """x - max - log(sum(exp(x - max))) along `dim`."""

    x: Value
    dim: int

    def reference(self, x: Any) -> Any:
        return torch.log_softmax(x, self.dim)
