"""Convolutions, matrix products and attention, alone and with what follows them."""

from __future__ import annotations

import pytest
import torch

from effc.backends import find_backend
from effc.ir import parse

CONV = """
def graph(x: f32[N, 8, H, W], z: f32[N, 12, H, W], s: f32[12, 1, 1]):
    w0: f32[12, 8, 3, 3] = weight("w", digest="")
    w1: f32[12] = weight("b", digest="")
    y0 = to_layout(x, layout=LAYOUT)
    y1 = to_layout(z, layout=LAYOUT)
    def body(x: f32[N, 8, H, W] @ LAYOUT, w: f32[12, 8, 3, 3], b: f32[12], z: f32[N, 12, H, W] @ LAYOUT, s: f32[12, 1, 1]):
        y0 = conv2d(x, w, b, padding=(1, 1))
EPILOGUE
        return y9,
    y2: f32[N, 12, H, W] @ LAYOUT = fused((y0, w0, w1, y1, s), body=body)
    y3 = to_layout(y2, layout=row_major)
    return y3,
"""
EPILOGUES = {
    "leaky_relu": ["y9 = leaky_relu(y0, slope=0.2)"],
    "relu": ["y9 = relu(y0)"],
    "gelu": ["y9 = gelu(y0)"],
    "sigmoid_mul": ["y1 = sigmoid(y0)", "y9 = mul(y1, z)"],
    "add": ["y9 = add(y0, z)"],
    "add_relu": ["y1 = add(z, y0)", "y9 = relu(y1)"],
    "scale": ["y1 = mul(y0, s)", "y2 = add(y1, z)", "y9 = tanh(y2)"],
    "used_twice": ["y1 = sigmoid(y0)", "y9 = mul(y0, y1)"],
    "beside": ["y1 = exp(z)", "y2 = add(y0, y1)", "y9 = clamp(y2, -1, 1)"],
}


def conv(layout: str, epilogue: list[str]):
    lines = "\n".join(f"        {line}" for line in epilogue)
    source = CONV.replace("EPILOGUE", lines).replace(" @ LAYOUT", f" @ {layout}")
    source = source.replace("LAYOUT", layout).replace(" @ row_major", "")
    torch.manual_seed(0)
    return parse(source, weights={"w": torch.randn(12, 8, 3, 3) / 8, "b": torch.randn(12)})


@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
@pytest.mark.parametrize("name", list(EPILOGUES))
def test_convolution_and_what_follows(compiled, name, layout) -> None:
    run = compiled(conv(layout, EPILOGUES[name]))
    for n, h, w in ((1, 5, 7), (2, 1, 1), (3, 8, 6)):
        run(torch.randn(n, 8, h, w), torch.randn(n, 12, h, w), torch.randn(12, 1, 1))


@pytest.mark.parametrize("layout", ["row_major", "channels_last"])
def test_pixel_shuffle_is_part_of_the_epilogue(compiled, layout) -> None:
    source = f"""
def graph(x: f32[2, 8, 5, 6], w: f32[12, 8, 3, 3], s: f32[12, 1, 1]):
    y0 = to_layout(x, layout={layout})
    def body(x: f32[2, 8, 5, 6] @ {layout}, w: f32[12, 8, 3, 3], s: f32[12, 1, 1]):
        y0 = conv2d(x, w, padding=(1, 1))
        y1 = add(y0, s)
        y2 = pixel_shuffle(y1, factor=2)
        return y2,
    y1 = fused((y0, w, s), body=body)
    return y1,
""".replace(" @ row_major", "")
    run = compiled(source)
    run(torch.randn(2, 8, 5, 6), torch.randn(12, 8, 3, 3), torch.randn(12, 1, 1))
    assert [e.kind for e in run.executable.launches].count("kernel") == 1


def test_products_and_attention(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[B, T, 24], w: f32[36, 24], c: f32[36], m: f32[T, T], v: bf16[B, 24], u: bf16[7, 24], i: i64[5, 4], k: i64[4, 3]):
    y0 = linear(x, w, c)
    y1 = gelu(y0)
    y2 = slice(y1, dim=2, start=0, size=12)
    y3 = slice(y1, dim=2, start=12, size=12)
    y4 = slice(y1, dim=2, start=24, size=12)
    y5 = reshape(y2, to=(B, T, 3, 4))
    y6 = permute(y5, dims=(0, 2, 1, 3))
    y7 = reshape(y3, to=(B, T, 3, 4))
    y8 = permute(y7, dims=(0, 2, 1, 3))
    y9 = reshape(y4, to=(B, T, 3, 4))
    y10 = permute(y9, dims=(0, 2, 1, 3))
    y11 = attention(y6, y8, y10, m)
    y12 = permute(y11, dims=(0, 2, 1, 3))
    y13 = reshape(y12, to=(B, T, 12))
    y14 = relu(y13)
    y15 = attention(y6, y8, y10, causal=True, scale=0.3)
    y16 = neg(y15)
    y17 = permute(y14, dims=(0, 2, 1))
    y18 = matmul(y14, y17)
    y19 = linear(v, u)
    y20 = silu(y19)
    y21 = matmul(i, k)
    y22 = attention(y2, y3, y4)
    y23 = exp(y22)
    return y14, y16, y18, y20, y21, y23
