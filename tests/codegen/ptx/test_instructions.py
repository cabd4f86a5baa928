"""Each family of instructions against numpy: every case in one kernel, on values hypothesis draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import Case, run, same, together, view

U32, S32, U64, S64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64


def wide(a):
    return [int(x) for x in a]


def ints(f, dtype):
    """f on Python's integers, wrapped to a type."""
    bits = np.dtype(dtype).itemsize * 8

    def want(*arrays):
        values = [f(*xs) & ((1 << bits) - 1) for xs in zip(*map(wide, arrays))]
        return np.array(values, np.dtype(f"u{bits // 8}")).view(dtype)

    return want


def clamp(lo, hi):
    return lambda v: max(lo, min(hi, v))


def bfe(bits, signed):
    def f(a, pos, length):
        pos, length = pos & 255, length & 255
        a &= (1 << bits) - 1
        if length == 0:
            return 0
        sign = a >> min(pos + length - 1, bits - 1) & 1 if signed else 0
        out = 0
        for i in range(bits):
            bit = a >> (pos + i) & 1 if i < length and pos + i < bits else sign
            out |= bit << i
        return out

    return f


def bfi(bits):
    def f(a, b, pos):
        length = 7
        pos &= 255
        for i in range(length):
            if pos + i < bits:
                b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
        return b

    return f


def prmt(a, b, s):
    data = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        byte = data[s >> 4 * i & 7]
        if s >> (4 * i + 3) & 1:
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * i
    return out


def lop3(table):
    def f(a, b, c):
        out = 0
        for i in range(32):
            k = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
            out |= (table >> k & 1) << i
        return out

    return f


def dp4a(a, b, c):
    x, y = (np.array([v], U32).view(np.int8).astype(int) for v in (a, b))
    return int((x * y).sum()) + c


def trunc_div(a, b):
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def trunc_rem(a, b):
    return a if b == 0 else a - b * trunc_div(a, b)


