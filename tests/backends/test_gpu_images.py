"""Pooling and interpolation on GPUs against the interpreter."""

from __future__ import annotations

import functools

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

from .conftest import close

ANY = """
def graph(x: f32[N, 5, H, W]):
    y0 = to_layout(x, layout=LAYOUT)
    y1 = max_pool2d(y0, kernel=(3, 2), stride=(2, 1), padding=(1, 0))
    y2 = avg_pool2d(y0, kernel=(3, 3), stride=(1, 2), padding=(1, 1), count_include_pad=False)
    y3 = interpolate(y0, size=(H + 3, 17))
    y4 = interpolate(y0, size=(13, W + 1), mode="nearest-exact")
    return y1, y2, y3, y4
"""


@functools.cache
def program(layout: str):
    graph = parse(ANY.replace("LAYOUT", layout))
    executable = find_backend("ptx-host").compile(graph)
    assert not executable.fallbacks
    return graph, executable.bind()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 3), st.integers(3, 19), st.integers(3, 19), st.booleans())
@example(1, 3, 3, True)
@example(2, 31, 37, False)
def test_images_of_any_size(n, h, w, last) -> None:
    graph, bound = program("channels_last" if last else "row_major")
    x = torch.randn(n, 5, h, w)
    for got, want in zip(bound([x]), interpret(graph, [x]), strict=True):
        close(got, want, rtol=1e-5, atol=1e-5)


def test_every_window_and_mode(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[3, 9, 8], z: f16[2, 4, 9, 10]):
    y0 = max_pool2d(x, kernel=(2, 2), stride=(1, 1), dilation=(2, 3))
    y1 = avg_pool2d(x, kernel=(3, 2), stride=(2, 3), padding=(1, 1), ceil_mode=True)
    y2 = avg_pool2d(x, kernel=(2, 2), stride=(2, 2), divisor=3)
    y3 = max_pool2d(x, kernel=(7, 7), stride=(2, 2), padding=(3, 3), ceil_mode=True)
    y4 = permute(z, dims=(0, 1, 3, 2))
    y5 = interpolate(y4, size=(5, 23), align_corners=True)
    y6 = interpolate(z, size=(15, 6), mode="nearest", scales=(1.7, 0.6))
    y7 = interpolate(z, size=(15, 6), scales=(1.7, 0.6))
    y8 = interpolate(z, size=(1, 1), align_corners=True)
    return y0, y1, y2, y3, y5, y6, y7, y8
""",
        backend="ptx-host",
    )
    x = torch.randn(3, 9, 8)
    x[0, 0, 0], x[1, 3, 3], x[2, :] = float("nan"), float("inf"), -float("inf")
    run(x, torch.randn(2, 4, 9, 10).half())


NEAREST = """
def graph(x: f32[1, 1, S, S], like: f32[K]):
    y0 = interpolate(x, size=(K, K), mode="nearest")
    y1 = interpolate(x, size=(K, K), mode="nearest-exact")
    return y0, y1
"""


@functools.cache
def nearest():
    graph = parse(NEAREST)
    return graph, find_backend("ptx-host").compile(graph).bind()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 80))
def test_nearest_takes_the_pixels_torch_takes(size, out) -> None:
    graph, bound = nearest()
    inputs = [
        torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size),
        torch.empty(out),
    ]
    for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
        assert torch.equal(got, want)
