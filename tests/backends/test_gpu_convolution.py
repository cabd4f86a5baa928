"""Convolutions in Triton kernels, run as PTX on the CPU, and what compilers make of them."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.gpu import GPU
from effc.ir import No, interpret, parse

from .conftest import close
from .gpu_compiled import TARGETS, kernels, usage

EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", "12"))
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def image(shape: str, dtype: str, last: bool) -> str:
    return f"{dtype}[{shape}]" + (" @ channels_last" if last else "")


def convolution(
    shape: str, results: int, weight: str, options: str, dtype: str = "f32", last: bool = True,
    out: str = "N, K, OH, OW",
) -> str:  # fmt: skip
    """A weight that is known when weights are bound, and a bias."""
    return f"""
def graph(x: {image(shape, dtype, last)}, b: {dtype}[{results}]):
    w: {dtype}[{weight}] = weight("w", digest="")
    y = conv2d(x, w, b{options})
    return y,
"""


class Hosted:
    """A graph on ptx-host; a call compares with the interpreter."""

    def __init__(self, text: str, steps: int | None = None, **weights: torch.Tensor) -> None:
        self.graph = parse(text, weights=weights)
        self.executable = find_backend("ptx-host").compile(self.graph)
        reasons = [f"{n.name}: {why}" for n, why in self.executable.fallbacks]
        assert not reasons, "\n".join(reasons)
        if steps is not None:
            assert len(self.executable.launches) == steps, self.executable.text
        self.bound = self.executable.bind()

    def __call__(self, *inputs: torch.Tensor, **tolerance: float) -> torch.Tensor:
        got, want = self.bound(inputs), interpret(self.graph, inputs)
        for g, w in zip(got, want, strict=True):
            close(g, w, **tolerance)
        return got[0]


def picture(*shape: int, dtype: str = "f32", last: bool = True) -> torch.Tensor:
    x = torch.randn(shape).to(TYPES[dtype])
    return x.to(memory_format=torch.channels_last) if last else x


CASES = {
    "same": ((20, 24, 20, 3, 3), ", padding=(1, 1)", True),
    "stride and dilation": ((20, 24, 20, 3, 5), ", stride=(2, 1), padding=(1, 3), dilation=(1, 2)", True),
    "few channels": ((3, 24, 3, 3, 3), ", padding=(1, 1)", True),
    "rows": ((20, 24, 20, 3, 3), ", padding=(1, 1)", False),
    "few channels in rows": ((3, 24, 3, 3, 3), ", stride=(2, 2)", False),
    "one tap": ((20, 24, 20, 1, 1), ", stride=(2, 2)", False),
    "one tap, padded": ((20, 24, 20, 1, 1), ", padding=(1, 1)", True),
    "groups": ((32, 24, 16, 3, 3), ", padding=(1, 1), groups=2", True),
    "depthwise": ((20, 20, 1, 3, 3), ", padding=(1, 1), groups=20", True),
    "depthwise in rows": ((20, 20, 1, 5, 3), ", padding=(2, 1), stride=(1, 2), groups=20", False),
    "depthwise, twice": ((20, 40, 1, 3, 3), ", padding=(1, 1), groups=20", True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_convolution(name) -> None:
    (channels, results, each, tall, broad), options, last = CASES[name]
    w = torch.randn(results, each, tall, broad) / (each * tall * broad) ** 0.5
    text = convolution(
        f"N, {channels}, H, W", results, f"{results}, {each}, {tall}, {broad}", options, last=last
    )
    run = Hosted(text, w=w)
    for n, high, wide in ((1, 9, 11), (2, 5, 16)):
        run(picture(n, channels, high, wide, last=last), torch.randn(results))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_short_types(dtype) -> None:
    w = (torch.randn(24, 20, 3, 3) / 13).to(TYPES[dtype])
    text = convolution("N, 20, H, W", 24, "24, 20, 3, 3", ", padding=(1, 1)", dtype)
    run = Hosted(text, w=w)
    b = torch.randn(24).to(TYPES[dtype])
    run(picture(1, 20, 9, 11, dtype=dtype), b, rtol=3e-2, atol=3e-2)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2), st.integers(1, 9), st.integers(1, 40))
def test_any_picture_with_one_kernel(n, high, wide) -> None:
    if not HELD:
        w = torch.randn(8, 5, 3, 2) / 5
        HELD.append(Hosted(convolution("N, 5, H, W", 8, "8, 5, 3, 2", ", padding=(1, 1)"), w=w))
    HELD[0](picture(n, 5, high, wide), torch.randn(8))


HELD: list[Hosted] = []


def test_a_weight_that_is_computed_is_read_as_it_lies() -> None:
    x = image("1, 16, 9, 11", "f32", True)
    text = f"""
def graph(x: {x}, w: f32[8, 16, 3, 3]):
    y = conv2d(x, w, None, padding=(1, 1))
    return y,
