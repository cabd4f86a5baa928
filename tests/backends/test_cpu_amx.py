"""bf16 products on the tiles of AMX, through an emulation of its instructions on any CPU.

Most inputs are small integers: bf16 parts hold them and sums are exact, so results must be equal.
"""

from __future__ import annotations

import ctypes
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.cpu import products
from effc.backends.cpu.features import CpuFeatures, compile_flags, detect, planning_for
from effc.codegen.build import build
from effc.codegen.compile import BASE_FLAGS, HEADERS
from effc.codegen.cpp.products import core
from effc.codegen.toolchain import Toolchain, find_toolchain
from effc.ir import parse

from .amx import REAL, pretend, trapped
from .conftest import Compiled
from .test_cpu_products import EXAMPLES, conv_graph, conv_out
from .test_cpu_products import linear as linear_graph

CORE = "effc_convolution_bf16"
BF16 = torch.bfloat16
EXTENSIONS = ("avx512_bf16", "amx_tile", "amx_bf16")


@pytest.fixture
def tiles(monkeypatch) -> None:
    pretend(monkeypatch)


def integers(*shape: int, most: int = 8) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape).float()


def compiled(source, weights=None, precision="medium", **options):
    graph = parse(source, weights=weights) if isinstance(source, str) else source
    options = {"float32_matmul_precision": precision, **options}
    return find_backend("cpu").compile(graph, options)


def notes(executable) -> list[str]:
    return [e.note for e in executable.launches if e.call == CORE]


# ------------------------------------------------------------------ linear layers

LINEAR = """
def graph(x: DT[M, {k}]):
    w0: DT[{n}, {k}] = weight("w", digest="")
    y0 = linear(x, w0)
    return y0,
"""


def linear(w: torch.Tensor, precision: str, **options):
    n, k = w.shape
    source = LINEAR.format(n=n, k=k).replace("DT", "bf16" if w.dtype == BF16 else "f32")
    return compiled(source, {"w": w}, precision, **options)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k, n", [(1, 1), (7, 5), (32, 16), (100, 33), (64, 300), (900, 17)])
def test_linear(tiles, k, n, threads) -> None:
    """Rows that do not fill a tile, results that do not fill a panel, several runs of steps."""
    for most_x, most_w, precision in ((8, 8, "medium"), (1000, 8, "high"), (8, 1000, "high")):
        w = integers(n, k, most=most_w)
        executable = linear(w, precision, threads=threads)
        assert notes(executable) == ["bf16" if precision == "medium" else "bf16 x3"]
        bound = executable.bind()
        for rows in (1, 15, 16, 17, 33, 70, 300, 0):
            x = integers(rows, k, most=most_x)
            (y,) = bound([x])
            assert y.equal(F.linear(x.double(), w.double()).float())


def test_errors_are_within_the_bounds_of_theory(tiles) -> None:
    """bf16 rounds by 2^-8 of a number at most; a rest by 2^-8 of itself. So a product of two parts
    lacks 2^-16 for each factor and 2^-16 for the product of the rests."""
    for k in (1, 64, 1000):
        x, w = torch.randn(60, k), torch.randn(40, k)
        exact = F.linear(x.double(), w.double())
        size = F.linear(x.double().abs(), w.double().abs())
        sums = (3 * k + 2) * 2**-24
        for precision, bound in (("high", 3.1 * 2**-16), ("medium", 2.1 * 2**-8)):
            (y,) = linear(w, precision).bind()([x])
            assert ((y - exact).abs() <= (bound + sums) * size).all()
        (y,) = linear(w, "high").bind()([x])
        assert (y - exact).norm() < 2**-15 * exact.norm()


