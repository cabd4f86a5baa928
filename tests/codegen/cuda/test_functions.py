"""Every pointwise op has a device function with torch's meaning: NaN, infinities, types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effc.codegen.cpp import scalar
from tests.codegen.cuda.running import by_ptx, text

N = 512
# What float32 results may differ by, relative or absolute: CUDA's functions are right to 1 to 4
# units in the last place, activations add roundings of their own.
RTOL, ATOL = 2e-6, 2e-6
UNARY = {
    "abs": torch.abs, "acos": torch.acos, "acosh": torch.acosh, "asin": torch.asin,
    "asinh": torch.asinh, "atan": torch.atan, "atanh": torch.atanh, "ceil": torch.ceil,
    "cos": torch.cos, "cosh": torch.cosh, "erf": torch.erf, "erfc": torch.erfc, "exp": torch.exp,
    "exp2": torch.exp2, "expm1": torch.expm1, "floor": torch.floor, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish, "isinf": torch.isinf, "log": torch.log, "log10": torch.log10,
    "log1p": torch.log1p, "log2": torch.log2, "log_sigmoid": F.logsigmoid, "mish": F.mish,
    "neg": torch.neg, "reciprocal": torch.reciprocal, "relu": torch.relu, "round": torch.round,
    "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "sign": torch.sign, "silu": F.silu,
    "sin": torch.sin, "sinh": torch.sinh, "sqrt": torch.sqrt, "square": torch.square,
    "tan": torch.tan, "tanh": torch.tanh, "trunc": torch.trunc,
}  # fmt: skip
BINARY = {
    "add": torch.add, "atan2": torch.atan2, "fmod": torch.fmod, "maximum": torch.maximum,
    "minimum": torch.minimum, "mul": torch.mul, "pow": torch.pow, "remainder": torch.remainder,
    "sub": torch.sub, "floor_divide": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}  # fmt: skip
MORE = {
    "lerp(a, b, 0.25f)": lambda a, b: torch.lerp(a, b, 0.25),
    "leaky_relu(a, 0.1f)": lambda a, b: F.leaky_relu(a, 0.1),
    "elu(a, 1.5f, 1.0f, 1.0f)": lambda a, b: F.elu(a, 1.5),
    "softplus(a, 2.0f, 20.0f)": lambda a, b: F.softplus(a, 2.0, 20.0),
}
WHOLE = [name for name in BINARY if name not in ("atan2", "pow")]
INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, INF, -INF, NAN, 1e-3, 1e3]
EXTREME = [1e-30, -1e-30, 1e30, -1e30, 1e-40, 88.8, -104.0, 8192.0]  # for one operand


def inputs():
    pairs = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T
    extreme = torch.tensor([EXTREME, [2.0] * len(EXTREME)])
    rest = torch.randn(2, N - pairs.shape[1] - len(EXTREME)) * 3
    return torch.cat([pairs, extreme, rest], 1).contiguous()


def run(name, calls, kind, x):
    lines = [f"  y[{i * N} + i] = {call};" for i, call in enumerate(calls)]
    body = "\n".join(["  const int i = blockIdx.x * 32 + l;",
                      f"  const {kind} a = x0[i], b = x0[{N} + i];", *lines])  # fmt: skip
    y = torch.full((len(calls), N), 7, dtype=x.dtype)
    by_ptx(text(name, body, kind, kind), N // 32, [y, x])
    return y


def assert_alike(name, got, want):
    want = want.to(got.dtype)
    torch.testing.assert_close(
        got, want, rtol=RTOL, atol=ATOL, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def test_functions_of_one_number():
    x = inputs()
    y = run("unary", [f"effc::{name}(a)" for name in UNARY], "float", x)
    for name, got in zip(UNARY, y, strict=True):
        assert_alike(name, got, UNARY[name](x[0].double()))  # torch's own float32 is less exact


def test_functions_of_two_numbers():
    x = inputs()
    calls = [f"effc::{name}(a, b)" for name in BINARY] + [f"effc::{call}" for call in MORE]
    y = run("binary", calls, "float", x)
    for (name, reference), got in zip({**BINARY, **MORE}.items(), y, strict=True):
        assert_alike(name, got, reference(x[0], x[1]))


@pytest.mark.parametrize("kind, dtype", [("int32_t", torch.int32), ("int8_t", torch.int8)])
def test_integers_wrap(kind, dtype):
    x = torch.randint(-(2**31), 2**31, (2, N)).to(dtype)
    x[1][x[1] == 0] = 3  # torch raises on a zero among divisors
    y = run(f"whole_{kind}", [f"effc::{name}(a, b)" for name in WHOLE], kind, x)
    for name, got in zip(WHOLE, y, strict=True):
        assert torch.equal(got, BINARY[name](x[0], x[1])), name


def test_the_table_has_no_function_that_is_not_tested_here():
    """Names that codegen/cpp/scalar.py may write."""
    tested = {*UNARY, *BINARY, *(call.partition("(")[0] for call in MORE)}
    written = {n for n in scalar.EXPRESSIONS if n not in (
        "div", "eq", "ne", "lt", "le", "gt", "ge", "where", "cast", "clamp", "isnan", "logical_not",
        "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
        "bitwise_not", "div_floor", "div_trunc",
    )}  # fmt: skip
    assert written <= tested, written - tested
