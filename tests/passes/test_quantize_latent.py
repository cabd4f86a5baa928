"""Compressed weights while they are trained: values, gradients, and what is stored."""

from __future__ import annotations

import pytest
import torch

from effc.ir import Tensor
from effc.ir.formats import Encoded, GroupQuant, GroupSparse, decoded, quantize
from effc.ir.types import DTYPES, f16, f32, i8
from effc.passes.quantize.latent import (
    Latent,
    Trained,
    fake_quantized,
    rounded,
    straight_through,
)
from effc.passes.sparsify.prune_groups import picked

TYPES = [
    (DTYPES["uint4"], GroupQuant(8, f16, DTYPES["uint4"])),
    (DTYPES["uint2"], GroupQuant(None, f32, DTYPES["uint2"])),
    (DTYPES["int2b"], GroupQuant(8, f16)),
    (DTYPES["int3"], GroupQuant(5, f16)),
    (i8, GroupQuant(None, f32)),
]


def matrix(seed: int = 0, shape=(6, 24)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def mask(rows: int, groups: int) -> torch.Tensor:
    made = torch.rand(rows, groups, generator=torch.Generator().manual_seed(7)) < 0.6
    made[1] = False  # an empty row and a full one
    made[2] = True
    return made


@pytest.mark.parametrize(("dtype", "format"), TYPES, ids=str)
@pytest.mark.parametrize("clipped", [False, True])
def test_fake_quantised_is_quantised(dtype, format, clipped) -> None:
    """Bit for bit: what is trained is what will be stored."""
    w, t = matrix(), Tensor((6, 24), dtype, format=format)
    by_group = format.grouped(w)
    limits = (0.7 * by_group.amin(-1), 0.8 * by_group.amax(-1)) if clipped else ()
    assert torch.equal(fake_quantized(w, t, *limits), quantize(w, t, *limits).decode())


def test_the_gradient_of_a_limit_is_that_of_the_numbers_it_clips() -> None:
    """Of int2b without rounding errors: beyond the limit a number is 2 * scale = limit."""
    t = Tensor((1, 4), DTYPES["int2b"], format=GroupQuant(None, f32))
    w = torch.tensor([[0.5, 1.0, 3.0, -3.0]], requires_grad=True)
    high = torch.tensor([[1.0]], requires_grad=True)
    made = fake_quantized(w, t, -high, high)
    assert made.tolist() == [[0.5, 1.0, 1.0, -1.0]]
    made.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert w.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    # By the straight-through rule, d/d high of high * round(w / high * 2) / 2 is code/2 - w/high.
    assert high.grad.item() == pytest.approx(0 + 0 + 100 - 1000)


def test_a_rounding_passes_gradients_and_values_as_they_are() -> None:
    x = torch.tensor([0.4, 0.6, 2.5], requires_grad=True)
    y = rounded(x)
    assert y.tolist() == [0.0, 1.0, 2.0]
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0]
    to = torch.tensor([1.1, 1e-7, 3.0])
    assert torch.equal(straight_through(torch.full((3,), 1e9), to), to)  # x + (to - x) is not


@pytest.mark.parametrize(("dtype", "format"), TYPES, ids=str)
@pytest.mark.parametrize("sparse", [None, "bitmap", "gap", "u16"])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_latent_starts_as_the_value_it_was_given(dtype, format, sparse, numbers) -> None:
    if sparse and format.group == 5:
        return  # no groups of 8
    w = matrix()
    value = quantize(w, Tensor((6, 24), dtype, format=format))
    if sparse:
        value = picked(value, mask(6, 3), 8, sparse)
    for original in (None, w):
        latent = Latent(value, Trained(numbers), original)
        assert torch.equal(latent.dense(), value.decode())
        again = latent.encoded()
        assert again.type == value.type
        assert all(map(same, again.parts, value.parts))


def same(a, b) -> bool:
    if isinstance(a, Encoded):
        return a.type == b.type and all(map(same, a.parts, b.parts))
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("sparse", [False, True])
def test_what_was_trained_is_what_is_stored(sparse) -> None:
    value = quantize(matrix(), Tensor((6, 24), DTYPES["uint4"], format=TYPES[0][1]))
    value = picked(value, mask(6, 3), 8, "bitmap") if sparse else value
    latent = Latent(value, Trained(True), matrix())
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in latent.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=made))
    assert set(latent.parameters) == {"numbers", "factor"}
    after = latent.encoded()
    assert torch.equal(after.decode(), latent.dense())
    assert not torch.equal(after.decode(), value.decode())
    if sparse:
        assert torch.equal(after["mask"], value["mask"])
        assert not after.decode()[1].any()  # the row of which nothing is kept


@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_of_a_scale_is_the_closed_form(sparse) -> None:
    """d loss / d s = sum over the group of (code - zero) * d loss / d w (GQSA, section 2.4)."""
    t = Tensor((6, 24), DTYPES["uint4"], format=GroupQuant(8, f32, DTYPES["uint4"]))
    whole = quantize(matrix(), t)
    value = picked(whole, mask(6, 3), 8, "u16") if sparse else whole
    latent = Latent(value, Trained())
    outer = matrix(5)
    (latent.dense() * outer).sum().backward()
    from_zero = whole["codes"].float() - t.format.spread(whole["zero"].float(), 24)
    closed = (from_zero * outer).unflatten(-1, (3, 8)).sum(-1)
    if sparse:
        closed = closed[mask(6, 3)][:, None]
    gradient = latent.parameters["factor"].grad / latent.scale  # of scale = first * factor
    assert torch.allclose(gradient, closed, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_scale_is_the_difference_quotient() -> None:
    t = Tensor((2, 16), DTYPES["uint4"], format=GroupQuant(8, f32, DTYPES["uint4"]))
    latent = Latent(quantize(matrix(0, (2, 16)), t), Trained())
    outer, factor = matrix(6, (2, 16)), latent.parameters["factor"]

    def loss() -> torch.Tensor:
        return (latent.dense() * outer).square().sum()

    loss().backward()
    for i in range(2):
        for j in range(2):
            ends = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    factor[i, j] += step
                    ends.append(float(loss()))
                    factor[i, j] -= step
            assert factor.grad[i, j].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2)


def test_groups_that_are_left_out_get_no_gradient() -> None:
    t = Tensor((6, 24), DTYPES["uint4"], format=GroupQuant(8, f16, DTYPES["uint4"]))
    value = picked(quantize(matrix(), t), mask(6, 3), 8, "bitmap")
    assert isinstance(value.type.format, GroupSparse)
    latent = Latent(value, Trained(True), matrix())
    assert latent.parameters["numbers"].shape[0] == int(mask(6, 3).sum())
    dense = latent.dense()
    keep = mask(6, 3).repeat_interleave(8, 1)
    assert torch.equal(dense, decoded(t, quantize(matrix(), t), torch.float32) * keep)


def test_a_format_without_scales_is_refused() -> None:
    w = matrix()
    format = GroupSparse(8, 18, "bitmap")
    value = Encoded(Tensor((6, 24), f32, format=format), (torch.ones(6, 3), w.reshape(18, 8)))
    with pytest.raises(TypeError, match="has no scale"):
        Latent(value, Trained())