def test_bf16_tensors_need_no_permission(tiles) -> None:
    """Whatever float32 products may be; results are rounded once."""
    for k, n in ((64, 48), (33, 7)):
        w = torch.randn(n, k).to(BF16)
        executable = linear(w, "highest")
        assert notes(executable) == ["bf16"]
        for rows in (1, 40):
            x = torch.randn(rows, k).to(BF16)
            (y,) = executable.bind()([x])
            want = F.linear(x.double(), w.double())
            assert y.dtype == BF16
            torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_follows_a_linear_layer(tiles, dtype) -> None:
    source = """
def graph(x: DT[2, M, 40], z: DT[2, M, 50]):
    w0: DT[50, 40] = weight("w", digest="")
    w1: DT[50] = weight("b", digest="")
    def body(x: DT[2, M, 40], w: DT[50, 40], b: DT[50], z: DT[2, M, 50]):
        y0 = linear(x, w, b)
        y1 = gelu(y0)
        y2 = mul(y1, z)
        return y2,
    y0: DT[2, M, 50] = fused((x, w0, w1, z), body=body)
    y1 = linear(x, w0)
    return y0, y1
""".replace("DT", dtype)
    made = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights = {"w": (torch.randn(50, 40) / 6).to(made), "b": torch.randn(50).to(made)}
    run = Compiled(parse(source, weights=weights), float32_matmul_precision="high")
    assert len(notes(run.executable)) == 2
    tolerance = {} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    for rows in (1, 20):
        run(*(torch.randn(2, rows, n).to(made) for n in (40, 50)), **tolerance)


def test_special_numbers(tiles) -> None:
    w = torch.eye(4)
    x = torch.tensor([[torch.inf, 1, 2, 3], [torch.nan, 1, 2, 3], [3e38, 1e-38, 1.0, -0.0]])
    for precision in ("medium", "high"):
        (y,) = linear(w, precision).bind()([x])
        assert not y[:2, 0].isfinite().any()
        torch.testing.assert_close(y[2], x[2], rtol=2**-8, atol=1e-30)
    (y,) = linear(torch.ones(1, 4), "medium").bind()([x])
    assert y[0].item() == torch.inf and y[1].isnan().all()


# ------------------------------------------------------------------ convolutions

CONV = """
def graph(x: DT[N, {c}, H, W] @ channels_last):
    w0: DT[{k}, {c}, {kh}, {kw}] = weight("w", digest="")
    y0 = conv2d(x, w0, stride={stride}, padding={padding}, dilation={dilation})
    return y0,
"""


def convolution(w, precision="medium", stride=(1, 1), padding=(0, 0), dilation=(1, 1), **options):
    k, c, kh, kw = w.shape
    source = CONV.format(
        k=k, c=c, kh=kh, kw=kw, stride=stride, padding=padding, dilation=dilation
    ).replace("DT", "bf16" if w.dtype == BF16 else "f32")
    executable = compiled(source, {"w": w}, precision, **options)
    assert len(notes(executable)) == 1
    bound = executable.bind()

    def check(n: int, h: int, width: int) -> None:
        x = integers(n, c, h, width).to(w.dtype).to(memory_format=torch.channels_last)
        (y,) = bound([x])
        want = F.conv2d(x.double(), w.double(), None, stride, padding, dilation)
        assert y.equal(want.to(w.dtype))

    return check


@pytest.mark.parametrize(
    "c, k, kernel, window",
    [
        (3, 20, (3, 3), dict(padding=(1, 1))),
        (3, 16, (7, 7), dict(stride=(2, 2), padding=(3, 3))),
        (16, 17, (3, 3), dict(stride=(2, 2), padding=(1, 1))),
        (40, 33, (3, 3), dict(padding=(1, 1))),
        (64, 64, (1, 1), dict()),
        (130, 140, (1, 1), dict(stride=(2, 2))),
        (33, 8, (3, 2), dict(stride=(3, 2), padding=(2, 0), dilation=(2, 3))),
        (5, 8, (5, 5), dict(stride=(1, 2), padding=(2, 2))),
        (32, 9, (3, 3), dict(padding=(9, 9), dilation=(9, 9))),
        (512, 5, (1, 3), dict(padding=(0, 1))),
        (1, 2, (1, 1), dict(padding=(1, 1))),
        (20, 40, (2, 2), dict(stride=(5, 4))),
    ],
    ids=str,
)
def test_convolution(tiles, c, k, kernel, window) -> None:
    for precision, most in (("medium", 8), ("high", 1000)):
        check = convolution(integers(k, c, *kernel, most=most), precision, **window)
        for n, h, w in ((1, 9, 11), (2, 6, 35), (3, 20, 7), (0, 5, 5)):
            check(n, h, w)


