"""Ops that move elements, pooling and interpolation, against the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

IMAGES = """
def graph(x: T[N, 12, H, W]):
    y0 = to_layout(x, layout=LAYOUT)
    y1 = cat((y0, x), dim=1)
    y2 = pad(y0, before=(0, 1, 2, 0), after=(0, 0, 3, -1), value=2.5)
    y3 = flip(y0, dims=(1, 3))
    y4 = pixel_shuffle(y0, factor=2)
    y5 = pixel_unshuffle(y4, factor=2)
    y6 = max_pool2d(y0, kernel=(3, 2), stride=(2, 1), padding=(1, 0))
    y7 = avg_pool2d(y0, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    y8 = avg_pool2d(y0, kernel=(3, 3), stride=(1, 2), padding=(1, 1), count_include_pad=False)
    y9 = interpolate(y0, size=(H * 2, W * 3), mode="nearest")
    y10 = interpolate(y0, size=(13, 5), mode="nearest-exact")
    y11 = interpolate(y0, size=(H + 3, 17))
    y12 = interpolate(y0, size=(5, W + 1), align_corners=True)
    y13 = interpolate(y0, size=(1, 1), align_corners=True)
    y14 = interpolate(y0, size=(7, 2), mode="nearest")
    y15 = copy(y0)
    y16 = max_pool2d(y0, kernel=(2, 2), stride=(1, 1), dilation=(2, 3))
    y17 = avg_pool2d(y0, kernel=(2, 2), stride=(2, 2), divisor=3)
    y18 = to_layout(y3, layout=LAYOUT)
    y19 = slice(y0, dim=2, start=1, size=H - 2, step=1)
    y20 = max_pool2d(y19, kernel=(1, 1), stride=(2, 2))
    y21 = permute(y0, dims=(0, 1, 3, 2))
    y22 = avg_pool2d(y21, kernel=(2, 2), stride=(1, 1))
    y23 = cat((y19, y19, y19), dim=2)
    return y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10, y11, y12, y13, y14, y15, y16, y17, y18, y20, y22, y23
"""


@functools.cache
def images(dtype: str, layout: str):
    graph = parse(IMAGES.replace("T[", f"{dtype}[").replace("LAYOUT", layout))
    executable = find_backend("cpu").compile(graph)
    assert not executable.fallbacks
    return graph, executable.bind()


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 3]), st.integers(3, 19), st.integers(4, 19), st.booleans())
def test_images_of_all_sizes(n, h, w, last) -> None:
    for dtype, layout in (("f32", "row_major"), ("f32", "channels_last"), ("bf16", "row_major")):
        graph, bound = images(dtype, layout)
        x = torch.randn(n, 12, h, w).to(graph.inputs[0].dtype.torch)
        x = x.to(memory_format=torch.channels_last) if last else x
        for o, got, want in zip(graph.outputs, bound([x]), interpret(graph, [x]), strict=True):
            # torch rounds bf16 between steps of interpolation and pooling
            tolerance = 1e-5 if dtype == "f32" else 2e-2
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, msg=lambda m, o=o: f"{o}: {m}"
            )


def test_batches_may_be_empty() -> None:
    graph, bound = images("f32", "row_major")
    out = bound([torch.randn(0, 12, 5, 6)])
    assert [tuple(t.shape) for t in out] == [
        (0, *o.shape[1:2], *t.shape[2:]) for o, t in zip(graph.outputs, out)
    ]


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 80), st.sampled_from(["nearest", "nearest-exact"]))
def test_nearest_takes_the_pixels_torch_takes(size, out, mode) -> None:
    graph, bound = nearest(mode)
    x = torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size)
    (got,) = bound([x, torch.empty(out)])
    assert torch.equal(got, interpret(graph, [x, torch.empty(out)])[0])


@functools.cache
def nearest(mode: str):
    graph = parse(
        f"""
def graph(x: f32[N, 1, H, W], like: f32[K]):
    y0 = interpolate(x, size=(K, K), mode="{mode}")
    return y0,
"""
    )
    return graph, find_backend("cpu").compile(graph).bind()


@pytest.mark.parametrize("scales", [(2.0, 2.0), (1.7, 0.6), (3.0, 1.0)])
def test_given_scales_decide_the_step(compiled, scales) -> None:
    h, w = int(9 * scales[0]), int(10 * scales[1])
    run = compiled(
        f"""
def graph(x: f32[2, 3, 9, 10]):
    y0 = interpolate(x, size=({h}, {w}), scales={scales})
    y1 = interpolate(x, size=({h}, {w}), mode="nearest", scales={scales})
    return y0, y1
"""
    )
    run(torch.randn(2, 3, 9, 10))


def test_pooling_keeps_nan_and_takes_images_without_a_batch(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[3, 9, 8]):
    y0 = max_pool2d(x, kernel=(2, 2), stride=(2, 2))
    y1 = avg_pool2d(x, kernel=(2, 2), stride=(2, 2), ceil_mode=True)
    y2 = max_pool2d(x, kernel=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True)
    y3 = avg_pool2d(x, kernel=(3, 2), stride=(2, 3), padding=(1, 1), ceil_mode=True, count_include_pad=False)
    return y0, y1, y2, y3
"""
    )
    x = torch.randn(3, 9, 8)
    x[0, 0, 0], x[1, 3, 3], x[2, :] = float("nan"), float("inf"), -float("inf")
    run(x)