U3, S3, U6, S6 = ("u32",) * 3, ("s32",) * 3, ("u64",) * 3, ("s64",) * 3
INTEGER = [
    Case("add.u32 {d}, {a}, {b}", "u32", U3[:2], ints(lambda a, b: a + b, U32)),
    Case("sub.s64 {d}, {a}, {b}", "s64", S6[:2], ints(lambda a, b: a - b, S64)),
    Case("add.sat.s32 {d}, {a}, {b}", "s32", S3[:2], ints(lambda a, b: clamp(-(2**31), 2**31 - 1)(a + b), S32)),
    Case("add.u16 {d}, {a}, {b}", "u16", ("u16",) * 2, ints(lambda a, b: a + b, np.uint16)),
    Case("mul.lo.s32 {d}, {a}, {b}", "s32", S3[:2], ints(lambda a, b: a * b, S32)),
    Case("mul.lo.u16 {d}, {a}, {b}", "u16", ("u16",) * 2, ints(lambda a, b: a * b, np.uint16)),
    Case("mul.hi.s32 {d}, {a}, {b}", "s32", S3[:2], ints(lambda a, b: a * b >> 32, S32)),
    Case("mul.hi.u64 {d}, {a}, {b}", "u64", U6[:2], ints(lambda a, b: a * b >> 64, U64)),
    Case("mul.hi.s64 {d}, {a}, {b}", "s64", S6[:2], ints(lambda a, b: a * b >> 64, S64)),
    Case("mul.wide.s32 {d}, {a}, {b}", "s64", S3[:2], ints(lambda a, b: a * b, S64)),
    Case("mul.wide.u16 {d}, {a}, {b}", "u32", ("u16",) * 2, ints(lambda a, b: a * b, U32)),
    Case("mad.lo.s32 {d}, {a}, {b}, {c}", "s32", S3, ints(lambda a, b, c: a * b + c, S32)),
    Case("mad.wide.u32 {d}, {a}, {b}, {c}", "u64", ("u32", "u32", "u64"), ints(lambda a, b, c: a * b + c, U64)),
    Case("mad.hi.u32 {d}, {a}, {b}, {c}", "u32", U3, ints(lambda a, b, c: (a * b >> 32) + c, U32)),
    Case("mul24.lo.u32 {d}, {a}, {b}", "u32", U3[:2], ints(lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF), U32)),
    Case("sad.s32 {d}, {a}, {b}, {c}", "s32", S3, ints(lambda a, b, c: c + abs(a - b), S32)),
    Case("div.s32 {d}, {a}, {b}", "s32", S3[:2], ints(trunc_div, S32)),
    Case("rem.s32 {d}, {a}, {b}", "s32", S3[:2], ints(trunc_rem, S32)),
    Case("div.u64 {d}, {a}, {b}", "u64", U6[:2], ints(lambda a, b: a // b if b else -1, U64)),
    Case("min.s32 {d}, {a}, {b}", "s32", S3[:2], np.minimum),
    Case("max.u64 {d}, {a}, {b}", "u64", U6[:2], np.maximum),
    Case("and.b32 {d}, {a}, {b}", "b32", U3[:2], np.bitwise_and),
    Case("xor.b64 {d}, {a}, {b}", "b64", U6[:2], np.bitwise_xor),
    Case("not.b16 {d}, {a}", "b16", ("b16",), np.bitwise_not),
    Case("neg.s32 {d}, {a}", "s32", ("s32",), ints(lambda a: -a, S32)),
    Case("abs.s64 {d}, {a}", "s64", ("s64",), ints(abs, S64)),
    Case("shl.b32 {d}, {a}, {b}", "b32", U3[:2], ints(lambda a, b: a << b if b < 32 else 0, U32)),
    Case("shr.u32 {d}, {a}, {b}", "u32", U3[:2], ints(lambda a, b: a >> b if b < 32 else 0, U32)),
    Case("shr.s64 {d}, {a}, {b}", "s64", ("s64", "u32"), ints(lambda a, b: a >> min(b, 63), S64)),
    Case("popc.b64 {d}, {a}", "u32", ("b64",), ints(lambda a: a.bit_count(), U32)),
    Case("clz.b32 {d}, {a}", "u32", ("b32",), ints(lambda a: 32 - a.bit_length(), U32)),
    Case("clz.b64 {d}, {a}", "u32", ("b64",), ints(lambda a: 64 - a.bit_length(), U32)),
    Case("brev.b32 {d}, {a}", "b32", ("b32",), ints(lambda a: int(f"{a:032b}"[::-1], 2), U32)),
    Case("bfind.u32 {d}, {a}", "u32", ("u32",), ints(lambda a: a.bit_length() - 1, U32)),
    Case("bfind.s32 {d}, {a}", "u32", ("s32",), ints(lambda a: (a if a >= 0 else ~a).bit_length() - 1, U32)),
    Case("bfe.u32 {d}, {a}, {b}, {c}", "u32", U3, ints(bfe(32, False), U32)),
    Case("bfe.s32 {d}, {a}, {b}, {c}", "s32", ("s32", "u32", "u32"), ints(bfe(32, True), S32)),
    Case("bfe.s64 {d}, {a}, {b}, {c}", "s64", ("s64", "u32", "u32"), ints(bfe(64, True), S64)),
    Case("bfi.b32 {d}, {a}, {b}, {c}, 7", "b32", U3, ints(bfi(32), U32)),
    Case("prmt.b32 {d}, {a}, {b}, {c}", "b32", U3, ints(prmt, U32)),
    Case("lop3.b32 {d}, {a}, {b}, {c}, 0xCA", "b32", U3, ints(lop3(0xCA), U32)),
    Case("lop3.b32 {d}, {a}, {b}, {c}, 0x96", "b32", U3, ints(lop3(0x96), U32)),
    Case("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "b32", U3, ints(lambda a, b, n: (b << 32 | a) << (n & 31) >> 32, U32)),
    Case("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "b32", U3, ints(lambda a, b, n: (b << 32 | a) >> min(n, 32), U32)),
    Case("dp4a.s32.s32 {d}, {a}, {b}, {c}", "s32", ("b32", "b32", "s32"), ints(dp4a, S32)),
    Case("bmsk.clamp.b32 {d}, {a}, {b}", "b32", U3[:2], ints(lambda p, n: (((1 << min(n, 32)) - 1) << p) if p < 32 else 0, U32)),
    Case("selp.b32 {d}, {a}, {b}, {c}", "b32", ("b32", "b32", "pred"), lambda a, b, p: np.where(p != 0, a, b)),
    Case("slct.s32.s32 {d}, {a}, {b}, {c}", "s32", S3, lambda a, b, c: np.where(c >= 0, a, b)),
    Case("setp.lt.s32 {d}, {a}, {b}", "pred", S3[:2], lambda a, b: a < b),
    Case("setp.hs.u32 {d}, {a}, {b}", "pred", U3[:2], lambda a, b: a >= b),
    Case("setp.ne.and.u64 {d}, {a}, {b}, {c}", "pred", ("u64", "u64", "pred"), lambda a, b, c: (a != b) & (c != 0)),
    Case("set.gt.u32.s32 {d}, {a}, {b}", "u32", S3[:2], lambda a, b: np.where(a > b, 0xFFFFFFFF, 0)),
    Case("cvt.s64.s32 {d}, {a}", "s64", ("s32",), lambda a: a.astype(S64)),
    Case("cvt.u32.u16 {d}, {a}", "u32", ("u16",), lambda a: a.astype(U32)),
    Case("cvt.s32.s8 {d}, {a}", "s32", ("b32",), lambda a: a.astype(np.int8).astype(S32)),
    Case("cvt.u16.u64 {d}, {a}", "u16", ("u64",), lambda a: a.astype(np.uint16)),
    Case("cvt.sat.s8.s32 {d}, {a}", "s32", ("s32",), lambda a: np.clip(a, -128, 127)),
    Case("cvt.sat.u16.s32 {d}, {a}", "u16", ("s32",), lambda a: np.clip(a, 0, 65535)),
    Case("cvt.pack.sat.s8.s32.b32 {d}, {a}, {b}, {c}", "b32", ("s32", "s32", "b32"),
         lambda a, b, c: (c << 16) | (np.clip(a, -128, 127).astype(np.uint8).astype(U32) << 8) | np.clip(b, -128, 127).astype(np.uint8)),
    Case("cvt.rn.f32.s32 {d}, {a}", "f32", ("s32",), lambda a: a.astype(F32)),
    Case("cvt.rn.f64.u64 {d}, {a}", "f64", ("u64",), lambda a: a.astype(F64)),
    Case("cvt.rn.f16.u16 {d}, {a}", "f16", ("u16",), lambda a: a.astype(F64).astype(np.float16)),
]  # fmt: skip


def quiet(f):
    def want(*arrays):
        with np.errstate(all="ignore"):
            return f(*arrays)

    return want


def fma32(a, b, c):
    """Rounded once: by exact fractions where both are finite."""
    from fractions import Fraction

    out = np.empty(len(a), F32)
    for i, (x, y, z) in enumerate(zip(a, b, c)):
        if np.isfinite([x, y, z]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            out[i] = round_fraction(exact) if exact else F32(x) * F32(y) + F32(z)
        else:
            out[i] = F32(F64(x) * F64(y) + F64(z))
    return out


def round_fraction(v):
    near = F32(float(v))
    if not np.isfinite(near):
        return near
    from fractions import Fraction

    around = [near, np.nextafter(near, F32(np.inf)), np.nextafter(near, F32(-np.inf))]
    around = [x for x in around if np.isfinite(x)]
    best = min(abs(Fraction(float(x)) - v) for x in around)
    ties = [x for x in around if abs(Fraction(float(x)) - v) == best]
    return min(ties, key=lambda x: int(x.view(U32)) & 1)


def minimum(a, b):
    with np.errstate(all="ignore"):
        out = np.fmin(a, b)
        zero = (a == 0) & (b == 0)
        return np.where(zero, np.where(np.signbit(a) | np.signbit(b), F32(-0.0), F32(0.0)), out)


def to_int(lo, hi, f):
    def want(a):
        with np.errstate(all="ignore"):
            r = np.nan_to_num(f(a.astype(F64)), nan=0.0)
        return np.array([int(clamp(lo, hi)(x)) for x in r])

    return want


def toward(mode):
    """f32 of an f64, by a rounding mode."""

    def want(a):
        with np.errstate(all="ignore"):
            near = a.astype(F32)
            down = np.where(near.astype(F64) > a, np.nextafter(near, F32(-np.inf)), near)
            up = np.where(near.astype(F64) < a, np.nextafter(near, F32(np.inf)), near)
            return {"rm": down, "rp": up, "rz": np.where(a > 0, down, up)}[mode]

    return want


def bf16(a):
    return (
        torch.from_numpy(np.ascontiguousarray(a))
        .to(torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def from_bf16(a):
    return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16).float().numpy()


def pair(f):
    def want(*arrays):
        with np.errstate(all="ignore"):
            halves = [
                np.ascontiguousarray(x).view(np.float16).reshape(-1, 2).astype(F32) for x in arrays
            ]
            return f(*halves).astype(np.float16).view(np.uint32)[:, 0]

    return want


F3, D3 = ("f32",) * 3, ("f64",) * 3
FLOAT = [
    Case("add.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(np.add)),
    Case("sub.rn.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(np.subtract)),
    Case("mul.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(np.multiply)),
    Case("div.rn.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(np.divide)),
    Case("mul.f64 {d}, {a}, {b}", "f64", D3[:2], quiet(np.multiply)),
    Case("fma.rn.f32 {d}, {a}, {b}, {c}", "f32", F3, fma32),
    Case("add.sat.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0) + F32(0))),
    Case("min.f32 {d}, {a}, {b}", "f32", F3[:2], minimum),
    Case("max.NaN.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(lambda a, b: np.where((a == 0) & (b == 0), np.where(np.signbit(a) & np.signbit(b), F32(-0.0), F32(0)), np.maximum(a, b)))),
    Case("neg.f32 {d}, {a}", "f32", F3[:1], np.negative),
    Case("abs.f64 {d}, {a}", "f64", D3[:1], np.abs),
    Case("sqrt.rn.f32 {d}, {a}", "f32", F3[:1], quiet(np.sqrt)),
    Case("rcp.rn.f64 {d}, {a}", "f64", D3[:1], quiet(lambda a: 1 / a)),
    Case("copysign.f32 {d}, {a}, {b}", "f32", F3[:2], lambda a, b: np.copysign(b, a)),
    Case("mul.ftz.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(lambda a, b: flush(flush(a) * flush(b)))),
    Case("ex2.approx.f32 {d}, {a}", "f32", F3[:1], quiet(lambda a: np.exp2(a.astype(F64)).astype(F32)), ulp=4),
    Case("lg2.approx.f32 {d}, {a}", "f32", F3[:1], quiet(lambda a: np.log2(a.astype(F64)).astype(F32)), ulp=64),
    Case("rsqrt.approx.f32 {d}, {a}", "f32", F3[:1], quiet(lambda a: (1 / np.sqrt(a.astype(F64))).astype(F32)), ulp=2),
    Case("tanh.approx.f32 {d}, {a}", "f32", F3[:1], quiet(lambda a: np.tanh(a.astype(F64)).astype(F32)), ulp=4),
    Case("setp.lt.f32 {d}, {a}, {b}", "pred", F3[:2], lambda a, b: a < b),
    Case("setp.ne.f32 {d}, {a}, {b}", "pred", F3[:2], lambda a, b: (a < b) | (a > b)),
    Case("setp.neu.f32 {d}, {a}, {b}", "pred", F3[:2], lambda a, b: a != b),
    Case("setp.geu.f64 {d}, {a}, {b}", "pred", D3[:2], lambda a, b: ~(a < b)),
    Case("setp.nan.f32 {d}, {a}, {b}", "pred", F3[:2], lambda a, b: np.isnan(a) | np.isnan(b)),
    Case("testp.finite.f32 {d}, {a}", "pred", F3[:1], np.isfinite),
    Case("testp.subnormal.f32 {d}, {a}", "pred", F3[:1], lambda a: (a != 0) & (np.abs(a) < F32(2**-126))),
    Case("cvt.rzi.s32.f32 {d}, {a}", "s32", F3[:1], to_int(-(2**31), 2**31 - 1, np.trunc)),
    Case("cvt.rni.u8.f32 {d}, {a}", "u32", F3[:1], to_int(0, 255, np.rint)),
    Case("cvt.rmi.f32.f32 {d}, {a}", "f32", F3[:1], np.floor),
    Case("cvt.rpi.f64.f64 {d}, {a}", "f64", D3[:1], np.ceil),
    Case("cvt.rn.f32.f64 {d}, {a}", "f32", D3[:1], quiet(lambda a: a.astype(F32))),
    Case("cvt.rz.f32.f64 {d}, {a}", "f32", D3[:1], toward("rz")),
    Case("cvt.rm.f32.f64 {d}, {a}", "f32", D3[:1], toward("rm")),
    Case("cvt.rp.f32.f64 {d}, {a}", "f32", D3[:1], toward("rp")),
    Case("cvt.f64.f32 {d}, {a}", "f64", F3[:1], quiet(lambda a: a.astype(F64))),
    Case("cvt.rn.f16.f32 {d}, {a}", "f16", F3[:1], quiet(lambda a: a.astype(np.float16))),
    Case("cvt.rn.f16.f64 {d}, {a}", "f16", D3[:1], quiet(lambda a: a.astype(np.float16))),
    Case("cvt.f32.f16 {d}, {a}", "f32", ("f16",), quiet(lambda a: a.astype(F32))),
    Case("cvt.rn.bf16.f32 {d}, {a}", "bf16", F3[:1], bf16),
    Case("cvt.f32.bf16 {d}, {a}", "f32", ("bf16",), from_bf16),
    Case("cvt.rna.tf32.f32 {d}, {a}", "b32", F3[:1], lambda a: tf32(a)),
    Case("cvt.rn.f16x2.f32 {d}, {a}, {b}", "b32", F3[:2], quiet(lambda a, b: np.stack([b, a], 1).astype(np.float16).view(U32)[:, 0])),
    Case("add.f16 {d}, {a}, {b}", "f16", ("f16",) * 2, quiet(np.add)),
    Case("mul.f16x2 {d}, {a}, {b}", "b32", ("b32",) * 2, pair(np.multiply)),
    Case("fma.rn.f16 {d}, {a}, {b}, {c}", "f16", ("f16",) * 3, quiet(lambda a, b, c: fma_half(a, b, c))),
    Case("fma.rn.relu.f16x2 {d}, {a}, {b}, {c}", "b32", ("b32",) * 3, None),
    Case("add.rz.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(lambda a, b: directed(a, b, "rz"))),
    Case("add.rp.f32 {d}, {a}, {b}", "f32", F3[:2], quiet(lambda a, b: directed(a, b, "rp"))),
]  # fmt: skip
FLOAT = [case for case in FLOAT if case.want is not None]


def flush(a):
    return np.where(np.abs(a) < F32(2**-126), np.copysign(F32(0), a), a).astype(F32)


def tf32(a):
    u = np.ascontiguousarray(a).view(U32)
    finite = np.isfinite(a)
    return np.where(finite, (u + U32(0x1000)) & U32(0xFFFFE000), u)


def fma_half(a, b, c):
    from fractions import Fraction

    out = []
    for x, y, z in zip(a, b, c):
        if np.isfinite([x, y, z]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            near = np.float64(float(exact))
            half = np.float16(near)
            if Fraction(float(near)) != exact and np.isfinite(half):
                # Rounding twice: look at both neighbours.
                around = [
                    half,
                    np.nextafter(half, np.float16(np.inf)),
                    np.nextafter(half, np.float16(-np.inf)),
                ]
                half = min(
                    (h for h in around if np.isfinite(h)),
                    key=lambda h: abs(Fraction(float(h)) - exact),
                )
            out.append(half if exact else np.float16(x) * np.float16(y) + np.float16(z))
        else:
            out.append(np.float16(float(x) * float(y) + float(z)))
    return np.array(out, np.float16)


def directed(a, b, mode):
    from fractions import Fraction

    out = (a + b).astype(F32)
    for i, (x, y) in enumerate(zip(a, b)):
        if not np.isfinite([x, y]).all():
            continue
        exact, near = Fraction(float(x)) + Fraction(float(y)), out[i]
        above = (not np.isfinite(near) and near > 0) or (
            np.isfinite(near) and Fraction(float(near)) > exact
        )
        below = (not np.isfinite(near) and near < 0) or (
            np.isfinite(near) and Fraction(float(near)) < exact
        )
        if above and mode == "rz" and exact > 0:
            out[i] = np.nextafter(near, F32(-np.inf))
        if below and (mode == "rp" or (mode == "rz" and exact < 0)):
            out[i] = np.nextafter(near, F32(np.inf))
    return out


@pytest.fixture(scope="module")
def integer_kernel():
    return together(INTEGER)


@pytest.fixture(scope="module")
def float_kernel():
    return together(FLOAT)


EDGES = [0, 1, 2, 7, 31, 32, 33, 63, 64, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1,
         2**63 - 1, 2**63, 2**64 - 1, 0x3F800000, 0x80000000, 0x7FF0000000000000]  # fmt: skip
patterns = st.lists(
    st.sampled_from(EDGES) | st.integers(0, 40) | st.integers(0, 2**64 - 1),
    min_size=32,
    max_size=32,
).map(lambda v: np.array(v, np.uint64))


@given(a=patterns, b=patterns, c=patterns)
@settings(max_examples=40)
def test_integers_and_bits(integer_kernel, a, b, c):
    check(integer_kernel, INTEGER, [(a, b, c)] * len(INTEGER), (a, b, c))


def check(kernel, cases, views, operands):
    got = run(kernel, cases, operands)
    for case, out, ops in zip(cases, got, views):
        args = [view(o, t) for o, t in zip(ops, case.ins)]
        with np.errstate(all="ignore"):
            good = same(out, case.want(*args), case.ulp)
        k = int(np.argmin(good))
        assert good.all(), (
            f"{case.text}: {[x[k] for x in args]} gave {out[k]!r}, want {case.want(*args)[k]!r}"
        )


FLOATS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.5, 2.0**-149, 2.0**-130, 3e38, -3e38, 65504.0, 65520.0, 6e-8, 0.5, 2.5, -2.5,
     np.inf, -np.inf, np.nan, 1 + 2**-11, 2.0**31, -(2.0**31), 255.5]
) | st.floats(-1e4, 1e4) | st.floats(width=32)  # fmt: skip
floats = st.lists(FLOATS, min_size=32, max_size=32)


@given(a=floats, b=floats, c=floats)
@settings(max_examples=40)
def test_floats(float_kernel, a, b, c):
    """Operands are laid down in the width each case reads."""
    n = len(FLOAT)
    arrays = [np.zeros((n, 32), np.uint64) for _ in range(3)]
    with np.errstate(all="ignore"):
        for i, case in enumerate(FLOAT):
            for k, t in enumerate(case.ins):
                arrays[k][i] = as_pattern((a, b, c)[k], t)
    out = np.zeros((n, 32), np.uint64)
    float_kernel.launch(1, [out, *arrays])
    for i, case in enumerate(FLOAT):
        args = [view(arrays[k][i], t) for k, t in enumerate(case.ins)]
        got = view(out[i], case.out)
        with np.errstate(all="ignore"):
            want = case.want(*args)
        if case.out in ("bf16", "b32") and case.text.startswith(("cvt", "mul", "fma")):
            good = same_bits(got, want, case.out, case.text)
        else:
            good = same(got, want, case.ulp)
        k = int(np.argmin(good))
        assert good.all(), f"{case.text}: {[x[k] for x in args]} gave {got[k]!r}, want {want[k]!r}"


def same_bits(got, want, out, text):
    """Patterns that hold floats: any NaN is a NaN."""
    want = want.astype(got.dtype)
    if out == "bf16":
        nan = (got & 0x7FFF > 0x7F80) & (want & 0x7FFF > 0x7F80)
    elif "tf32" in text:
        nan = (got & 0x7FFFFFFF > 0x7F800000) & (want & 0x7FFFFFFF > 0x7F800000)
    else:
        g, w = (np.ascontiguousarray(x).view(np.float16).reshape(-1, 2) for x in (got, want))
        return ((g.view(np.uint16) == w.view(np.uint16)) | (np.isnan(g) & np.isnan(w))).all(1)
    return (got == want) | nan


def as_pattern(values, t):
    v = np.array(values, F64)
    if t in ("f16", "b32"):
        h = v.astype(np.float16).view(np.uint16).astype(np.uint64)
        return h | h[::-1] << np.uint64(16) if t == "b32" else h
    if t == "bf16":
        return bf16(v.astype(F32)).astype(np.uint64)
    return v.astype(F32).view(U32).astype(np.uint64) if t == "f32" else v.view(np.uint64)


def test_carries_make_wide_integers(tmp_path):
    from .harness import kernel

    k = kernel("""
mad.wide.u32 %d0, %t, 16, %q1;
ld.global.v2.u64 {%d1, %d2}, [%d0];
mov.b64 {%r0, %r1}, %d1;
mov.b64 {%r2, %r3}, %d2;
add.cc.u32 %r4, %r0, %r2;
addc.u32 %r5, %r1, %r3;
sub.cc.u32 %r6, %r0, %r2;
subc.u32 %r7, %r1, %r3;
mad.lo.cc.u32 %r8, %r0, %r2, %r1;
madc.hi.u32 %r9, %r0, %r2, 0;
mad.wide.u32 %d3, %t, 32, %q0;
st.global.v2.b32 [%d3], {%r4, %r5};
st.global.v2.b32 [%d3+8], {%r6, %r7};
st.global.v2.b32 [%d3+16], {%r8, %r9};
""")  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**64, (32, 2), np.uint64)
    out = np.zeros((32, 4), np.uint64)
    k.launch(1, [out, x])
    a, b = x[:, 0], x[:, 1]
    lo = (a & np.uint64(0xFFFFFFFF)) * (b & np.uint64(0xFFFFFFFF)) + (a >> np.uint64(32))
    assert (out[:, 0] == a + b).all() and (out[:, 1] == a - b).all() and (out[:, 2] == lo).all()


def test_saturating_fp8_conversions_match_torch():
    from .harness import kernel

    k = kernel("""
mad.wide.u32 %d0, %t, 8, %q1;
ld.global.v2.b32 {%r0, %r1}, [%d0];
cvt.rn.satfinite.e4m3x2.f32 %h0, %r1, %r0;
cvt.rn.satfinite.e5m2x2.f32 %h1, %r1, %r0;
cvt.rn.f16x2.e4m3x2 %r2, %h0;
mad.wide.u32 %d1, %t, 8, %q0;
mov.b32 %r3, {%h0, %h1};
st.global.v2.b32 [%d1], {%r3, %r2};
""")  # fmt: skip
    x = torch.cat([torch.randn(32), torch.randn(32) * 1e-3]).reshape(32, 2).contiguous()
    out = torch.zeros(32, 2, dtype=torch.int32)
    k.launch(1, [out, x])
    packed = out[:, 0].contiguous().view(torch.uint8).reshape(32, 4)
    want = x.to(torch.float8_e4m3fn)
    assert torch.equal(packed[:, :2], want.view(torch.uint8))
    assert torch.equal(packed[:, 2:], x.to(torch.float8_e5m2).view(torch.uint8))
    assert torch.equal(out[:, 1].contiguous().view(torch.float16).reshape(32, 2), want.half())
