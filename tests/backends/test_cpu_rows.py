"""Row kernels against the interpreter: reductions, softmax, norms, and regions around them."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

PROGRAM = """
def graph(x: T[A, B, C], w: T[C], v: T[B, C], g: T[B]):
    y0 = softmax(x, dim=-1)
    y1 = softmax(x, dim=1)
    y2 = log_softmax(x, dim=0)
    y3 = layer_norm(x, w, w)
    y4 = layer_norm(x, v, dims=2)
    y5 = rms_norm(x, w)
    y6 = sum(x, dims=(0, 2))
    y7 = mean(x, dims=(1,), keepdim=True)
    y8 = amax(x, dims=(2,))
    y9 = amin(x, dims=(0, 1))
    y10 = any(x, dims=(1, 2))
    y11 = all(x, dims=(0,))
    y12 = sum(x, dims=(0, 1, 2))
    y13 = permute(x, dims=(0, 2, 1))
    y14 = softmax(y13, dim=-1)
    y15 = mean(y13, dims=(0, 2))
    y16 = prod(x, dims=(1,), keepdim=True)
    def body(x: T[A, B, C], w: T[C]):
        y0 = add(x, w)
        y1 = layer_norm(y0, w)
        y2 = gelu(y1)
        return y0, y2
    y17: (T[A, B, C], T[A, B, C]) = fused((x, w), body=body)
    y18 = item(y17, index=0)
    y19 = item(y17, index=1)
    def body2(x: T[A, B, C]):
        y0 = amax(x, dims=(2,), keepdim=True)
        y1 = sub(x, y0)
        y2 = mul(y1, 0.5)
        y3 = mean(y2, dims=(2,), keepdim=True)
        y4 = mul(y2, y3)
        y5 = add(y0, y3)
        return y4, y5
    y20: (T[A, B, C], T[A, B, 1]) = fused((x,), body=body2)
    y21 = item(y20, index=0)
    y22 = item(y20, index=1)
    y23 = group_norm(x, groups=1, weight=g, bias=g)
    y24 = batch_norm(x, g, g, g, g, eps=30.0)
    return y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10, y11, y12, y14, y15, y16, y18, y19, y21, y22, y23, y24
"""
TYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
SIZES = st.tuples(*[st.sampled_from([1, 2, 3, 5, 17, 64, 65, 130])] * 3)


@functools.cache
def program(name: str):
    graph = parse(PROGRAM.replace("T[", f"{name}["))
    executable = find_backend("cpu").compile(graph)
    assert not executable.fallbacks
    return graph, executable.bind()


def inputs(sizes: tuple[int, int, int], dtype: torch.dtype, how: int = 0) -> list[torch.Tensor]:
    a, b, c = sizes
    x = torch.randn(a, b, c) + 1.5
    if how:
        x = (
            torch.randn(c, b, a).permute(2, 1, 0)
            if how == 1
            else torch.randn(a, b, 2 * c)[..., ::2]
        )
    return [t.to(dtype) for t in (x, torch.randn(c), torch.randn(b, c), torch.rand(b) + 0.1)]


BLOCKED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK_TOLERANCE = {
    "f32": {"rtol": 1e-4, "atol": 1e-5},
    "f16": {"rtol": 5e-3, "atol": 5e-3},
    "bf16": {"rtol": 4e-2, "atol": 4e-2},
}

# Against double arithmetic on the same inputs, relative to the largest value.
# bf16 is rounded once, to 8 bits.
TOLERANCE = {"f32": 1e-4, "f64": 1e-9, "bf16": 1e-2}


@settings(max_examples=8)
@given(SIZES, st.integers(0, 2))
def test_all_sizes_with_one_kernel(sizes, how) -> None:
    assume(sizes[0] * sizes[2] > 1)  # torch's group_norm refuses one value a channel
    for name in TYPES:
        graph, bound = program(name)
        given = inputs(sizes, TYPES[name], how)
        want = interpret(program("f64")[0], [t.double() for t in given])
        for o, g, w in zip(graph.outputs, bound(given), want, strict=True):
            assert g.dtype == o.dtype.torch and g.shape == w.shape
            scale = max(1.0, w.double().nan_to_num(0, 0, 0).abs().max().item())
            torch.testing.assert_close(
                g.double(), w.double(), rtol=TOLERANCE[name], atol=TOLERANCE[name] * scale, equal_nan=True,
                msg=lambda m, o=o, name=name: f"{name} {o.name}: {m}",
            )  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("far", [1, 1 << 62])
def test_rows_in_blocks(compiled, monkeypatch, dtype, far) -> None:
    """16-bit rows are converted as a whole; large results are written past the caches."""
    monkeypatch.setattr("effc.backends.cpu.rows.past_caches", lambda: far)
    run = compiled(
        """
