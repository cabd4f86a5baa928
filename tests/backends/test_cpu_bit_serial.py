"""Products by bits are exact: every pair of widths, signed and unsigned, rows that fill no line."""

from __future__ import annotations

import ctypes

import pytest
import torch

from effc.backends import find_backend
from effc.backends.cpu import plane_codes
from effc.backends.cpu.features import CpuFeatures, compile_flags, detect
from effc.codegen.build import build
from effc.ir import Graph, Input, Tensor
from effc.ir.formats import BitPlanes, Encoded, GroupQuant, code_range, encode
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, DType, f32

from .cores import call
from .test_cpu_sparse_codes import constant, numbers_of

EVERY = """
#include "effc_planes.h"
using namespace effc;
template <int P, int Q>
static int64_t one(const uint8_t* x, const uint8_t* w, int64_t n) {
  const int64_t lines = (n + LINE - 1) / LINE;
  uint8_t* planes = scratch<uint8_t>(lines * (P + Q) * LINE_BYTES);
  to_planes<P>(x, 0, n, planes);
  to_planes<Q>(w, 0, n, planes + lines * P * LINE_BYTES);
  const int64_t found = product<P, Q>(planes, planes + lines * P * LINE_BYTES, lines);
  release(planes);
  return found;
}
template <int... I>
static int64_t pick(int64_t which, const uint8_t* x, const uint8_t* w, int64_t n, std::integer_sequence<int, I...>) {
  constexpr int64_t (*each[])(const uint8_t*, const uint8_t*, int64_t) = {one<I / 8 + 1, I % 8 + 1>...};
  return each[which](x, w, n);
}
EFFC_EXPORT int64_t effc_every(int64_t which, const uint8_t* x, const uint8_t* w, int64_t n) {
  return pick(which, x, w, n, std::make_integer_sequence<int, 64>());
}
"""


def type_of(bits: int, signed: bool) -> DType:
    if bits == 8:
        return DTYPES["i8" if signed else "u8"]
    return DTYPES[f"{'int' if signed else 'uint'}{bits}"]


@pytest.mark.parametrize("level", ["here", pytest.param("default", marks=pytest.mark.slow)])
def test_every_pair_of_widths(level) -> None:
    flags = detect().flags() if level == "here" else compile_flags("default", ())
    every = build(EVERY, flags=flags, name="planes").function(
        "effc_every", ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
        restype=ctypes.c_int64,
    )  # fmt: skip
    for p in range(1, 9):
        for q in range(1, 9):
            for n in (1, 255, 257, 11008):
                x, w = numbers_of(type_of(p, False), n), numbers_of(type_of(q, False), n)
                if n == 11008:  # the largest sum there is
                    x.fill_((1 << p) - 1), w.fill_((1 << q) - 1)
                got = every((p - 1) * 8 + q - 1, x.data_ptr(), w.data_ptr(), n)
                assert got == int((x.long() * w.long()).sum()), (p, q, n)


def planes(
    rows: int, depth: int, dtype: DType, zero: DType | None = None
) -> tuple[Encoded, torch.Tensor]:
    """A weight of scales 1, and its numbers."""
    format = GroupQuant(None, f32, zero, BitPlanes())
    t = Tensor((rows, depth), dtype, format=format)
    held = numbers_of(dtype, rows, depth)
    parts = [encode(held, format.parts(t)["codes"]), torch.ones(rows, 1)]
    numbers = held.long()
    if zero is not None:
        parts.append(numbers_of(zero, rows, 1))
        numbers = numbers - parts[-1].long()
    return Encoded(t, tuple(parts)), numbers


PAIRS = [
    (2, 2, True, True),
    (8, 3, True, False),
    pytest.param(1, 1, False, False, marks=pytest.mark.slow),
    pytest.param(3, 8, False, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("p, q, of_x, of_w", PAIRS)
def test_signs_and_zeros(p, q, of_x, of_w) -> None:
    """x is p bits and has zeros or not; sums are below 2^24, which float32 holds."""
    x_type, dtype = type_of(p, of_x), type_of(q, of_w)
    for depth, zero in ((100, None), (256, dtype), (300, dtype)):
        value, w = planes(19, depth, dtype, zero)
        packed = plane_codes.in_lines(value)
        held = plane_codes.codes_of(packed, 19, depth, q).long() + code_range(dtype)[0]
        assert torch.equal(held - (0 if zero is None else value["zero"].long()), w)
        x = numbers_of(x_type, 5, depth)
        of = [
            plane_codes.row_scales(value),
            plane_codes.row_offsets(value),
            plane_codes.code_sums(value),
        ]
        for zeros in (0, 1 if of_x else 2):
            off = numbers_of(x_type, 5)
            told = (19, depth, x.stride(0), code_range(x_type)[0], zeros)
            got = call(plane_codes.core(p, q), 5, 19, [x, torch.ones(5), off, packed, *of], told)
            want = (x.long() - off.long()[:, None] * (zeros > 0)) @ w.T
            assert torch.equal(got.long(), want)


def graph_of(value: Encoded, bits: int) -> Graph:
    x = Input("x", Tensor((3, value.type.shape[1]), f32))
    held = op.quantize(x, type_of(bits, True), GroupQuant(None, f32))
    return Graph.of((x,), (op.linear(op.decode(held), op.decode(constant(value, "w"))),))


def test_who_counts_bits(monkeypatch) -> None:
    """CPUs that have an instruction for it, and only for few pairs of planes; both give the same."""
    value, w = planes(24, 100, type_of(2, True))
    x = torch.randint(-1, 2, (3, 100)).float()
    x[:, 0] = 1
    plain = CpuFeatures.has
    results = {}
    for counts, bits, name in ((False, 2, "effc_linear_of_codes2"), (True, 2, "effc_linear_planes_2x2"),
                               (True, 3, "effc_linear_of_codes2")):  # fmt: skip
        monkeypatch.setattr(
            CpuFeatures, "has",
            lambda cpu, what, counts=counts: counts if what == "avx512_vpopcntdq" else plain(cpu, what),
        )  # fmt: skip
        executable = find_backend("cpu").compile(graph_of(value, bits))
        assert [e.call for e in executable.launches if "linear" in e.call] == [name]
        if bits == 2:
            results[counts] = executable.bind()((x,))[0]
    assert torch.equal(results[False], results[True])
    assert torch.equal(results[True].long(), x.long() @ w.T)
