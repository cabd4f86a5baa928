"""Each intrinsic's two bodies agree to the bit, and mean what their declaration says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.cuda.running import both, text

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


# ------------------------------------------------------------------ matrix instructions


def matrices(registers: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A [16, K] and B [K, 8] as raw elements, from a warp's fragments [6, 32] (PTX ISA, figures of
    'Matrix Fragments for mma.m16n8k8' to '.m16n8k256')."""
    per, depth = 32 // bits, 256 // bits
    a, b = np.zeros((16, depth), np.uint32), np.zeros((depth, 8), np.uint32)
    mask = np.uint32((1 << bits) - 1 if bits < 32 else 0xFFFFFFFF)
    for i in range(per):
        part = (registers >> np.uint32(i * bits)) & mask
        for half in (0, 1):
            along = per * T + i + half * depth // 2
            a[G, along], a[G + 8, along] = part[2 * half], part[2 * half + 1]
            b[along, G] = part[4 + half]
    return a, b


def sums(d: np.ndarray) -> np.ndarray:
    """[4, 32] registers as [16, 8]."""
    c = np.zeros((16, 8), d.dtype)
    for i in range(4):
        c[G + 8 * (i // 2), 2 * T + i % 2] = d[i]
    return c


def signed(bits):
    return lambda raw: (raw.astype(np.int64) ^ (1 << (bits - 1))) - (1 << (bits - 1))


def unsigned(raw):
    return raw.astype(np.int64)


def half(raw):
    return raw.astype(np.uint16).view(np.float16).astype(np.float64)


def bfloat(raw):
    return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def single(raw):
    return raw.astype(np.uint32).view(np.float32).astype(np.float64)


INTEGER = {
    "mma_s8": (8, signed(8), signed(8)), "mma_u8": (8, unsigned, unsigned),
    "mma_u8_s8": (8, unsigned, signed(8)), "mma_s4": (4, signed(4), signed(4)),
    "mma_u4": (4, unsigned, unsigned),
}  # fmt: skip
FLOAT = {"mma_f16": (16, half), "mma_bf16": (16, bfloat), "mma_tf32": (32, single)}


def mma_kernel(name: str, ops: list[str], kind: str):
    """Case k: registers c, a, b are x0[k, 0:4], x0[k, 4:8], x0[k, 8:10]."""
    cases = "\n".join(
        f"""  {{
    uint32_t a[4], b[2];
    {kind} d[4];
    for (int i = 0; i < 4; ++i) d[i] = effc::bit_cast<{kind}>(x0[({k} * 10 + i) * 32 + l]);
    for (int i = 0; i < 4; ++i) a[i] = x0[({k} * 10 + 4 + i) * 32 + l];
    for (int i = 0; i < 2; ++i) b[i] = x0[({k} * 10 + 8 + i) * 32 + l];
    effc::{op}(d, a, b);
    for (int i = 0; i < 4; ++i) y[({k} * 4 + i) * 32 + l] = effc::bit_cast<uint32_t>(d[i]);
  }}"""
        for k, op in enumerate(ops)
    )
    return text(name, cases, "uint32_t", "uint32_t")


def run_mma(name, ops, kind, x):
    out = np.zeros((len(ops), 4, 32), np.uint32)
    return both(mma_kernel(name, ops, kind), out, x)


def test_integer_products_are_exact():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, (len(INTEGER), 10, 32), dtype=np.uint32)
    y = run_mma("integers", list(INTEGER), "int32_t", x)
    for k, (bits, left, right) in enumerate(INTEGER.values()):
        a, b = matrices(x[k, 4:], bits)
        want = left(a) @ right(b) + sums(x[k, :4].view(np.int32)).astype(np.int64)
        np.testing.assert_array_equal(sums(y[k].view(np.int32)), want.astype(np.int32))


@pytest.mark.parametrize("op, how", [("and", np.bitwise_and), ("xor", np.bitwise_xor)])
def test_binary_products_count_bits(op, how):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1 << 32, (1, 10, 32), dtype=np.uint32)
    y = run_mma(f"bits_{op}", [f"mma_b1_{op}"], "int32_t", x)
    a, b = matrices(x[0, 4:], 1)
    want = how(a[:, :, None], b[None]).sum(1).astype(np.int64) + sums(x[0, :4].view(np.int32))
    np.testing.assert_array_equal(sums(y[0].view(np.int32)), want.astype(np.int32))


