"""CUDA C++ kernels in a plan, run by their PTX on the CPU, against the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.base import Options
from effc.backends.cuda.lowering import CUDA
from effc.backends.plan.planner import make_plan
from effc.codegen.cuda import toolchain
from effc.codegen.cuda.kernel import CudaKernel
from effc.codegen.cuda.toolchain import MissingCuda
from effc.ir import interpret, parse

from .host_gpu import MIXED

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def plan(text):
    """The kernels of each step."""
    return make_plan(parse(text), Options(), CUDA).launches


def kernels(text):
    made = make_plan(parse(text), Options(), CUDA).kernels.values()
    return [k for k in made if isinstance(k, CudaKernel)]


def close(got, want, of=None):
    """Within a few roundings of the type, the result's own or `of` a value before it, of the largest
    element."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want)
        return
    size = want.double().nan_to_num(0, 0, 0).abs().max().item() if want.numel() else 0.0
    atol = TOLERANCE[of or want.dtype] * max(size, 1e-3)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol, equal_nan=True)


@functools.cache
def compiled(text):
    graph = parse(text)
    executable = find_backend("cuda-host").compile(graph)
    assert not executable.fallbacks and executable.native
    return graph, executable.bind(), executable


def check(text, inputs, of=None):
    graph, bound, _ = compiled(text)
    for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
        close(got, want, of)


# ------------------------------------------------------------------ products

LINEAR = """
def graph(x: bf16[M, 72], w: bf16[40, 72], b: bf16[40], z: f32[M, 40]):
    def body(x: bf16[M, 72], w: bf16[40, 72], b: bf16[40], z: f32[M, 40]):
        y0 = linear(x, w, b)
        y1 = gelu(y0)
        y2 = mul(y1, 0.5)
        y3 = add(y2, z)
        return y3
    y0 = fused((x, w, b, z), body=body)
    return y0
"""


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([1, 2, 16, 17, 31, 64, 65, 130]))
@example(0)
@example(129)
def test_linear_with_what_follows_for_any_number_of_rows(m):
    inputs = [torch.randn(m, 72).bfloat16(), torch.randn(40, 72).bfloat16(),
              torch.randn(40).bfloat16(), torch.randn(m, 40)]  # fmt: skip
    check(LINEAR, inputs, of=torch.bfloat16)  # the interpreter rounds the linear layer's result


def test_the_kernel_is_ours():
    (kernel,) = kernels(LINEAR)
    assert kernel.name.startswith("product_") and "effc::gelu(" in kernel.source


# Rows of 7 elements cannot be moved in vectors; columns of the weight lie together ("turned").
ODD = """
def graph(x: f16[3, N, 7], w: f16[7, 13], r: f16[3, 1, 13]):
    y0 = matmul(x, w)
    y1 = add(y0, r)
    return y1
"""


@pytest.mark.parametrize("n", [1, 6])
def test_matmul_of_sizes_that_fit_no_vector(n):
    check(
        ODD, [torch.randn(3, n, 7).half(), torch.randn(7, 13).half(), torch.randn(3, 1, 13).half()]
    )


def test_sliced_and_turned_operands_are_read_where_they_lie():
    text = """
def graph(x: bf16[96, 40], w: bf16[64, 50]):
    y0 = permute(x, dims=(1, 0))
    y1 = slice(y0, dim=1, start=16, size=64, step=1)
    y2 = slice(w, dim=1, start=8, size=24, step=1)
    y3 = matmul(y1, y2)
    return y3
"""
    check(text, [torch.randn(96, 40).bfloat16(), torch.randn(64, 50).bfloat16()])


def test_no_depth_gives_the_bias():
    text = """
def graph(x: bf16[5, 0], w: bf16[8, 0], b: bf16[8]):
    y0 = linear(x, w, b)
    return y0
"""
    check(
        text,
        [torch.randn(5, 0).bfloat16(), torch.randn(8, 0).bfloat16(), torch.randn(8).bfloat16()],
    )


def test_nan_and_infinity_stay_in_their_rows():
    x = torch.randn(33, 72).bfloat16()
    x[3, 5], x[20, 0] = float("nan"), float("inf")
    inputs = [x, torch.randn(40, 72).bfloat16(), torch.zeros(40).bfloat16(), torch.zeros(33, 40)]
    check(LINEAR, inputs, of=torch.bfloat16)


@pytest.mark.parametrize(
    "text",
    [
        "def graph(x: f32[64, 64], w: f32[64, 64]):\n    y0 = linear(x, w)\n    return y0\n",
        "def graph(x: bf16[2, 64, 64], w: bf16[2, 64, 64]):\n    y0 = matmul(x, w)\n    return y0\n",
        "def graph(x: bf16[64], w: bf16[64, 64]):\n    y0 = matmul(x, w)\n    return y0\n",
    ],
)
def test_other_products_are_tritons(text):
    assert not kernels(text)
    assert [launch.kind for launch in plan(text)][:1] == ["kernel"]