"""
    Hosted(text, steps=1)(picture(1, 16, 9, 11), torch.randn(8, 16, 3, 3) / 12)


SHUFFLED = """
def graph({0}):
    def body({0}):
        h = conv2d(x, w, b, padding=(1, 1))
        a = leaky_relu(h, slope=0.05)
        m = mul(a, s)
        r = add(m, z)
        p = pixel_shuffle(r, factor=2)
        {1}
        return y,
    y = fused((x, w, b, z, s), body=body)
    return y,
"""


@pytest.mark.parametrize("row_major", [False, True])
def test_what_follows_is_stored_where_the_shuffle_says(row_major) -> None:
    end = "y = to_layout(p, layout=row_major)"
    arguments = (
        "x: f32[2, 16, 9, 11] @ channels_last, w: f32[12, 16, 3, 3], b: f32[12], "
        "z: f32[2, 12, 9, 11] @ channels_last, s: f32[2, 12, 1, 1]"
    )
    text = SHUFFLED.format(arguments, end)
    if not row_major:
        text = text.replace(f"        {end}\n", "").replace("return y,\n    y", "return p,\n    y")
    w, scale = torch.randn(12, 16, 3, 3) / 12, torch.randn(2, 12, 1, 1)
    run = Hosted(text, steps=1)
    run(picture(2, 16, 9, 11), w, torch.randn(12), picture(2, 12, 9, 11), scale)


def test_one_and_three_dimensions() -> None:
    text = """
def graph(x: f32[2, 20, L], w: f32[24, 20, 5], b: f32[24], v: f32[2, 4, 5, 6, 7], u: f32[8, 4, 2, 3, 3]):
    y = conv1d(x, w, b, padding=(2,), stride=(2,))
    z = conv3d(v, u, None, padding=(0, 1, 1))
    return y, z
"""
    run = Hosted(text)
    w, u = torch.randn(24, 20, 5) / 10, torch.randn(8, 4, 2, 3, 3) / 8
    run(torch.randn(2, 20, 30), w, torch.randn(24), torch.randn(2, 4, 5, 6, 7), u)


def test_depthwise_with_what_follows() -> None:
    arguments = "x: f32[2, 20, 9, 11] @ channels_last, w: f32[20, 1, 3, 3], b: f32[20]"
    text = f"""
def graph({arguments}):
    def body({arguments}):
        h = conv2d(x, w, b, padding=(1, 1), groups=20)
        a = relu(h)
        y = add(a, x)
        return y,
    y = fused((x, w, b), body=body)
    return y,
"""
    Hosted(text, steps=1)(picture(2, 20, 9, 11), torch.randn(20, 1, 3, 3), torch.randn(20))


def test_refusals_have_reasons() -> None:
    text = """
def graph(x: f32[1, 16, 9, 9] @ channels_last, w: f32[8, 16, 3, 3]):
    def body(x: f32[1, 16, 9, 9] @ channels_last, w: f32[8, 16, 3, 3]):
        a = exp(x)
        y = conv2d(a, w, None)
        return y,
    y = fused((x, w), body=body)
    return y,
"""
    answer = GPU.claim(parse(text).nodes[0])
    assert isinstance(answer, No) and "every tap" in str(answer)


# ------------------------------------------------------------------ what compilers make of them


def rlfn(dtype: str, channels: int, results: int, taps: int, shuffle: int = 0) -> str:
    """A convolution of RLFN over a picture of 320 x 180."""
    x, z = (f"{dtype}[1, {c}, 180, 320] @ channels_last" for c in (channels, results))
    w, p = f"{dtype}[{results}, {channels}, {taps}, {taps}]", taps // 2
    end = f"pixel_shuffle(a, factor={shuffle})" if shuffle else "add(a, z)"
    return f"""
def graph(x: {x}, b: {dtype}[{results}], z: {z}):
    w: {w} = weight("w", digest="")
    def body(x: {x}, w: {w}, b: {dtype}[{results}], z: {z}):
        h = conv2d(x, w, b, padding=({p}, {p}))
        a = leaky_relu(h, slope=0.05)
        y = {end}
        return y,
    y = fused((x, w, b, z), body=body)
    return y,
"""


FULL = {
    "3x3, half": rlfn("f16", 52, 52, 3),
    "3x3": rlfn("f32", 52, 52, 3),
    "1x1": rlfn("f32", 52, 52, 1),
    "first": rlfn("f16", 3, 52, 3),
    "last, shuffled": rlfn("f16", 52, 48, 3, shuffle=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FULL)
def test_full_sizes_use_tensor_cores_and_spill_nothing(name, to) -> None:
    (kernel,) = kernels(FULL[name])
    used = usage(kernel, to)
    assert used.spilled == 0, (kernel.source, used)
    if "f16" in FULL[name] or to.startswith("hip"):
        assert used.tensor_cores > 0