def test_float_products_of_small_numbers_are_exact():
    rng = np.random.default_rng(2)
    x = np.zeros((len(FLOAT), 10, 32), np.uint32)
    for k, (bits, _) in enumerate(FLOAT.values()):
        x[k, :4] = rng.integers(-99, 99, (4, 32)).astype(np.float32).view(np.uint32)
        values = rng.integers(-16, 16, (6, 32, 32 // bits))
        if bits == 32:
            x[k, 4:] = values[..., 0].astype(np.float32).view(np.uint32)
            continue
        raw = (values.astype(np.float16).view(np.uint16) if k == 0
               else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))  # fmt: skip
        x[k, 4:] = raw[..., 0] | raw[..., 1].astype(np.uint32) << 16
    y = run_mma("floats", list(FLOAT), "float", x)
    for k, (bits, decode) in enumerate(FLOAT.values()):
        a, b = matrices(x[k, 4:], bits)
        want = decode(a) @ decode(b) + sums(x[k, :4].view(np.float32))
        np.testing.assert_array_equal(sums(y[k].view(np.float32)), want.astype(np.float32))


def test_tf32_operands_are_rounded_to_ten_bits_of_fraction():
    special = np.array(
        [0, -0.0, 1 + 2**-11, 1 + 2**-10, -1 - 2**-11, np.inf, -np.inf, 3e38], np.float32
    )
    x = np.concatenate([special, np.random.default_rng(3).normal(size=24).astype(np.float32)])
    y = both(text("tf32", "  y[l] = effc::to_tf32(x0[l]);", "uint32_t", "float"),
             np.zeros(32, np.uint32), x)  # fmt: skip
    want = ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)  # halves away from zero
    want = np.where(np.isfinite(x), want, x)
    np.testing.assert_array_equal(y.view(np.float32), want)


# ------------------------------------------------------------------ shared memory


def test_ldmatrix_spreads_tiles_over_lanes():
    """Four tiles of 8 rows; lane l gives row l % 8 of tile l / 8."""
    body = """  EFFC_SHARED(shared);
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(shared);
  for (int i = l; i < 256; i += 32) tiles[i] = x0[i];
  effc::block_barrier();
  const uint16_t* const row = tiles + 8 * l;
  uint32_t one[1], two[2], four[4];
  effc::ldmatrix(one, row);
  y[l] = one[0];
  effc::ldmatrix(two, row);
  for (int i = 0; i < 2; ++i) y[32 * (1 + i) + l] = two[i];
  effc::ldmatrix(four, row);
  for (int i = 0; i < 4; ++i) y[32 * (3 + i) + l] = four[i];
  effc::ldmatrix<1, true>(one, row);
  y[32 * 7 + l] = one[0];
  effc::ldmatrix<2, true>(two, row);
  for (int i = 0; i < 2; ++i) y[32 * (8 + i) + l] = two[i];
  effc::ldmatrix<4, true>(four, row);
  for (int i = 0; i < 4; ++i) y[32 * (10 + i) + l] = four[i];"""
    x = np.random.default_rng(4).integers(0, 1 << 16, 256, dtype=np.uint16)
    y = both(
        text("ldmatrix", body, "uint32_t", "uint16_t", shared=512), np.zeros((14, 32), np.uint32), x
    )
    tiles = x.reshape(4, 8, 8)
    straight = tiles[:, G, 2 * T] | tiles[:, G, 2 * T + 1].astype(np.uint32) << 16
    turned = tiles[:, 2 * T, G] | tiles[:, 2 * T + 1, G].astype(np.uint32) << 16
    for at, want in ((0, straight), (7, turned)):
        np.testing.assert_array_equal(y[at : at + 7], np.concatenate([want[:1], want[:2], want]))