def test_blocks_of_a_picture(tiles, monkeypatch) -> None:
    """Bands of lines, strips of wide ones, lines apart; one thread and several."""
    window = dict(padding=(1, 1), stride=(1, 1))
    for room, threads in ((8 << 10, 1), (64 << 10, 4), (2 << 20, 3)):
        monkeypatch.setattr(products, "_l2", lambda room=room: room)
        check = convolution(integers(40, 6, 3, 3), threads=threads, **window)
        for n, h, w in ((1, 5, 300), (2, 17, 64), (1, 1, 1000), (2, 40, 5)):
            check(n, h, w)
        check = convolution(integers(140, 34, 2, 3), dilation=(1, 12), threads=threads)
        for n, h, w in ((1, 5, 300), (2, 7, 45)):
            check(n, h, w)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(1, 12),
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.integers(0, 3), st.integers(1, 3), st.sampled_from(["high", "medium"]),
)  # fmt: skip
def test_convolution_of_any_size(
    n, c, k, h, w, kh, kw, stride, padding, dilation, precision
) -> None:
    if min(conv_out(s, t, stride, padding, dilation) for s, t in ((h, kh), (w, kw))) < 1:
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        window = dict(stride=(stride,) * 2, padding=(padding,) * 2, dilation=(dilation,) * 2)
        convolution(integers(k, c, kh, kw), precision, **window)(n, h, w)


def test_convolution_of_bf16(tiles) -> None:
    for c in (3, 40):
        check = convolution(integers(24, c, 3, 3, most=1).to(BF16), "highest", padding=(1, 1))
        check(2, 9, 20)


def test_what_follows_a_convolution(tiles) -> None:
    graph, inputs = conv_graph(n=2, c=16, k=21, h=7, w=18, kernel=3)
    for precision, error in (("high", 1e-4), ("medium", 5e-2)):
        run = Compiled(graph, float32_matmul_precision=precision)
        run(*inputs, rtol=error, atol=error)
        assert len(notes(run.executable)) == 2


def test_a_changed_weight_is_packed_anew(tiles) -> None:
    w, x = integers(20, 30), integers(5, 30)
    executable = linear(w, "high")
    for factor in (1, 2):
        (y,) = executable.bind({"w": w * factor})([x])
        assert y.equal(F.linear(x, w * factor))


# ------------------------------------------------------------------ attention

ATTENTION = """
def graph(q: DT[2, {heads}, N, {depth}], k: DT[2, {kept}, M, {depth}], v: DT[2, {kept}, M, {results}], m: DT[N, M], z: DT[2, {heads}, N, {results}], b: bool[2, 1, N, M]):
    def body(q: DT[2, {heads}, N, {depth}], k: DT[2, {kept}, M, {depth}], v: DT[2, {kept}, M, {results}], m: DT[N, M], z: DT[2, {heads}, N, {results}]):
        y0 = attention(q, k, v, m, gqa={gqa}, scale=-0.2)
        y1 = mul(y0, z)
        return y1,
    y0: DT[2, {heads}, N, {results}] = fused((q, k, v, m, z), body=body)
    y1 = attention(q, k, v, causal=True, gqa={gqa})
    y2 = attention(q, k, v, b, gqa={gqa})
    y3 = attention(q, k, v, gqa={gqa})
    return y0, y1, y2, y3
"""


@pytest.mark.parametrize(
    "dtype, precision", [("f32", "high"), ("f32", "medium"), ("bf16", "highest")]
)
@pytest.mark.parametrize(
    "heads, kept, depth, results", [(4, 4, 16, 16), (6, 2, 5, 9), (1, 1, 40, 70), (2, 1, 64, 33)]
)
def test_attention(tiles, heads, kept, depth, results, dtype, precision) -> None:
    """Against float64; scores and weights are rounded to 16 bits, to 8, and 8 as all of eager's."""
    sizes = dict(heads=heads, kept=kept, depth=depth, results=results, gqa=heads != kept)
    executable = compiled(
        ATTENTION.format(**sizes).replace("DT", dtype), None, precision, threads=3
    )
    assert [e.call for e in executable.launches] == ["effc_attention_bf16"] * 4
    bound = executable.bind()
    made = BF16 if dtype == "bf16" else torch.float32
    worst = 1e-4 if precision == "high" else 4e-2
    for n, m in ((1, 250), (5, 7), (97, 193), (200, 200), (400, 390), (33, 1)):
        shapes = ((2, heads, n, depth), (2, kept, m, depth), (2, kept, m, results), (n, m),
                  (2, heads, n, results))  # fmt: skip
        inputs = [torch.randn(s).to(made) for s in shapes]
        keep = torch.rand(2, 1, n, m) < 0.7
        keep[..., :1] = True
        got = bound([*inputs, keep])
        q, k, v, mask, z = (x.double() for x in inputs)
        run = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        wanted = (
            run(mask, scale=-0.2) * z, run(is_causal=True), run(keep), run(),
        )  # fmt: skip
        for y, want in zip(got, wanted, strict=True):
            assert y.dtype == made
            assert (y - want).abs().max() < worst * max(1, want.abs().max())