def graph(x: T[A, B, C], w: T[C]):
    y0 = softmax(x, dim=-1)
    y1 = log_softmax(x, dim=-1)
    y2 = layer_norm(x, w, w)
    y3 = rms_norm(x, w)
    y4 = sum(x, dims=(2,))
    def body(x: T[A, B, C], w: T[C]):
        y0 = mul(x, w)
        y1 = layer_norm(y0, w)
        return y0, y1
    y5: (T[A, B, C], T[A, B, C]) = fused((x, w), body=body)
    y6 = item(y5, index=0)
    y7 = item(y5, index=1)
    y8 = permute(x, dims=(0, 2, 1))
    y9 = softmax(y8, dim=-1)
    y10 = layer_norm(x, dims=2)
    return y0, y1, y2, y3, y4, y6, y7, y9, y10
""".replace("T[", f"{dtype}[")
    )
    for size in ((1, 1, 3), (2, 3, 33), (3, 5, 64), (1, 2, 2083)):
        x, w = torch.randn(size) + 0.5, torch.randn(size[2])
        run(x.to(BLOCKED[dtype]), w.to(BLOCKED[dtype]), **BLOCK_TOLERANCE[dtype])


def test_softmax_of_a_mask_is_exactly_zero(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[4, 50]):
    y0 = softmax(x, dim=1)
    return y0,
"""
    )
    x = torch.randn(4, 50)
    x[:, 20:] = -float("inf")
    x[3, :20] = torch.linspace(-100, 0, 20)
    (got,) = run(x)
    assert (got[:, 20:] == 0).all()


def test_nan_and_infinity_reach_the_result(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[6, 40]):
    y0 = amax(x, dims=(1,))
    y1 = amin(x, dims=(0,))
    y2 = softmax(x, dim=1)
    y3 = sum(x, dims=(1,))
    y4 = layer_norm(x)
    y5 = any(x, dims=(1,))
    y6 = log_softmax(x, dim=0)
    return y0, y1, y2, y3, y4, y5, y6
"""
    )
    x = torch.randn(6, 40)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    x[3, :] = -float("inf")
    x[4, :] = 0
    run(x)


def test_a_long_sum_keeps_its_digits(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[2, 1000003], z: f32[200003, 3]):
    y0 = sum(x, dims=(1,))
    y1 = mean(z, dims=(0,))
    return y0, y1
"""
    )
    x, z = torch.rand(2, 1000003) + 1, torch.rand(200003, 3)
    total, mean = run(x, z)
    torch.testing.assert_close(total.double(), x.double().sum(1), rtol=3e-7, atol=0)
    torch.testing.assert_close(mean.double(), z.double().mean(0), rtol=3e-7, atol=0)


def test_integers(compiled) -> None:
    run = compiled(
        """
def graph(x: i32[5, 9], b: bool[5, 9], u: u8[5, 9]):
    y0 = sum(x, dims=(1,))
    y1 = prod(x, dims=(0,))
    y2 = amax(x, dims=(1,))
    y3 = amin(u, dims=(0,))
    y4 = sum(b, dims=(0, 1))
    y5 = any(b, dims=(1,))
    y6 = all(b, dims=(0,))
    y8 = amax(b, dims=(1,))
    y9 = any(u, dims=(0,))
    return y0, y1, y2, y3, y4, y5, y6, y8, y9
"""
    )
    run(torch.randint(-5, 5, (5, 9), dtype=torch.int32), torch.rand(5, 9) < 0.3,
        torch.randint(0, 200, (5, 9), dtype=torch.uint8))  # fmt: skip


def test_channels_last_norms(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[2, 12, 5, 7], w: f32[12]):
    y0 = to_layout(x, layout=channels_last)
    y1 = group_norm(y0, groups=4, weight=w, bias=w)
    y2 = batch_norm(y0, w, w, w, w, eps=9.0)
    y3 = mean(y0, dims=(2, 3), keepdim=True)
    y4 = softmax(y0, dim=1)
    y5 = softmax(y0, dim=3)
    return y1, y2, y3, y4, y5
"""
    )
    run(torch.randn(2, 12, 5, 7), torch.randn(12))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y0 = sum(x, dims=(0,), keepdim=True)\n        y1 = sum(x, dims=(1,), keepdim=True)\n"
         "        y2 = add(y0, y1)", "sum goes along other rows than sum"),
        ("y0 = sum(x, dims=(1,))\n        y1 = mul(y0, 2)\n        y2 = add(y1, 1)",
         "sum without keepdim is used inside the region"),
        ("y0 = softmax(x, dim=1)\n        y1: f32[4, 6] = aten.cumsum.default(y0, 1)\n"
         "        y2 = neg(y1)", "aten is not pointwise"),
    ],
)  # fmt: skip
def test_refusals_say_why(body: str, reason: str) -> None:
    graph = parse(
        f"""
def graph(x: f32[4, 6]):
    def body(x: f32[4, 6]):
        {body}
        return y2,
    y0 = fused((x,), body=body)
    return y0,
"""
    )
    answer = find_backend("cpu").supports(graph.nodes[-1])
    assert not answer and answer.reason == reason
