"""Convolutions over 1 to 3 spatial dimensions. Weights are [out, in / groups, *kernel]."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..symbols import Dim, dim, floordiv, product
from ..types import Tensor, Type, channels_last, row_major
from .common import check_shape


class Conv(Op):
    """Base: shape, cost and layout of a convolution of `spatial` dimensions, with a batch first."""

    spatial: ClassVar[int]
    x: Value
    w: Value
    bias: Value | None
    stride: tuple[int, ...]
    padding: tuple[Dim, ...]
    dilation: tuple[int, ...]
    groups: int

    def infer(self) -> Type:
        x, w = self.x.tensor, self.w.tensor
        if x.rank != self.spatial + 2 or w.rank != self.spatial + 2:
            raise self.fail(f"x and w need {self.spatial + 2} dimensions")
        if x.dtype != w.dtype:
            raise self.fail(f"x is {x.dtype}, w is {w.dtype}")
        given = x.shape[1]
        if isinstance(given, int) and isinstance(w.shape[1], int):
            if given != w.shape[1] * self.groups:
                raise self.fail(f"x has {given} channels, w takes {w.shape[1] * self.groups}")
        if isinstance(w.shape[0], int) and w.shape[0] % self.groups:
            raise self.fail(f"{w.shape[0]} results do not split into {self.groups} groups")
        check_shape(self, "bias", w.shape[0])
        sizes = []
        for axis in range(self.spatial):
            reach = self.dilation[axis] * (w.shape[axis + 2] - 1) + 1
            room = dim(x.shape[axis + 2] + 2 * self.padding[axis] - reach)
            sizes.append(dim(floordiv(room, self.stride[axis]) + 1))
            if isinstance(room, int) and room < 0:
                raise self.fail(f"the kernel is larger than the padded input in dimension {axis}")
        last = channels_last in (x.layout, w.layout)
        layout = channels_last if last else row_major
        return Tensor((x.shape[0], w.shape[0], *sizes), x.dtype, layout)

    def cost(self) -> Cost:
        taps = product(self.w.shape[1:])
        return Cost(2 * self.tensor.numel * taps, self.bytes_moved())


def _declare(spatial: int, fn: Any) -> type[Conv]:
    ones, zeros = (1,) * spatial, (0,) * spatial

    def reference(self: Any, x: Any, w: Any, bias: Any) -> Any:
        return fn(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    body = {
        "__annotations__": {
            "x": Value, "w": Value, "bias": Value | None, "stride": tuple[int, ...],
            "padding": tuple[Dim, ...], "dilation": tuple[int, ...], "groups": int,
        },
        "bias": None, "stride": ones, "padding": zeros, "dilation": ones, "groups": 1,
        "spatial": spatial, "reference": reference, "__module__": __name__,
        "__doc__": f"Cross-correlation over {spatial} spatial dimensions (torch conv{spatial}d).",
    }  # fmt: skip
    return op(f"conv{spatial}d")(type(f"Conv{spatial}d", (Conv,), body))


Conv1d = _declare(1, F.conv1d)
Conv2d = _declare(2, F.conv2d)
Conv3d = _declare(3, F.conv3d)
