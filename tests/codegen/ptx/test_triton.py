"""Triton's own sm_80 code, run on CPU tensors, against torch."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which compiles the kernels")

import triton.language as tl

from . import kernels
from .kernels import build

F16, BF16, F32, I8, I32 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32
NAMES = {F16: "*fp16", BF16: "*bf16", F32: "*fp32", I8: "*i8", I32: "*i32"}


@pytest.fixture(autouse=True, scope="module")
def triton_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def product(dtype, out, accumulator, tile, precision="tf32", split=1):
    bm, bn, bk = tile
    return build(
        kernels.matmul, f"{NAMES[dtype]} {NAMES[dtype]} {NAMES[out]} i32 i32 i32",
        {"BM": bm, "BN": bn, "BK": bk, "ACC": accumulator, "PRECISION": precision, "SPLIT": split},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "out", "accumulator", "tile", "precision", "split", "tolerance"),
    [
        (F16, F32, tl.float32, (64, 64, 32), "tf32", 1, 1e-4),
        (BF16, BF16, tl.float32, (64, 32, 32), "tf32", 1, 0.3),
        (F32, F32, tl.float32, (32, 32, 32), "tf32", 1, 0.06),
        (F32, F32, tl.float32, (32, 32, 16), "ieee", 1, 1e-4),
        (I8, I32, tl.int32, (32, 32, 64), "tf32", 1, 0),
        (F16, F32, tl.float32, (32, 32, 32), "tf32", 3, 1e-4),  # split-K with atomics
    ],
    ids=lambda v: str(v).replace("torch.", ""),
)
def test_products(dtype, out, accumulator, tile, precision, split, tolerance):
    torch.manual_seed(0)
    m, n, k = 96, 64, 144
    if dtype is I8:
        a, b = (torch.randint(-128, 128, s, dtype=I8) for s in ((m, k), (k, n)))
    else:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.zeros(m, n, dtype=out) if split > 1 else torch.full((m, n), -7).to(out)
    grid = (-(-m // tile[0]), -(-n // tile[1]), split)
    product(dtype, out, accumulator, tile, precision, split).launch(grid, [a, b, c, m, n, k])
    assert (c.double() - a.double() @ b.double()).abs().max() <= tolerance


def test_persistent_loop_with_an_epilogue():
    k = build(kernels.persistent, "*fp16 *fp16 *fp16 i32 i32 i32", {"B": 32})
    a, b, c = (
        torch.randn(128, 128).half(),
        torch.randn(128, 128).half(),
        torch.empty(128, 128).half(),
    )
    k.launch(3, [a, b, c, 128, 16, 3])
    assert torch.allclose(c.float(), (a.float() @ b.float()).relu(), atol=0.03, rtol=1e-3)


def test_convolution_as_a_product():
    k = build(kernels.convolution, "*fp16 *fp16 *fp16 i32 i32", {"C": 16, "OUT": 32, "BM": 32})
    x, w = torch.randn(9, 11, 16).half(), torch.randn(3, 3, 16, 32).half()
    y = torch.zeros(9, 11, 32).half()
    k.launch(4, [x, w, y, 9, 11])
    want = torch.nn.functional.conv2d(
        x.float().permute(2, 0, 1)[None], w.float().permute(3, 2, 0, 1), padding=1
    )
    assert torch.allclose(y.float(), want[0].permute(1, 2, 0), atol=0.03, rtol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows(dtype):
    x = torch.randn(5, 300).to(dtype)
    y = torch.empty_like(x)
    build(kernels.softmax, f"{NAMES[dtype]} {NAMES[dtype]} i32", {"B": 512}).launch(5, [x, y, 300])
    assert torch.allclose(y.float(), x.float().softmax(-1), atol=1e-6 if dtype is F32 else 2e-3)
    w, b = torch.randn(300), torch.randn(300)
    k = build(kernels.layer_norm, f"{NAMES[dtype]} *fp32 *fp32 {NAMES[dtype]} i32 fp32", {"B": 512})
    k.launch(5, [x, w, b, y, 300, 1e-5])
    want = torch.nn.functional.layer_norm(x.float(), (300,), w, b)
    assert torch.allclose(y.float(), want, atol=1e-5 if dtype is F32 else 0.04)


def test_pointwise():
    a, b, z = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    build(kernels.pointwise, "*fp32 *fp32 *fp32 i32", {"B": 256}).launch(4, [a, b, z, 1000])
    want = a.sigmoid() * b.tanh() + a.abs().sqrt() + torch.erf(b) + torch.log(b.abs() + 1)
    want += a.exp() * torch.maximum(a, b) + a.floor()
    assert torch.allclose(z, want, atol=1e-5)


def test_scan_and_sort():
    x = torch.randn(256)
    y, z = torch.empty_like(x), torch.empty_like(x)
    build(kernels.scan_and_sort, "*fp32 *fp32 *fp32", {"B": 256}).launch(1, [x, y, z])
    assert torch.allclose(y, x.cumsum(0), atol=1e-4) and torch.equal(z, x.sort()[0])


def test_gather_atomics_and_inline_assembly():
    n = 1000
    index, value, table = torch.randint(0, 64, (n,), dtype=I32), torch.randn(n), torch.randn(64)
    out = torch.zeros(64)
    k = build(kernels.scatter, "*i32 *fp32 *fp32 *fp32 i32", {"B": 256})
    k.launch(4, [index, value, table, out, n])
    assert torch.allclose(
        out, torch.zeros(64).index_add_(0, index.long(), value * table[index.long()]), atol=1e-4
    )
    x = torch.randint(-(2**31), 2**31 - 1, (128,), dtype=I32)
    y = torch.empty_like(x)
    build(kernels.popcount, "*i32 *i32", {"B": 128}).launch(1, [x, y])
    assert y.tolist() == [(v & 0xFFFFFFFF).bit_count() for v in x.tolist()]


def test_a_lock_between_blocks():
    lock, y = torch.zeros(1, dtype=I32), torch.zeros(128)
    build(kernels.locked, "*i32 *fp32", {"B": 128}).launch(9, [lock, y])
    assert (y == 9).all() and lock.item() == 0


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_attention(dtype):
    q, k, v = (torch.randn(2, 2, 80, 32).to(dtype) for _ in range(3))
    o = torch.empty_like(q)
    kernel = build(
        kernels.attention,
        " ".join([NAMES[dtype]] * 4 + ["fp32", "i32"]),
        {"D": 32, "BM": 32, "BN": 32},
    )
    kernel.launch((3, 4), [q, k, v, o, 32**-0.5, 80])
    want = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True
    )
    assert torch.allclose(o.float(), want, atol=2e-3 if dtype is F16 else 2e-2)