def test_attention_of_large_and_forbidden_scores(tiles) -> None:
    """Sums stay finite, and a query that sees nothing gives what torch gives."""
    source = """
def graph(q: f32[1, 1, 5, 4], k: f32[1, 1, 300, 4], v: f32[1, 1, 300, 4], m: f32[5, 300]):
    y0 = attention(q, k, v, m)
    return y0,
"""
    q, k, v = integers(1, 1, 5, 4), integers(1, 1, 300, 4), integers(1, 1, 300, 4)
    mask = integers(5, 300, most=100)
    mask[0] = -torch.inf
    mask[1, :250] = -torch.inf
    mask[2, 3:] = -torch.inf
    run = Compiled(source, float32_matmul_precision="high")
    run(q * 64, k, v, mask, rtol=1e-4, atol=1e-4)


def test_few_queries_are_multiplied_as_float32(tiles) -> None:
    """Where their number is known; keys are read once for them, as they lie."""
    source = """
def graph(q: DT[2, 3, 8], k: DT[2, 50, 8]):
    y0 = attention(q, k, k)
    return y0,
"""
    calls = [compiled(source.replace("DT", t)).launches[0].call for t in ("f32", "bf16")]
    assert calls == ["effc_attention", "effc_attention_of_bf16"]


# ------------------------------------------------------------------ who decides


def test_highest_is_untouched(monkeypatch) -> None:
    """The same kernels with AMX as without, and so the same bits."""
    graph, inputs = conv_graph(n=1, c=16, k=20, h=9, w=12, kernel=3, stride=2)
    plans = []
    for _ in range(2):
        executable = compiled(graph, precision="highest")
        plans.append((executable.text, executable.bind()(inputs)))
        pretend(monkeypatch)
    assert plans[0][0] == plans[1][0] and CORE not in plans[0][0]
    assert all(a.equal(b) for a, b in zip(plans[0][1], plans[1][1], strict=True))


def test_without_amx_the_permission_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(products, "amx", lambda: False)
    w, x = torch.randn(40, 50), torch.randn(30, 50)
    (one,), (two,) = (linear(w, p).bind()([x]) for p in ("highest", "medium"))
    assert one.equal(two)
    assert CORE not in [e.call for e in linear(w.to(BF16), "medium").launches]


def test_a_weight_that_is_no_constant_stays_float32(tiles) -> None:
    executable = compiled(linear_graph("M", 40, 20), precision="medium")
    assert [e.call for e in executable.launches] == ["effc_linear"] * 2


def test_torchs_switch_is_read_when_a_graph_is_compiled(tiles) -> None:
    w = integers(8, 8)
    for precision in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        expected = {"high": ["bf16 x3"], "medium": ["bf16"], "highest": []}[precision]
        assert notes(linear(w, None)) == expected


def test_a_saved_plan_keeps_its_precision(tiles) -> None:
    w, x = torch.randn(20, 70), torch.randn(9, 70)
    executable = linear(w, "medium")
    loaded = find_backend("cpu").load(executable.graph, executable.objects, executable.machine)
    assert loaded.text == executable.text
    assert loaded.bind({"w": w})([x])[0].equal(executable.bind()([x])[0])


def test_which_cpu_has_tiles() -> None:
    """As plans for a described CPU show; both extensions are needed."""
    here = detect()
    if not isinstance(here, CpuFeatures):
        pytest.skip("no x86-64 CPU")
    graph = parse(LINEAR.format(n=8, k=8).replace("DT", "f32"), weights={"w": integers(8, 8)})
    for extensions, call in ((EXTENSIONS, CORE), (EXTENSIONS[:2], "effc_linear")):
        with planning_for(replace(here, level="avx512", extensions=extensions)):
            options = {"float32_matmul_precision": "high"}
            plan = find_backend("null").compile(graph, options)
        assert [e.call for e in plan.launches] == [call]