# ------------------------------------------------------------------ rows

NORM = """
def graph(x: {t}[R, {n}], z: {t}[R, {n}], w: f32[{n}]):
    def body(x: {t}[R, {n}], z: {t}[R, {n}], w: f32[{n}]):
        y0 = add(x, z)
        y1 = cast(y0, dtype_=f32)
        y2 = {norm}
        y3 = silu(y2)
        y4 = cast(y3, dtype_={t})
        return y0, y4
    y0: ({t}[R, {n}], {t}[R, {n}]) = fused((x, z, w), body=body)
    y1 = item(y0, index=0)
    y2 = item(y0, index=1)
    return y1, y2
"""


# A warp a row, a block a row, a row that is read again for every pass; vectors of 8, 4 and 1.
@pytest.mark.parametrize(
    "n, t, norm",
    [
        (64, "bf16", "rms_norm(y1, w)"), (1000, "f16", "layer_norm(y1, w, w)"),
        (333, "f32", "layer_norm(y1, w)"), (40960, "bf16", "rms_norm(y1, w)"),
    ],
)  # fmt: skip
def test_norms_with_what_is_around_them(n, t, norm):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[t]
    for rows in (1, 5, 0):
        x, z = torch.randn(2, rows, n).to(dtype)
        check(NORM.format(n=n, t=t, norm=norm), [x, z, torch.randn(n)])


SOFTMAX = """
def graph(x: f32[A, B]):
    y0 = softmax(x, dim=1)
    y1 = log_softmax(x, dim=1)
    return y0, y1
"""


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 3, 255, 256, 257, 1031]))
def test_softmax_of_rows_of_any_length(a, b):
    check(SOFTMAX, [torch.randn(a, b) * 5])


def test_softmax_of_rows_without_a_finite_element():
    x = torch.randn(4, 19)
    x[1], x[2, 3] = float("-inf"), float("nan")
    check(SOFTMAX, [x])


def test_reductions_of_every_kind_and_type():
    text = """
def graph(x: f32[6, 100], k: i64[6, 100], s: u8[6, 100], p: bool[6, 100]):
    y0 = sum(x, dims=(1,))
    y1 = mean(x, dims=(1,), keepdim=True)
    y2 = amax(x, dims=(1,))
    y3 = amin(k, dims=(1,))
    y4 = sum(k, dims=(1,))
    y5 = amax(s, dims=(1,))
    y6 = any(p, dims=(1,))
    y7 = all(s, dims=(1,))
    y8 = prod(x, dims=(1,))
    return y0, y1, y2, y3, y4, y5, y6, y7, y8
"""
    assert len(kernels(text)) == 9
    check(text, [torch.rand(6, 100) + 0.5, torch.randint(-(2**40), 2**40, (6, 100)),
                 torch.randint(0, 256, (6, 100), dtype=torch.uint8), torch.rand(6, 100) > 0.99])  # fmt: skip


def test_rows_of_several_dimensions_with_an_operand_of_one_of_them():
    text = """
def graph(x: f32[5, 6, 7], w: f32[6, 1]):
    def body(x: f32[5, 6, 7], w: f32[6, 1]):
        y0 = mul(x, w)
        y1 = sum(y0, dims=(1, 2))
        return y1
    y0 = fused((x, w), body=body)
    return y0
"""
    assert len(kernels(text)) == 1
    check(text, [torch.randn(5, 6, 7), torch.randn(6, 1)])


def test_rows_across_memory_are_tritons():
    text = "def graph(x: f32[64, 40]):\n    y0 = softmax(x, dim=0)\n    return y0\n"
    assert not kernels(text)


# ------------------------------------------------------------------ plans


def test_a_plan_mixes_both_languages():
    check(
        MIXED,
        [
            torch.randn(20, 64).bfloat16(),
            torch.randn(64, 64).bfloat16(),
            torch.randn(64).bfloat16(),
        ],
    )
    executable = compiled(MIXED)[2]
    sources = executable.kernels.values()
    assert sum("__global__" in s for s in sources) == 2
    assert sum("@triton.jit" in s for s in sources) >= 1


def test_without_a_compiler_torch_runs_everything(monkeypatch):
    text = "def graph(x: f32[4, 5]):\n    y0 = softmax(x, dim=1)\n    return y0\n"
    monkeypatch.setattr(
        "effc.backends.cuda.find_cuda", lambda: MissingCuda("no CUDA compiler found")
    )
    graph = parse(text)
    executable = find_backend("cuda-host").compile(graph)
    ((node, reason),) = executable.fallbacks
    assert node.name == "softmax" and str(reason).startswith(
        "no CUDA compiler: no CUDA compiler found"
    )
    assert toolchain.FIX in str(reason)
    x = torch.randn(4, 5)
    close(executable.bind()([x])[0], x.softmax(1))
