"""Samples of ops with values: elementwise, products, norms, images; samples_moved.py has the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from effc.ir import (
    OPS,
    Input,
    Op,
    Tensor,
    channels_last,
    row_major,
)
from effc.ir.rewrite import op
from effc.ir.types import bf16, boolean, f32, f64, i32, i64, u8

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
