"""Our own matrix products and convolutions: every shape, every register tile, what follows them."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.cpu import products
from effc.backends.cpu.features import LEVELS, CpuFeatures, detect
from effc.codegen.cpp.products import TILES
from effc.ir import parse

EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", "12"))


@pytest.fixture(params=[*LEVELS, "wide"])
def level(request, monkeypatch) -> str:
    """Each instruction set of this machine; and the tile of AVX-512 wherever we are."""
    if request.param != "wide":
        monkeypatch.setenv("EFFC_CPU", request.param)
        if detect().level != request.param:
            pytest.skip(f"this CPU has no {request.param}")
        return request.param
    plain = CpuFeatures.flags
    monkeypatch.setattr(CpuFeatures, "flags", lambda *a: (*plain(*a), "-DEFFC_WIDE"))
    monkeypatch.setattr(products, "tile", lambda: TILES["avx512"])
    return "wide"


def called(run) -> list[str]:
    return [e.call for e in run.executable.launches if e.call.startswith("effc_")]


def linear(lead: str, depth: int, results: int, epilogue: str = "y1 = gelu(y0)") -> str:
    return f"""
def graph(x: f32[{lead}, {depth}], w: f32[{results}, {depth}], b: f32[{results}], z: f32[{lead}, {results}]):
    def body(x: f32[{lead}, {depth}], w: f32[{results}, {depth}], b: f32[{results}], z: f32[{lead}, {results}]):
        y0 = linear(x, w, b)
        {epilogue}
        y2 = mul(y1, z)
        return y2,
    y0: f32[{lead}, {results}] = fused((x, w, b, z), body=body)
    y1 = linear(x, w)
    return y0, y1
"""


def run_linear(run, rows: tuple[int, ...], depth: int, results: int) -> None:
    w = torch.randn(results, depth) / max(1, depth) ** 0.5
    run(torch.randn(*rows, depth), w, torch.randn(results), torch.randn(*rows, results))


@pytest.mark.parametrize(
    "depth, results", [(128, 48), (200, 53), (7, 5), (1, 1), (64, 130), (300, 3)]
)
def test_linear(compiled, level, depth, results) -> None:
    run = compiled(linear("M", depth, results))
    assert called(run) == ["effc_linear", "effc_linear"]
    for rows in (1, 2, 3, 5, 6, 7, 13, 31, 32, 33, 97, 200, 0):
        run_linear(run, (rows,), depth, results)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 70), st.integers(0, 150), st.integers(0, 70))
def test_linear_of_any_size(rows, depth, results) -> None:
    from .conftest import Compiled

    run_linear(Compiled(linear(f"{rows}, 2", depth, results)), (rows, 2), depth, results)


def test_linear_reads_views_as_they_lie(compiled) -> None:
    """A slice of a wider row; rows that do not follow each other, which are packed first; a weight
    that is stored turned."""
    run = compiled(
        """
def graph(x: f32[4, 6, 40], w: f32[9, 16], v: f32[16, 9]):
    y0 = slice(x, dim=2, start=8, size=16)
    y1 = linear(y0, w)
    y2 = permute(x, dims=(1, 0, 2))
    y3 = slice(y2, dim=2, start=0, size=16)
    y4 = linear(y3, w)
    y5 = permute(v, dims=(1, 0))
    y6 = linear(y0, y5)
    return y1, y4, y6
"""
    )
    run(torch.randn(4, 6, 40), torch.randn(9, 16), torch.randn(16, 9))
    assert called(run) == ["effc_linear"] * 3


def test_matmul_with_a_matrix(compiled, level) -> None:
    run = compiled(
        """
def graph(x: f32[2, M, K], y: f32[K, N], z: f32[N, K], t: f32[K, 24]):
    y0 = matmul(x, y)
    y1 = permute(z, dims=(1, 0))
    y2 = matmul(x, y1)
    y3 = add(y0, y2)
    y4 = matmul(x, t)
    y5 = relu(y4)
    return y3, y5
