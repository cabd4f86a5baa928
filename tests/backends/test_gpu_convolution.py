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


def test_a_picture_that_is_the_same_along_a_side_has_zeros_beside_it() -> None:
    text = """
def graph(x: f32[1, 5, 1, 11], w: f32[8, 5, 3, 3]):
    r = expand(x, to=(1, 5, 9, 11))
    y = conv2d(r, w, None, padding=(1, 1))
    return y,
"""
    Hosted(text, steps=1)(torch.randn(1, 5, 1, 11), torch.randn(8, 5, 3, 3) / 7)


# ------------------------------------------------------------------ before and beside


def region(arguments: str, *lines: str) -> str:
    """A graph of one region."""
    names = ", ".join(a.partition(":")[0] for a in arguments.split("; "))
    given, body = arguments.replace(";", ","), "".join(f"        {line}\n" for line in lines)
    return (
        f"def graph({given}):\n    def body({given}):\n{body}        return y,\n"
        f"    y = fused(({names},), body=body)\n    return y,\n"
    )


def gate(how: str = "", options: str = "", each: int = 16, dtype: str = "f32", last: bool = True):
    """A product with an enlarged picture beside it."""
    x, q, c = (image(s, dtype, last) for s in ("N, 16, H, W", "N, 20, P, Q", "N, 20, H, W"))
    return region(
        f"x: {x}; q: {q}; w: {dtype}[20, {each}, 1, 1]; b: {dtype}[20]; c: {c}",
        f"h = conv2d(x, w, b{options})", f"u = interpolate(q, size=(H, W){how})", "s = add(u, h)",
        "g = sigmoid(s)", "y = mul(c, g)",
    )  # fmt: skip


def given_to_gate(
    n: int, size: tuple[int, int], small: tuple[int, int], each: int = 16, dtype: str = "f32",
    last: bool = True,
) -> list[torch.Tensor]:  # fmt: skip
    x, q, c = (
        picture(n, k, *s, dtype=dtype, last=last) for k, s in ((16, size), (20, small), (20, size))
    )
    w, b = torch.randn(20, each, 1, 1) / 4, torch.randn(20)
    return [x, q, w.to(TYPES[dtype]), b.to(TYPES[dtype]), c]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2), st.tuples(*[st.integers(1, 19)] * 2), st.tuples(*[st.integers(1, 9)] * 2))
def test_a_picture_is_enlarged_in_the_kernel_that_reads_it(n, size, small) -> None:
    if not GATES:
        GATES.append(Hosted(gate(), steps=1))
    GATES[0](*given_to_gate(n, size, small))


GATES: list[Hosted] = []


@pytest.mark.parametrize(
    ("how", "options", "dtype"),
    [
        (', mode="nearest-exact"', ", groups=2", "f32"),
        (", align_corners=True", "", "f16"),
        (", scales=(3.5, 2.0)", "", "f32"),
    ],
)
def test_enlarging_reads_the_pixels_that_torch_reads(how, options, dtype) -> None:
    each, loose = (8 if options else 16), {"rtol": 1e-2, "atol": 1e-2} if dtype == "f16" else {}
    known = str.maketrans({"N": "2", "H": "7", "W": "10", "P": "2", "Q": "5"})
    run = Hosted(gate(how, options, each, dtype, last=False).translate(known), steps=1)
    run(*given_to_gate(2, (7, 10), (2, 5), each, dtype, last=False), **loose)


def test_enlarging_beside_a_depthwise_convolution() -> None:
    x, q = image("2, 20, 9, 11", "f32", True), image("2, 20, 4, 3", "f32", True)
    text = region(
        f"x: {x}; w: f32[20, 1, 3, 3]; q: {q}", "h = conv2d(x, w, None, padding=(1, 1), groups=20)",
        "u = interpolate(q, size=(9, 11))", "y = add(h, u)",
    )  # fmt: skip
    Hosted(text, steps=1)(picture(2, 20, 9, 11), torch.randn(20, 1, 3, 3), picture(2, 20, 4, 3))


