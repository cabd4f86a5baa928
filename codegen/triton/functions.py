"""Device functions with torch's meaning, called by generated Triton kernels as `fn.NAME`.

They are what effc.h is to C++ kernels. 16-bit floats arrive as float32. A NaN goes through
wherever it does in torch, which Triton's own `maximum` and comparisons do not do by default.
Integers are computed in their own type and wrap.
"""

# ruff: noqa: ANN001, ANN201  Triton reads these as its own language, which has no annotations
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# ------------------------------------------------------------------ arithmetic


@triton.jit
def add(a, b):
    if a.dtype == tl.int1:
        return a | b
    return a + b


@triton.jit
def sub(a, b):
    return a - b


@triton.jit
def mul(a, b):
    if a.dtype == tl.int1:
        return a & b
    return a * b


@triton.jit
def div(a, b):
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def fmod(a, b):
    if a.dtype.is_floating():
        return libdevice.fmod(a, b)
    return a % b


@triton.jit
def remainder(a, b):
    """With the divisor's sign, as Python's %."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def trunc_divide(a, b):
    if a.dtype.is_floating():
        return libdevice.trunc(div(a, b))
    return a // b


@triton.jit
def floor_divide(a, b):
    """Python's //; of floats by way of the exact remainder, as torch computes it."""
    if a.dtype.is_floating():
        rest = libdevice.fmod(a, b)
        whole = div(a - rest, b)
        whole = tl.where((rest != 0) & ((rest < 0) != (b < 0)), whole - 1, whole)
        near = libdevice.floor(whole)
        near = tl.where(whole - near > 0.5, near + 1, near)
        zero = libdevice.copysign(tl.zeros_like(whole), div(a, b))
        result = tl.where(whole != 0, near, zero)
        return tl.where(b == 0, div(a, b), result)
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def maximum(a, b):
    if a.dtype.is_floating():
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    if a.dtype == tl.int1:
        return a | b
    return tl.maximum(a, b)


@triton.jit
def minimum(a, b):
    if a.dtype.is_floating():
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    if a.dtype == tl.int1:
        return a & b
    return tl.minimum(a, b)


@triton.jit
def neg(x):
    return -x


@triton.jit
def abs(x):
    if x.dtype.is_int_unsigned() or x.dtype == tl.int1:
        return x
    return tl.abs(x)


@triton.jit
def sign(x):
    if x.dtype == tl.int1:
        return x
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def square(x):
    return x * x


@triton.jit
def reciprocal(x):
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    return 1.0 / x


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return libdevice.sqrt(x)


@triton.jit
def rsqrt(x):
    return libdevice.rsqrt(x)


@triton.jit
def lerp(a, b, t):
    """From the nearer end, so that both ends are met exactly."""
    return tl.where(tl.abs(t) < 0.5, a + t * (b - a), b - (b - a) * (1 - t))


@triton.jit
def pow(a, b):
    if a.dtype.is_floating():
        return libdevice.pow(a, b.to(a.dtype))
    # Squaring over the bits of an exponent that is not negative, as integers wrap.
    result, base, left = a * 0 + 1, a, b + a * 0
    for _ in tl.static_range(64):
        result = tl.where((left & 1) != 0, result * base, result)
        base = base * base
        left = left >> 1
    return result


# ------------------------------------------------------------------ rounding


@triton.jit
def floor(x):
    return libdevice.floor(x)


@triton.jit
def ceil(x):
    return libdevice.ceil(x)


@triton.jit
def trunc(x):
    return libdevice.trunc(x)


@triton.jit
def round(x):
    """To the nearest whole number, halves to the even one."""
    return libdevice.rint(x)


# ------------------------------------------------------------------ transcendental functions


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return libdevice.exp(x)
    return tl.exp(x)


@triton.jit
def exp2(x):
    if x.dtype == tl.float64:
        return libdevice.exp2(x)
    return tl.exp2(x)


@triton.jit
def expm1(x):
    return libdevice.expm1(x)


@triton.jit
def log(x):
    return libdevice.log(x)


