"""Triton kernels of the families that matter, compiled ahead of time for sm_80."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice

from effc.codegen.ptx import Kernel, from_triton


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
           PRECISION: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(tl.program_id(2) * BK, K, BK * SPLIT):
        x = tl.load(
            a + rm[:, None] * K + (k + rk)[None, :],
            mask=(rm[:, None] < M) & ((k + rk)[None, :] < K),
            other=0.0,
        )
        y = tl.load(
            b + (k + rk)[:, None] * N + rn[None, :],
            mask=((k + rk)[:, None] < K) & (rn[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(x, y, acc, out_dtype=ACC, input_precision=PRECISION)
    at = c + rm[:, None] * N + rn[None, :]
    inside = (rm[:, None] < M) & (rn[None, :] < N)
    if SPLIT > 1:
        tl.atomic_add(at, acc, mask=inside)
    else:
        tl.store(at, acc.to(c.dtype.element_ty), mask=inside)


@triton.jit
def persistent(a, b, c, N, tiles, programs, B: tl.constexpr):
    r = tl.arange(0, B)
    for tile in range(tl.program_id(0), tiles, programs):
        i, j = tile // (N // B), tile % (N // B)
        acc = tl.zeros((B, B), tl.float32)
        for k in range(0, N, B):
            x = tl.load(a + (i * B + r)[:, None] * N + (k + r)[None, :])
            y = tl.load(b + (k + r)[:, None] * N + (j * B + r)[None, :])
            acc = tl.dot(x, y, acc)
        tl.store(
            c + (i * B + r)[:, None] * N + (j * B + r)[None, :], tl.maximum(acc, 0.0).to(tl.float16)
        )


@triton.jit
def convolution(x, w, y, H, W, C: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr):
    """3 x 3, padding 1, NHWC, as a product over gathered pixels."""
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    i, j = p // W, p % W
    rc, ro = tl.arange(0, C), tl.arange(0, OUT)
    acc = tl.zeros((BM, OUT), tl.float32)
    for t in range(9):
        r, s = i + t // 3 - 1, j + t % 3 - 1
        ok = (p < H * W) & (r >= 0) & (r < H) & (s >= 0) & (s < W)
        v = tl.load(x + (r * W + s)[:, None] * C + rc[None, :], mask=ok[:, None], other=0.0)
        k = tl.load(w + (t * C + rc)[:, None] * OUT + ro[None, :])
        acc = tl.dot(v, k, acc)
    tl.store(y + p[:, None] * OUT + ro[None, :], acc.to(tl.float16), mask=(p < H * W)[:, None])


@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    p, r = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + p * n + r, mask=r < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + p * n + r, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=r < n)


@triton.jit
def layer_norm(x, w, b, y, n, eps, B: tl.constexpr):
    p, r = tl.program_id(0), tl.arange(0, B)
    m = r < n
    v = tl.load(x + p * n + r, mask=m, other=0.0).to(tl.float32)
    d = tl.where(m, v - tl.sum(v, 0) / n, 0.0)
    s = tl.rsqrt(tl.sum(d * d, 0) / n + eps)
    out = d * s * tl.load(w + r, mask=m, other=0.0) + tl.load(b + r, mask=m, other=0.0)
    tl.store(y + p * n + r, out.to(y.dtype.element_ty), mask=m)


@triton.jit
def pointwise(x, y, z, n, B: tl.constexpr):
    r = tl.program_id(0) * B + tl.arange(0, B)
    a, b = tl.load(x + r, mask=r < n, other=0.0), tl.load(y + r, mask=r < n, other=0.0)
    v = (
        tl.sigmoid(a) * libdevice.tanh(b)
        + tl.sqrt(tl.abs(a))
        + libdevice.erf(b)
        + tl.log(tl.abs(b) + 1.0)
    )
    v += tl.exp(a) * tl.where(a > b, a, b) + tl.floor(a)
    tl.store(z + r, v, mask=r < n)


@triton.jit
def scan_and_sort(x, y, z, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    tl.store(y + tl.arange(0, B), tl.cumsum(v, 0))
    tl.store(z + tl.arange(0, B), tl.sort(v))


@triton.jit
def scatter(index, value, table, out, n, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    m = p < n
    i = tl.load(index + p, mask=m, other=0)
    tl.atomic_add(
        out + i,
        tl.load(value + p, mask=m, other=0.0) * tl.load(table + i, mask=m, other=0.0),
        mask=m,
    )


@triton.jit
def popcount(x, y, B: tl.constexpr):
    v = tl.load(x + tl.arange(0, B))
    n = tl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(y + tl.arange(0, B), n)


@triton.jit
def attention(q, k, v, o, scale, N, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Causal, one head a program of the second axis."""
    pm, base = tl.program_id(0), tl.program_id(1) * N * D
    rm, rd, rn = pm * BM + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    Q = tl.load(q + base + rm[:, None] * D + rd[None, :], mask=rm[:, None] < N, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for s in range(0, tl.minimum((pm + 1) * BM, N), BN):
        K = tl.load(
            k + base + (s + rn)[None, :] * D + rd[:, None], mask=(s + rn)[None, :] < N, other=0.0
        )
        V = tl.load(
            v + base + (s + rn)[:, None] * D + rd[None, :], mask=(s + rn)[:, None] < N, other=0.0
        )
        S = tl.where(rm[:, None] >= (s + rn)[None, :], tl.dot(Q, K) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(S, 1))
        P = tl.exp2((S - new[:, None]) * 1.44269504)
        shrink = tl.exp2((top - new) * 1.44269504)
        total = total * shrink + tl.sum(P, 1)
        acc = acc * shrink[:, None] + tl.dot(P.to(V.dtype), V)
        top = new
    tl.store(
        o + base + rm[:, None] * D + rd[None, :],
        (acc / total[:, None]).to(o.dtype.element_ty),
        mask=rm[:, None] < N,
    )


@triton.jit
def locked(lock, y, B: tl.constexpr):
    r = tl.arange(0, B)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(y + r, tl.load(y + r) + 1.0)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def compiled(fn, signature: str, constants: dict, *, warps: int = 4, stages: int = 3):
    """signature: types of the arguments in order, "*fp16 *fp16 i32"."""
    names = [n for n in fn.arg_names if n not in constants]
    types = dict(zip(names, signature.split())) | dict.fromkeys(constants, "constexpr")
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if types[n][0] == "*"
    }
    source = ASTSource(fn, {n: types[n] for n in fn.arg_names}, constants, attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps, "num_stages": stages}
    )


def build(fn, signature: str, constants: dict, **options) -> Kernel:
    return from_triton(compiled(fn, signature, constants, **options))
