"""Pooling and interpolation."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import Op, no
from effc.ir.rewrite import op
from effc.ir.symbols import floordiv

from .products import as_tuple


@converts("aten.upsample_nearest2d.vec", "aten._upsample_nearest_exact2d.vec")
def _nearest(call: Call, x: Op, output_size: Any, scale_factors: Any) -> Any:
    mode = "nearest-exact" if "exact" in call.target else "nearest"
    return op.interpolate(x, call.shape[-2:], mode, False, _scales(scale_factors))


@converts("aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec")
def _bilinear(call: Call, x: Op, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
    mode = "bicubic" if "bicubic" in call.target else "bilinear"
    return op.interpolate(x, call.shape[-2:], mode, align_corners, _scales(scale_factors))


def _scales(factors: Any) -> tuple[Any, Any]:
    return (None, None) if factors is None else (float(factors[0]), float(factors[1]))


@converts("aten.max_pool2d.default")
def _max_pool(
    call: Call, x: Op, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    kernel = as_tuple(kernel_size, 2)
    stride = as_tuple(stride, 2) if stride else kernel
    return op.max_pool2d(x, kernel, stride, as_tuple(padding, 2), as_tuple(dilation, 2), ceil_mode)


@converts("aten.avg_pool2d.default")
def _avg_pool(
    call: Call, x: Op, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Any:  # fmt: skip
    kernel = as_tuple(kernel_size, 2)
    stride = as_tuple(stride, 2) if stride else kernel
    pad = as_tuple(padding, 2)
    return op.avg_pool2d(x, kernel, stride, pad, ceil_mode, count_include_pad, divisor_override)


@converts("aten.adaptive_avg_pool2d.default")
def _adaptive_avg_pool(call: Call, x: Op, output_size: Any) -> Any:
    rank, size = x.tensor.rank, as_tuple(output_size, 2)
    if size == (1, 1):
        return op.mean(x, (rank - 2, rank - 1), True)
    have = x.shape[-2:]
    if all(
        isinstance(h, int) and isinstance(s, int) and s and h % s == 0 for h, s in zip(have, size)
    ):
        kernel = tuple(floordiv(h, s) for h, s in zip(have, size))
        return op.avg_pool2d(x, kernel, kernel)
    return no("adaptive pooling from {} to {}: windows differ in size", have, size)
