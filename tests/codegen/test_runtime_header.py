"""effc.h means what torch means: each function against float64 or torch, over wide ranges."""

import ctypes
import math
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from effc.backends.cpu.features import UnsupportedCpu, compile_flags, detect
from effc.codegen.build import Unit, build, build_many
from effc.codegen.compile import BASE_FLAGS, HEADERS
from effc.codegen.toolchain import find_toolchain

INF, NAN = float("inf"), float("nan")
C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bfloat16: "effc::bf16",
    torch.float16: "effc::half",
}
FLOATS, INTS = (torch.float32, torch.float64), (torch.uint8, torch.int8, torch.int32, torch.int64)

# Vectorised float functions: their bounds stand in the comment of effc_math.h.
VECTOR = [
    "exp", "exp2", "expm1", "log", "log1p", "log2", "log10",
    "tanh", "erf", "sin", "cos", "sigmoid",
]  # fmt: skip
LIBM = ["acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "tan", "erfc"]
EXACT = [
    "abs", "neg", "sign", "square", "ceil", "floor", "trunc", "round", "frac",
    "sqrt", "rsqrt", "reciprocal", "nan_to_num",
]  # fmt: skip
ACTIVATIONS = {
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "softplus": F.softplus, "mish": F.mish,
    "log_sigmoid": F.logsigmoid, "elu": F.elu, "celu": F.celu, "selu": F.selu,
    "softsign": F.softsign, "tanhshrink": F.tanhshrink, "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
}  # fmt: skip
BINARY = {
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "remainder": torch.remainder, "fmod": torch.fmod, "floor_divide": torch.floor_divide,
    "copysign": torch.copysign, "nextafter": torch.nextafter,
}  # fmt: skip
ROUNDED = {
    "pow": torch.pow, "atan2": torch.atan2, "hypot": torch.hypot, "xlogy": torch.xlogy,
    "logaddexp": torch.logaddexp,
}  # fmt: skip
INT_BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "remainder": torch.remainder, "fmod": torch.fmod, "floor_divide": torch.floor_divide,
    "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "pow": torch.pow,
    "bitwise_left_shift": torch.bitwise_left_shift,
    "bitwise_right_shift": torch.bitwise_right_shift,
}  # fmt: skip
UNARY = [*VECTOR, *LIBM, *EXACT, *ACTIVATIONS]

LOOP = """EFFC_EXPORT void {symbol}({args}, {to}* EFFC_RESTRICT y, int64_t n) {{
  _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) effc::store(y + i, {call});
}}
"""


BLOCKED = (torch.float32, torch.bfloat16, torch.float16)
ROWS = """
EFFC_EXPORT void row_to_NAME(const float* a, TYPE* y, int64_t n) {
  for (int64_t from = 0; from < n; from += effc::BLOCK) {
    const int64_t size = n - from < effc::BLOCK ? n - from : effc::BLOCK;
    float block[effc::BLOCK];
    float* to = effc::begin(y + from, block, FAR);
    for (int64_t k = 0; k < size; ++k) to[k] = a[from + k];
    effc::finish(y + from, block, size, FAR);
  }
  effc::settle(FAR);
}
"""
LOAD = """
EFFC_EXPORT void row_of_NAME(const TYPE* a, float* y, int64_t n) { effc::load_row(a, y, n); }
"""
ROWS = ROWS.replace("FAR", "false") + ROWS.replace("FAR", "true").replace("row_to", "far_row_to")


def symbol(name, dtype):
    return f"{name}_{str(dtype).removeprefix('torch.')}"


def loops(names, dtypes, arity):
    """A kernel for each function and type."""
    letters = "ab"[:arity]
    text = '#include "effc.h"\n'
    for dtype in dtypes:
        of = C_TYPES[dtype]
        for name in names:
            text += LOOP.format(
                symbol=symbol(name, dtype),
                args=", ".join(f"const {of}* EFFC_RESTRICT {x}" for x in letters),
                to=of,
                call=f"effc::{name}({', '.join(f'{x}[i]' for x in letters)})",
            )
    return text


def casts():
    text = '#include "effc.h"\n'
    for small in (torch.bfloat16, torch.float16):
        for a, b in ((small, torch.float32), (torch.float32, small)):
            text += LOOP.format(
                symbol=f"{symbol('from', a)}_{symbol('to', b)}",
                args=f"const {C_TYPES[a]}* EFFC_RESTRICT a",
                to=C_TYPES[b],
                call="effc::load(a + i)",
            )
    return (
        text
        + "".join(ROWS.replace("TYPE", C_TYPES[t]).replace("NAME", str(t)[6:]) for t in BLOCKED)
        + "".join(LOAD.replace("TYPE", C_TYPES[t]).replace("NAME", str(t)[6:]) for t in BLOCKED[1:])
        + """
EFFC_EXPORT void to_uint8(const float* a, uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = effc::cast<uint8_t>(a[i]);
}
EFFC_EXPORT void amax(const float* a, float* y, int64_t n) {
  float hi = -INFINITY, lo = INFINITY;
  #pragma omp simd reduction(effc::amax : hi) reduction(effc::amin : lo)
  for (int64_t i = 0; i < n; ++i) { hi = effc::maximum(hi, a[i]); lo = effc::minimum(lo, a[i]); }
  y[0] = hi; y[1] = lo;
}
"""
    )