def test_asynchronous_copies_fill_up_with_zeros():
    """Lane l copies l % (BYTES + 1) bytes of BYTES; the second group is waited for later."""
    body = """  EFFC_SHARED(shared);
  const char* const from = reinterpret_cast<const char*>(x0);
  effc::cp_async<16>(shared + 16 * l, from + 16 * l, l % 17);
  effc::cp_async_commit();
  effc::cp_async<8>(shared + 512 + 8 * l, from + 16 * l, l % 9);
  effc::cp_async<4>(shared + 768 + 4 * l, from + 16 * l, l % 5);
  effc::cp_async_commit();
  effc::cp_async_wait<1>();
  effc::block_barrier();
  for (int i = 0; i < 16; ++i) y[16 * l + i] = shared[511 - 16 * l - i];
  effc::cp_async_wait<0>();
  effc::block_barrier();
  for (int i = 0; i < 12; ++i) y[512 + 12 * l + i] = shared[512 + 12 * l + i];"""
    x = np.random.default_rng(5).integers(1, 256, 512, dtype=np.uint8)
    kernel = text("copies", body, "uint8_t", "uint8_t", shared=896)
    y = both(kernel, np.full(896, 7, np.uint8), x)
    rows = x.reshape(32, 16)
    there = lambda n: np.where(np.arange(n) < LANES[:, None] % (n + 1), rows[:, :n], 0)  # noqa: E731
    np.testing.assert_array_equal(y[:512][::-1], there(16).ravel())
    np.testing.assert_array_equal(y[512:], np.concatenate([there(8).ravel(), there(4).ravel()]))


def test_runs_of_elements_are_converted_on_the_way():
    body = """  float v[8] = {};
  effc::load_run<true>(v, x0 + 8 * l, 8);
  for (int i = 0; i < 8; ++i) v[i] = v[i] * 3.0f + 1.0f;
  effc::store_run<true>(y + 8 * l, v, 8);
  effc::load_run<false>(v, x0 + 8 * l, l % 9);
  effc::store_run<false>(y + 256 + 8 * l, v, l % 9);"""
    x = np.random.default_rng(6).normal(size=256).astype(np.float16)
    kernel = text("runs", body, "effc::half", "effc::half")
    y = both(kernel, np.zeros(512, np.float16), x)
    # One rounding of x * 3 + 1 in float and one to half.
    np.testing.assert_array_equal(
        y[:256], (x.astype(np.float64) * 3 + 1).astype(np.float32).astype(np.float16)
    )
    kept = np.arange(8) < LANES[:, None] % 9
    np.testing.assert_array_equal(y[256:], np.where(kept, x.reshape(32, 8), 0).ravel())


# ------------------------------------------------------------------ lanes, bits


def test_lanes_exchange_values():
    body = """  y[l] = effc::shuffle_xor(x0[l], 5);
  y[32 + l] = effc::shuffle_down(x0[l], 3);
  y[64 + l] = effc::shuffle_up(x0[l], 7);
  y[96 + l] = effc::shuffle_from(x0[l], (l * 11 + 3) % 32);
  const uint64_t wide = static_cast<uint64_t>(x0[l]) << 32 | x0[31 - l];
  const uint64_t there = effc::shuffle_xor(wide, 16);
  y[128 + l] = there >> 32;
  y[160 + l] = static_cast<uint32_t>(there);
  y[192 + l] = effc::ballot(x0[l] % 3 == 0);
  y[224 + l] = effc::any_lane(l == 9) * 2 + effc::all_lanes(l != 9);
  effc::warp_barrier();
  y[256 + l] = effc::any_lane(l == 32) * 2 + effc::all_lanes(l < 32);"""
    x = np.random.default_rng(7).integers(0, 1 << 32, 32, dtype=np.uint32)
    y = both(text("lanes", body, "uint32_t", "uint32_t"), np.zeros((9, 32), np.uint32), x)
    want = [
        x[LANES ^ 5], x[np.where(LANES + 3 < 32, LANES + 3, LANES)],
        x[np.where(LANES >= 7, LANES - 7, LANES)], x[(LANES * 11 + 3) % 32], x[LANES ^ 16],
        x[31 - (LANES ^ 16)], np.full(32, sum(1 << int(i) for i in LANES if x[i] % 3 == 0)),
        np.full(32, 2), np.full(32, 1),
    ]  # fmt: skip
    np.testing.assert_array_equal(y, np.array(want, np.uint32))


