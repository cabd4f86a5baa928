"""Normalisation layers, one op each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..types import Type
from .common import check_shape


class Norm(Op):
    """Base: the result has the type of x."""

    x: Value

    def infer(self) -> Type:
        if not self.x.dtype.is_float:
            raise self.fail(f"x is {self.x.dtype}, not a float type")
        return self.x.tensor

    def cost(self) -> Cost:
        return Cost(8 * self.tensor.numel, self.bytes_moved())


class LastNorm(Norm):
    """Base of norms over the last `dims` dimensions."""

    dims: int

    def infer(self) -> Type:
        t = self.x.tensor
        if not 1 <= self.dims <= t.rank:
            raise self.fail(f"x has {t.rank} dimensions, {self.dims} are to be normalised")
        for name in ("weight", "bias"):
            if hasattr(self, name):
                check_shape(self, name, *t.shape[t.rank - self.dims :])
        return super().infer()


class ChannelNorm(Norm):
    """Base of norms with a number for each channel (dimension 1)."""

    def infer(self) -> Type:
        t = self.x.tensor
        if t.rank < 2:
            raise self.fail("x needs a channel dimension")
        for name in ("mean", "var", "weight", "bias"):
            if hasattr(self, name):
                check_shape(self, name, t.shape[1])
        return super().infer()


@op("layer_norm")
class LayerNorm(LastNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last `dims` dimensions."""

    x: Value
    weight: Value | None = None
    bias: Value | None = None
    dims: int = 1
    eps: float = 1e-5

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        return F.layer_norm(x, x.shape[x.dim() - self.dims :], weight, bias, self.eps)


@op("rms_norm")
class RmsNorm(LastNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last `dims` dimensions; 16-bit x in float32."""

    x: Value
    weight: Value | None = None
    dims: int = 1
    eps: float = 1e-6

    def reference(self, x: Any, weight: Any) -> Any:
        return F.rms_norm(x, x.shape[x.dim() - self.dims :], weight, self.eps)


@op("group_norm")
class GroupNorm(ChannelNorm):
    """Normalise each of `groups` groups of channels (dimension 1) over channels and space."""

    x: Value
    groups: int
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    def infer(self) -> Type:
        result = super().infer()
        channels = self.x.shape[1]
        if isinstance(channels, int) and channels % self.groups:
            raise self.fail(f"{channels} channels do not split into {self.groups} groups")
        return result

    def reference(self, x: Any, weight: Any, bias: Any) -> Any:
        return torch.group_norm(x, self.groups, weight, bias, self.eps)  # F refuses single values


@op("batch_norm")
class BatchNorm(ChannelNorm):
    """Inference: (x - mean) / sqrt(var + eps) * weight + bias per channel (dimension 1)."""

    x: Value
    mean: Value
    var: Value
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    def reference(self, x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
