"""Products with weights of which some groups are left out, and with those of five levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.backends import find_backend
from effc.backends.cpu import codes, level_codes, sparse_codes
from effc.ir import Graph, Input, Op, Tensor, Weight
from effc.ir.formats import Encoded, GroupQuant, GroupSparse, code_range
from effc.ir.rewrite import op
from effc.ir.symbols import symbol
from effc.ir.types import DTYPES, f16, f32, i8

from .cores import call


def numbers_of(dtype: Any, *shape: int) -> torch.Tensor:
    low, high = code_range(dtype)
    return torch.randint(low, high + 1, shape, dtype=torch.int16).to(dtype.torch)


def sparse(
    mask: torch.Tensor, group: int, dtype: str, zero: str | None, index: str = "bitmap", scale=f16
) -> Encoded:
    """Random codes where mask[rows, groups] keeps them."""
    kept, of = int(mask.sum()), DTYPES[dtype]
    format = GroupSparse(
        group, kept, index, GroupQuant(None, scale, None if zero is None else DTYPES[zero])
    )
    t = Tensor((mask.shape[0], mask.shape[1] * group), of, format=format)
    parts = [numbers_of(of, kept, group), (torch.rand(kept, 1) + 0.1).to(scale.torch)]
    if zero is not None:
        parts.append(numbers_of(DTYPES[zero], kept, 1))
    values = Encoded(format.parts(t)["values"], tuple(parts))
    return Encoded(t, (*format.encode_index(mask), values))


def product(value: Encoded, x: torch.Tensor, parts: int = 0, **more: Any) -> torch.Tensor:
    """x w^T of the core; x: int8 codes of a scale of 1/8, or floats."""
    packing = sparse_codes.chunks(value.type)
    packed = [sparse_codes.in_chunks(value), sparse_codes.row_starts(value)]
    integer = x.dtype == torch.int8
    if integer:
        packed = [torch.full((len(x),), 0.125), sparse_codes.shifted_by(value), *packed]
    core = sparse_codes.core(packing, i8 if integer else f32)
    rows, depth = value.type.shape
    told = (rows, depth, x.stride(0), parts, -packing.least)
    return call(core, len(x), rows, [x, *packed], told, **more)


def check(value: Encoded, rows: int, parts: int = 0, **more: Any) -> None:
    """Against float64: within float32 of the sum of what is added up, which for codes is those plus 128."""
    w, depth = value.decode(torch.float64), value.type.shape[1]
    span = sum(abs(n) for n in code_range(value.type.dtype)) + 1
    most = torch.where(w != 0, w.abs() + 1.1 * span, 0)
    x = torch.randint(-128, 128, (rows, depth), dtype=torch.int8)
    got, want = product(value, x, parts, **more), 0.125 * x.double() @ w.T
    assert ((got - want).abs() <= 2e-6 * (0.125 * (x.double().abs() + 128) @ most.T)).all()
    floats = torch.randn(rows, depth)
    got, want = product(value, floats, parts, **more), floats.double() @ w.T
    assert ((got - want).abs() <= 2e-6 * (floats.double().abs() @ most.T)).all()


KINDS = [
    pytest.param(16, "uint4", "uint4", id="u4x16"),
    pytest.param(8, "int2", None, id="i2x8"),
    pytest.param(32, "u8", "u8", id="u8x32"),
    pytest.param(32, "uint3", "uint3", id="u3x32", marks=pytest.mark.slow),
    pytest.param(8, "uint4", "uint4", id="u4x8", marks=pytest.mark.slow),
    pytest.param(32, "uint4", "uint4", id="u4x32", marks=pytest.mark.slow),
    pytest.param(16, "i8", None, id="i8x16", marks=pytest.mark.slow),
    pytest.param(32, "int5", None, id="i5x32", marks=pytest.mark.slow),
    pytest.param(16, "uint7", "uint7", id="u7x16", marks=pytest.mark.slow),
    pytest.param(16, "uint6", "u8", id="u6x16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("group, dtype, zero", KINDS)
def test_packing_keeps_every_code(group, dtype, zero) -> None:
    for keep in (0.0, 0.03, 0.5, 1.0):
        mask = torch.rand(19, 23) < keep
        value = sparse(mask, group, dtype, zero)
        packed = sparse_codes.in_chunks(value)
        packing, format = sparse_codes.chunks(value.type), value.type.format
        assert packed.numel() == packing.count(format.kept) * packing.nbytes
        want = value["values"].parts
        held = sparse_codes.unpacked(packed, value.type)
        assert torch.equal(held[0], want[0].to(torch.int16))
        assert torch.equal(held[1], want[1].flatten())
        assert torch.equal(held[3], mask.nonzero()[:, 1])
        assert held[2] is None if zero is None else torch.equal(held[2], want[2].flatten())


@pytest.mark.parametrize("group, dtype, zero", KINDS)
def test_any_kept_groups_in_any_number_of_parts(group, dtype, zero) -> None:
    """Rows without groups, with one, with all; parts that end within rows, and more parts than groups."""
    rows, groups = 29, 21
    ragged = torch.rand(rows, groups) < 0.5
    ragged[3], ragged[4], ragged[11], ragged[-1] = False, False, True, False
    single = torch.zeros(rows, groups, dtype=torch.bool)
    single[torch.arange(rows), torch.randint(groups, (rows,))] = True
    whole = torch.ones(rows, groups, dtype=torch.bool)
    for mask in (ragged, single, whole, ~whole):
        value = sparse(mask, group, dtype, zero)
        for parts, x in ((1, 1), (3, 1), (64, 1), (1000, 1), (3, 5), (1000, 33)):
            check(value, x, parts)


def test_without_any_extension() -> None:
    value = sparse(torch.rand(17, 33) < 0.4, 16, "uint4", "uint4")
    x = torch.randint(-128, 128, (3, 528), dtype=torch.int8)
    for rows, parts in ((1, 1), (3, 7)):
        got = product(value, x[:rows], parts, plain=True)
        torch.testing.assert_close(got, product(value, x[:rows], parts), rtol=1e-5, atol=1e-3)


def test_the_same_bits_every_time() -> None:
    """Whichever thread comes first, rows that lie across parts are added in order."""
    value = sparse(torch.rand(40, 37) < 0.5, 16, "uint4", "uint4")
    for x in (torch.randint(-127, 128, (2, 592), dtype=torch.int8), torch.randn(2, 592)):
        for parts in (1, 3, 64, 1000):
            first = product(value, x, parts, threads=1)
            assert all(
                torch.equal(first, product(value, x, parts, threads=n)) for n in (1, 2, 3, 3)
            )


def test_what_is_not_kept_is_not_read() -> None:
    """A number that is none stays where a row has no group."""
    mask = torch.ones(9, 12, dtype=torch.bool)
    mask[::2, 5] = False
    x = torch.randn(1, 192)
    x[0, 85] = float("nan")
    got = product(sparse(mask, 16, "uint4", "uint4"), x)[0]
    assert torch.equal(got.isnan(), mask[:, 5])


# ------------------------------------------------------------------ whole layers


def constant(value: Encoded, key: str) -> Op:
    """The value as ops of its parts."""
    format = value.type.format
    made = []
    for (name, t), part in zip(format.parts(value.type).items(), value.parts, strict=True):
        nested = isinstance(part, Encoded)
        made.append(
            constant(part, f"{key}.{name}") if nested else Weight.holding(f"{key}.{name}", part, t)
        )
    return op.encoded(tuple(made), of=value.type)


@pytest.mark.parametrize("index", ["bitmap", "u16", "gap"])
def test_layers_read_the_codes(index) -> None:
    """Every index; x quantised and in floats, on one constant; the dense weight is made nowhere."""
    value = sparse(torch.rand(24, 12) < 0.5, 16, "uint4", "uint4", index)
    w, x = op.decode(constant(value, "w")), Input("x", Tensor((3, 192), f32))
    by_codes = op.linear(op.decode(op.quantize(x, i8, GroupQuant(None, f32))), w)
    graph = Graph.of((x,), (by_codes, op.silu(op.linear(x, w))))
    executable = find_backend("cpu").compile(graph)
    assert not executable.fallbacks
    called = [e.call for e in executable.launches if "linear" in e.call]
    assert called == [
        "effc_linear_sparse_i8_u4x16_f16_zero4", "effc_linear_sparse_f32_u4x16_f16_zero4",
    ]  # fmt: skip
    values = torch.randn(3, 192)
    got, silu = executable.bind()((values,))
    dense = value.decode()
    torch.testing.assert_close(
        silu, torch.nn.functional.silu(values @ dense.T), rtol=1e-4, atol=1e-4
    )
    scale = values.abs().amax(1, keepdim=True) / 127
    want = (values / scale).round() * scale @ dense.T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------ five levels


def levels(rows: int, depth: int, group: int | None, zero: str | None = None) -> Encoded:
    format = GroupQuant(group, f16, None if zero is None else DTYPES[zero])
    t = Tensor((rows, depth), DTYPES["int2b"], format=format)
    parts = [
        numbers_of(of.dtype, *of.shape) for of in format.parts(t).values() if of.dtype.kind == "int"
    ]
    scale = (torch.rand(rows, format.groups(t)) + 0.1).half()
    return Encoded(t, (parts[0], scale, *parts[1:]))


SIZES = [(8, 160, None, None), (13, 31, None, None), (21, 576, 128, "int2b"), (40, 999, 32, None)]


@pytest.mark.parametrize("rows, depth, group, zero", SIZES)
@pytest.mark.parametrize("wide", [4, 8, 16])
def test_packing_of_levels_keeps_every_code(rows, depth, group, zero, wide) -> None:
    value = levels(rows, depth, group, zero)
    held = level_codes.in_bundles(value, wide)
    assert held.numel() == codes.up(rows, wide) * codes.up(depth, 160) * 12 // 5 // 8
    assert torch.equal(level_codes.levels_of(held, rows, depth, wide).char() - 2, value["codes"])


def test_layers_of_five_levels() -> None:
    """With codes and with floats, one row and more; groups that end within what is packed together."""
    for rows, depth, group, zero in SIZES:
        value = levels(rows, depth, group, zero)
        dense = value.decode(torch.float64)
        w, x = op.decode(constant(value, "w")), Input("x", Tensor((symbol("M"), depth), f32))
        by_codes = op.linear(op.decode(op.quantize(x, i8, GroupQuant(None, f32))), w)
        executable = find_backend("cpu").compile(Graph.of((x,), (by_codes, op.linear(x, w))))
        called = [e.call for e in executable.launches if "linear" in e.call]
        assert called == ["effc_linear_levels", "effc_linear_levels_by_floats"]
        run = executable.bind()
        for count in (1, 2, 3, 5, 9, 97, 98):
            values = torch.randint(-127, 128, (count, depth)).float()
            values[:, 0] = 127  # so that the scale is 1 and codes are the numbers
            want, most = values.double() @ dense.T, values.double().abs() @ (dense.abs() + 4).T
            for got in run((values,)):
                assert ((got - want).abs() <= 1e-6 * most).all(), (depth, count)
