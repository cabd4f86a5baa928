"""group_norm and batch_norm on GPUs against the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

from .conftest import close

ANY = """
def graph(x: f32[N, 12, H, W], w: f32[12], e: f32[N, 12, 1, 1]):
    y0 = to_layout(x, layout=LAYOUT)
    def body(x: f32[N, 12, H, W] @ LAYOUT, w: f32[12], e: f32[N, 12, 1, 1]):
        y0 = group_norm(x, groups=3, weight=w, bias=w)
        y1 = add(e, 1.0)
        y2 = mul(y0, y1)
        y3 = silu(y2)
        return y3,
    y1 = fused((y0, w, e), body=body)
    y2 = batch_norm(y0, w, w, w, eps=30.0)
    return y1, y2
"""


@functools.cache
def program(layout: str):
    graph = parse(ANY.replace("LAYOUT", layout))
    executable = find_backend("ptx-host").compile(graph)
    assert not executable.fallbacks
    return graph, executable.bind()


@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
@settings(max_examples=8, deadline=None)
@given(n=st.sampled_from([0, 1, 3]), h=st.integers(1, 9), w=st.sampled_from([1, 2, 5, 33]))
@example(n=2, h=40, w=41)
def test_images_of_any_size(layout, n, h, w) -> None:
    graph, bound = program(layout)
    inputs = [torch.randn(n, 12, h, w) + 3, torch.rand(12) + 0.2, torch.randn(n, 12, 1, 1)]
    for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
        close(got, want, rtol=1e-4, atol=1e-4)


def test_known_sizes(compiled) -> None:
    """Groups that fit a tile, and that several programs share; 16 bits; sequences and vectors."""
    run = compiled(
        """
def graph(x: f16[2, 32, 9, 9], big: bf16[1, 64, 40, 40], s: f32[3, 6, 17], v: f64[4, 10], w: f32[6]):
    y0 = to_layout(x, layout=channels_last)
    y1 = group_norm(y0, groups=8)
    y2 = to_layout(big, layout=channels_last)
    y3 = group_norm(y2, groups=2)
    y4 = group_norm(s, groups=6, weight=w)
    y5 = group_norm(v, groups=5)
    y6 = slice(s, dim=2, start=1, size=8, step=2)
    y7 = batch_norm(y6, w, w, bias=w)
    return y1, y3, y4, y5, y7
""",
        backend="ptx-host",
    )
    run(torch.randn(2, 32, 9, 9).half() + 2, torch.randn(1, 64, 40, 40).bfloat16(),
        torch.randn(3, 6, 17), torch.randn(4, 10).double(), torch.rand(6) + 0.1)  # fmt: skip


def test_moments_far_from_zero(compiled) -> None:
    run = compiled(
        "\ndef graph(x: f32[1, 4, 100, 101]):\n    y0 = group_norm(x, groups=1)\n    return y0,\n",
        backend="ptx-host",
    )
    x = torch.rand(1, 4, 100, 101) + 1000
    (got,) = run(x, rtol=1e-2, atol=1e-2)
    exact = torch.nn.functional.group_norm(x.double(), 1)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-3)