@triton.jit
def log2(x):
    return libdevice.log2(x)


@triton.jit
def log10(x):
    return libdevice.log10(x)


@triton.jit
def log1p(x):
    return libdevice.log1p(x)


@triton.jit
def sin(x):
    return libdevice.sin(x)


@triton.jit
def cos(x):
    return libdevice.cos(x)


@triton.jit
def tan(x):
    return libdevice.tan(x)


@triton.jit
def asin(x):
    return libdevice.asin(x)


@triton.jit
def acos(x):
    return libdevice.acos(x)


@triton.jit
def atan(x):
    return libdevice.atan(x)


@triton.jit
def atan2(a, b):
    return libdevice.atan2(a, b)


@triton.jit
def sinh(x):
    return libdevice.sinh(x)


@triton.jit
def cosh(x):
    return libdevice.cosh(x)


@triton.jit
def tanh(x):
    return libdevice.tanh(x)


@triton.jit
def asinh(x):
    return libdevice.asinh(x)


@triton.jit
def acosh(x):
    return libdevice.acosh(x)


@triton.jit
def atanh(x):
    return libdevice.atanh(x)


@triton.jit
def erf(x):
    return libdevice.erf(x)


@triton.jit
def erfc(x):
    return libdevice.erfc(x)


@triton.jit
def isinf(x):
    return tl.abs(x) == float("inf")


# ------------------------------------------------------------------ reductions, lane by lane


@triton.jit
def join_powers(top, total, x, inside):
    """A tile joins the maximum and sum(exp(x - maximum)) of each lane."""
    new = maximum(top, tl.where(inside, x, float("-inf")))
    shift = tl.where(new == float("-inf"), 0.0, new)  # infinities alone leave the sum at 0
    power = tl.where(inside, exp(x - shift), 0.0)
    return new, total * exp(top - shift) + power


@triton.jit
def joined_powers(top, total):
    """Of all lanes, [rows, 1]."""
    all = tl.reduce(top, 1, maximum, keep_dims=True)
    shift = tl.where(all == float("-inf"), 0.0, all)
    return all, tl.sum(total * exp(top - shift), 1, keep_dims=True)


@triton.jit
def join_moments(mean, squares, x, inside, turn):
    """A tile joins the mean and the squared differences from it of each lane, its turn-th value."""
    delta = x - mean
    new = mean + delta * (1.0 / turn.to(mean.dtype))
    return tl.where(inside, new, mean), tl.where(inside, squares + delta * (x - new), squares)


@triton.jit
def joined_moments(mean, squares, count, elements):
    """Of all lanes, `count` values in each and `elements` in all, [rows, 1]."""
    n = count.to(mean.dtype)
    middle = div(tl.sum(mean * n, 1, keep_dims=True), elements)
    delta = mean - middle
    return middle, tl.sum(squares + n * delta * delta, 1, keep_dims=True)


# ------------------------------------------------------------------ activations


@triton.jit
def relu(x):
    return tl.where(x < 0, 0, x)  # not a maximum: NaN stays


@triton.jit
def leaky_relu(x, slope):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def sigmoid(x):
    return reciprocal(1 + exp(-x))


@triton.jit
def silu(x):
    return div(x, 1 + exp(-x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + libdevice.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + libdevice.tanh(inner))


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x > 0, x * scale, libdevice.expm1(x * input_scale) * (alpha * scale))


@triton.jit
def softplus(x, beta, threshold):
    scaled = x * beta
    return tl.where(scaled > threshold, x, libdevice.log1p(exp(scaled)) / beta)


@triton.jit
def log_sigmoid(x):
    return minimum(x, 0.0) - libdevice.log1p(exp(-tl.abs(x)))


@triton.jit
def mish(x):
    return x * libdevice.tanh(softplus(x, 1.0, 20.0))


@triton.jit
def hardsigmoid(x):
    return minimum(maximum(x + 3, 0.0), 6.0) / 6


@triton.jit
def hardswish(x):
    return x * minimum(maximum(x + 3, 0.0), 6.0) / 6