@pytest.fixture(scope="module")
def cpu():
    found = detect()
    if isinstance(found, UnsupportedCpu):
        pytest.skip(f"needs an x86-64 CPU: {found.reason}")
    return found


@pytest.fixture(scope="module")
def library(cpu):
    """All kernels of this file, as one name space."""
    units = [
        Unit(loops(UNARY, FLOATS, 1), "unary"),
        Unit(loops([*BINARY, *ROUNDED], FLOATS, 2), "binary"),
        Unit(loops(["abs", "neg", "sign", "square"], INTS, 1), "int-unary"),
        Unit(loops(INT_BINARY, INTS, 2), "int-binary"),
        Unit(casts(), "casts"),
    ]
    return build_many(units, flags=cpu.flags(find_toolchain()))


def function(library, name, *argtypes, **kwargs):
    for part in library:
        if hasattr(part.cdll, name):
            return part.function(name, *argtypes, **kwargs)
    raise AssertionError(f"no kernel {name}")


def run(library, name, *inputs, to=None):
    inputs = [x.contiguous() for x in inputs]
    out = torch.empty(inputs[0].shape, dtype=to or inputs[0].dtype)
    pointers = [ctypes.c_void_p] * (len(inputs) + 1)
    kernel = function(library, name, *pointers, ctypes.c_int64)
    kernel(*(x.data_ptr() for x in inputs), out.data_ptr(), out.numel())
    return out


def call(library, name, *inputs):
    return run(library, symbol(name, inputs[0].dtype), *inputs)


def reference(name, x):
    return ACTIVATIONS[name](x) if name in ACTIVATIONS else getattr(torch, name)(x)


def specials(dtype):
    tiny, info = torch.finfo(dtype).smallest_normal, torch.finfo(dtype)
    some = [
        0.0,
        0.25,
        0.5,
        1,
        1.5,
        2,
        2.5,
        3,
        7,
        20,
        88.5,
        1e-4,
        tiny,
        tiny / 8,
        1e30,
        info.max,
        INF,
    ]
    return torch.tensor([s * v for v in some for s in (1, -1)] + [NAN], dtype=dtype)


def all_floats(step):
    """Every `step`-th float there is, with both signs, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    return torch.cat([bits.view(torch.float32), specials(torch.float32)])


def ulps(got, right):
    """Distance of a float result from a float64 one in last places of the right result."""
    spacing = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(right.abs()))
    spacing = spacing.clamp(min=2.0**-149).nan_to_num(2.0**-149, posinf=2.0**104)
    error = (got.double() - right).abs() / spacing
    # Overflow to infinity is right where the exact result rounds to it.
    error = torch.where((got.double() == right) | (got == right.float()), 0.0, error)
    return torch.where(got.isnan() & right.isnan(), 0.0, error).nan_to_num(INF)


def assert_same(got, want, about=""):
    """Equal with equal zeros' signs; any NaN equals any other."""
    same = (got == want) & (got.signbit() == want.signbit()) | (got.isnan() & want.isnan())
    wrong = (~same).nonzero().flatten()[:5].tolist()
    assert same.all(), [(about, got[i].item(), want[i].item()) for i in wrong]


def documented():
    text = (HEADERS / "effc_math.h").read_text().partition("#pragma once")[0]
    return {name: float(bound) for name, bound in re.findall(r"(\w+) ([\d.]+) ulp", text)}


@pytest.mark.parametrize("name", VECTOR)
def test_vector_functions_keep_their_documented_error(library, name):
    x = all_floats(step=4099)
    right = reference(name, x.double())
    error = ulps(call(library, name, x), right)
    if name == "sigmoid":
        error = error[(right > 1.2e-38) | right.isnan()]
    assert error.max() <= documented()[name]


def test_vector_functions_without_fma(cpu):
    """The bounds hold on the lowest level too, where products round on their own."""
    # With <> the builder sees no use for a precompiled header of these flags.
    source = loops(VECTOR, [torch.float32], 1).replace('"effc.h"', "<effc.h>")
    kernels = [build(source, name="default-level")]
    x = all_floats(step=65521)
    for name in set(VECTOR) - {"sigmoid"}:
        error = ulps(call(kernels, name, x), reference(name, x.double()))
        assert error.max() <= documented()[name], name