"""
    )
    assert called(run) == ["effc_linear"] * 3
    for m, k, n in ((1, 40, 16), (2, 130, 7), (20, 33, 100), (70, 1, 65), (3, 64, 1), (0, 5, 3)):
        x, y, z = torch.randn(2, m, k), torch.randn(k, n), torch.randn(n, k)
        run(x, y, z, torch.randn(k, 24))


CONV = """
def graph(x: f32[N, C, H, W]{last}, z: f32[N, K, OH, OW]{last}, g: f32[N, K, 1, 1], s: f32[N, 1, OH, OW]{last}):
    w0: f32[K, CG, KH, KW] = weight("w", digest="")
    w1: f32[K] = weight("b", digest="")
    def body(x: f32[N, C, H, W]{last}, w: f32[K, CG, KH, KW], b: f32[K], z: f32[N, K, OH, OW]{last}, g: f32[N, K, 1, 1], s: f32[N, 1, OH, OW]{last}):
        y0 = conv2d(x, w, b, WINDOW)
        y1 = mul(y0, g)
        y2 = add(y1, s)
        y3 = leaky_relu(y2, slope=0.05)
        y4 = add(z, y3)
        return y4,
    y0: f32[N, K, OH, OW]{last} = fused((x, w0, w1, z, g, s), body=body)
    y1 = conv2d(x, w0, WINDOW)
    return y0, y1
""".replace("{last}", " @ channels_last")


def conv_out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_graph(n, c, k, h, w, kernel, stride=1, padding=1, dilation=1, groups=1):
    """The graph, and inputs it takes."""
    oh, ow = (conv_out(s, kernel, stride, padding, dilation) for s in (h, w))
    window = f"stride=({stride}, {stride}), padding=({padding}, {padding}), dilation=({dilation}, {dilation}), groups={groups}"
    source = CONV.replace("WINDOW", window)
    for name, value in {"OH": oh, "OW": ow, "KH": kernel, "KW": kernel, "N": n, "CG": c // groups, "C": c, "K": k,
                        "H": h, "W": w}.items():  # fmt: skip
        for before, after in (("[", ","), (" ", ","), (" ", "]"), ("[", "]")):
            source = source.replace(f"{before}{name}{after}", f"{before}{value}{after}")
    weights = {
        "w": torch.randn(k, c // groups, kernel, kernel) / (c // groups * kernel**2) ** 0.5,
        "b": torch.randn(k),
    }
    inputs = [torch.randn(n, c, h, w), torch.randn(n, k, oh, ow), torch.randn(n, k, 1, 1),
              torch.randn(n, 1, oh, ow)]  # fmt: skip
    return parse(source, weights=weights), inputs


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n=1, c=3, k=20, h=9, w=11, kernel=3),
        dict(n=2, c=16, k=17, h=7, w=6, kernel=3, stride=2),
        dict(n=1, c=9, k=40, h=8, w=8, kernel=3, padding=2, dilation=2),
        dict(n=2, c=24, k=33, h=5, w=13, kernel=1, padding=0),
        dict(n=1, c=5, k=8, h=6, w=7, kernel=5, padding=2),
        dict(n=1, c=130, k=200, h=3, w=3, kernel=1, padding=0, stride=2),
        dict(n=1, c=1, k=2, h=2, w=1, kernel=1, padding=0),
    ],
    ids=str,
)
def test_convolution(compiled, level, sizes) -> None:
    graph, inputs = conv_graph(**sizes)
    run = compiled(graph)
    run(*inputs)
    assert called(run) == ["effc_convolution"] * 2


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n=1, c=16, k=16, h=12, w=12, kernel=3),
        dict(n=2, c=17, k=53, h=9, w=30, kernel=3),
        dict(n=3, c=8, k=9, h=7, w=5, kernel=3, padding=0),
        dict(n=1, c=64, k=64, h=33, w=41, kernel=3),
        dict(n=1, c=20, k=20, h=11, w=6, kernel=3, padding=2),
    ],
    ids=str,
)
def test_winograd(compiled, level, monkeypatch, sizes) -> None:
    monkeypatch.setattr(products, "winograd_cost", lambda node, run: run)
    graph, inputs = conv_graph(**sizes)
    run = compiled(graph)
    run(*inputs)
    assert called(run) == ["effc_winograd"] * 2


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n=2, c=40, k=40, h=9, w=23, kernel=3),
        dict(n=1, c=33, k=33, h=8, w=9, kernel=3, stride=2),
        dict(n=1, c=19, k=19, h=12, w=15, kernel=5, padding=2),
        dict(n=1, c=3, k=3, h=6, w=11, kernel=3, padding=2, dilation=2),
        dict(n=1, c=24, k=24, h=7, w=7, kernel=3, padding=0),
        dict(n=3, c=700, k=700, h=2, w=3, kernel=3),
    ],
    ids=str,
)
def test_depthwise(compiled, level, sizes) -> None:
    graph, inputs = conv_graph(**sizes, groups=sizes["c"])
    run = compiled(graph)
    run(*inputs)
    assert called(run) == ["effc_depthwise"] * 2


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(2, 40), st.integers(3, 20),
    st.integers(3, 20), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(0, 2),
)  # fmt: skip
def test_convolution_of_any_size(n, c, k, h, w, kernel, stride, padding) -> None:
    from .conftest import Compiled

    graph, inputs = conv_graph(n, c, k, h, w, kernel, stride, padding)
    Compiled(graph)(*inputs)


def test_winograd_is_as_exact_as_a_plain_sum(compiled) -> None:
    """Errors against float64 beside those of torch's own float32 convolution."""
    graph, inputs = conv_graph(n=1, c=64, k=64, h=32, w=32, kernel=3)
    run = compiled(graph)
    assert called(run) == ["effc_winograd"] * 2
    (w,) = (v.data for v in graph.nodes if v.name == "weight" and v.key == "w")
    exact = torch.nn.functional.conv2d(inputs[0].double(), w.double(), padding=1)
    plain = torch.nn.functional.conv2d(inputs[0], w, padding=1)
    ours = run(*inputs)[1]
    error = lambda y: (y - exact).norm().item()  # noqa: E731
    assert error(ours) < 2 * error(plain)


