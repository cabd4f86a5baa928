"""Look-ups and tensors made from nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..symbols import Dim
from ..types import DType, Tensor, Type
from .common import check_sizes

if TYPE_CHECKING:
    import sympy


@op("embedding")
class Embedding(Op):
    """Row ids[i] of the table, for every i."""

    table: Value
    ids: Value

    def infer(self) -> Type:
        if self.table.tensor.rank != 2 or self.ids.dtype.name not in ("i64", "i32"):
            raise self.fail("the table needs 2 dimensions, ids an integer type")
        return Tensor((*self.ids.shape, self.table.shape[1]), self.table.dtype)

    def reference(self, table: Any, ids: Any) -> Any:
        return F.embedding(ids, table)

    def cost(self) -> Cost:
        return Cost(0, 2 * self.tensor.nbytes + self.ids.tensor.nbytes)


@op("arange")
class Arange(Op):
    """start + step * i for i < size, as torch.arange(start, start + size * step, step)."""

    size: Dim
    dtype_: DType
    start: int | float | sympy.Expr = 0
    step: int | float | sympy.Expr = 1

    def infer(self) -> Type:
        check_sizes(self, (self.size,))
        return Tensor((self.size,), self.dtype_)

    def reference(self) -> Any:
        integer = not self.dtype_.is_float
        steps = torch.arange(self.size, dtype=torch.int64 if integer else torch.float64)
        return (steps * self.step + self.start).to(self.dtype_.torch)


@op("full")
class Full(Op):
    """A tensor of one value."""

    to: tuple[Dim, ...]
    value: int | float | bool | complex | sympy.Expr
    dtype_: DType

    def infer(self) -> Type:
        check_sizes(self, self.to)
        return Tensor(self.to, self.dtype_)

    def reference(self) -> Any:
        return torch.full(self.to, self.value, dtype=self.dtype_.torch)