@pytest.mark.parametrize("name", VECTOR)
def test_vector_functions_on_special_values(library, name):
    x = specials(torch.float32)
    got, want = call(library, name, x), reference(name, x)
    odd = (x == 0) | x.isinf() | x.isnan() | (want == 0) | want.isinf() | want.isnan()
    assert_same(got[odd], want[odd], name)


@pytest.mark.parametrize("name", [*VECTOR, *LIBM])
def test_double_functions(library, name):
    x = torch.cat([torch.randn(20000, dtype=torch.float64) * s for s in (1e-8, 1, 30, 1e4)])
    x = torch.cat(
        [x[(x.abs() < 709) | (x.abs() > 712)], specials(torch.float64)]
    )  # not at overflow
    # Both sides are libm or a vector library: a few last places.
    got, want = call(library, name, x), reference(name, x)
    torch.testing.assert_close(got, want, rtol=4e-15, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("name", LIBM)
def test_libm_functions(library, name):
    x = all_floats(step=40009)
    assert ulps(call(library, name, x), reference(name, x.double())).max() <= 4


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_functions(library, name, dtype):
    x = torch.cat([torch.randn(5000, dtype=dtype) * 10, specials(dtype)])
    want = reference(name, x)
    if "sqrt" in name:  # torch's own is one place off here and there
        root = tensor([math.sqrt(v) if v >= 0 else NAN for v in x.tolist()], dtype=dtype)
        root = torch.where(x == 0, x, root)
        want = root if name == "sqrt" else 1 / root
    assert_same(call(library, name, x), want, name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(library, name, dtype):
    x = torch.cat([torch.randn(20000, dtype=dtype) * s for s in (1e-6, 1, 10, 100)])
    x = torch.cat([x, specials(dtype)])
    got, want = call(library, name, x), reference(name, x)
    # Against float64 the two differ by rounding; where torch itself cancels (gelu far left,
    # tanhshrink near 0) only the absolute error means anything, and it grows with |x|.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=8 * eps, atol=8 * eps, equal_nan=True)


@pytest.mark.parametrize(("low", "high"), [(-4, 0), (0, 4), (4, 40), (-40, -4)])
def test_gelu_is_as_near_as_torch(library, low, high):
    x = torch.linspace(low, high, 100_001)[1:-1]
    right = F.gelu(x.double())
    ours, torchs = call(library, "gelu", x).double() - right, F.gelu(x).double() - right
    assert ours.abs().max() <= 1.5 * torchs.abs().max()
    if low >= -4:
        assert (ours / right).abs().max() <= 1.5 * (torchs / right).abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*BINARY, *ROUNDED])
def test_binary_functions(library, name, dtype):
    values = torch.cat([specials(dtype), torch.randn(60, dtype=dtype) * 10])
    a, b = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    got, want = call(library, name, a, b), {**BINARY, **ROUNDED}[name](a, b)
    if name in BINARY:
        # Which of two equal zeros max and min return is not defined.
        clear = (a != b) | (a != 0) if "m" in name[:3] and name != "fmod" else a == a
        clear |= a.isnan()
        if name in ("fmod", "remainder"):
            want = want_modulo(name, a, b, want)
        assert_same(got[clear], want[clear], name)
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=eps / 2, equal_nan=True)


def want_modulo(name, a, b, want):
    """torch's vectorised fmod gives NaN for very large quotients; Python's has an answer."""
    finite = a.isfinite() & b.isfinite() & (b != 0)
    exact = [
        math.fmod(x, y) if ok else NAN
        for x, y, ok in zip(*map(torch.Tensor.tolist, (a, b, finite)))
    ]
    exact = tensor(exact, dtype=a.dtype)
    if name == "remainder":
        exact = torch.where((exact != 0) & ((exact < 0) != (b < 0)), exact + b, exact)
    return torch.where(finite & want.isnan(), exact, want)


def integers(dtype):
    info = torch.iinfo(dtype)
    near = [v for v in range(-9, 10) if v >= info.min] + [31, 32, 63, 64, 100]
    return torch.tensor([info.min, info.min + 1, info.max - 1, info.max, *near], dtype=dtype)


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("name", INT_BINARY)
def test_integer_functions(library, name, dtype):
    a, b = (x.flatten() for x in torch.meshgrid(integers(dtype), integers(dtype), indexing="ij"))
    got = call(library, name, a, b)
    if name in ("remainder", "fmod", "floor_divide", "trunc_divide"):
        assert (got[b == 0] == 0).all()  # torch raises
        fits = b != 0
        if dtype.is_signed:
            edge = (a == torch.iinfo(dtype).min) & (b == -1)  # torch traps
            assert (got[edge] == (a[edge] if "divide" in name else 0)).all()
            fits &= ~edge
        a, b, got = a[fits], b[fits], got[fits]
    assert torch.equal(got, INT_BINARY[name](a, b))


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("name", ["abs", "neg", "sign", "square"])
def test_integer_unary_functions(library, name, dtype):
    x = integers(dtype)
    assert torch.equal(call(library, name, x), getattr(torch, name)(x))


