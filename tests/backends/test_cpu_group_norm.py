"""group_norm and what follows it in one kernel: both layouts, every size, torch's numerics."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.ir import interpret, parse

from .conftest import Compiled, close

EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", "12"))
LAYOUTS = {"channels_last": " @ channels_last", "row_major": ""}
# (channels, groups): vectors that do not fill up, one channel a group, one group, one channel
CHANNELS = [(12, 4), (7, 7), (13, 1), (1, 1), (64, 32), (70, 10), (40, 8)]
TYPES = ("f32", "bf16", "f16", "f64")
# One rounding of the result apart: the interpreter rounds after every op, and f16 rounds its means.
TOLERANCE = {"f32": 2e-5, "f64": 1e-10, "bf16": 3e-2, "f16": 4e-3}


def followed(kind: str, layout: str, c: int, groups: int) -> str:
    """Bare; and with an activation, a residual, the input again, and channels' and pixels' own."""
    x = f"{kind}[N, {c}, H, W]{LAYOUTS[layout]}"
    given = f"x: {x}, w: {kind}[{c}], z: {x}, t: {kind}[N, {c}, 1, 1], m: {kind}[H, 1]"
    return f"""
def graph({given}):
    y0 = group_norm(x, groups={groups}, weight=w, bias=w, eps=1e-3)
    y1 = group_norm(x, groups={groups})
    def body({given}):
        y0 = group_norm(x, groups={groups}, weight=w, bias=w, eps=1e-5)
        y1 = silu(y0)
        y2 = add(y1, z)
        y3 = mul(y2, t)
        y4 = sub(y3, m)
        y5 = add(y4, x)
        return y5,
    y2: {x} = fused((x, w, z, t, m), body=body)
    def body2(x: {x}, w: {kind}[{c}]):
        y0 = group_norm(x, groups={groups}, bias=w)
        y1 = cast(y0, f32)
        y2 = gt(y0, 0.0)
        return y0, y1, y2
    y3: ({x}, f32[N, {c}, H, W]{LAYOUTS[layout]}, bool[N, {c}, H, W]{LAYOUTS[layout]}) = fused((x, w), body=body2)
    y4 = item(y3, index=0)
    y5 = item(y3, index=1)
    return y0, y1, y2, y4, y5
"""


@functools.cache
def compiled_once(*key) -> Compiled:
    return Compiled(followed(*key))


def values(run: Compiled, n: int, h: int, w: int) -> list[torch.Tensor]:
    sizes = {"N": n, "H": h, "W": w}
    result = []
    for node in run.graph.inputs:
        t = node.tensor
        shape = [sizes.get(str(s), s) for s in t.shape]
        x = torch.randn(shape).to(t.dtype.torch)
        last = t.layout.name == "channels_last"
        result.append(x.contiguous(memory_format=torch.channels_last) if last else x)
    return result


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from(CHANNELS), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(TYPES),
    st.tuples(*[st.sampled_from([0, 1, 2, 3, 7, 17, 40])] * 3), st.sampled_from([1, 2, 5]),
)  # fmt: skip
def test_every_size_layout_and_type(channels, layout, kind, sizes, threads) -> None:
    run = compiled_once(kind, layout, *channels)
    given = values(run, *sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run.bound(given)
    finally:
        torch.set_num_threads(before)
    want = interpret(run.graph, [t.double() for t in given]) if kind == "f64" else None
    want = want or interpret(parse(followed("f64", layout, *channels)), [t.double() for t in given])
    for o, g, w in zip(run.graph.outputs, got, want, strict=True):
        assert g.dtype == o.dtype.torch and g.shape == w.shape
        scale = max(1.0, w.abs().max().item()) if w.numel() else 1.0
        close(g.double(), w.double(), o.name, rtol=TOLERANCE[kind], atol=TOLERANCE[kind] * scale)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_threads_split_large_tensors_and_give_the_same_bits(compiled, layout) -> None:
    run = compiled(followed("f32", layout, 70, 2))
    given = values(run, 2, 61, 67)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run.bound(given))
    finally:
        torch.set_num_threads(before)
    want = interpret(run.graph, given)
    for got in results:
        for g, first, w in zip(got, results[0], want, strict=True):
            close(g, w)
            assert torch.equal(g, first)


def plain(shape: str, layout: str = "", groups: int = 4, kind: str = "f32") -> str:
    return f"""
def graph(x: {kind}[{shape}]{layout}):
    y0 = group_norm(x, groups={groups}, eps=1e-5)
    return y0,