POOLS = {
    "largest": ("max_pool2d(x, kernel=(4, 3), stride=(3, 2))", (4, 8), "", "f32"),
    "largest, padded": (
        "max_pool2d(x, kernel=(3, 2), stride=(2, 1), padding=(1, 1), dilation=(2, 1), ceil_mode=True)",
        (6, 18), ", stride=(2, 1)", "f32",
    ),
    "mean": ("avg_pool2d(x, kernel=(2, 3), stride=(2, 2))", (6, 8), ", dilation=(2, 1)", "f16"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_a_picture_is_pooled_in_the_kernel_that_reads_it(name) -> None:
    pool, (high, wide), options, dtype = POOLS[name]
    last = "padded" not in name
    k = 20 if last else 5
    x = image(f"2, {k}, 13, 17", dtype, last)
    text = region(
        f"x: {x}; w: {dtype}[9, {k}, 3, 3]; b: {dtype}[9]", f"p = {pool}",
        f"h = conv2d(p, w, b, padding=(1, 2){options})", "y = relu(h)",
    )  # fmt: skip
    run, given = Hosted(text, steps=1), picture(2, k, 13, 17, dtype=dtype, last=last)
    assert parse(text).nodes[-1].body.nodes[0].shape[2:] == (high, wide)
    given[0, 3, 5, 6], given[1, 2, 0, 0] = float("nan"), -float("inf")
    if name == "mean":
        given[1, 2, 0, 0] = 1
    w, b = torch.randn(9, k, 3, 3) / 13, torch.randn(9)
    loose = {"rtol": 1e-2, "atol": 1e-2} if dtype == "f16" else {}
    run(given, w.to(TYPES[dtype]), b.to(TYPES[dtype]), **loose)


@pytest.mark.parametrize(("dtype", "k", "m"), [("f16", 20, 24), ("bf16", 1, 1)])
def test_two_products_in_a_row(dtype, k, m) -> None:
    """1 / x of what is beside the channels is infinite, and must not be multiplied by 0."""
    p, q = (image(s, dtype, True) for s in ("2, 16, 9, 11", f"2, {k}, 9, 11"))
    text = region(
        f"x: {p}; w: {dtype}[{k}, 16, 3, 3]; b: {dtype}[{k}]; z: {q}; v: {dtype}[{m}, {k}, 1, 1]; "
        f"c: {dtype}[{m}]", "h = conv2d(x, w, b, padding=(1, 1))", "e = square(h)",
        "a = add(e, z)", "r = reciprocal(a)", "g = conv2d(r, v, c)", "y = tanh(g)",
    )  # fmt: skip
    run, t = Hosted(text, steps=1), TYPES[dtype]
    z = (torch.rand(2, k, 9, 11) + 0.5).to(t).to(memory_format=torch.channels_last)
    weights = torch.randn(k, 16, 3, 3) / 12, torch.randn(m, k, 1, 1) / 4
    w, v, b, c = (i.to(t) for i in (*weights, torch.randn(k), torch.randn(m)))
    run(picture(2, 16, 9, 11, dtype=dtype), w, b, z, v, c, rtol=3e-2, atol=3e-2)


def test_two_products_in_a_row_with_a_picture_enlarged_between_them() -> None:
    x, q, c = (image(s, "f16", True) for s in ("1, 16, 9, 11", "1, 16, 3, 4", "1, 52, 9, 11"))
    text = region(
        f"x: {x}; q: {q}; w: f16[16, 16, 1, 1]; v: f16[52, 16, 1, 1]; b: f16[52]; c: {c}",
        "h = conv2d(x, w)", "u = interpolate(q, size=(9, 11))", "s = add(u, h)",
        "g = conv2d(s, v, b)", "a = sigmoid(g)", "y = mul(c, a)",
    )  # fmt: skip
    p, q, c = (picture(1, *s, dtype="f16") for s in ((16, 9, 11), (16, 3, 4), (52, 9, 11)))
    w, v = torch.randn(16, 16, 1, 1) / 4, torch.randn(52, 16, 1, 1) / 4
    run = Hosted(text, steps=1)
    run(p, q, w.half(), v.half(), torch.randn(52).half(), c, rtol=1e-2, atol=1e-2)


def test_a_picture_of_few_channels_is_read_as_it_lies() -> None:
    text = region(
        "x: f32[N, 3, H, W]; w: f32[24, 3, 3, 3]; b: f32[24]",
        "t = to_layout(x, layout=channels_last)", "h = conv2d(t, w, b, padding=(1, 1))",
        "y = leaky_relu(h, slope=0.05)",
    )  # fmt: skip
    run = Hosted(text, steps=1)
    for n, high, wide in ((1, 9, 11), (2, 1, 5), (0, 3, 3)):
        x = torch.randn(n, 3, high, wide)
        got = run(x, torch.randn(24, 3, 3, 3) / 5, torch.randn(24))
        assert got.is_contiguous(memory_format=torch.channels_last)


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


POOL = "p = max_pool2d(x, kernel=(7, 7), stride=(3, 3))"
REFUSED = {
    "pool again": ("8, 16, 256, 256", "16, 16, 3, 3", POOL, "y = conv2d(p, w)"),
    "*N elements": (
        "N, 16, 64, 64", "16, 16, 3, 3", POOL, "y = conv2d(p, w)"
    ),
    "grouped": ("1, 16, 64, 64", "16, 8, 3, 3", POOL, "y = conv2d(p, w, groups=2)"),
    "beside the picture": (
        "1, 16, 64, 64", "16, 16, 3, 3",
        "p = avg_pool2d(x, kernel=(3, 3), stride=(2, 2), padding=(1, 1))", "y = conv2d(p, w)",
    ),
    "also read after": (
        "1, 16, 64, 64", "16, 16, 1, 1", POOL, "h = conv2d(p, w)", "y = add(h, p)",
    ),
    "reads them together": (
        "1, 16, 64, 64", "16, 16, 3, 3", "p = to_layout(x, layout=channels_last)", "y = conv2d(p, w)",
    ),
    "not of the shape": (
        "1, 16, 1, 64", "16, 16, 1, 1", "h = conv2d(x, w)", "u = interpolate(x, size=(1, 1))",
        "y = add(h, u)",
    ),
    "computed in the region": (
        "1, 16, 64, 64", "16, 16, 1, 1", "h = conv2d(x, w)", "e = exp(x)",
        "u = interpolate(e, size=(64, 64))", "y = add(h, u)",
    ),
    "bicubic": (
        "1, 16, 64, 64", "16, 16, 1, 1", "h = conv2d(x, w)",
        'u = interpolate(x, size=(64, 64), mode="bicubic")', "y = add(h, u)",
    ),
    "beside a pixel_shuffle": (
        "1, 16, 64, 64", "16, 16, 1, 1", "h = conv2d(x, w)", "u = interpolate(x, size=(64, 64))",
        "s = add(h, u)", "y = pixel_shuffle(s, factor=2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_before_or_beside_is_refused_with_a_reason(why) -> None:
    shape, weight, *lines = REFUSED[why]
    x = image(shape, "f32", "to_layout" not in lines[0])
    answer = GPU.claim(parse(region(f"x: {x}; w: f32[{weight}]", *lines)).nodes[0])
    assert isinstance(answer, No) and why in str(answer)


TWICE = ("h = conv2d(x, w)", "y = conv2d(h, w)")
NOT_IN_A_ROW = {
    "are not multiplied again": ("f32", "16, 16, 1, 1", *TWICE),
    "not 1x1": ("f16", "16, 16, 3, 3", *TWICE),
    "more than a tile holds": ("f16", "96, 96, 1, 1", *TWICE),
    "also read after": ("f16", "16, 16, 1, 1", *TWICE[:1], "g = conv2d(h, w)", "y = add(g, h)"),
    "after two products": ("f16", "16, 16, 1, 1", *TWICE[:1], "g = conv2d(h, w)",
                           "y = pixel_shuffle(g, factor=2)"),
}  # fmt: skip


@pytest.mark.parametrize("why", NOT_IN_A_ROW)
def test_two_products_are_refused_with_a_reason(why) -> None:
    dtype, weight, *lines = NOT_IN_A_ROW[why]
    channels = weight.partition(",")[0]
    arguments = f"x: {dtype}[1, {channels}, 8, 8]; w: {dtype}[{weight}]"
    answer = GPU.claim(parse(region(arguments, *lines)).nodes[0])
    assert isinstance(answer, No) and why in str(answer)


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


GATE = region(
    "x: {d}[1, 16, 180, 320] @ channels_last; q: {d}[1, 52, 28, 51] @ channels_last; "
    "w: {d}[52, 16, 1, 1]; b: {d}[52]; c: {d}[1, 52, 180, 320] @ channels_last",
    "h = conv2d(x, w, b)", "u = interpolate(q, size=(180, 320))", "s = add(u, h)",
    "g = sigmoid(s)", "y = mul(c, g)",
)  # fmt: skip
CHAINED = region(
    "x: f16[1, 52, 180, 320] @ channels_last; w: f16[52, 52, 3, 3]; b: f16[52]; "
    "v: f16[52, 52, 1, 1]; c: f16[52]",
    "h = conv2d(x, w, b, padding=(1, 1))", "a = leaky_relu(h, slope=0.05)", "s = add(a, x)",
    "y = conv2d(s, v, c)",
)  # fmt: skip
POOLED = region(
    "x: {d}[1, 16, 89, 159] @ channels_last; w: {d}[52, 16, 3, 3]; b: {d}[52]", POOL,
    "y = conv2d(p, w, b, padding=(1, 1))",
)  # fmt: skip
FULL = {
    "3x3, half": rlfn("f16", 52, 52, 3),
    "3x3": rlfn("f32", 52, 52, 3),
    "1x1": rlfn("f32", 52, 52, 1),
    "first": rlfn("f16", 3, 52, 3),
    "last, shuffled": rlfn("f16", 52, 48, 3, shuffle=4),
    "gate": GATE.format(d="f32"),
    "gate, f16": GATE.format(d="f16"),
    "3x3 and 1x1": CHAINED,
    "pooled": POOLED.format(d="f32"),
    "pooled, f16": POOLED.format(d="f16"),
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