def test_bits_and_bytes():
    body = """  const uint32_t a = x0[l], b = x0[32 + l], c = x0[64 + l];
  y[l] = effc::dp4a(int32_t(a), int32_t(b), int32_t(c));
  y[32 + l] = effc::dp4a(a, b, c);
  y[64 + l] = effc::prmt(a, b, c);
  y[96 + l] = effc::lop3<0x96>(a, b, c);
  y[128 + l] = effc::lop3<0xca>(a, b, c);
  y[160 + l] = effc::popcount(a);
  y[192 + l] = effc::popcount(static_cast<uint64_t>(a) << 32 | b);"""
    x = np.random.default_rng(8).integers(0, 1 << 32, (3, 32), dtype=np.uint32)
    y = both(text("bits", body, "uint32_t", "uint32_t"), np.zeros((7, 32), np.uint32), x)
    a, b, c = x
    bytes_ = lambda v, kind: v[:, None].view(np.uint8).view(kind).astype(np.int64)  # noqa: E731
    signed_dot = (bytes_(a, np.int8) * bytes_(b, np.int8)).sum(1) + c
    unsigned_dot = (bytes_(a, np.uint8) * bytes_(b, np.uint8)).sum(1) + c
    pool = np.concatenate([bytes_(a, np.uint8), bytes_(b, np.uint8)], 1)
    select = (c[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
    picked = np.take_along_axis(pool, (select & 7).astype(np.int64), 1)
    ones = lambda v: np.bitwise_count(v).astype(np.int64)  # noqa: E731
    picked = np.where(select & 8, np.where(picked & 128, 255, 0), picked)
    want = [
        signed_dot, unsigned_dot, (picked << np.array([0, 8, 16, 24])).sum(1), a ^ b ^ c,
        (a & b) | (~a & c), ones(a), ones(a) + ones(b),
    ]  # fmt: skip
    np.testing.assert_array_equal(y, np.array([w & 0xFFFFFFFF for w in want]).astype(np.uint32))


@pytest.mark.parametrize("warps", [1, 4])
def test_reductions_of_a_block(warps):
    body = f"""  EFFC_SHARED(scratch);
  const float v = x0[l];
  y[l] = effc::reduce<{warps}, effc::Sum>(v, 0.0f, scratch);
  y[{32 * warps} + l] = effc::reduce<{warps}, effc::Amax>(v, -1e30f, scratch + 64);
  y[{64 * warps} + l] = effc::reduce<{warps}, effc::Amin>(double(v), 1e30, scratch + 128);
  y[{96 * warps} + l] = effc::reduce<{warps}, effc::Prod>(int64_t(l % 3 == 0 ? 2 : 1), int64_t(1), scratch + 192) % 1000003;
  y[{128 * warps} + l] = effc::reduce<{warps}, effc::Any>(int(v > 100), 0, scratch + 256);
  y[{160 * warps} + l] = effc::reduce<{warps}, effc::All>(int(v < 100), 1, scratch + 320);"""
    n = 32 * warps
    x = np.random.default_rng(9).integers(-50, 50, n).astype(np.float32)
    kernel = text(f"reduce{warps}", body, "float", "float", warps=warps, shared=384)
    y = both(kernel, np.zeros((6, n), np.float32), x)
    want = [x.sum(), x.max(), x.min(), 2 ** len(range(0, n, 3)) % 2**64 % 1000003, 0, 1]
    np.testing.assert_array_equal(y, np.repeat(np.array(want, np.float32)[:, None], n, 1))


def test_a_nan_goes_through_a_maximum():
    body = """  y[l] = effc::reduce<1, effc::Amax>(x0[l], -1e30f, nullptr);
  y[32 + l] = effc::reduce<1, effc::Amin>(x0[l], 1e30f, nullptr);"""
    x = np.arange(32, dtype=np.float32)
    x[11] = np.nan
    y = both(text("nans", body, "float", "float"), np.zeros(64, np.float32), x)
    assert np.isnan(y).all()