"""


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("size", [3, 33, 200])
def test_a_mean_far_from_zero_costs_no_digits(compiled, layout, size) -> None:
    """What is left is half a unit of two numbers below 2048: x times its scale, and the shift."""
    run = compiled(plain("2, 24, H, 5", LAYOUTS[layout]))
    x = torch.randn(2, 24, size, 5) + torch.tensor([1e3, -1e3]).repeat_interleave(12)[:, None, None]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    (got,) = run.bound([x])
    want = torch.group_norm(x.double(), 4)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1.3e-4)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_odd_first_pixel_spoils_nothing(compiled, layout) -> None:
    run = compiled(plain("1, 8, 40, 40", LAYOUTS[layout]))
    x = torch.randn(1, 8, 40, 40)
    x[:, :, 0, 0] = 1e4
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    (got,) = run.bound([x])
    want = torch.group_norm(x.double(), 4)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_nan_and_infinity_stay_in_their_group(compiled, layout) -> None:
    run = compiled(plain("2, 8, 5, 9", LAYOUTS[layout]))
    x = torch.randn(2, 8, 5, 9)
    x[0, 3, 2, 2], x[1, 0, 0, 0], x[1, 5] = float("nan"), float("inf"), -float("inf")
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    (got,) = run(x)
    assert got.isnan().any(dim=(2, 3)).sum() == 6 and not got.isinf().any()


def test_other_ranks(compiled) -> None:
    """No pixels at all, one dimension of them, three."""
    for shape, layout in (("B, 12", ""), ("B, 12, L", ""), ("B, 12, L", " @ channels_last"),
                          ("B, 12, L, 2, 3", ""), ("B, 12, L, 2, 3", " @ channels_last")):  # fmt: skip
        run = compiled(plain(shape, layout))
        for batch, length in ((1, 1), (3, 40), (200, 2)):
            x = torch.randn([{"B": batch, "L": length}.get(s, s) for s in _sizes(shape)])
            if layout:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            run(x)


def _sizes(shape: str) -> list[str | int]:
    return [int(s) if s.isdigit() else s for s in shape.split(", ")]


@pytest.mark.parametrize(
    "view",
    ["y0 = slice(x, dim=1, start=4, size=8)", "y0 = slice(x, dim=2, start=1, size=3)",
     "y0 = slice(x, dim=3, start=2, size=4)", "y0 = permute(x, dims=(0, 1, 3, 2))",
     "y0 = slice(x, dim=3, start=0, size=3, step=2)"],
)  # fmt: skip
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_views_are_read_as_they_lie_or_packed(compiled, view, layout) -> None:
    run = compiled(
        f"""
def graph(x: f32[2, 16, 5, 7]):
    y9 = to_layout(x, layout={layout})
    {view.replace("(x", "(y9")}
    y1 = group_norm(y0, groups=4)
    return y1,
"""
    )
    run(torch.randn(2, 16, 5, 7))


def test_memory_that_nobody_needs_takes_the_result(compiled) -> None:
    """The sum is dead after the norm; the input is not ours."""
    run = compiled(
        """
def graph(x: f32[2, 16, 9, 9] @ channels_last):
    y0 = mul(x, 2.0)
    def body(x: f32[2, 16, 9, 9] @ channels_last):
        y0 = group_norm(x, groups=4)
        y1 = silu(y0)
        return y1,
    y1: f32[2, 16, 9, 9] @ channels_last = fused((y0,), body=body)
    y2 = mul(y1, x)
    return y2,
"""
    )
    (norm,) = [s for s in run.executable.plan.steps if s.kernel.name.startswith("group_norm")]
    assert norm.refs[0].root is norm.refs[1].root
    run(torch.randn(2, 16, 9, 9).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y0 = neg(x)\n        y1 = group_norm(y0, groups=2)\n        y2 = silu(y1)",
         "neg before a group_norm runs in a kernel of its own"),
        ("y0 = group_norm(x, groups=2)\n        y1 = group_norm(x, groups=1)\n"
         "        y2 = add(y0, y1)", "two of group_norm in one region"),
        ("y0 = group_norm(x, groups=2)\n        y1 = softmax(y0, dim=-1)\n"
         "        y2 = neg(y1)", "softmax is not pointwise"),
        ("y0 = group_norm(x, groups=2)\n        y2 = add(y0, z)",
         "add is not of the shape of the group_norm"),
        ("y0 = group_norm(x, groups=2)\n        y2 = mul(w, 2.0)",
         "an output is not of the shape of the group_norm"),
        ("y0 = group_norm(x, groups=2)\n        y2 = slice(y0, dim=3, start=0, size=1)",
         "slice of a value computed in the region"),
    ],
)  # fmt: skip
def test_refusals_say_why(body: str, reason: str) -> None:
    given = "x: f32[1, 4, 6, 6], z: f32[3, 4, 6, 6], w: f32[1]"
    graph = parse(
        f"""
def graph({given}):
    def body({given}):
        {body}
        return y2,
    y0 = fused((x, z, w), body=body)
    return y0,
"""
    )
    answer = find_backend("cpu").supports(graph.nodes[-1])
    assert not answer and answer.reason == reason


def test_the_default_passes_put_silu_into_the_kernel() -> None:
    from effc.passes.base import Pipeline
    from effc.passes.pipelines import DEFAULT
    from effc.pipeline import run_pipeline

    graph = parse(
        """
def graph(x: f32[1, 32, 8, 8], w: f32[32]):
    y0 = group_norm(x, groups=8, weight=w, bias=w)
    y1 = silu(y0)
    return y1,
"""
    )
    backend = find_backend("cpu")
    last = run_pipeline(graph, Pipeline.parse(DEFAULT), supports=backend.supports)[-1].graph
    launches = backend.compile(last).launches
    assert [e.call.rpartition("_")[0] for e in launches] == ["group_norm"]
