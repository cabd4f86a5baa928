"""Matrix products in Triton kernels, run as PTX on the CPU, and what compilers make of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.base import Options
from effc.backends.gpu import GPU, products
from effc.backends.plan.planner import make_plan
from effc.codegen.triton.kernel import Schedule
from effc.codegen.triton.schedules import ANY, DEVICES, GFX942, Problem, describe, schedules
from effc.ir import No, UnsupportedError, interpret, parse

from .conftest import close
from .gpu_compiled import TARGETS, kernels, usage

EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", "12"))
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


class Hosted:
    """A graph on ptx-host; a call compares with the interpreter."""

    def __init__(self, text: str, precision: str = "highest", steps: int | None = None) -> None:
        self.graph = parse(text)
        options = {"float32_matmul_precision": precision}
        self.executable = find_backend("ptx-host").compile(self.graph, options)
        reasons = [f"{n.name}: {why}" for n, why in self.executable.fallbacks]
        assert not reasons, "\n".join(reasons)
        if steps is not None:
            assert len(self.executable.launches) == steps, self.executable.text
        self.bound = self.executable.bind()

    def __call__(self, *inputs: torch.Tensor, **tolerance: float) -> tuple[torch.Tensor, ...]:
        got, want = self.bound(inputs), interpret(self.graph, inputs)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            close(g, w, f"output {i}", **tolerance)
        return got


def scheduled(monkeypatch, **blocks: int) -> None:
    """Take the model's first schedule with other sizes of some blocks."""

    def given(problem, device):
        choice = schedules(problem, device)[0]
        s = choice.schedule
        known = dict(s.blocks) | {n: v for n, v in blocks.items() if n not in ("warps", "stages")}
        warps, stages = blocks.get("warps", s.warps), blocks.get("stages", s.stages)
        return [replace(choice, schedule=Schedule(warps, stages, tuple(known.items())))]

    monkeypatch.setattr(products, "schedules", given)


def fused(arguments: str, *lines: str) -> str:
    """A graph of one region."""
    names = ", ".join(a.split(":")[0].strip() for a in arguments.replace("],", "];").split(";"))
    body = "".join(f"        {line}\n" for line in lines)
    return f"def graph({arguments}):\n    def body({arguments}):\n{body}        return y,\n" + (
        f"    y = fused(({names},), body=body)\n    return y,\n"
    )


EPILOGUE = "x: {d}[M, 40], w: {d}[24, 40], b: {d}[24], z: {d}[M, 24], s: {d}[M, 1]"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_linear_with_what_follows(dtype) -> None:
    run = Hosted(
        fused(
            EPILOGUE.format(d=dtype), "h = linear(x, w, b)", "g = gelu(h)", "a = mul(g, s)",
            "y = add(a, z)",
        ), steps=1
    )  # fmt: skip
    for m in (1, 2, 17, 64, 131, 0):
        shapes = ((m, 40), (24, 40), (24,), (m, 24), (m, 1))
        run(*(torch.randn(s).to(TYPES[dtype]) for s in shapes), **loose(dtype))


def loose(dtype: str) -> dict[str, float]:
    """Between the ops of one kernel nothing is rounded, the interpreter rounds sums as well."""
    return {} if dtype in ("f32", "f64") else {"rtol": 3e-2, "atol": 3e-2}


ANY_SIZE = """
def graph(x: f32[M, K], w: f32[N, K], b: f32[N]):
    y = linear(x, w, b)
    t = permute(x, dims=(1, 0))
    z = matmul(t, y)
    return y, z
"""


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 40), st.integers(0, 70), st.integers(1, 40))
def test_any_size_with_one_kernel(m, k, n) -> None:
    if not HELD:
        HELD.append(Hosted(ANY_SIZE))
    w = torch.randn(n, k) / max(1, k) ** 0.5
    HELD[0](torch.randn(m, k), w, torch.randn(n), rtol=1e-4, atol=1e-4)


HELD: list[Hosted] = []


