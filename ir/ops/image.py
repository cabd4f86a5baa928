"""Pooling and interpolation over the last two dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Op, Value, op
from ..symbols import Dim, dim, floordiv
from ..types import Tensor, Type
from .common import check_sizes


class Pool2d(Op):
    """Base: the size torch gives a pooling window."""

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    def window(self) -> tuple[int, int]:
        """Pixels a window spans."""
        return self.kernel

    def infer(self) -> Type:
        t = self.x.tensor
        if t.rank not in (3, 4):
            raise self.fail("x needs 3 or 4 dimensions")
        sizes = (self._size(t.shape[-2 + i], i) for i in range(2))
        return Tensor((*t.shape[:-2], *sizes), t.dtype, t.layout)

    def _size(self, size: Dim, i: int) -> Dim:
        stride, pad = self.stride[i], self.padding[i]
        room = dim(size + 2 * pad - self.window()[i])
        if isinstance(room, int) and room < 0:
            raise self.fail(f"the window is larger than the padded input in dimension {i}")
        if not self.ceil_mode:
            return dim(floordiv(room, stride) + 1)
        out = dim(floordiv(dim(room + stride - 1), stride) + 1)
        if not isinstance(out, int):
            raise self.fail("ceil_mode needs known sizes")
        return out - 1 if (out - 1) * stride >= size + pad else out


@op("max_pool2d")
class MaxPool2d(Pool2d):
    """Largest value of each window."""

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def window(self) -> tuple[int, int]:
        kernel = zip(self.kernel, self.dilation, strict=True)
        height, width = (d * (k - 1) + 1 for k, d in kernel)
        return height, width

    def reference(self, x: Any) -> Any:
        return F.max_pool2d(
            x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode
        )


@op("avg_pool2d")
class AvgPool2d(Pool2d):
    """Mean of each window; `divisor` replaces the number of elements."""

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def reference(self, x: Any) -> Any:
        return F.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor,
        )  # fmt: skip


@op("interpolate")
class Interpolate(Op):
    """Resize [N, C, H, W] to `size`. mode: nearest | nearest-exact | bilinear | bicubic.

    scales: the factors the user gave; torch then takes 1 / scale as the step in the source, else
    in / out (with align_corners: (in - 1) / (out - 1)).
    """

    x: Value
    size: tuple[Dim, Dim]
    mode: str = "bilinear"
    align_corners: bool = False
    scales: tuple[float | None, float | None] = (None, None)

    def infer(self) -> Type:
        t = self.x.tensor
        if t.rank != 4:
            raise self.fail("x needs 4 dimensions")
        if self.mode not in ("nearest", "nearest-exact", "bilinear", "bicubic"):
            raise self.fail(f"unknown mode {self.mode!r}")
        check_sizes(self, self.size)
        return Tensor((*t.shape[:2], *self.size), t.dtype, t.layout)

    def reference(self, x: Any) -> Any:
        aten = torch.ops.aten
        match self.mode:
            case "nearest":
                return aten.upsample_nearest2d(x, self.size, *self.scales)
            case "nearest-exact":
                return aten._upsample_nearest_exact2d(x, self.size, *self.scales)
            case "bilinear":
                return aten.upsample_bilinear2d(x, self.size, self.align_corners, *self.scales)
        return aten.upsample_bicubic2d(x, self.size, self.align_corners, *self.scales)
