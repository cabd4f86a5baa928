"""Pooling and interpolation over the last two dimensions, row-major or channels-last."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.image import image_kernel
from effc.ir import channels_last, no, row_major, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim

from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.moves import packed_ref
from ..plan.regions import Region
from .lowering import lowers

FLOATS = ("f32", "f64", "bf16", "f16")


def floats(node: Any) -> Answer:
    if node.dtype.name not in FLOATS:
        return no("{} of {}", node.name, node.dtype, at=node)
    return yes


def as_image(x: Ref) -> Ref:
    """[C, H, W] as one image of a batch."""
    if len(x.shape) == 4:
        return x
    return x.with_(shape=(1, *x.shape), strides=(0, *x.strides))


def _walk(b: Builder, node: Any) -> tuple[bool, Ref, Ref, tuple[Dim, ...], tuple[Dim, ...]]:
    """(channels last?, result, operand as the kernel reads it, sizes, strides)."""
    (out,) = b.results(node)
    last = node.tensor.layout == channels_last
    x = b.ref(node.x)
    axis = -3 if last else -1
    if x.strides[axis] != 1 and x.shape[axis] != 1:
        x = packed_ref(b, node.x, x, channels_last if last else row_major)
    given, made = as_image(x), as_image(out)
    sizes = (*given.shape, *made.shape[2:])
    return last, out, x, sizes, (*given.strides, *made.strides)


# ------------------------------------------------------------------ pooling


@lowers("max_pool2d", "avg_pool2d", check=floats)
def _pool(b: Builder, node: Any) -> None:
    last, out, x, sizes, strides = _walk(b, node)
    maximum = node.name == "max_pool2d"
    real = "double" if node.dtype.name == "f64" else "float"
    made = image_kernel(
        "pool", node.dtype, last, sizes, strides, comment=Region.of(node).comment(b),
        kernel=node.kernel, stride=node.stride, padding=node.padding,
        dilation=node.dilation if maximum else (1, 1), maximum=maximum,
        start=f"-std::numeric_limits<{real}>::infinity()" if maximum else "0",
        divisor=None if maximum else node.divisor,
        include_pad=not maximum and node.count_include_pad,
    )  # fmt: skip
    b.kernel(made.kernel, node, [out], [x], made.numbers)
    b.set(node, out)


# ------------------------------------------------------------------ interpolation


def interpolate_check(node: Any) -> Answer:
    if node.mode not in ("nearest", "nearest-exact", "bilinear"):
        return no("mode {!r} has no kernel", node.mode, at=node)
    return floats(node)


@lowers("interpolate", check=interpolate_check)
def _interpolate(b: Builder, node: Any) -> None:
    last, out, x, sizes, strides = _walk(b, node)
    linear = node.mode == "bilinear"
    more = {
        f"steps_{'hw'[i]}": step_of(node, node.x.shape[2 + i], node.size[i], node.scales[i])
        for i in range(2)
    }
    made = image_kernel(
        "interpolate", node.dtype, last, sizes, strides, more=more,
        comment=Region.of(node).comment(b), linear=linear, corners=node.align_corners,
        exact=node.mode == "nearest-exact",
    )  # fmt: skip
    b.kernel(made.kernel, node, [out], [x], made.numbers)
    b.set(node, out)


def step_of(node: Any, size: Dim, out: Dim, scale: float | None) -> Any:
    """Pixels of the source for one of the result, as torch's area_pixel_compute_scale."""
    if node.mode == "bilinear" and node.align_corners:
        if isinstance(out, int):
            return _quotient(size - 1, out - 1) if out > 1 else 0.0
        import sympy

        return _quotient(size - 1, sympy.Max(out - 1, 1))
    if scale is not None and scale > 0:
        return 1.0 / scale
    return _quotient(size, out)


def _quotient(a: Dim, b: Dim) -> Any:
    """A quotient of sizes as a float, also where it is a whole number."""
    if isinstance(a, int) and isinstance(b, int):
        return a / b
    import sympy

    value = sympy.sympify(a) / sympy.sympify(b)
    return float(value) if value.is_number else value + sympy.Float(0.0)
