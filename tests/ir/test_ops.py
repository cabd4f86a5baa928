"""Every declared op: its type, its meaning, its cost and its text, on awkward shapes and types."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from effc.ir import (
    OPS,
    Graph,
    Input,
    Item,
    Number,
    Op,
    OpError,
    Tensor,
    Weight,
    channels_last,
    evaluate,
    interpret,
    parse,
    row_major,
    symbol,
)
from effc.ir.op import op as declare
from effc.ir.ops.aten import Aten
from effc.ir.ops.common import promote
from effc.ir.ops.region import Fused, Loop
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, bf16, boolean, f32, f64, i32, i64, u8

# ------------------------------------------------------------------ operands with values


class Maker:
    """Makes inputs of a sample together with their values."""

    def __init__(self) -> None:
        self.values: dict[Input, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(7)

    def __call__(
        self, *shape: int, dtype=f32, layout=row_major, low: float = -2.0, high: float = 2.0
    ) -> Input:
        if dtype.is_float:
            value = torch.rand(shape, generator=self.generator) * (high - low) + low
        else:
            low, high = (0, 2) if dtype is boolean else (max(int(low), 0), max(int(high), 1))
            value = torch.randint(low, high + 1, shape, generator=self.generator)
        value = value.to(dtype.torch)
        if layout is channels_last:
            value = op.to_layout(Input("x", Tensor(shape, dtype)), layout).reference(value)
        node = Input(f"x{len(self.values)}", Tensor(shape, dtype, layout))
        self.values[node] = value
        return node


Sampler = Callable[[Maker], Iterator[Op]]
SAMPLERS: dict[str, Sampler] = {}


def sampler(*names: str) -> Callable[[Callable[..., Iterator[Op]]], Callable[..., Iterator[Op]]]:
    """Samples of one op, or of several that take the same operands: then with the op's class."""

    def register(fn: Callable[..., Iterator[Op]]) -> Callable[..., Iterator[Op]]:
        for name in names:
            SAMPLERS[name] = fn if len(names) == 1 else lambda t, fn=fn, name=name: fn(t, OPS[name])
        return fn

    return register


SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 5), (1, 3, 5, 4)]

# ------------------------------------------------------------------ samples: elementwise

DOMAIN = {
    "log": (0.1, 3), "log2": (0.1, 3), "log10": (0.1, 3), "log1p": (-0.9, 3), "sqrt": (0, 3),
    "rsqrt": (0.1, 3), "reciprocal": (0.5, 3), "asin": (-1, 1), "acos": (-1, 1),
    "acosh": (1, 3), "atanh": (-0.9, 0.9),
}  # fmt: skip
UNARY = [
    "neg", "abs", "sign", "floor", "ceil", "trunc", "round", "relu", "square", "exp", "exp2",
    "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
    "sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "log_sigmoid", "isnan", "isinf",
    "logical_not",
]  # fmt: skip
INTEGERS_TOO = set(UNARY) - {"silu", "mish", "hardswish", "hardsigmoid", "log_sigmoid"}
BOOLS_TOO = INTEGERS_TOO - {"neg", "floor", "ceil", "trunc", "round", "relu", "square", "abs"}


@sampler(*UNARY)
def unary(t: Maker, cls: type[Op]) -> Iterator[Op]:
    low, high = DOMAIN.get(cls.name, (-3, 3))
    for shape in SHAPES:
        yield cls(t(*shape, low=low, high=high))
    for dtype in (f64, bf16):
        yield cls(t(2, 3, dtype=dtype, low=low, high=high))
    yield cls(t(2, 3, 5, 4, layout=channels_last, low=low, high=high))
    for dtype in (i64, u8) if cls.name in INTEGERS_TOO else ():
        yield cls(t(3, 2, dtype=dtype, low=max(low, 0), high=high))
    if cls.name in BOOLS_TOO:
        yield cls(t(3, dtype=boolean))


@sampler("bitwise_not")
def bitwise_not(t: Maker) -> Iterator[Op]:
    for dtype, shape in itertools.product((i64, i32, u8, boolean), SHAPES):
        yield op.bitwise_not(t(*shape, dtype=dtype))


def pairs(t: Maker, dtype=f32, **bounds: float) -> Iterator[tuple[Any, Any]]:
    """Operands of binary ops: same shapes, broadcast shapes, layouts, a number on either side."""
    shapes = [
        ((3,), (3,)),
        ((), (3,)),
        ((2, 0), (1, 0)),
        ((2, 1, 5), (3, 1)),
        ((1, 7), (7,)),
        ((), ()),
    ]
    for a, b in shapes if dtype is f32 else shapes[:2]:
        yield t(*a, dtype=dtype, **bounds), t(*b, dtype=dtype, **bounds)
    yield (
        t(2, 3, 4, 5, dtype=dtype, layout=channels_last, **bounds),
        t(3, 1, 1, dtype=dtype, **bounds),
    )
    number = True if dtype is boolean else 2 if not dtype.is_float else 1.5
    yield t(2, 3, dtype=dtype, **bounds), number
    yield number, t(2, 3, dtype=dtype, **bounds)
    yield number, t(dtype=dtype, **bounds)


