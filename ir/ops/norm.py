"""Normalisation layers, one op each."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..types import Tensor, Type


class Norm(Op):
    """Base: the result has the type of x."""

    x: Value

    def infer(self) -> Type:
        if not self.x.dtype.is_float:
            raise self.fail(f"x is {self.x.dtype}, not a float type")
        return self.x.tensor

    def cost(self) -> Cost:
        return Cost(8 * self.tensor.numel, self.bytes_moved())


@op("layer_norm")
class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last `dims` dimensions."""

    x: Value
    weight: Value | None = None
    bias: Value | None = None
    dims: int = 1
    eps: float = 1e-5

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, x.shape[x.dim() - self.dims :], weight, bias, self.eps)


@op("rms_norm")
class RmsNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight over the last `dims` dimensions, in float32 for 16-bit x."""

    x: Value
    weight: Value | None = None
    dims: int = 1
    eps: float = 1e-6

    def reference(self, x: Any, weight: Any) -> Any:
        return F.rms_norm(x, x.shape[x.dim() - self.dims :], weight, self.eps)


@op("group_norm")
class GroupNorm(Norm):
    """Normalise each of `groups` groups of channels (dimension 1) over channels and space."""

    x: Value
    groups: int
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    def infer(self) -> Type:
        channels = self.x.shape[1] if self.x.tensor.rank > 1 else 1
        if isinstance(channels, int) and channels % self.groups:
            raise self.fail(f"{channels} channels do not split into {self.groups} groups")
        return super().infer()

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        return F.group_norm(x, self.groups, weight, bias, self.eps)


@op("batch_norm")
class BatchNorm(Norm):
    """Inference: (x - mean) / sqrt(var + eps) * weight + bias per channel (dimension 1)."""

    x: Value
    mean: Value
    var: Value
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    def infer(self) -> Type:
        t = super().infer()
        assert isinstance(t, Tensor)
        if t.rank < 2:
            raise self.fail("x needs a channel dimension")
        return t

    def reference(self, x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