MADE = """
def graph(x: f32[A, B], t: bf16[V, D], ids: i64[A, B], small: i32[A], n: size, r: number):
    y0 = embedding(t, ids)
    y1 = embedding(t, small)
    y2 = arange(size=A, dtype_=f32, start=2, step=0.5)
    y3 = arange(size=B, dtype_=i64, start=n, step=-3)
    y4 = full(to=(A, 3), value=B, dtype_=i64)
    y5 = full(to=(A, B), value=0.1, dtype_=bf16)
    y6 = mul(x, r)
    y7 = add(x, n)
    y8 = permute(x, dims=(1, 0))
    y9 = cat((y8, y8), dim=0)
    y10 = pad(y8, before=(0, 2), after=(1, n), value=-inf)
    y11 = full(to=(B,), value=r, dtype_=f32)
    y12 = permute(t, dims=(1, 0))
    y13 = embedding(y12, small)
    return y0, y1, y2, y3, y4, y5, y6, y7, y9, y10, y11, y13
"""


def test_lookups_and_made_tensors_of_all_sizes(compiled) -> None:
    run = compiled(MADE)
    for a, b, n, r in ((3, 5, 2, 0.5), (1, 1, 0, 3.0), (17, 2, 5, -1e-3), (4, 0, 1, 2)):
        ids = torch.randint(0, 7, (a, b))
        run(torch.randn(a, b), torch.randn(7, 9).bfloat16(), ids,
            torch.randint(0, 7, (a,), dtype=torch.int32), n, r)  # fmt: skip


@pytest.mark.parametrize("bad", [-1, 10])
def test_an_index_outside_the_table_raises_as_in_torch(compiled, bad) -> None:
    run = compiled(
        """
def graph(t: f32[10, 4], ids: i64[6]):
    y0 = embedding(t, ids)
    y1 = neg(y0)
    return y1,
"""
    )
    ids = torch.arange(6)
    with pytest.raises(IndexError, match="index out of range in self"):
        run.bound([torch.randn(10, 4), ids.clone().fill_(bad)])
    run(torch.randn(10, 4), ids)  # and the next call is right again


@settings(max_examples=10)
@given(st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 7]), st.booleans())
def test_rope(b, n, flat) -> None:
    graph, bound = rope()
    x = torch.randn(b, n, 4, 16).transpose(1, 2) if flat else torch.randn(b, 4, n, 16)
    given = [x, torch.randn(n, 16), torch.randn(n, 16)]
    given += [t.bfloat16() for t in given]
    assume(b * n)
    for got, want in zip(bound(given), interpret(graph, given), strict=True):
        tolerance = 1e-5 if got.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@functools.cache
def rope():
    graph = parse(
        """
def graph(x: f32[B, 4, N, 16], c: f32[N, 16], s: f32[N, 16], u: bf16[B, 4, N, 16], v: bf16[N, 16], w: bf16[N, 16]):
    y0 = rope(x, c, s)
    y1 = rope(x, c, s, interleaved=True)
    y2 = rope(u, v, w)
    y3 = rope(u, v, w, interleaved=True)
    return y0, y1, y2, y3
"""
    )
    return graph, find_backend("cpu").compile(graph).bind()
