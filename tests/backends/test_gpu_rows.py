"""Row kernels of GPUs against the interpreter, and what compilers make of their schedules."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

from .conftest import close, special
from .gpu_compiled import TARGETS, kernels, usage

ANY = """
def graph(x: f32[A, B, C], w: f32[C]):
    y0 = softmax(x, dim=-1)
    y1 = log_softmax(x, dim=1)
    y2 = sum(x, dims=(0, 2))
    y3 = mean(x, dims=(0, 1, 2))
    def body(x: f32[A, B, C], w: f32[C]):
        y0 = mul(x, 0.5)
        y1 = layer_norm(y0, w, w)
        y2 = gelu(y1)
        return y0, y2
    y4: (f32[A, B, C], f32[A, B, C]) = fused((x, w), body=body)
    y5 = item(y4, index=0)
    y6 = item(y4, index=1)
    return y0, y1, y2, y3, y5, y6
"""
SIZES = st.tuples(*[st.sampled_from([1, 2, 3, 5, 17, 64, 65, 130])] * 3)


@functools.cache
def of_any_size():
    graph = parse(ANY)
    executable = find_backend("ptx-host").compile(graph)
    assert not executable.fallbacks
    return graph, executable.bind()


@settings(max_examples=12, deadline=None)
@given(SIZES, st.integers(0, 2))
@example((0, 3, 5), 0)
@example((1, 1, 1), 0)
@example((2, 3, 4100), 1)
@example((1, 200, 65), 2)
def test_one_kernel_for_all_sizes(sizes, how) -> None:
    """how: rows as they lie, in another order, and with holes."""
    graph, bound = of_any_size()
    a, b, c = sizes
    given = [
        torch.randn(a, b, c),
        torch.randn(c, b, a).permute(2, 1, 0),
        torch.randn(a, b, 2 * c)[..., ::2],
    ]
    inputs = [given[how] + 1.5, torch.randn(c)]
    for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
        scale = max(1.0, want.nan_to_num(0).abs().max().item()) if want.numel() else 1.0
        close(got, want, rtol=2e-5, atol=2e-5 * scale)


def test_rows_that_fit_a_tile(compiled) -> None:
    """Several short rows a program; rows side by side; several values a region, and no weight."""
    run = compiled(
        """
def graph(x: f32[6, 100], h: bf16[7, 64], z: f16[3, 21, 40], e: f32[6, 1], s: f32[1]):
    y0 = softmax(x, dim=-1)
    y1 = rms_norm(h)
    y2 = softmax(z, dim=1)
    y3 = amin(z, dims=(0, 1))
    def body(x: f32[6, 100], e: f32[6, 1]):
        y0 = amax(x, dims=(1,), keepdim=True)
        y1 = sub(x, y0)
        y2 = mul(y1, e)
        y3 = mean(y2, dims=(1,), keepdim=True)
        y4 = add(y0, y3)
        y5 = mul(y2, y4)
        return y5, y4
    y4: (f32[6, 100], f32[6, 1]) = fused((x, e), body=body)
    y5 = item(y4, index=0)
    y6 = item(y4, index=1)
    y7 = expand(s, to=(4, 64))
    y8 = sum(y7, dims=(1,))
    y9 = slice(x, dim=1, start=3, size=32, step=2)
    y10 = layer_norm(y9)
    y11 = prod(x, dims=(0, 1), keepdim=True)
    return y0, y1, y2, y3, y5, y6, y8, y10, y11
""",
        backend="ptx-host",
    )
    run(torch.randn(6, 100), torch.randn(7, 64).bfloat16(), torch.randn(3, 21, 40).half(),
        torch.randn(6, 1), torch.randn(1))  # fmt: skip


def test_few_long_rows_are_shared_by_programs(compiled) -> None:
    """Sums keep their digits, and so do moments far from zero."""
    run = compiled(
        """
def graph(x: f32[2, 200003], h: f16[3, 17001], z: f32[5003, 40]):
    y0 = sum(x, dims=(1,))
    y1 = layer_norm(x)
    y2 = softmax(h, dim=1)
    y3 = mean(z, dims=(0,))
    return y0, y1, y2, y3
