"""Pooling and interpolation over the last two dimensions, row-major or channels-last."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Operand
from effc.codegen.triton.image import Image, Sampling, Window, interpolate, pool
from effc.ir import channels_last

from ..cpu.images import as_image, floats, interpolate_check, step_of
from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.regions import Region
from .lowering import call, lowers, offsets


def _image(b: Builder, node: Any) -> tuple[Image, Ref, Ref]:
    """How the kernel walks result and operand; result; operand."""
    (out,), x = b.results(node), b.ref(node.x)
    made, given = as_image(out), as_image(x)
    height, width = given.shape[2:]
    image = Image(
        made.shape, height, width, Operand(out.dtype, made.strides),
        Operand(x.dtype, given.strides), node.tensor.layout == channels_last, offsets([out, x]),
    )  # fmt: skip
    return image, out, x


@lowers("max_pool2d", "avg_pool2d", check=floats)
def _pool(b: Builder, node: Any) -> None:
    image, out, x = _image(b, node)
    call(b, node, pool(image, window_of(node), Region.of(node).comment(b)), [out], [x])
    b.set(node, out)


def window_of(node: Any) -> Window:
    """What a pooling takes the largest or the mean of."""
    if node.name == "max_pool2d":
        return Window(node.kernel, node.stride, node.padding, node.dilation)
    return Window(node.kernel, node.stride, node.padding, maximum=False, divisor=node.divisor,
                  include_pad=node.count_include_pad)  # fmt: skip


@lowers("interpolate", check=interpolate_check)
def _interpolate(b: Builder, node: Any) -> None:
    image, out, x = _image(b, node)
    call(b, node, interpolate(image, sampling(node), Region.of(node).comment(b)), [out], [x])
    b.set(node, out)


def sampling(node: Any) -> Sampling:
    """Where an interpolation reads its operand."""
    height, width = node.x.shape[2:]
    steps = (step_of(node, size, node.size[i], node.scales[i])
             for i, size in enumerate((height, width)))  # fmt: skip
    return Sampling(
        height, width, tuple(steps), node.mode == "bilinear", node.align_corners,
        node.mode == "nearest-exact",
    )  # fmt: skip


__all__ = ["sampling", "window_of"]