def test_matmul_with_batches_and_vectors() -> None:
    run = Hosted(
        """
def graph(a: f32[3, 20, 33], b: f32[3, 33, 24], c: f32[33, 24], d: f32[33], e: f32[2, 1, 20, 33]):
    y0 = matmul(a, b)
    y1 = matmul(a, c)
    y2 = permute(b, dims=(0, 2, 1))
    y3 = matmul(y2, d)
    y4 = matmul(d, c)
    y5 = matmul(d, d)
    y6 = matmul(e, b)
    y7 = slice(a, dim=2, start=5, size=20)
    y8 = slice(y7, dim=0, start=1, size=2)
    y9 = slice(c, dim=0, start=3, size=20)
    y10 = matmul(y8, y9)
    return y0, y1, y3, y4, y5, y6, y10
""", steps=7
    )  # fmt: skip
    shapes = ((3, 20, 33), (3, 33, 24), (33, 24), (33,), (2, 1, 20, 33))
    run(*map(torch.randn, shapes))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_one_row_and_a_few(dtype) -> None:
    """Long sums of few rows are added lane by lane."""
    text = f"""
def graph(x: {dtype}[ROWS, 1000], w: {dtype}[50, 1000], v: {dtype}[1000, 50], b: {dtype}[50]):
    y = linear(x, w, b)
    z = matmul(x, v)
    return y, z
"""
    for rows in (1, 3):
        run = Hosted(text.replace("ROWS", str(rows)), steps=2)
        shapes = ((rows, 1000), (50, 1000), (1000, 50), (50,))
        run(*((torch.randn(s) / 5).to(TYPES[dtype]) for s in shapes), **loose(dtype))


GATED = "x: {d}[M, 72], g: {d}[50, 72], u: {d}[50, 72], b: {d}[50]"
GATE = ("h = linear(x, g, b)", "s = silu(h)", "z = linear(x, u)", "y = mul(s, z)")