@sampler(
    "add", "mul", "maximum", "minimum", "sub", "div", "atan2", "eq", "ne", "lt", "le", "gt", "ge"
)
def arithmetic(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for dtype in (f32, f64, bf16, i64, u8):
        for a, b in pairs(t, dtype, low=0.5):
            yield cls(a, b)
    for a, b in ((f32, i64), (bf16, f32), (i32, i64), (u8, f32), (i64, bf16)):
        yield cls(t(2, 3, dtype=a), t(3, dtype=b, low=1))
        yield cls(t(2, 3, dtype=a), t(dtype=b, low=1))  # a 0-d tensor loses against the other one
    yield cls(t(4, dtype=i64), 2.5)
    yield cls(2.5, t(4, dtype=i64, low=1))
    yield cls(t(4, dtype=bf16), 3)


@sampler("div_floor", "div_trunc", "remainder", "fmod", "pow")
def division(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for dtype in (f32, f64, bf16, i64):
        for a, b in pairs(t, dtype, low=1, high=3):
            yield cls(a, b)
    yield cls(t(2, 3), t(3, dtype=i64, low=1))


@sampler("bitwise_and", "bitwise_or", "bitwise_xor")
def bitwise(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for dtype in (i64, i32, u8, boolean):
        for a, b in pairs(t, dtype, high=9):
            yield cls(a, b)


@sampler("logical_and", "logical_or", "logical_xor")
def logical(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for dtype in (boolean, f32, i64):
        for a, b in pairs(t, dtype):
            yield cls(a, b)


@sampler("leaky_relu", "elu", "gelu", "softplus")
def activation(t: Maker, cls: type[Op]) -> Iterator[Op]:
    options: dict[str, dict[str, Any]] = {
        "leaky_relu": {"slope": 0.2}, "elu": {"alpha": 1.5, "scale": 0.5, "input_scale": 2.0},
        "gelu": {"approximate": "tanh"}, "softplus": {"beta": 2.0, "threshold": 1.0},
    }  # fmt: skip
    for shape in SHAPES:
        yield cls(t(*shape))
    for dtype in (f64, bf16):
        yield cls(t(2, 3, dtype=dtype), **options[cls.name])
    yield cls(t(2, 3, 4, 5, layout=channels_last), **options[cls.name])


@sampler("clamp")
def clamp(t: Maker) -> Iterator[Op]:
    for low, high in ((0, 1), (None, 0.5), (-0.5, None), (1.0, -1.0), (-math.inf, 0.0)):
        yield op.clamp(t(2, 3), low, high)
        yield op.clamp(t(dtype=f64), low, high)
    yield op.clamp(t(3, dtype=i64), 0, 1)
    yield op.clamp(t(3, dtype=i64), 0.5)
    yield op.clamp(t(2, 3), t(3), None)
    yield op.clamp(t(2, 3), t(3), 1.0)
    yield op.clamp(t(2, 3), 0, t(2, 1))
    yield op.clamp(t(2, 3, 4, 5, layout=channels_last), 0, 6)


@sampler("where")
def where(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield op.where(t(*shape, dtype=boolean), t(*shape), t(*shape))
    yield op.where(t(2, 1, dtype=boolean), t(3), t(dtype=f64))
    yield op.where(t(2, dtype=u8), t(2), 0)
    yield op.where(t(2, dtype=boolean), 1, 2.5)
    yield op.where(t(2, dtype=boolean), -math.inf, t(2, dtype=bf16))
    yield op.where(t(2, dtype=boolean), t(2, dtype=i64), 0.5)


@sampler("cast")
def cast(t: Maker) -> Iterator[Op]:
    for source, target in itertools.product((f32, f64, bf16, i64, u8, boolean), repeat=2):
        yield op.cast(t(2, 3, dtype=source, low=0), target)
    yield op.cast(t(2, 3, 4, 5, layout=channels_last), bf16)
    yield op.cast(t(), f64)


@sampler("lerp")
def lerp(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield op.lerp(t(*shape), t(*shape), 0.25)
    yield op.lerp(t(2, 1, dtype=f64), t(3, dtype=f64), t(1, dtype=f64))


# ------------------------------------------------------------------ samples: reductions, products


@sampler("sum", "prod", "mean", "amax", "amin", "any", "all")
def reduction(t: Maker, cls: type[Op]) -> Iterator[Op]:
    dtypes = (f32, f64, bf16) if cls.name == "mean" else (f32, f64, bf16, i64, i32, u8, boolean)
    for dtype in dtypes:
        yield cls(t(2, 3, 5, dtype=dtype), (1,))
        yield cls(t(2, 3, 5, dtype=dtype), (0, 2), keepdim=True)
        yield cls(t(2, 3, dtype=dtype), ())
        yield cls(t(dtype=dtype), ())
        yield cls(t(dtype=dtype), (0,))
        yield cls(t(1, dtype=dtype), (0,), True)
    yield cls(t(0, 3), (1,))
    if not cls.name.startswith("am"):  # the largest of nothing does not exist
        yield cls(t(0, 3), (0,))
    yield cls(t(2, 3, 4, 5, layout=channels_last), (2, 3), keepdim=True)
    yield cls(t(2, 3, 4, 5, layout=channels_last), (1,), keepdim=True)


@sampler("softmax", "log_softmax")
def rows(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for shape in SHAPES:
        yield cls(t(*shape), 0)
        yield cls(t(*shape), -1)
    yield cls(t(2, 3, dtype=f64), 1)
    yield cls(t(2, 3, dtype=bf16), 0)
    for dim in (1, 3):
        yield cls(t(2, 3, 4, 5, layout=channels_last), dim)


@sampler("linear")
def linear(t: Maker) -> Iterator[Op]:
    for lead, dtype in itertools.product(((), (0,), (1,), (2, 3)), (f32, f64, bf16)):
        yield op.linear(t(*lead, 5, dtype=dtype), t(7, 5, dtype=dtype))
        yield op.linear(t(*lead, 5, dtype=dtype), t(1, 5, dtype=dtype), t(1, dtype=dtype))
    yield op.linear(t(3, 0), t(2, 0), t(2))
    yield op.linear(t(2, 3, 4, 5, layout=channels_last), t(7, 5))


@sampler("matmul")
def matmul(t: Maker) -> Iterator[Op]:
    shapes = [
        ((3, 5), (5, 2)), ((5,), (5,)), ((5,), (5, 2)), ((3, 5), (5,)), ((2, 3, 5), (5, 7)),
        ((2, 1, 3, 5), (4, 5, 1)), ((0, 5), (5, 2)), ((3, 0), (0, 2)), ((5,), (4, 5, 2)),
        ((4, 3, 5), (5,)), ((1, 1), (1, 1)),
    ]  # fmt: skip
    for a, b in shapes:
        yield op.matmul(t(*a), t(*b))
    for dtype in (f64, bf16, i64):
        yield op.matmul(t(3, 5, dtype=dtype), t(5, 2, dtype=dtype))


@sampler("conv1d", "conv2d", "conv3d")
def conv(t: Maker, cls: type[Op]) -> Iterator[Op]:
    n = cls.spatial
    size = (7, 5, 4)[:n]
    for dtype in (f32, f64, bf16):
        yield cls(t(2, 3, *size, dtype=dtype), t(4, 3, *(3,) * n, dtype=dtype), t(4, dtype=dtype))
    yield cls(t(0, 3, *size), t(4, 3, *(1,) * n))
    yield cls(t(1, 1, *(1,) * n), t(1, 1, *(1,) * n))
    yield cls(t(1, 4, *size), t(6, 2, *(3,) * n), groups=2, padding=(1,) * n)
    yield cls(t(1, 4, *size), t(4, 1, *(3,) * n), t(4), groups=4, stride=(2,) * n)
    yield cls(t(1, 2, *size), t(1, 2, *(2,) * n), dilation=(3,) * n, padding=(2,) * n)
    yield cls(t(1, 2, *size), t(3, 2, *(3, 1, 2)[:n]), stride=(2, 1, 3)[:n], padding=(1, 0, 2)[:n])
    if n == 2:
        yield cls(t(2, 4, 5, 7, layout=channels_last), t(6, 4, 3, 3, layout=channels_last))
        yield cls(t(2, 4, 5, 7, layout=channels_last), t(6, 4, 3, 3), padding=(1, 1))
        yield cls(t(2, 4, 5, 7), t(6, 4, 3, 3, layout=channels_last))


# ------------------------------------------------------------------ samples: norms, attention


@sampler("layer_norm", "rms_norm")
def last_norm(t: Maker, cls: type[Op]) -> Iterator[Op]:
    with_bias = cls.name == "layer_norm"
    for dtype in (f32, f64, bf16):
        yield cls(t(2, 3, 5, dtype=dtype))
        yield cls(t(2, 3, 5, dtype=dtype), t(5, dtype=dtype), eps=1e-3)
        yield cls(t(3, 5, dtype=dtype), t(3, 5, dtype=dtype), dims=2)
    yield cls(t(0, 5), t(5))
    yield cls(t(7, 1))
    if with_bias:
        yield cls(t(2, 5), t(5), t(5))
        yield cls(t(2, 5), bias=t(5))
        yield cls(t(2, 5, dtype=bf16), t(5), t(5))  # 16-bit x, 32-bit weights


@sampler("group_norm")
def group_norm(t: Maker) -> Iterator[Op]:
    for dtype in (f32, f64, bf16):
        yield op.group_norm(t(2, 6, 5, dtype=dtype), 3, t(6, dtype=dtype), t(6, dtype=dtype))
    yield op.group_norm(t(2, 4, 3, 5, layout=channels_last), 2)
    yield op.group_norm(t(1, 7, 2), 7, eps=1e-2)
    yield op.group_norm(t(2, 4), 1)
    yield op.group_norm(t(0, 4, 3), 2)


@sampler("batch_norm")
def batch_norm(t: Maker) -> Iterator[Op]:
    for dtype in (f32, f64, bf16):
        mean, var = t(3, dtype=dtype), t(3, dtype=dtype, low=0.5)
        yield op.batch_norm(
            t(2, 3, 5, dtype=dtype), mean, var, t(3, dtype=dtype), t(3, dtype=dtype)
        )
    yield op.batch_norm(t(2, 3, 4, 5, layout=channels_last), t(3), t(3, low=0.5))
    yield op.batch_norm(t(2, 3), t(3), t(3, low=0.5), t(3), eps=0.1)
    yield op.batch_norm(t(0, 3, 2), t(3), t(3, low=0.5))
    yield op.batch_norm(t(2, 3, 2, dtype=bf16), t(3), t(3, low=0.5))


@sampler("attention")
def attention(t: Maker) -> Iterator[Op]:
    for dtype in (f32, f64, bf16):
        yield op.attention(*(t(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7)))
    q, k, v = t(1, 2, 5, 4), t(1, 2, 7, 4), t(1, 2, 7, 3)
    yield op.attention(q, k, v, scale=0.5)
    yield op.attention(q, k, v, causal=True)
    yield op.attention(q, k, v, t(5, 7))
    yield op.attention(q, k, v, t(1, 1, 5, 7, dtype=boolean, low=1))
    yield op.attention(q, k, v, t(5, 7), causal=True)
    yield op.attention(t(2, 4, 3, 4), t(2, 2, 3, 4), t(2, 2, 3, 4), gqa=True)
    yield op.attention(t(3, 5, 4), t(3, 6, 4), t(3, 6, 4))
    yield op.attention(t(5, 4), t(1, 4), t(1, 2))
    yield op.attention(t(2, 1, 3, 4), t(1, 5, 3, 4), t(2, 1, 3, 4))
    past = t(dtype=i64, low=2, high=2)
    yield op.attention(q, k, v, past=past)
    yield op.attention(q, k, v, t(5, 7), causal=True, past=past)
    yield op.attention(t(2, 4, 3, 4), t(2, 2, 7, 4), t(2, 2, 7, 4), gqa=True, past=past)


@sampler("rope")
def rope(t: Maker) -> Iterator[Op]:
    for interleaved, dtype in itertools.product((False, True), (f32, f64, bf16)):
        cos, sin = t(5, 8, dtype=dtype), t(5, 8, dtype=dtype)
        yield op.rope(t(2, 3, 5, 8, dtype=dtype), cos, sin, interleaved=interleaved)
    yield op.rope(t(0, 2), t(2), t(2))
    yield op.rope(t(2, 5, 4, dtype=bf16), t(5, 4), t(5, 4))


# ------------------------------------------------------------------ samples: images


@sampler("max_pool2d", "avg_pool2d")
def pool(t: Maker, cls: type[Op]) -> Iterator[Op]:
    for dtype in (f32, f64, bf16):
        yield cls(t(2, 3, 7, 5, dtype=dtype), (3, 2), (2, 2))
    yield cls(t(3, 7, 5), (2, 2), (3, 1), ceil_mode=True)
    yield cls(t(0, 3, 7, 5), (2, 2), (2, 2), (1, 1))
    yield cls(t(2, 4, 8, 7, layout=channels_last), (3, 3), (2, 2), (1, 1), ceil_mode=True)
    yield cls(t(1, 1, 5, 6), (2, 3), (2, 3), (1, 1), ceil_mode=True)
    yield cls(t(1, 1, 1, 1), (1, 1), (1, 1))
    if cls.name == "max_pool2d":
        yield cls(t(1, 2, 9, 8), (3, 2), (1, 1), dilation=(2, 3))
    else:
        yield cls(t(1, 2, 6, 6), (3, 3), (2, 2), (1, 1), count_include_pad=False)
        yield cls(t(1, 2, 6, 6), (3, 3), (2, 2), divisor=5)


@sampler("interpolate")
def interpolate(t: Maker) -> Iterator[Op]:
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
        yield op.interpolate(t(2, 3, 5, 4), (7, 9), mode)
        yield op.interpolate(t(1, 1, 1, 1, dtype=f64), (3, 2), mode)
        yield op.interpolate(t(1, 2, 4, 6), (8, 3), mode, scales=(2.0, 0.5))
        yield op.interpolate(t(1, 4, 4, 6, layout=channels_last), (8, 3), mode)
    yield op.interpolate(t(2, 3, 5, 4), (7, 9), "bilinear", True)
    yield op.interpolate(t(2, 3, 5, 4, dtype=bf16), (2, 2), "bicubic", True)


@sampler("pixel_shuffle")
def pixel_shuffle(t: Maker) -> Iterator[Op]:
    for dtype in (f32, bf16, i64):
        yield op.pixel_shuffle(t(2, 8, 3, 5, dtype=dtype), 2)
    yield op.pixel_shuffle(t(9, 1, 2), 3)
    yield op.pixel_shuffle(t(0, 4, 2, 2), 2)
    yield op.pixel_shuffle(t(2, 8, 3, 5, layout=channels_last), 2)


@sampler("pixel_unshuffle")
def pixel_unshuffle(t: Maker) -> Iterator[Op]:
    for dtype in (f32, bf16, i64):
        yield op.pixel_unshuffle(t(2, 3, 4, 6, dtype=dtype), 2)
    yield op.pixel_unshuffle(t(1, 3, 6), 3)
    yield op.pixel_unshuffle(t(2, 3, 4, 6, layout=channels_last), 2)


# ------------------------------------------------------------------ samples: movement


@sampler("reshape")
def reshape(t: Maker) -> Iterator[Op]:
    for dtype in (f32, bf16, i64, boolean):
        yield op.reshape(t(2, 3, 5, dtype=dtype), (5, 6))
    yield op.reshape(t(), (1, 1))
    yield op.reshape(t(1), ())
    yield op.reshape(t(0, 3), (7, 0, 2))
    yield op.reshape(t(2, 3, 4, 5, layout=channels_last), (2, 3, 20))
    yield op.reshape(t(2, 3, 4, 5, layout=channels_last), (2, 3, 4, 5))


@sampler("permute")
def permute(t: Maker) -> Iterator[Op]:
    for dims in itertools.permutations(range(3)):
        yield op.permute(t(2, 3, 5), dims)
    yield op.permute(t(), ())
    yield op.permute(t(2, 0), (1, 0))


@sampler("expand")
def expand(t: Maker) -> Iterator[Op]:
    yield op.expand(t(3, 1), (3, 5))
    yield op.expand(t(), (2, 0))
    yield op.expand(t(1), (0,))
    yield op.expand(t(1, 2), (4, 3, 2))
    yield op.expand(t(2, dtype=boolean), (2,))


@sampler("slice")
def slices(t: Maker) -> Iterator[Op]:
    yield op.slice(t(7, 3), 0, 1, 3, step=2)
    yield op.slice(t(7, 3), -1, 2, 1)
    yield op.slice(t(7, 3), 0, 0, 0)
    yield op.slice(t(7), 0, 7, 0)
    yield op.slice(t(7), 0, 6, 1, step=5)
    yield op.slice(t(2, 3, 4, 5, layout=channels_last), 2, 1, 2)
    yield op.slice(t(7, dtype=i64), 0, 3, 4)


@sampler("to_layout")
def to_layout(t: Maker) -> Iterator[Op]:
    for shape, layout in itertools.product(SHAPES, (channels_last, row_major)):
        yield op.to_layout(t(*shape), layout)
    yield op.to_layout(t(2, 3, 4, 5, layout=channels_last), row_major)
    yield op.to_layout(t(2, 3, 4, 5, layout=channels_last), channels_last)


@sampler("copy")
def copy(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield op.copy(t(*shape))
    yield op.copy(t(2, 3, 4, 5, layout=channels_last))


@sampler("stack")
def stack(t: Maker) -> Iterator[Op]:
    yield op.stack((t(2, 3), t(2, 3), t(2, 3)))
    yield op.stack((t(), t()))
    yield op.stack((t(0, 5),))
    yield op.stack((t(3, dtype=i64), t(3, dtype=i64)))


@sampler("cat")
def cat(t: Maker) -> Iterator[Op]:
    yield op.cat((t(2, 3), t(0, 3), t(5, 3)), 0)
    yield op.cat((t(2, 3), t(2, 1)), -1)
    yield op.cat((t(2, 3),), 1)
    yield op.cat((t(2, dtype=bf16), t(2)), 0)
    yield op.cat((t(2, dtype=i64), t(2, dtype=boolean)), 0)
    yield op.cat(tuple(t(2, c, 4, 5, layout=channels_last) for c in (3, 4)), 1)


@sampler("update")
def update(t: Maker) -> Iterator[Op]:
    at = t(dtype=i64, low=2, high=2)
    for dtype in (f32, bf16, i64, boolean):
        yield op.update(t(2, 7, 3, dtype=dtype), t(2, 5, 3, dtype=dtype), at, 1)
    yield op.update(t(1, 5, 3), t(1, 5, 1), at, -1)
    yield op.update(t(7), t(0), at, 0)
    yield op.update(t(2, 3, 5, 4, layout=channels_last), t(2, 3, 3, 4), at, 2)


@sampler("pad")
def pad(t: Maker) -> Iterator[Op]:
    yield op.pad(t(2, 3), (0, 1), (2, 0))
    yield op.pad(t(2, 3), (0, 1), (0, 1), value=-math.inf)
    yield op.pad(t(4, 3), (-1, 0), (-2, 1), value=0.5)
    yield op.pad(t(2, dtype=i64), (1,), (1,), value=7)
    yield op.pad(t(2, dtype=boolean), (1,), (1,), value=True)
    yield op.pad(t(), (), ())
    yield op.pad(t(0, 2), (0, 0), (1, 0))
    yield op.pad(t(2, 3, 4, 5, layout=channels_last), (0, 0, 1, 1), (0, 0, 1, 1))


@sampler("flip")
def flip(t: Maker) -> Iterator[Op]:
    yield op.flip(t(2, 3, 5), (0, 2))
    yield op.flip(t(2, 3), (-1,))
    yield op.flip(t(0, 3), (0,))
    yield op.flip(t(2, 3), ())
    yield op.flip(t(2, 3, 4, 5, layout=channels_last), (1,))


# ------------------------------------------------------------------ samples: the rest


@sampler("embedding")
def embedding(t: Maker) -> Iterator[Op]:
    for shape, ids in itertools.product(((), (0,), (2, 3)), (i64, i32)):
        yield op.embedding(t(5, 3), t(*shape, dtype=ids, high=4))
    yield op.embedding(t(5, 1, dtype=bf16), t(7, dtype=i64, high=4))


@sampler("arange")
def arange(t: Maker) -> Iterator[Op]:
    yield op.arange(7, i64)
    yield op.arange(0, f32)
    yield op.arange(5, i32, start=3, step=-2)
    yield op.arange(5, f32, start=0.5, step=0.1)
    yield op.arange(3, bf16, start=1)
    yield op.arange(1, f64, step=0.25)


@sampler("full")
def full(t: Maker) -> Iterator[Op]:
    yield op.full((), 1.5, f32)
    yield op.full((2, 0), 3, i64)
    yield op.full((3,), True, boolean)
    yield op.full((2, 2), -math.inf, bf16)
    yield op.full((1,), math.nan, f64)
    yield op.full((2,), complex(1, -2), DTYPES["c64"])


@sampler("item")
def item(t: Maker) -> Iterator[Op]:
    x = t(5, 3)
    of = (Tensor((2, 3), f32), Tensor((2, 3), i64))
    many = Aten("aten.topk.default", (x, 2, 0), (), of=of)
    yield Item(many, 0)
    yield Item(many, 1)


@sampler("aten")
def aten(t: Maker) -> Iterator[Op]:
    yield Aten("aten.cumsum.default", (t(3, 2), 1), (), of=Tensor((3, 2), f32))
    yield Aten(
        "aten.sum.dim_IntList", (t(3, 2), (0, 1)), (("dtype", torch.float64),), of=Tensor((), f64)
    )
    yield Aten("aten.stack.default", ((t(3), t(3)), 1), (), of=Tensor((3, 2), f32))
    many = (Tensor((1, 3), f32), Tensor((2, 3), f32))
    yield Aten("aten.split_with_sizes.default", (t(3, 3), (1, 2)), (), of=many)
    kwargs = (("dtype", torch.float32), ("device", torch.device("cpu")))
    yield Aten("aten.zeros.default", ((2, 3),), kwargs, of=Tensor((2, 3), f32))
    of = Tensor((1, 2, 3, 3), f32, channels_last)
    memory = (("memory_format", torch.channels_last),)
    yield Aten("aten.clone.default", (t(1, 2, 3, 3),), memory, of=of)
    yield Aten("aten.nan_to_num.default", (t(3), None, math.inf), (), of=Tensor((3,), f32))


@sampler("fused")
def fused(t: Maker) -> Iterator[Op]:
    x, b = t(2, 3), t(3)
    inner = Input("a", x.of), Input("b", b.of)
    added = op.add(*inner)
    yield Fused((x, b), Graph.of(inner, (op.relu(added),), "body"))
    yield Fused((x, b), Graph.of(inner, (added, op.neg(added)), "body"))


@sampler("loop")
def loop(t: Maker) -> Iterator[Op]:
    x, table, w = t(2, 3), t(3), t(4, 3)
    inner = Input("a", x.of), Input("b", table.of), Input("c", table.of)
    added = op.add(inner[0], inner[1])
    scaled = op.mul(added, inner[2])
    for trip, body in ((4, Graph.of(inner, (scaled,))), (4, Graph.of(inner, (scaled, added)))):
        yield Loop((x,), (table,), (w,), body, trip)
    yield Loop((x,), (), (), Graph.of(inner[:1], (op.relu(inner[0]),)), 1)
    swapped = Graph.of(inner, (inner[0], inner[2], inner[1]))
    yield Loop((x, table, t(3)), (), (), swapped, 3)


@sampler("input")
def inputs(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield t(*shape)
    yield t(2, 3, 4, 5, layout=channels_last)


@sampler("weight")
def weight(t: Maker) -> Iterator[Op]:
    for dtype, shape in itertools.product((f32, bf16, i64, boolean), SHAPES):
        yield Weight.holding(f"layer.{dtype}", torch.ones(shape, dtype=dtype.torch))


# ------------------------------------------------------------------ the tests

OURS = sorted(name for name, cls in OPS.items() if cls.__module__.startswith("effc.ir."))


@cache
def samples(name: str) -> tuple[tuple[Op, Maker], ...]:
    maker = Maker()
    return tuple((node, maker) for node in SAMPLERS[name](maker))


def graph_of(node: Op) -> Graph:
    """The sample as a graph whose inputs are what it reads."""
    found: dict[Input, None] = {}
    stack: list[Op] = [node]
    while stack:
        top = stack.pop()
        if isinstance(top, Input):
            found[top] = None
        stack += reversed(top.operands)
    return Graph.of(found, (node,))


@cache
def run(node: Op, maker: Maker) -> Any:
    graph = graph_of(node)
    return interpret(graph, [maker.values[i] for i in graph.inputs])[0]


@pytest.mark.parametrize("name", OURS)
def test_every_op_has_samples(name: str) -> None:
    assert name in SAMPLERS, f"give {name} a sampler in this file"


def described(value: Any) -> Any:
    """Shape and element type of a real value."""
    if isinstance(value, (tuple, list)):
        return tuple(map(described, value))
    return tuple(value.shape), value.dtype


def declared(t: Any) -> Any:
    return tuple(map(declared, t)) if isinstance(t, tuple) else (t.shape, t.dtype.torch)


@pytest.mark.parametrize("name", OURS)
def test_infer_says_what_reference_gives(name: str) -> None:
    for node, maker in samples(name):
        assert described(run(node, maker)) == declared(node.type), graph_of(node).text


LAYOUT_IS_OURS = {
    # Views show the strides of what they look at; the layout of their type is that of a copy.
    "permute", "expand", "slice", "reshape", "item",
    # Ours keep the layout of x, as all ops that give one element for each; torch's write rows.
    "softmax", "log_softmax", "log_sigmoid",
    "attention",  # rows; torch's CPU kernel happens to write [batch, n, heads, d]
    "aten", "fused", "loop",  # whatever the annotation or the body says
}  # fmt: skip


def order_of_memory(value: torch.Tensor) -> list[int]:
    """Dimensions by stride, outermost first; those of size 1 have no place."""
    real = [d for d in range(value.dim()) if value.shape[d] != 1]
    return sorted(real, key=lambda d: value.stride(d), reverse=True)


@pytest.mark.parametrize("name", [n for n in OURS if n not in LAYOUT_IS_OURS])
def test_layout_is_that_of_the_real_result(name: str) -> None:
    for node, maker in samples(name):
        value = run(node, maker)
        if value.numel():
            order = [d for d in node.tensor.layout.order(value.dim()) if value.shape[d] != 1]
            assert order_of_memory(value) == order, graph_of(node).text


@pytest.mark.parametrize("name", OURS)
def test_cost_is_finite_and_not_negative(name: str) -> None:
    for node, _ in samples(name):
        cost = node.cost()
        assert 0 <= cost.flops < math.inf and 0 <= cost.bytes < math.inf, node


@pytest.mark.parametrize("name", OURS)
def test_text_comes_back(name: str) -> None:
    for node, _ in samples(name):
        graph = graph_of(node)
        again = parse(graph.text, {w.key: w.data for w in graph.weights})
        assert again == graph and again.text == graph.text


# ------------------------------------------------------------------ symbolic sizes


def symbolic(node: Op, made: dict[Op, Op]) -> Op:
    """The same program where every input size above 1 is a symbol: 5 becomes n5."""
    if node not in made:
        if isinstance(node, Input):
            shape = tuple(symbol(f"n{s}") if s > 1 else s for s in node.of.shape)
            made[node] = Input(node.key, node.of.with_(shape=shape))
        else:
            made[node] = node.map_operands(lambda o: symbolic(o, made))
    return made[node]


SIZES = {symbol(f"n{s}"): s for s in range(2, 21)}
TYPE_IS_GIVEN = {"aten", "fused", "item", "loop", "weight"}


@pytest.mark.parametrize("name", [n for n in OURS if n not in TYPE_IS_GIVEN])
def test_symbols_give_the_type_and_cost_that_numbers_give(name: str) -> None:
    tried: set[str] = set()
    for node, _ in samples(name):
        if (shapes := f"{[o.shape for o in node.operands]} {node.attrs}") in tried:
            continue  # another element type
        try:
            general = symbolic(node, {})
        except OpError as e:
            assert e.what.endswith("ceil_mode needs known sizes")
            continue
        tried.add(shapes)
        assert evaluate(general.tensor.shape, SIZES) == node.tensor.shape
        assert general.dtype == node.dtype
        cost = general.cost()
        assert evaluate(cost.flops, SIZES) == node.cost().flops
        assert evaluate(cost.bytes, SIZES) == node.cost().bytes
    assert tried


# ------------------------------------------------------------------ caches


def test_update_writes_where_it_is_told_and_leaves_its_operand() -> None:
    node = op.update(X(2, 5), X(2, 2), I(), 1)
    x, new = torch.zeros(2, 5), torch.ones(2, 2)
    got = node.reference(x, new, torch.tensor(3))
    assert got.tolist() == [[0, 0, 0, 1, 1]] * 2 and not x.any()
    for at in (-1, 4):
        with pytest.raises(IndexError, match=rf"positions {at}\.\.{at + 2} of dimension 1 with 5"):
            node.reference(x, new, torch.tensor(at))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, boolean, f32])
@pytest.mark.parametrize("past, n", [(0, 1), (0, 4), (3, 1), (3, 4), (5, 4)])
def test_attention_over_a_cache_is_the_last_rows_of_attention_over_all(
    causal: bool, masked: Any, past: int, n: int
) -> None:
    t, end, room = Maker(), past + n, 9
    q, k, v = (t(2, heads, end, 4) for heads in (4, 2, 2))
    mask = None if masked is None else t(end, end, dtype=masked)
    (q_, k_, v_), m = (t.values[x] for x in (q, k, v)), None
    if mask is not None:
        m = t.values[mask].clone()
        m.fill_diagonal_(True if masked is boolean else 0.0)
    everything = op.attention(q, k, v, mask, causal=causal, gqa=True)
    want = everything.reference(q_, k_, v_, m, None)[..., past:, :]

    def padded(x: torch.Tensor, dim: int, value: float) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = room - x.shape[dim]
        return torch.cat((x, torch.full(shape, value).to(x.dtype)), dim)

    cached = op.attention(X(2, 4, n, 4), X(2, 2, room, 4), X(2, 2, room, 4), causal=causal,
                          gqa=True, past=I())  # fmt: skip
    k_, v_ = padded(k_, 2, math.nan), padded(v_, 2, math.nan)
    m = None if m is None else padded(m[past:], 1, math.nan)
    got = cached.reference(q_[..., past:, :], k_, v_, m, torch.tensor(past))
    torch.testing.assert_close(got, want)


def test_attention_refuses_positions_that_the_cache_has_not() -> None:
    node = op.attention(X(2, 4), X(5, 4), X(5, 4), past=I())
    values = [torch.zeros(n, 4) for n in (2, 5, 5)]
    for past, text in ((4, r"4\.\.6"), (-1, r"-1\.\.1")):
        with pytest.raises(IndexError, match=f"positions {text} of a cache of 5"):
            node.reference(*values, None, torch.tensor(past))


# ------------------------------------------------------------------ promotion of element types


def test_promotion_is_that_of_torch() -> None:
    t = Maker()
    dtypes = (f32, f64, bf16, i64, i32, u8, boolean, DTYPES["c64"])
    numbers: list[Any] = [True, 3, 2.5, 1j]
    nodes = [Input("x", Tensor(shape, dtype)) for dtype in dtypes for shape in ((2,), ())]
    for a, b in itertools.product(nodes, [*nodes, *numbers]):
        values = [
            torch.zeros(v.of.shape, dtype=v.of.dtype.torch) if isinstance(v, Input) else v
            for v in (a, b)
        ]
        assert promote(a, b).torch == torch.result_type(*values), (a, b)
    assert promote(t(2, dtype=i64), symbol("N")) == i64
    assert promote(t(2, dtype=bf16), symbol("N")) == bf16


# ------------------------------------------------------------------ refusals, as text


def X(*shape: int) -> Input:
    return Input("x", Tensor(shape, f32))


def I(*shape: int) -> Input:  # noqa: E743
    return Input("i", Tensor(shape, i64))


MANY = Aten("aten.topk.default", (X(3), 2), (), of=(Tensor((2,), f32), Tensor((2,), i64)))

REFUSED: list[tuple[Callable[[], Op], str]] = [
    (lambda: op.relu(3), "relu: x must be a value of a graph, not 3"),
    (lambda: op.relu(None), "relu: x must be a value of a graph, not None"),
    (lambda: op.relu((X(1),)), "relu: x must be a value of a graph, not (<input: f32[1]>,)"),
    (lambda: op.relu(MANY), "aten gives (f32[2], i64[2]), not one tensor"),
    (lambda: op.add(X(1), "2"), "add: b must be a value of a graph, not '2'"),
    (lambda: op.add(1, 2), "add(): no operand is a tensor"),
    (
        lambda: op.add(X(2, 3), X(2, 4)),
        "add(f32[2, 3], f32[2, 4]): shapes [2, 3] and [2, 4] do not broadcast in dimension -1",
    ),
    (
        lambda: op.mul(X(0), X(2)),
        "mul(f32[0], f32[2]): shapes [0] and [2] do not broadcast in dimension -1",
    ),
    (
        lambda: op.add(Input("q", Tensor((2,), DTYPES["int4"])), X(2)),
        "torch has no common type for torch.int4 and torch.float32",
    ),
    (lambda: op.clamp(X(2)), "clamp(f32[2]): neither low nor high is given"),
    (
        lambda: op.where(X(2), 1, 2),
        "where(f32[2]): the condition is f32, not bool",
    ),
    (
        lambda: op.sum(X(2, 3), (1, 0)),
        "sum(f32[2, 3]): dimensions (1, 0) must be distinct, sorted and non-negative",
    ),
    (lambda: op.sum(X(2), (1,)), "sum(f32[2]): dimension 1 of a tensor with 1 dimensions"),
    (lambda: op.mean(I(2), (0,)), "mean(i64[2]): mean of i64"),
    (lambda: op.softmax(X(2), 2), "softmax(f32[2]): dimension 2 of a tensor with 1 dimensions"),
    (lambda: op.softmax(I(2), 0), "softmax(i64[2]): x is i64, not a float type"),
    (
        lambda: op.linear(X(2, 3), X(4, 5)),
        "linear(f32[2, 3], f32[4, 5]): the last dimension of x must be the second of w",
    ),
    (lambda: op.linear(X(3), I(4, 3)), "linear(f32[3], i64[4, 3]): x is f32, w is i64"),
    (
        lambda: op.linear(X(3), X(4, 3), X(3)),
        "linear(f32[3], f32[4, 3], f32[3]): bias has shape [3], not [4]",
    ),
    (lambda: op.matmul(X(), X(2)), "matmul(f32[()], f32[2]): operands need at least one dimension"),
    (lambda: op.matmul(X(2, 3), X(2, 3)), "matmul(f32[2, 3], f32[2, 3]): inner sizes differ"),
    (lambda: op.matmul(X(3), I(3)), "matmul(f32[3], i64[3]): a is f32, b is i64"),
    (
        lambda: op.conv2d(X(3, 5, 5), X(4, 3, 1, 1)),
        "conv2d(f32[3, 5, 5], f32[4, 3, 1, 1]): x and w need 4 dimensions",
    ),
    (
        lambda: op.conv1d(X(1, 3, 5), X(4, 2, 1)),
        "conv1d(f32[1, 3, 5], f32[4, 2, 1]): x has 3 channels, w takes 2",
    ),
    (
        lambda: op.conv1d(X(1, 4, 5), X(3, 2, 1), groups=2),
        "conv1d(f32[1, 4, 5], f32[3, 2, 1]): 3 results do not split into 2 groups",
    ),
    (
        lambda: op.conv1d(X(1, 1, 5), X(4, 1, 1), X(3)),
        "conv1d(f32[1, 1, 5], f32[4, 1, 1], f32[3]): bias has shape [3], not [4]",
    ),
    (
        lambda: op.conv1d(X(1, 1, 2), X(1, 1, 3)),
        "conv1d(f32[1, 1, 2], f32[1, 1, 3]): "
        "the kernel is larger than the padded input in dimension 0",
    ),
    (lambda: op.layer_norm(I(3)), "layer_norm(i64[3]): x is i64, not a float type"),
    (
        lambda: op.layer_norm(X(3), dims=2),
        "layer_norm(f32[3]): x has 1 dimensions, 2 are to be normalised",
    ),
    (
        lambda: op.rms_norm(X(2, 3), X(2)),
        "rms_norm(f32[2, 3], f32[2]): weight has shape [2], not [3]",
    ),
    (
        lambda: op.group_norm(X(1, 5, 2), 2),
        "group_norm(f32[1, 5, 2]): 5 channels do not split into 2 groups",
    ),
    (lambda: op.group_norm(X(5), 1), "group_norm(f32[5]): x needs a channel dimension"),
    (
        lambda: op.batch_norm(X(2, 3), X(3), X(2)),
        "batch_norm(f32[2, 3], f32[3], f32[2]): var has shape [2], not [3]",
    ),
    (
        lambda: op.attention(X(4), X(4), X(4)),
        "attention(f32[4], f32[4], f32[4]): q, k and v need at least two dimensions",
    ),
    (
        lambda: op.attention(X(2, 4), X(2, 3), X(2, 4)),
        "attention(f32[2, 4], f32[2, 3], f32[2, 4]): "
        "q and k differ in their last size, or k and v in the one before",
    ),
    (
        lambda: op.attention(X(2, 4), X(2, 4), X(2, 4), I(2, 2)),
        "attention(f32[2, 4], f32[2, 4], f32[2, 4], i64[2, 2]): "
        "the mask is i64, neither f32 nor bool",
    ),
    (
        lambda: op.attention(X(2, 4), X(5, 4), X(5, 4), past=I(1)),
        "attention(f32[2, 4], f32[5, 4], f32[5, 4], i64[1]): past is i64[1], not i64[()]",
    ),
    (
        lambda: op.attention(X(6, 4), X(5, 4), X(5, 4), past=I()),
        "attention(f32[6, 4], f32[5, 4], f32[5, 4], i64[()]): 6 new positions of 5",
    ),
    (
        lambda: op.rope(X(3), X(3), X(3)),
        "rope(f32[3], f32[3], f32[3]): the last dimension (3) must be even",
    ),
    (
        lambda: op.max_pool2d(X(4, 4), (2, 2), (2, 2)),
        "max_pool2d(f32[4, 4]): x needs 3 or 4 dimensions",
    ),
    (
        lambda: op.avg_pool2d(X(1, 2, 4), (3, 2), (1, 1)),
        "avg_pool2d(f32[1, 2, 4]): the window is larger than the padded input in dimension 0",
    ),
    (lambda: op.interpolate(X(1, 4, 4), (2, 2)), "interpolate(f32[1, 4, 4]): x needs 4 dimensions"),
    (
        lambda: op.interpolate(X(1, 1, 4, 4), (2, 2), "cubic"),
        "interpolate(f32[1, 1, 4, 4]): unknown mode 'cubic'",
    ),
    (
        lambda: op.pixel_shuffle(X(6, 2, 2), 2),
        "pixel_shuffle(f32[6, 2, 2]): channels must be a multiple of 4",
    ),
    (
        lambda: op.pixel_unshuffle(X(1, 3, 4), 2),
        "pixel_unshuffle(f32[1, 3, 4]): height and width must be multiples of 2",
    ),
    (
        lambda: op.reshape(X(2, 3), (5,)),
        "reshape(f32[2, 3]): 6 elements do not fill shape [5]",
    ),
    (lambda: op.reshape(X(2, 3), (2, -1)), "reshape(f32[2, 3]): negative size in [2, -1]"),
    (
        lambda: op.permute(X(2, 3), (0, 0)),
        "permute(f32[2, 3]): (0, 0) is not a permutation of 2 dimensions",
    ),
    (
        lambda: op.expand(X(2, 3), (3,)),
        "expand(f32[2, 3]): cannot expand to fewer dimensions [3]",
    ),
    (lambda: op.expand(X(2), (3,)), "expand(f32[2]): size 2 does not expand to 3"),
    (lambda: op.expand(X(2), (-1,)), "expand(f32[2]): negative size in [-1]"),
    (
        lambda: op.slice(X(4), 0, 2, 3),
        "slice(f32[4]): elements 2..4 of dimension 0 with 4",
    ),
    (lambda: op.slice(X(4), 0, -2, 1), "slice(f32[4]): negative size in [-2, 1]"),
    (
        lambda: op.slice(X(4), 0, 0, 1, step=0),
        "slice(f32[4]): step 0 in a tensor with 1 dimensions",
    ),
    (
        lambda: op.slice(X(), 0, 0, 1),
        "slice(f32[()]): step 1 in a tensor with 0 dimensions",
    ),
    (lambda: op.cat((), 0), "cat(): nothing to concatenate"),
    (lambda: op.cat((X(2), 3), 0), "cat: xs must be a value of a graph, not (<input: f32[2]>, 3)"),
    (
        lambda: op.cat((X(2), X(2, 2)), 0),
        "cat(f32[2], f32[2, 2]): operands have no dimensions, or different numbers of them",
    ),
    (
        lambda: op.cat((X(2, 3), X(2, 4)), 0),
        "cat(f32[2, 3], f32[2, 4]): sizes 3 and 4 of dimension 1 differ",
    ),
    (lambda: op.update(X(2, 3), X(3), I(), 0), "update(f32[2, 3], f32[3], i64[()]): "
        "1 dimensions are written into 2"),
    (lambda: op.update(X(2, 3), X(2, 4), I(), 0), "update(f32[2, 3], f32[2, 4], i64[()]): "
        "sizes 3 and 4 of dimension 1 differ"),
    (lambda: op.update(X(2, 3), X(3, 3), I(), 0), "update(f32[2, 3], f32[3, 3], i64[()]): "
        "3 new positions of 2"),
    (lambda: op.update(X(2), I(1), I(), 0), "update(f32[2], i64[1], i64[()]): "
        "i64 is written into f32"),
    (lambda: op.update(X(2), X(1), X(), 0), "update(f32[2], f32[1], f32[()]): "
        "start is f32[()], not i64[()]"),
    (lambda: op.pad(X(2, 3), (1,), (1,)), "pad(f32[2, 3]): 1 paddings for 2 dimensions"),
    (lambda: op.pad(X(2), (-2,), (-1,)), "pad(f32[2]): negative size after cropping"),
    (lambda: op.flip(X(2, 3), (1, -1)), "flip(f32[2, 3]): a dimension appears twice in (1, -1)"),
    (
        lambda: op.embedding(X(3), I(2)),
        "embedding(f32[3], i64[2]): the table needs 2 dimensions, ids an integer type",
    ),
    (lambda: op.arange(-1, i64), "arange(): negative size in [-1]"),
    (lambda: op.full((2, -1), 0, i64), "full(): negative size in [2, -1]"),
    (lambda: Item(X(2), 0), "item(f32[2]): the operand has one result"),
    (lambda: Item(MANY, 2), "item((f32[2], i64[2])): index 2 of 2 results"),
    (
        lambda: Aten("aten.no_such.default", (), (), of=Tensor((), f32)),
        "this torch has no operator aten.no_such.default",
    ),
    (
        lambda: Aten("aten.relu", (), (), of=Tensor((), f32)),
        "this torch has no operator aten.relu",
    ),
    (
        lambda: Fused((X(2),), Graph.of((), (op.full((2,), 0, f32),), "body")),
        "fused(f32[2]): the body takes 0 operands",
    ),
    (lambda: Input("a.b", Tensor((), f32)), "input(): 'a.b' cannot be the name of an input"),
    (lambda: Input("n", Number(), True), "input(): n is size; a state is one tensor"),
    (lambda: Input("class", Tensor((), f32)), "input(): 'class' cannot be the name of an input"),
]  # fmt: skip


@pytest.mark.parametrize("build, text", REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refusals_say_what_is_wrong(build: Callable[[], Op], text: str) -> None:
    with pytest.raises(OpError) as e:
        build()
    assert e.value.what == text


def test_unknown_op_names_the_nearest() -> None:
    with pytest.raises(OpError) as e:
        op.leaky_rely
    assert str(e.value) == "unknown op 'leaky_rely'\n  fix   did you mean 'leaky_relu'?"


# ------------------------------------------------------------------ declaring


def test_a_name_is_declared_once_and_is_an_identifier() -> None:
    class Again(Op):
        x: Op

    with pytest.raises(OpError, match="op 'relu' is already declared by effc"):
        declare("relu")(Again)
    with pytest.raises(OpError, match="op name 're lu' is not an identifier"):
        declare("re lu")(Again)


def test_fields_are_sorted_by_their_annotations() -> None:
    kinds = {
        name: [f.kind for f in OPS[name].fields] for name in ("conv2d", "fused", "weight", "aten")
    }
    assert kinds == {
        "conv2d": ["operand"] * 3 + ["attr"] * 4,
        "fused": ["operand", "region"],
        "weight": ["attr", "type", "attr", "attr"],
        "aten": ["attr", "operand", "operand", "type"],
    }


def test_nodes_are_frozen() -> None:
    node = op.relu(X(2))
    with pytest.raises(AttributeError):
        node.x = X(3)


def test_a_random_operator_and_a_view_say_so() -> None:
    x = X(4)
    of = Tensor((4,), f32)
    assert Aten("aten.rand_like.default", (x,), (), of=of).random
    assert not Aten("aten.cumsum.default", (x, 0), (), of=of).random
    assert Aten("aten.t.default", (x,), (), of=of).view
    assert not Aten("aten.cumsum.default", (x, 0), (), of=of).view
    a = Input("a", of)
    body = Graph.of((a,), (Aten("aten.rand_like.default", (a,), (), of=of),), "body")
    assert Fused((x,), body).random and not Fused((x,), Graph.of((a,), (op.relu(a),))).random
