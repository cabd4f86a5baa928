"""Pooling and interpolation over the last two dimensions, row-major or channels-last."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Operand
from effc.codegen.triton.image import Image, Window, interpolate, pool
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
    if node.name == "max_pool2d":
        window = Window(node.kernel, node.stride, node.padding, node.dilation)
    else:
        window = Window(node.kernel, node.stride, node.padding, maximum=False,
                        divisor=node.divisor, include_pad=node.count_include_pad)  # fmt: skip
    call(b, node, pool(image, window, Region.of(node).comment(b)), [out], [x])
    b.set(node, out)


@lowers("interpolate", check=interpolate_check)
def _interpolate(b: Builder, node: Any) -> None:
    image, out, x = _image(b, node)
    steps = [step_of(node, node.x.shape[2 + i], node.size[i], node.scales[i]) for i in range(2)]
    made = interpolate(
        image, steps, linear=node.mode == "bilinear", corners=node.align_corners,
        exact=node.mode == "nearest-exact", comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, [out], [x])
    b.set(node, out)