def test_a_gated_pair_is_one_kernel() -> None:
    run = Hosted(fused(GATED.format(d="f16"), *GATE), steps=1)
    for m in (1, 33, 70):
        shapes = ((m, 72), (50, 72), (50, 72), (50,))
        run(*((torch.randn(s) / 3).half() for s in shapes), **loose("f16"))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_ops_before_a_product_are_computed_in_its_kernel(dtype) -> None:
    """exp(0) is 1: what is beyond the depth must not be added."""
    arguments = f"x: {dtype}[5, 70], w: {dtype}[50, 70], s: {dtype}[5, 1], t: {dtype}[70]"
    lines = ("p = exp(x)", "q = mul(p, s)", "r = add(q, t)", "h = linear(r, w)", "y = mul(h, s)")
    run = Hosted(fused(arguments, *lines), steps=1)
    given = torch.randn(5, 70), torch.randn(50, 70) / 8, torch.randn(5, 1), torch.randn(70)
    run(*(t.to(TYPES[dtype]) for t in given), **(loose(dtype) or {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.parametrize("pair", [False, True])
def test_parts_of_the_depth_are_summed_in_order(monkeypatch, pair) -> None:
    scheduled(monkeypatch, splits=4)
    if pair:
        run, shapes = Hosted(fused(GATED.format(d="f32"), *GATE), steps=2), ((50, 72), (50, 72))
        run(torch.randn(33, 72), *(torch.randn(s) / 8 for s in shapes), torch.randn(50))
        return
    lines = ("h = linear(x, w, b)", "g = gelu(h)", "y = add(g, z)")
    arguments = "x: f32[M, 300], w: f32[50, 300], b: f32[50], z: f32[M, 50]"
    run = Hosted(fused(arguments, *lines), steps=2)
    w = torch.randn(50, 300) / 17
    given = (torch.randn(33, 300), w, torch.randn(50), torch.randn(33, 50))
    (first,), (again,) = run(*given), run(*given)
    assert torch.equal(first, again)


@pytest.mark.parametrize("blocks", [{"programs": 3}, {"group": 1}, {"rows": 16, "stages": 4}])
def test_schedules_change_nothing(monkeypatch, blocks) -> None:
    scheduled(monkeypatch, **{"rows": 32, "columns": 32, "warps": 2, **blocks})
    arguments = "x: bf16[2, M, 40], w: bf16[2, 40, 50], z: bf16[2, M, 50]"
    run = Hosted(fused(arguments, "h = matmul(x, w)", "y = add(h, z)"), steps=1)
    for m in (1, 75, 300):
        shapes = ((2, m, 40), (2, 40, 50), (2, m, 50))
        run(*((torch.randn(s) / 3).bfloat16() for s in shapes), **loose("bf16"))


def test_nothing_to_add_and_nothing_to_store() -> None:
    text = """
def graph(x: f32[M, 0], w: f32[20, 0], b: f32[20], v: f32[0, 24], a: f32[2, 16, 24], c: f32[24, 0]):
    y0 = linear(x, w, b)
    y1 = permute(a, dims=(0, 2, 1))
    y2 = matmul(v, y1)
    y3 = matmul(a, c)
    return y0, y2, y3
"""
    shapes = ((5, 0), (20, 0), (20,), (0, 24), (2, 16, 24), (24, 0))
    Hosted(text)(*map(torch.randn, shapes))


def test_operands_that_stand_still() -> None:
    """Rows and columns that are one and the same in memory."""
    text = """
def graph(x: f32[1, 40], w: f32[24, 1], z: bf16[1, 40], v: bf16[24, 40]):
    y0 = expand(x, to=(20, 40))
    y1 = expand(w, to=(24, 40))
    y2 = linear(y0, y1)
    y3 = expand(z, to=(20, 40))
    y4 = linear(y3, v)
    return y2, y4
"""
    given = torch.randn(1, 40), torch.randn(24, 1), torch.randn(1, 40), torch.randn(24, 40)
    x, w, z, v = given
    Hosted(text)(x, w, z.bfloat16(), v.bfloat16(), rtol=3e-2, atol=3e-2)


def test_float64() -> None:
    text = "def graph(x: f64[33, 70], w: f64[50, 70]):\n    y = linear(x, w)\n    return y,\n"
    Hosted(text)(torch.randn(33, 70).double(), torch.randn(50, 70).double())


@pytest.mark.parametrize("precision, error", [("highest", 1e-6), ("high", 1e-5), ("medium", 1e-2)])
def test_precision_of_float32(precision, error) -> None:
    text = "def graph(x: f32[33, 72], w: f32[40, 72]):\n    y = linear(x, w)\n    return y,\n"
    x, w = torch.randn(33, 72), torch.randn(40, 72)
    (got,) = Hosted(text, precision)(x, w, rtol=0.1, atol=0.1)
    want = x.double() @ w.double().T
    relative = (got - want).norm() / want.norm()
    assert relative < error
    if precision == "medium":
        assert relative > 1e-5  # the products really are shorter


def test_nan_and_infinity_stay_in_their_rows() -> None:
    text = "def graph(x: f32[3, 5], w: f32[4, 5]):\n    y = linear(x, w)\n    return y,\n"
    x = torch.randn(3, 5)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    Hosted(text)(x, torch.randn(4, 5))


# ------------------------------------------------------------------ what is refused


def refusal(arguments: str, *lines: str) -> str:
    (node,) = (n for n in parse(fused(arguments, *lines)).nodes if n.name == "fused")
    answer = GPU.claim(node)
    assert isinstance(answer, No), "it was taken"
    return str(answer)


def test_refusals_have_reasons() -> None:
    x = "x: f32[200, 40], w: f32[600, 40]"
    assert "too many tiles" in refusal(x, "a = exp(x)", "y = linear(a, w)")
    two = "x: f32[8, 40], z: f32[8, 40], w: f32[40, 40]"
    assert "two products" in refusal(two, "a = linear(x, w)", "b = linear(z, w)", "y = add(a, b)")
    again = ("a = exp(x)", "h = linear(a, w)", "y = add(h, a)")
    assert "also read after" in refusal("x: f32[8, 40], w: f32[40, 40]", *again)
    weight = ("a = exp(w)", "y = linear(x, a)")
    assert "reads first" in refusal("x: f32[8, 40], w: f32[40, 40]", *weight)
    text = "def graph(x: i32[8, 40], w: i32[40, 40]):\n    y = matmul(x, w)\n    return y,\n"
    assert "floats only" in str(GPU.claim(parse(text).nodes[0]))


# ------------------------------------------------------------------ schedules

SHAPES = {
    "decode": Problem(1, 1, 4096, 4096, kind="bf16"),
    "square": Problem(1, 4096, 4096, 4096, kind="bf16", reads=1),
    "exact": Problem(1, 512, 1024, 1024, kind="f32"),
    "long": Problem(1, 16, 64, 65536, kind="bf16"),
    "window": Problem(1, 57600, 52, 52, taps=9, kind="f16"),
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
@pytest.mark.parametrize("problem", SHAPES.values(), ids=list(SHAPES))
def test_schedules_are_ordered_and_fit(device, problem) -> None:
    found = schedules(problem, device)
    assert found and len(set(map(str, (c.schedule for c in found)))) == len(found)
    assert all(c.shared <= device.shared and c.registers <= 255 for c in found)
    assert found[0].seconds <= 1.02 * min(c.seconds for c in found)
    assert all("bound by" in line for line in describe(found))


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_every_problem_has_a_schedule(device) -> None:
    for kind in device.peak:
        for sums, reads, prepared in ((1, 0, False), (2, 3, False), (2, 3, True)):
            for rows, deep in ((1, 50), (7, 50), (5000, 50), (5000, 3)):
                p = Problem(1, rows, 33, deep, kind=kind, sums=sums, reads=reads, prepared=prepared)
                assert schedules(p, device)
        for columns, deep, samples, pooled in ((9, 20, 0, 49), (64, 3, 0, 4), (52, 16, 1, 1)):
            p = Problem(1, 1428, columns, deep, 9, kind, samples=samples, pooled=pooled)
            assert schedules(p, device)
    for kind, chained in (("f16", 52), ("bf16", 3)):
        assert schedules(Problem(1, 57600, 52, 52, 9, kind, reads=2, chained=chained), device)
    with pytest.raises(UnsupportedError, match="no i8 products"):
        schedules(Problem(1, 64, 64, 64, kind="i8"), device)


def test_persistent_ones_are_there_to_be_measured() -> None:
    found = schedules(SHAPES["square"], ANY)
    loops = [dict(c.schedule.blocks)["programs"] for c in found]
    assert loops[0] == 0 and any(loops)


def test_shapes_get_different_schedules() -> None:
    blocks = {name: dict(schedules(p, ANY)[0].schedule.blocks) for name, p in SHAPES.items()}
    assert blocks["decode"]["dot"] == 0 and blocks["square"]["dot"] == 1
    assert blocks["long"]["splits"] > 1 and blocks["square"]["splits"] == 1
    assert blocks["square"]["rows"] * blocks["square"]["columns"] >= 64 * 128
    assert schedules(SHAPES["square"], GFX942)[0].shared <= 64 << 10


def test_a_product_that_amd_lacks_stays_exact(monkeypatch) -> None:
    text = "def graph(x: f32[33, 72], w: f32[40, 72]):\n    y = linear(x, w)\n    return y,\n"
    monkeypatch.setattr(GPU, "device", GFX942, raising=False)
    assert 'input_precision="ieee"' in kernels(text, "high")[0].source


# ------------------------------------------------------------------ what compilers make of them


def linear_of(rows: int | str, depth: int, columns: int, dtype: str) -> str:
    arguments = (
        f"x: {dtype}[{rows}, {depth}], w: {dtype}[{columns}, {depth}], b: {dtype}[{columns}], "
        f"z: {dtype}[{rows}, {columns}]"
    )
    return fused(arguments, "h = linear(x, w, b)", "g = gelu(h)", "y = add(g, z)")


def gated_of(rows: int, depth: int, columns: int, dtype: str) -> str:
    w = f"{dtype}[{columns}, {depth}]"
    arguments = f"x: {dtype}[{rows}, {depth}], g: {w}, u: {w}"
    return fused(arguments, "h = linear(x, g)", *GATE[1:])


FULL = {
    "llama": linear_of(512, 4096, 4096, "bf16"),
    "llama, any length": linear_of("M", 1024, 1024, "bf16"),
    "llama, decoding": linear_of(1, 4096, 4096, "bf16"),
    "llama, gated": gated_of(512, 4096, 11008, "bf16"),
    "llama, float32": linear_of(512, 1024, 1024, "f32"),
    "bert": linear_of(384, 768, 3072, "f16"),
    "bert, float32": linear_of(384, 768, 768, "f32"),
    "dit": linear_of(256, 1152, 4608, "bf16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", FULL)
def test_full_sizes_use_tensor_cores_and_spill_nothing(name, to) -> None:
    made = kernels(FULL[name])
    assert made
    for kernel in made:
        used = usage(kernel, to)
        assert used.spilled == 0, (kernel.source, used)
    exact = "float32" in name and not to.startswith("hip")  # their matrix cores take float32
    if not exact and "decoding" not in name:
        assert usage(made[0], to).tensor_cores > 0


def test_tensor_cores_of_each_generation() -> None:
    """64 rows of four warps reach each generation's own instructions."""
    (kernel,) = kernels(linear_of(512, 256, 256, "bf16"))
    assert all(usage(kernel, to).tensor_cores > 0 for to in ("cuda:sm_80", "hip:gfx942"))


def test_plans_say_which_schedule_and_why() -> None:
    plan = make_plan(parse(linear_of(512, 256, 256, "bf16")), Options(), GPU)
    (step,) = plan.steps
    assert "bound by" in step.launch.note
