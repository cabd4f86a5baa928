"""Matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..types import Tensor, Type
from .common import broadcast, check_shape, may_equal


@op("linear")
class Linear(Op):
    """y[..., n] = sum_k x[..., k] w[n, k] (+ bias[n])."""

    x: Value
    w: Value
    bias: Value | None = None

    def infer(self) -> Type:
        x, w = self.x.tensor, self.w.tensor
        if x.rank == 0 or w.rank != 2 or not may_equal(x.shape[-1], w.shape[1]):
            raise self.fail("the last dimension of x must be the second of w")
        if x.dtype != w.dtype:
            raise self.fail(f"x is {x.dtype}, w is {w.dtype}")
        check_shape(self, "bias", w.shape[0])
        return Tensor((*x.shape[:-1], w.shape[0]), x.dtype)

    def reference(self, x: Any, w: Any, bias: Any) -> Any:
        return F.linear(x, w, bias)

    def cost(self) -> Cost:
        return Cost(2 * self.tensor.numel * self.x.shape[-1], self.bytes_moved())


@op("matmul")
class Matmul(Op):
    """Batched product of the last two dimensions; leading ones broadcast. 1-d as torch.matmul."""

    a: Value
    b: Value

    def infer(self) -> Type:
        a, b = self.a.tensor, self.b.tensor
        if not a.rank or not b.rank:
            raise self.fail("operands need at least one dimension")
        if a.dtype != b.dtype:
            raise self.fail(f"a is {a.dtype}, b is {b.dtype}")
        if not may_equal(a.shape[-1], b.shape[-2] if b.rank > 1 else b.shape[-1]):
            raise self.fail("inner sizes differ")
        lead = broadcast(self, a.shape[:-2], b.shape[:-2])
        rows = a.shape[-2:-1] if a.rank > 1 else ()
        columns = b.shape[-1:] if b.rank > 1 else ()
        return Tensor((*lead, *rows, *columns), a.dtype)

    def reference(self, a: Any, b: Any) -> Any:
        return torch.matmul(a, b)

    def cost(self) -> Cost:
        return Cost(2 * self.tensor.numel * self.a.shape[-1], self.bytes_moved())