""",
        backend="ptx-host",
    )
    assert len(run.executable.launches) == 8
    x, z = torch.rand(2, 200003) + 100, torch.rand(5003, 40) + 1
    total, norm, _, mean = run(x, torch.randn(3, 17001).half(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.double(), x.double().sum(1), rtol=3e-7, atol=0)
    torch.testing.assert_close(mean.double(), z.double().mean(0), rtol=3e-7, atol=0)
    exact = torch.nn.functional.layer_norm(x.double(), (200003,))
    torch.testing.assert_close(norm.double(), exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", ["40", pytest.param("17001", marks=pytest.mark.slow)])
def test_nan_and_infinity_reach_the_result(compiled, size) -> None:
    run = compiled(
        """
def graph(x: f32[6, N]):
    y0 = amax(x, dims=(1,))
    y1 = amin(x, dims=(0,))
    y2 = softmax(x, dim=1)
    y3 = sum(x, dims=(1,))
    y4 = layer_norm(x)
    y5 = any(x, dims=(1,))
    y6 = log_softmax(x, dim=0)
    return y0, y1, y2, y3, y4, y5, y6
""".replace("N", size),
        backend="ptx-host",
    )
    x = torch.randn(6, int(size))
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    x[3, :] = -float("inf")
    x[4, :] = 0
    run(x, rtol=1e-4, atol=1e-4)


def test_integers_and_doubles(compiled) -> None:
    run = compiled(
        """
def graph(x: i32[5, 9], b: bool[5, 9], u: u8[5, 9], l: i64[3, 70], d: f64[7, 12]):
    y0 = sum(x, dims=(1,))
    y1 = prod(x, dims=(0,))
    y2 = amin(u, dims=(0,))
    y3 = sum(b, dims=(0, 1))
    y4 = all(b, dims=(0,))
    y5 = amax(b, dims=(1,))
    y6 = amin(l, dims=(1,))
    y7 = any(u, dims=(0, 1))
    y8 = softmax(d, dim=1)
    y9 = layer_norm(d)
    y10 = mean(d, dims=(0, 1), keepdim=True)
    return y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10
""",
        backend="ptx-host",
    )
    run(special((5, 9), torch.int32), torch.rand(5, 9) < 0.5, special((5, 9), torch.uint8),
        special((3, 70), torch.int64), torch.randn(7, 12).double())  # fmt: skip


# ------------------------------------------------------------------ text and schedules


def test_kernels_read_well(golden) -> None:
    shown = kernels(
        """
def graph(x: bf16[1000, 512], z: f32[4, 100000], w: f32[100000]):
    y0 = softmax(x, dim=-1)
    y1 = layer_norm(z, w)
    return y0, y1
"""
    )
    assert "\n\n".join(re.sub(r"_[0-9a-f]{8}", "", k.code) for k in shown) == golden


ADA = """
def graph(x: T[4096, H], r: T[4096, H], w: T[H], e: T[1, H]):
    def body(x: T[4096, H], r: T[4096, H], w: T[H], e: T[1, H]):
        y0 = add(x, r)
        y1 = layer_norm(y0, w, w)
        y2 = add(e, 1.0)
        y3 = mul(y1, y2)
        y4 = add(y3, e)
        return y0, y4
    y0: (T[4096, H], T[4096, H]) = fused((x, r, w, e), body=body)
    y1 = item(y0, index=0)
    y2 = item(y0, index=1)
    y3 = softmax(x, dim=-1)
    return y1, y2, y3
"""


@pytest.mark.parametrize(
    "hidden", [4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (512, 1024, 8192, 16384))]
)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
def test_rows_stay_in_registers(hidden, dtype) -> None:
    text = ADA.replace("T[", f"{dtype}[").replace("H]", f"{hidden}]")
    for kernel in kernels(text):
        for to in TARGETS:
            assert usage(kernel, to).spilled == 0, f"{kernel.source}\n{to}"


def test_long_rows_are_cut_where_rows_are_few() -> None:
    """One launch where rows fill a GPU, two where they do not, and one for what fits a tile."""
    text = "\ndef graph(x: f32[R, E]):\n    y0 = sum(x, dims=(1,))\n    return y0,\n"
    counts = {
        (rows, size): len(kernels(text.replace("R", rows).replace("E", size)))
        for rows in ("4", "4000", "N") for size in ("1000", "100000", "M")
    }  # fmt: skip
    assert [key for key, count in counts.items() if count == 2] == [
        ("4", "100000"), ("4", "M"), ("N", "100000"),
    ]  # fmt: skip