# ------------------------------------------------------------------ instructions


@pytest.mark.parametrize("name", ["convolution_bf16", "attention_bf16"])
def test_the_text_builds_with_the_instructions(tmp_path, name) -> None:
    """Compiled only: a compiler knows them on any machine."""
    found = find_toolchain()
    flags = compile_flags("avx512", EXTENSIONS)
    if not isinstance(found, Toolchain) or found.supported(flags) != flags:
        pytest.skip("the compiler does not know AMX")
    (tmp_path / "core.cpp").write_text(core(name).source)
    command = [
        *found.command,
        *BASE_FLAGS,
        *flags,
        f"-I{HEADERS}",
        "-S",
        "core.cpp",
        "-o",
        "core.s",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assembly = (tmp_path / "core.s").read_text()
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in assembly


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_what_the_compiler_makes_of_the_instructions(precision, monkeypatch) -> None:
    """Not the emulation in their place: where there are none, a signal handler does each one."""
    found = find_toolchain()
    if not isinstance(found, Toolchain) or found.supported(REAL) != REAL:
        pytest.skip("the compiler does not know AMX")
    real = products.amx()
    if not real:
        pretend(monkeypatch, REAL)
    with nullcontext() if real else trapped():
        for k, n in ((7, 5), (100, 33), (900, 40)):
            w, x = integers(n, k), integers(70, k, most=1000 if precision == "high" else 8)
            (y,) = linear(w, precision, threads=2).bind()([x])
            assert y.equal(F.linear(x.double(), w.double()).float())
        for c, k in ((3, 20), (40, 33)):
            convolution(integers(k, c, 3, 3), precision, (2, 1), (1, 1), threads=2)(2, 9, 37)
        q, v = torch.randn(2, 70, 40), torch.randn(2, 210, 40)
        source = """
def graph(q: f32[2, 70, 40], v: f32[2, 210, 40]):
    y0 = attention(q, v, v, causal=True)
    return y0,
"""
        error = 1e-4 if precision == "high" else 4e-2
        Compiled(source, float32_matmul_precision=precision)(q, v, rtol=error, atol=error)


def test_the_emulated_instructions() -> None:
    """Configured rows and bytes, strides, the order of pairs, no denormals."""
    source = """#include "effc_amx.h"
EFFC_EXPORT void effc_try(const uint16_t* a, const uint16_t* b, float* c, int rows, int pairs, int columns) {
  using namespace effc;
  amx::Config config = {};
  config.palette = 1;
  config.rows[0] = rows, config.row_bytes[0] = columns * 4;
  config.rows[1] = rows, config.row_bytes[1] = pairs * 4;
  config.rows[2] = pairs, config.row_bytes[2] = columns * 4;
  EFFC_TILE_CONFIGURE(config);
  EFFC_TILE_LOAD(0, c, 20 * 4);
  EFFC_TILE_LOAD(1, a, 36 * 2);
  EFFC_TILE_LOAD(2, b, 40 * 2);
  EFFC_TILE_DOT(0, 1, 2);
  EFFC_TILE_STORE(0, c, 20 * 4);
  EFFC_TILE_RELEASE();
}
"""
    flags = (*detect().flags(), "-DEFFC_EMULATE_AMX")
    call = build(source, flags=flags).function(
        "effc_try", *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 3
    )
    for rows, pairs, columns in ((16, 16, 16), (3, 5, 7), (1, 1, 1)):
        a, b, c = integers(16, 36).to(BF16), integers(16, 40).to(BF16), integers(16, 20)
        a[0, 0] = 1e-39  # a denormal counts as zero
        before = c.clone()
        call(a.data_ptr(), b.data_ptr(), c.data_ptr(), rows, pairs, columns)
        a[0, 0] = 0
        left = a[:rows, : 2 * pairs].float()
        right = b[:pairs, : 2 * columns].reshape(pairs, columns, 2).transpose(1, 2).float()
        before[:rows, :columns] += left @ right.reshape(2 * pairs, columns)
        assert c.equal(before)