ATTENTION = """
def graph(q: f32[B, H, N, D], k: f32[B, G, M, D], v: f32[B, G, M, E], m: f32[N, M], z: f32[B, H, N, E], k4: bool[B, 1, N, M]):
    def body(q: f32[B, H, N, D], k: f32[B, G, M, D], v: f32[B, G, M, E], m: f32[N, M], z: f32[B, H, N, E]):
        y0 = attention(q, k, v, m, gqa=GQA, scale=-0.2)
        y1 = mul(y0, z)
        return y1,
    y0: f32[B, H, N, E] = fused((q, k, v, m, z), body=body)
    y1 = attention(q, k, v, causal=True, gqa=GQA)
    y2 = attention(q, k, v, k4, gqa=GQA)
    return y0, y1, y2
"""


def run_attention(make, b, heads, kept, queries, keys, depth, results) -> None:
    source = ATTENTION.replace("GQA", str(heads != kept))
    sizes = {"B": b, "H": heads, "G": kept, "D": depth, "E": results}
    for name, value in sizes.items():
        for before, after in (("[", ","), (" ", ","), (" ", "]")):
            source = source.replace(f"{before}{name}{after}", f"{before}{value}{after}")
    run = make(source)
    assert called(run) == ["effc_attention"] * 3
    for n, m in zip(queries, keys, strict=True):
        keep = torch.rand(b, 1, n, m) < 0.7
        keep[..., :1] = True
        run(
            torch.randn(b, heads, n, depth), torch.randn(b, kept, m, depth),
            torch.randn(b, kept, m, results), torch.randn(n, m), torch.randn(b, heads, n, results),
            keep,
        )  # fmt: skip


@pytest.mark.parametrize(
    "heads, kept, depth, results", [(4, 4, 16, 16), (6, 2, 5, 9), (1, 1, 40, 7), (2, 1, 64, 64)]
)
def test_attention(compiled, level, heads, kept, depth, results) -> None:
    queries, keys = (1, 3, 4, 5, 97, 200, 400), (250, 7, 193, 1, 97, 200, 390)
    run_attention(compiled, 2, heads, kept, queries, keys, depth, results)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
def test_attention_of_any_size(queries, keys, depth, results) -> None:
    from .conftest import Compiled

    run_attention(Compiled, 1, 2, 2, (queries,), (keys,), depth, results)


def test_attention_reads_heads_as_they_lie(compiled) -> None:
    """Heads inside rows, as a split projection gives them; few and many queries, several threads."""
    source = """
def graph(x: f32[2, N, 96], y: f32[M, 8], z: f32[3, M, 8]):
    y0 = reshape(x, to=(2, N, 3, 4, 8))
    y1 = permute(y0, dims=(2, 0, 3, 1, 4))
    y2 = slice(y1, dim=0, start=0, size=1)
    y3 = slice(y1, dim=0, start=1, size=1)
    y4 = slice(y1, dim=0, start=2, size=1)
    y5 = reshape(y2, to=(2, 4, N, 8))
    y6 = reshape(y3, to=(2, 4, N, 8))
    y7 = reshape(y4, to=(2, 4, N, 8))
    y8 = attention(y5, y6, y7, causal=True)
    y9 = permute(y8, dims=(0, 2, 1, 3))
    y10 = reshape(y9, to=(2, N, 32))
    y11 = attention(y, y, y)
    y12 = attention(z, y, z)
    return y10, y8, y11, y12
"""
    for threads in (1, 3):
        run = compiled(source, threads=threads)
        assert "copy" not in [e.kind for e in run.executable.launches]
        for n, m in ((1, 1), (3, 40), (50, 2), (1000, 300)):
            run(torch.randn(2, n, 96), torch.randn(m, 8), torch.randn(3, m, 8))