"""
    )
    for b, t in ((2, 5), (1, 1), (3, 17)):
        run(torch.randn(b, t, 24), torch.randn(36, 24), torch.randn(36), torch.randn(t, t),
            torch.randn(b, 24).bfloat16(), torch.randn(7, 24).bfloat16(),
            torch.randint(0, 9, (5, 4)), torch.randint(0, 9, (4, 3)))  # fmt: skip


def test_linear_with_an_epilogue_in_place(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[B, 24], w: f32[36, 24], c: f32[36], r: f32[B, 36]):
    def body(x: f32[B, 24], w: f32[36, 24], c: f32[36], r: f32[B, 36]):
        y0 = linear(x, w, c)
        y1 = gelu(y0)
        y2 = add(y1, r)
        return y2,
    y0: f32[B, 36] = fused((x, w, c, r), body=body)
    return y0,
"""
    )
    for b in (1, 4, 33):
        run(torch.randn(b, 24), torch.randn(36, 24), torch.randn(36), torch.randn(b, 36))


def test_other_convolutions(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[2, 8, 20], a: f32[6, 4, 3], v: f32[2, 8, 5, 6, 7], b: f32[8, 8, 2, 2, 2], p: f32[2, 8, 9, 9], d: f32[8, 1, 3, 3], w: f32[5, 8, 3, 2]):
    y0 = conv1d(x, a, stride=(2,), padding=(1,), groups=2)
    y1 = relu(y0)
    y2 = conv3d(v, b, dilation=(1, 2, 1))
    y3 = relu(y2)
    y4 = conv2d(p, d, groups=8, padding=(2, 2), dilation=(2, 2))
    y5 = relu(y4)
    y6 = conv2d(p, w, stride=(2, 3))
    y7 = relu(y6)
    return y1, y3, y5, y7
"""
    )
    run(torch.randn(2, 8, 20), torch.randn(6, 4, 3), torch.randn(2, 8, 5, 6, 7), torch.randn(8, 8, 2, 2, 2),
        torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 3, 2))  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["y0 = linear(x, w)", "y1 = linear(y0, w)"], "linear and linear are two library routines"),
        (
            ["y0 = relu(x)", "y1 = linear(y0, w)"],
            "relu before a linear runs in a kernel of its own",
        ),
        (["y1 = linear(x, w)"], "nothing follows the linear"),
        (["y0 = linear(x, w)", "y1 = softmax(y0, dim=1)"], "softmax is not pointwise"),
    ],
)
def test_refusals_say_why(lines, reason) -> None:
    body = "\n".join(f"        {line}" for line in lines)
    graph = parse(
        f"""
def graph(x: f32[8, 8], w: f32[8, 8]):
    def body(x: f32[8, 8], w: f32[8, 8]):
{body}
        return y1,
    y0: f32[8, 8] = fused((x, w), body=body)
    return y0,
"""
    )
    answer = find_backend("cpu").supports(graph.nodes[-1])
    assert not answer and answer.reason == reason


def test_refused_regions_are_opened_and_still_right(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[8, 8], w: f32[8, 8]):
    def body(x: f32[8, 8], w: f32[8, 8]):
        y0 = relu(x)
        y1 = linear(y0, w)
        y2 = softmax(y1, dim=1)
        y3 = linear(y2, w)
        return y2, y3
    y0: (f32[8, 8], f32[8, 8]) = fused((x, w), body=body)
    y1 = item(y0, index=0)
    y2 = item(y0, index=1)
    y3: (f32[8, 8], f32[8, 8]) = fused((y1, w), body=body)
    y4 = item(y3, index=1)
    return y1, y2, y4
"""
    )
    run(torch.randn(8, 8), torch.randn(8, 8))
    assert {e.result for e in run.executable.launches} >= {"y0.y1", "y0.y2", "y3.y3"}
