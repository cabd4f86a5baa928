"""Codes, formats and the ops that make and read compressed values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.ir import Graph, Input, InputError, OpError, Tensor, Weight, interpret, parse, verify
from effc.ir.codes import pack, unpack
from effc.ir.formats import (
    BitPlanes,
    Encoded,
    GroupQuant,
    GroupSparse,
    bits_per_element,
    encode,
    quantize,
)
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, dense, f16, f32, i8, i32, type_text

CODES = [d for d in DTYPES.values() if d.is_code]
EIGHT = [*CODES, i8, DTYPES["u8"]]


def random_codes(dtype, shape, seed=0) -> torch.Tensor:
    low, high = dtype.range or (torch.iinfo(dtype.torch).min, torch.iinfo(dtype.torch).max)
    made = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=made).to(dtype.torch)


# ------------------------------------------------------------------ packing


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(CODES), st.integers(0, 100), st.integers(0, 99))
def test_packing_is_undone_by_unpacking(dtype, count: int, seed: int) -> None:
    values = random_codes(dtype, (count,), seed)
    data = pack(values, dtype)
    t = Tensor((count,), dtype)
    assert data.dtype == torch.uint8 and ((data.numel(),), data.dtype) == t.stored
    assert torch.equal(unpack(data, dtype, (count,)), values)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_code_has_a_place(dtype) -> None:
    least, largest = dtype.range
    values = torch.tensor(list(itertools.product(range(least, largest + 1), repeat=2)))
    values = values.to(dtype.torch).reshape(-1)
    assert torch.equal(unpack(pack(values, dtype), dtype, values.shape), values)
    for wrong in (least - 1, largest + 1):
        with pytest.raises(InputError, match=f"{wrong} is no {dtype}"):
            pack(torch.tensor([wrong]), dtype)


def test_five_levels_take_seven_bits_for_three() -> None:
    t = Tensor((3 * 800,), DTYPES["int2b"])
    assert t.nbytes == 700 and bits_per_element(t) == pytest.approx(7 / 3)
    assert Tensor((1,), DTYPES["int2b"]).nbytes == 1


def test_bits_lie_in_order() -> None:
    """The first code in the lowest bits of the first byte: files can be read elsewhere."""
    assert pack(torch.tensor([1, 2, 3, 4]), DTYPES["uint4"]).tolist() == [0x21, 0x43]
    assert pack(torch.tensor([-1, 1, -2]), DTYPES["int3"]).tolist() == [0b10_001_111, 0b1]


# ------------------------------------------------------------------ groups


def exact_values(dtype, format: GroupQuant, shape, seed: int) -> Encoded:
    """A value whose numbers float32 holds exactly."""
    t = Tensor(shape, dtype, format=format)
    made = torch.Generator().manual_seed(seed)
    types = format.parts(t)
    scale = 2.0 ** torch.randint(-3, 3, types["scale"].shape, generator=made)
    parts = [encode(random_codes(dtype, shape, seed), types["codes"]), scale.to(format.scale.torch)]
    if format.zero is not None:
        parts.append(random_codes(format.zero, types["zero"].shape, seed))
    return Encoded(t, tuple(parts))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(EIGHT), st.sampled_from([None, 1, 3, 8, 32]), st.booleans(), st.booleans(),
    st.tuples(st.integers(0, 5), st.integers(1, 40)), st.integers(0, 9),
)  # fmt: skip
def test_groups_decode_to_scale_times_code_minus_zero(
    dtype, group, with_zero, planes, shape, seed
) -> None:
    zero = dtype if with_zero else None
    format = GroupQuant(group, f16, zero, BitPlanes() if planes else dense)
    value = exact_values(dtype, format, shape, seed)
    codes = random_codes(dtype, shape, seed).double()
    want = torch.zeros(shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, shape)):
        g = 0 if group is None else j // group
        z = value["zero"][i, g].double() if with_zero else 0.0
        want[i, j] = value["scale"][i, g].double() * (codes[i, j] - z)
    assert torch.equal(value.decode(torch.float64), want)
    t = value.type
    each = math.ceil(shape[1] / group) if group else 1
    stored = (dtype.bits_of(shape[0] * shape[1]) + 7) // 8
    if planes:
        stored = dtype.bits * shape[0] * 4 * math.ceil(shape[1] / 32)
    zeros = (dtype.bits_of(shape[0] * each) + 7) // 8 if with_zero else 0
    assert t.nbytes == stored + 2 * shape[0] * each + zeros


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(EIGHT), st.sampled_from([None, 5, 16]), st.booleans(), st.integers(0, 99))
def test_quantising_what_is_on_the_grid_changes_nothing(dtype, group, with_zero, seed) -> None:
    if with_zero != (dtype.name[0] == "u") or dtype.name in ("int1", "uint1"):
        return
    format = GroupQuant(group, f32, dtype if with_zero else None)
    t = Tensor((3, 35), dtype, format=format)
    x = torch.randn(3, 35, generator=torch.Generator().manual_seed(seed))
    once = quantize(x, t)
    again = quantize(once.decode(), t)
    assert (once.decode() - again.decode()).abs().max() <= 1e-6 * x.abs().max()
    spread = format.spread(once["scale"], 35)
    assert ((x - once.decode()).abs() <= spread * (0.5 + 1e-4)).all()


def test_zeros_and_tiny_values_are_quantised_to_numbers() -> None:
    for scale in (f16, f32):
        t = Tensor((2, 8), i8, format=GroupQuant(4, scale))
        assert not quantize(torch.zeros(2, 8), t).decode().any()
        assert quantize(torch.full((2, 8), 1e-38), t).decode().isfinite().all()


# ------------------------------------------------------------------ groups left out


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["bitmap", "gap", "u16"]), st.integers(0, 5), st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]), st.integers(0, 99),
)  # fmt: skip
def test_sparse_groups_are_the_masked_matrix(index, rows, groups, share, seed) -> None:
    made = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, groups, generator=made) < share
    kept = int(mask.sum())
    inner = GroupQuant(4, f16, DTYPES["uint4"])
    format = GroupSparse(4, kept, index, inner)
    t = Tensor((rows, 4 * groups), DTYPES["uint4"], format=format)
    values = exact_values(DTYPES["uint4"], inner, (kept, 4), seed)
    value = Encoded(t, (*format.encode_index(mask), values))
    assert torch.equal(format.mask(t, value.parts), mask)
    want = torch.zeros(rows, groups, 4)
    want[mask] = values.decode()
    assert torch.equal(value.decode(), want.flatten(1))
    assert [type_text(p) for p in format.parts(t).values()][-1] == type_text(values.type)


def test_an_index_that_cannot_say_it_is_refused() -> None:
    mask = torch.zeros(1, 400, dtype=torch.bool)
    mask[0, [0, 300]] = True
    with pytest.raises(InputError, match="299 groups in a row are left out"):
        GroupSparse(16, 2, "gap").encode_index(mask)
    assert GroupSparse(16, 2, "u16").encode_index(mask)[1].tolist() == [0, 300]


def test_bits_per_weight_are_those_of_the_card() -> None:
    """GQSA, section 3.1: 4-bit codes, groups of 16, float16 scales, half of the groups kept."""
    n, k = 4096, 4096
    kept = n * k // 32
    for index, want in (("u16", 3.125), ("gap", 2.875), ("bitmap", 2.69)):
        format = GroupSparse(16, kept, index, GroupQuant(16, f16, DTYPES["uint4"]))
        each = bits_per_element(Tensor((n, k), DTYPES["uint4"], format=format))
        assert each == pytest.approx(want, abs=0.01)


# ------------------------------------------------------------------ in graphs


def compressed_graph() -> Graph:
    inner = GroupQuant(8, f16, DTYPES["uint4"])
    mask = torch.tensor([[1, 0], [1, 1], [0, 0]])
    t = Tensor((3, 16), DTYPES["uint4"], format=GroupSparse(8, 3, "bitmap", inner))
    codes = Weight.holding("codes", random_codes(DTYPES["uint4"], (3, 8)),
                           Tensor((3, 8), DTYPES["uint4"]))  # fmt: skip
    scale = Weight.holding("scale", torch.tensor([[0.5], [1.0], [2.0]]).half())
    zero = Weight.holding("zero", torch.tensor([[1], [2], [3]]), Tensor((3, 1), DTYPES["uint4"]))
    values = op.encoded((codes, scale, zero), of=Tensor((3, 8), DTYPES["uint4"], format=inner))
    kept = Weight.holding("mask", mask, Tensor((3, 2), DTYPES["uint1"]))
    w = op.encoded((kept, values), of=t)
    x = Input("x", Tensor((2, 16), f32))
    a = op.quantize(x, i8, GroupQuant(None, f32))
    return Graph.of((x,), (op.linear(op.decode(a), op.decode(w)),))


def test_compressed_graphs_print_and_come_back() -> None:
    g = verify(compressed_graph())
    weights = {w.key: w.data for w in g.weights}
    again = parse(g.text, weights)
    assert again == g and again.text == g.text
    assert "bits an element" in g.text
    x = torch.randn(2, 16)
    assert torch.equal(interpret(again, [x])[0], interpret(g, [x])[0])


def test_a_weight_of_codes_keeps_them_packed() -> None:
    w = Weight.holding("w", random_codes(DTYPES["int3"], (5, 7)), Tensor((5, 7), DTYPES["int3"]))
    assert w.data.shape == (14,) and torch.equal(w.value, random_codes(DTYPES["int3"], (5, 7)))
    verify(Graph.of((), (w,)))


def test_reading_a_decoded_weight_moves_the_bytes_of_its_codes() -> None:
    g = compressed_graph()
    linear = g.outputs[0]
    w, x = linear.w.x.type, linear.x.x.type
    assert linear.cost().bytes == w.nbytes + x.nbytes + linear.type.nbytes


def test_parts_that_do_not_fit_are_refused() -> None:
    of = Tensor((3, 8), DTYPES["uint4"], format=GroupQuant(8, f16))
    codes = Weight.holding("codes", torch.zeros(3, 8), Tensor((3, 8), f32))
    with pytest.raises(OpError, match=r"the parts of .* are codes: uint4\[3, 8\], scale: f16"):
        op.encoded((codes,), of=of)
    with pytest.raises(OpError, match="the value is dense already"):
        op.decode(codes)
    with pytest.raises(OpError, match="no rule to quantise"):
        op.quantize(Input("x", Tensor((2, 4), f32)), i32, BitPlanes())