def test_attention_of_large_and_forbidden_scores(compiled) -> None:
    """Sums stay finite, and a query that sees nothing gives what torch gives."""
    run = compiled(
        """
def graph(q: f32[1, 1, 5, 4], k: f32[1, 1, 300, 4], v: f32[1, 1, 300, 4], m: f32[5, 300], b: bool[5, 300]):
    y0 = attention(q, k, v, m)
    y1 = attention(q, k, v, b)
    return y0, y1
"""
    )
    q, k, v = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4)
    mask = torch.randn(5, 300) * 100
    mask[0] = -torch.inf
    mask[1, :250] = -torch.inf
    mask[2, 3:] = -torch.inf
    run(q * 100, k, v, mask, mask > -torch.inf)
    k[0, 0, 7, 1] = torch.nan
    run(q, k, v, mask, mask > -torch.inf)


def test_dynamic_sizes_and_threads(compiled) -> None:
    source = """
def graph(x: f32[N, 16, H, W] @ channels_last):
    w0: f32[24, 16, 3, 3] = weight("w", digest="")
    w1: f32[8, 24, 1, 1] = weight("v", digest="")
    y0 = conv2d(x, w0, padding=(1, 1))
    y1 = conv2d(y0, w1, stride=(2, 2))
    return y0, y1
"""
    weights = {"w": torch.randn(24, 16, 3, 3) / 12, "v": torch.randn(8, 24, 1, 1) / 5}
    for threads in (1, 2, 5):
        run = compiled(parse(source, weights=weights), threads=threads)
        for n, h, w in ((1, 30, 40), (2, 1, 3), (1, 3, 1), (3, 17, 16), (0, 5, 5)):
            run(torch.randn(n, 16, h, w))
    assert called(run) == ["effc_winograd", "effc_convolution"]


def test_where_a_nan_goes(compiled) -> None:
    """It reaches what eager says, and with Winograd no further than the tiles around."""
    graph, inputs = conv_graph(n=1, c=8, k=8, h=20, w=20, kernel=3)
    (want, _) = find_backend("reference").compile(graph).bind()(inputs)
    bound = find_backend("cpu").compile(graph).bind()
    inputs[0][0, 0, 9, 9] = float("nan")
    (got, _) = bound(inputs)
    assert got[:, :, 8:11, 8:11].isnan().all()
    far = torch.ones(20, 20, dtype=torch.bool)
    far[4:16, 4:16] = False
    torch.testing.assert_close(got[:, :, far], want[:, :, far], rtol=1e-4, atol=1e-4)


def test_a_changed_weight_is_packed_anew() -> None:
    w = torch.randn(16, 16, 3, 3)
    graph = parse(
        """
def graph(x: f32[1, 16, 8, 8] @ channels_last):
    w0: f32[16, 16, 3, 3] = weight("w", digest="")
    y0 = conv2d(x, w0, padding=(1, 1))
    return y0,
""",
        weights={"w": w},
    )
    executable = find_backend("cpu").compile(graph)
    x = torch.randn(1, 16, 8, 8)
    (one,) = executable.bind({"w": w})([x])
    (two,) = executable.bind({"w": w * 2})([x])
    torch.testing.assert_close(two, one * 2)


def test_tiles_are_those_of_the_header() -> None:
    """Python packs weights for the sizes that the C++ text has."""
    from effc.codegen.build import build

    source = """#include "effc_tile.h"
EFFC_EXPORT int effc_tile_sizes(int i) {
  return i == 0 ? effc::WIDTH : i == 1 ? effc::TILE_VECTORS : effc::TILE_ROWS;
}
"""
    cpu = detect()
    for name, flags in ((cpu.level, cpu.flags()), ("avx512", (*cpu.flags(), "-DEFFC_WIDE"))):
        sizes = build(source, flags=flags).function(
            "effc_tile_sizes", ctypes.c_int, restype=ctypes.c_int
        )
        tile = TILES[name]
        assert [sizes(i) for i in range(3)] == [tile.width, tile.vectors, tile.rows]