def bits(count=65536):
    return torch.arange(count, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_floats_to_float_for_all_patterns(library, dtype):
    x = bits().view(dtype)
    name = f"{symbol('from', dtype)}_to_float32"
    assert_same(run(library, name, x, to=torch.float32), x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_to_small_floats_rounds_to_even_everywhere(library, dtype):
    """Around every value of the small type: itself, the middle to the next, one float off each."""
    low = bits().view(dtype).float()
    middle = (low.double() + (bits() + 1).view(dtype).double()) / 2
    around = torch.cat([low, middle.float(), all_floats(step=65521)])
    raw = around.view(torch.int32)
    x = torch.cat([raw - 1, raw, raw + 1]).view(torch.float32)
    name = f"from_float32_{symbol('to', dtype)}"
    got, want = run(library, name, x, to=dtype), x.to(dtype)
    assert got.isnan().equal(x.isnan())
    assert torch.equal(got.view(torch.int16)[~x.isnan()], want.view(torch.int16)[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_rows_to_float(library, dtype):
    small = bits(65535).view(dtype)  # odd: the last ones go one by one
    name = f"row_of_{str(dtype)[6:]}"
    assert_same(run(library, name, small, to=torch.float32), small.float())


@pytest.mark.parametrize("dtype", BLOCKED)
@pytest.mark.parametrize("way", ["row_to", "far_row_to"])
def test_whole_rows_from_float(library, dtype, way):
    """Any alignment and length; the elements beside the row stay as they are."""
    kernel = function(library, f"{way}_{str(dtype)[6:]}", *[ctypes.c_void_p] * 2, ctypes.c_int64)
    x = torch.randn(5000) * 100
    for start in (0, 1, 8, 15, 16, 33):
        for n in (0, 1, 7, 31, 64, 100, 1024, 1061, 4567):
            y = torch.full((start + n + 40,), -7.0, dtype=dtype)
            kernel(x.data_ptr(), y[start:].data_ptr(), n)
            assert torch.equal(y[start : start + n], x[:n].to(dtype)), (start, n)
            assert (y[:start] == -7).all() and (y[start + n :] == -7).all(), (start, n)


def test_casts_to_unsigned_wrap_as_in_torch(library):
    x = tensor([-1.0, -2.7, 0.9, 255.9, 256.0, 1000.0])
    assert torch.equal(run(library, "to_uint8", x, to=torch.uint8), x.to(torch.uint8))


@pytest.mark.parametrize("at", [None, 0, 7, 999])
def test_reductions_keep_a_nan(library, at):
    x = torch.randn(1000)
    if at is not None:
        x[at] = NAN
    out = run(library, "amax", x)[:2]
    assert_same(out, torch.stack([x.amax(), x.amin()]))


@pytest.mark.parametrize(
    "flags, width",
    [
        (compile_flags("avx2"), 32),
        (("-march=sapphirerapids", "-mprefer-vector-width=512"), 64),
    ],
    ids=["avx2", "sapphirerapids"],
)
def test_loops_over_float_functions_are_vectorised(cpu, tmp_path, flags, width):
    toolchain = find_toolchain()
    if toolchain.kind != "gcc" or toolchain.supported(flags) != flags:
        pytest.skip("needs a g++ that knows these flags")
    names = [*VECTOR, "silu", "gelu", "gelu_tanh", "softplus", "mish", "elu", "nan_to_num", "round"]
    plan = [(n, torch.float32) for n in names]
    plan += [(n, t) for n in ("tanh", "gelu") for t in (torch.bfloat16, torch.float16)]
    text = "".join(loops([name], [dtype], 1).partition("\n")[2] for name, dtype in plan)
    # The unary plus makes a float of a bf16 or a half.
    (tmp_path / "loops.cpp").write_text('#include "effc.h"\n' + text.replace("(a[i])", "(+a[i])"))
    options = [*BASE_FLAGS, "-fopenmp-simd", *flags, "-fopt-info-vec-optimized", f"-I{HEADERS}"]
    command = [*toolchain.command, *options, "-S", "loops.cpp", "-o", "loops.s"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    hits = rf"loops\.cpp:(\d+):\d+: optimized: loop vectorized using {width} byte"
    lines = {int(line) for line in re.findall(hits, done.stderr)}
    assert [kernel for i, kernel in enumerate(plan) if 3 * i + 3 not in lines] == []
