"""Plans that run: memory and aliasing, weights, threads, leaks, fallbacks, errors."""

from __future__ import annotations

import gc
import os
import re
import threading

import pytest
import torch

from effc.backends import cpu, find_backend
from effc.codegen.build import BuildError
from effc.codegen.toolchain import MissingToolchain
from effc.ir import InputError, interpret, parse

# ------------------------------------------------------------------ who shares memory


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


VIEWS = """
def graph(x: f32[4, 6]):
    y0 = slice(x, dim=0, start=1, size=2)
    y1 = reshape(y0, to=(12,))
    y2 = permute(x, dims=(1, 0))
    y3 = exp(x)
    y4 = slice(y3, dim=1, start=0, size=3)
    y5 = slice(y3, dim=1, start=3, size=3)
    y6 = neg(y3)
    return y1, y2, y4, y5, y6, x
"""


def test_views_of_inputs_are_views_and_results_are_fresh(compiled) -> None:
    run = compiled(VIEWS)
    x = torch.randn(4, 6)
    flat, turned, left, right, negative, same = run(x)
    assert shares(flat, x) and shares(turned, x) and same is x
    assert flat._base is x and turned._base is x
    assert shares(left, right) and not shares(left, negative) and not shares(left, x)
    x.zero_()
    assert not flat.any() and not turned.any()


def test_a_later_call_writes_to_nothing_a_caller_has(compiled) -> None:
    run = compiled(VIEWS)
    kept = run(torch.randn(4, 6))
    first = [t.clone() for t in kept]
    for _ in range(3):
        run(torch.randn(4, 6))
    for a, b in zip(kept, first, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_never_written(compiled) -> None:
    run = compiled(VIEWS)
    x = torch.randn(6, 8)[1:5, :6]
    before = x.clone()
    run(x)
    assert torch.equal(x, before)


MERGED = """
def graph(x: f32[8]):
    y0 = exp(x)
    return y0, y0, x, x
"""
BEFORE = """
def graph(x: f32[8]):
    y0 = exp(x)
    y1 = exp(x)
    y2 = copy(x)
    return y0, y1, x, y2
"""


def test_what_a_pass_merged_is_taken_apart_again() -> None:
    """Two results that eager computes apart do not become one memory."""
    x = torch.randn(8)
    a, b, c, d = find_backend("cpu").compile(parse(MERGED)).bind()([x])
    assert a is b and c is d
    executable = find_backend("cpu").compile(parse(MERGED), {"captured": parse(BEFORE)})
    a, b, c, d = executable.bind()([x])
    assert not shares(a, b) and c is x and not shares(d, x)


def test_a_fallback_that_returns_its_operand_is_cloned() -> None:
    graph = parse(
        """
def graph(x: f32[4, 4]):
    y0: f32[4, 4] = aten.contiguous.default(x)
    y1 = exp(x)
    y2: f32[4, 4] = aten.contiguous.default(y1)
    y3 = neg(y2)
    y4: f32[4, 4] = aten.t.default(x)
    y5: f32[4, 4] = aten.dropout.default(x, 0.5, False)
    return y0, y2, y3, y4, y5
"""
    )
    bound = find_backend("cpu").compile(graph).bind()
    x = torch.randn(4, 4)
    for _ in range(2):
        same, power, negative, turned, dropped = bound([x])
        assert shares(same, x) and shares(turned, x)  # their schemas say so
        assert not shares(dropped, x) and torch.equal(dropped, x)
        assert torch.allclose(power, x.exp()) and torch.equal(negative, -power)
        assert not shares(power, negative)


def test_constants_that_are_results_are_copies_and_weights_are_themselves() -> None:
    graph = parse(
        """
def graph(x: f32[2]):
    w0: f32[2] = weight("w", digest="")
    y0 = mul(w0, 2)
    y1: f32[2] = full(to=(2,), value=1.0, dtype_=f32)
    return y0, y1, w0
"""
    )
    w = torch.randn(2)
    bound = find_backend("cpu").compile(graph).bind({"w": w})
    first, second = bound([torch.randn(2)]), bound([torch.randn(2)])
    assert torch.equal(first[0], w * 2) and shares(first[2], w)
    assert not shares(first[0], second[0]) and not shares(first[1], second[1])


# ------------------------------------------------------------------ weights

FOLDED = """
def graph(x: f32[N, 4]):
    w0: f32[4, 4] = weight("w", digest="")
    w1: f32[4] = weight("b", digest="")
    y0 = mul(w0, 2.0)
    y1 = permute(y0, dims=(1, 0))
    y2 = linear(x, y1, w1)
    y3 = add(y2, w1)
    return y3,
"""


def test_one_executable_serves_several_weight_sets() -> None:
    graph = parse(FOLDED)
    executable = find_backend("cpu").compile(graph)
    assert [e.node.name for e in executable.launches] == ["linear", "add"]  # the rest is folded
    sets = [{"w": torch.randn(4, 4), "b": torch.randn(4)} for _ in range(3)]
    bounds = [executable.bind(s) for s in sets]
    x = torch.randn(5, 4)
    for bound, s in zip(bounds, sets, strict=True):
        want = interpret(parse(FOLDED, weights=s), [x])[0]
        torch.testing.assert_close(bound([x])[0], want)


def test_weights_that_misfit_are_refused() -> None:
    executable = find_backend("cpu").compile(parse(FOLDED))
    with pytest.raises(InputError, match="no values for weight 'w'"):
        executable.bind({"b": torch.randn(4)})
    with pytest.raises(InputError, match=r"weight 'b' must be f32\[4\], got torch.float32\[5\]"):
        executable.bind({"w": torch.randn(4, 4), "b": torch.randn(5)})


# ------------------------------------------------------------------ calls

MIXED = """
def graph(x: f32[N, 16]):
    y0 = exp(x)
    y1: f32[N, 16] = aten.cumsum.default(y0, 1)
    y2 = softmax(y1, dim=1)
    y3 = add(y2, y0)
    y4 = permute(y3, dims=(1, 0))
    y5 = sum(y4, dims=(1,))
    return y3, y5
"""


def test_many_threads_call_one_bound() -> None:
    graph = parse(MIXED)
    bound = find_backend("cpu").compile(graph).bind()
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(40):
            x = torch.randn(1 + (seed + i) % 5, 16, generator=generator)
            for got, want in zip(bound([x]), interpret(graph, [x]), strict=True):
                if not torch.allclose(got, want, atol=1e-5):
                    wrong.append(f"thread {seed}, call {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_calls_keep_no_memory() -> None:
    bound = find_backend("cpu").compile(parse(MIXED)).bind()
    xs = [torch.randn(n, 16) for n in range(1, 40)]  # more sizes than frames are kept for
    for x in xs:
        bound([x])
    for _ in range(500):
        bound([xs[0]])
    gc.collect()
    before = resident()
    for i in range(10_000):
        bound([xs[0]])
        if i % 50 == 0:
            bound([xs[i // 50 % 39]])
    gc.collect()
    assert resident() - before < 8 << 20


def test_a_failed_call_leaves_the_next_one_right() -> None:
    graph = parse(MIXED)
    bound = find_backend("cpu").compile(graph).bind()
    x = torch.randn(3, 16)
    want = bound([x])
    with pytest.raises(InputError, match=r"must be f32\[N, 16\], got torch.float64"):
        bound([x.double()])
    with pytest.raises(InputError, match=r"got size 5 in dimension 1"):
        bound([torch.randn(3, 5)])
    with pytest.raises(InputError, match="takes 1 inputs, got 2"):
        bound([x, x])
    with pytest.raises(InputError, match="must be"):
        bound([3])
    for a, b in zip(bound([x]), want, strict=True):
        assert torch.equal(a, b)


def test_gradient_mode_is_left_as_it_was(compiled) -> None:
    run = compiled(FOLDED.replace("w0: f32[4, 4] = weight(\"w\", digest=\"\")", "w0: f32[4, 4] = full(to=(4, 4), value=0.5, dtype_=f32)")
                   .replace("w1: f32[4] = weight(\"b\", digest=\"\")", "w1: f32[4] = full(to=(4,), value=0.5, dtype_=f32)"))  # fmt: skip
    assert torch.is_grad_enabled()
    (out,) = run.bound([torch.randn(2, 4, requires_grad=True)])
    assert torch.is_grad_enabled() and not out.requires_grad


def test_sizes_that_turn_out_to_broadcast_are_interpreted() -> None:
    graph = parse(
        """
def graph(x: f32[N, 3], y: f32[M, 3]):
    y0 = add(x, y)
    return y0,
"""
    )
    bound = find_backend("cpu").compile(graph).bind()
    for n, m in ((4, 4), (4, 1), (1, 1), (2, 2)):
        x, y = torch.randn(n, 3), torch.randn(m, 3)
        assert torch.equal(bound([x, y])[0], x + y)


def test_memory_is_reused_between_values_that_do_not_live_together() -> None:
    graph = parse(
        """
def graph(x: f32[1024]):
    y0 = exp(x)
    y1 = permute(y0, dims=(0,))
    y2 = flip(y1, dims=(0,))
    y3 = flip(y2, dims=(0,))
    y4 = flip(y3, dims=(0,))
    y5 = flip(y4, dims=(0,))
    y6 = neg(y5)
    return y6,
"""
    )
    executable = find_backend("cpu").compile(graph)
    assert executable.memory == 2 * 4096  # two at a time, of five
    x = torch.randn(1024)
    torch.testing.assert_close(executable.bind()([x])[0], -x.exp())


# ------------------------------------------------------------------ fallbacks and plans


def test_fallbacks_have_reasons() -> None:
    graph = parse(
        """
def graph(x: f32[4], z: c64[4], n: i64[4]):
    y0: f32[4] = aten.cumsum.default(x, 0)
    y1 = mul(z, 2)
    y2 = div_floor(n, n)
    y3: (f32[4], i64[4]) = aten.sort.default(y0)
    y4 = item(y3, index=0)
    y5 = item(y3, index=1)
    return y1, y2, y4, y5
"""
    )
    executable = find_backend("cpu").compile(graph)
    assert {n.name: str(why) for n, why in executable.fallbacks if n.name != "aten"} == {
        "mul": "c64 is not taken",
        "div_floor": "torch raises on a zero among integer divisors",
    }
    assert "op aten.cumsum.default has no kernel" in executable.text
    inputs = [torch.randn(4), torch.randn(4, dtype=torch.complex64), torch.arange(1, 5)]
    for got, want in zip(executable.bind()(inputs), interpret(graph, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_results_that_are_not_all_tensors() -> None:
    """What torch leaves out is kept as None; only the others are read."""
    graph = parse(
        """
def graph(g: f32[1, 2, 3, 3], x: f32[1, 2, 3, 3], w: f32[2, 2, 1, 1]):
    y0: (f32[1, 2, 3, 3], (), f32[2]) = aten.convolution_backward.default(g, x, w, (2,), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, True))
    y1 = item(y0, index=0)
    y2 = relu(y1)
    y3 = item(y0, index=2)
    return y2, y3
"""
    )
    inputs = [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1)]
    got = find_backend("cpu").compile(graph).bind()(inputs)
    for g, w in zip(got, interpret(graph, inputs), strict=True):
        torch.testing.assert_close(g, w)


def test_without_a_compiler_everything_runs_through_aten(monkeypatch) -> None:
    missing = MissingToolchain("no C++ compiler found", "install one")
    monkeypatch.setattr(cpu, "find_toolchain", lambda: missing)
    graph = parse(MIXED)
    executable = find_backend("cpu").compile(graph)
    assert not executable.kernels
    assert all(
        str(why).startswith("no C++ compiler: no C++ compiler found; fix: install one")
        for n, why in executable.fallbacks
        if n.name != "aten"
    )
    x = torch.randn(3, 16)
    for got, want in zip(executable.bind()([x]), interpret(graph, [x]), strict=True):
        torch.testing.assert_close(got, want)


def test_kernels_that_do_not_build_are_named_and_torch_runs_instead(monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise BuildError("kernel rows_1: the C++ compiler failed")

    monkeypatch.setattr(cpu, "build_many", broken)
    with pytest.warns(RuntimeWarning, match="the C\\+\\+ compiler failed"):
        executable = find_backend("cpu").compile(parse(MIXED))
    assert "kernels do not build" in str(executable.fallbacks[0][1])
    x = torch.randn(2, 16)
    executable.bind()([x])


def test_kernels_can_be_switched_off() -> None:
    executable = find_backend("cpu").compile(parse(MIXED), {"kernels": False})
    assert not executable.kernels
    x = torch.randn(2, 16)
    for got, want in zip(executable.bind()([x]), interpret(parse(MIXED), [x]), strict=True):
        torch.testing.assert_close(got, want)


PLAN = """
def graph(x: f32[N, 8, 4, 4], ids: i64[N]):
    w0: f32[8, 8, 3, 3] = weight("conv.weight", digest="")
    w1: f32[9, 8] = weight("table", digest="")
    y0 = relu(x)
    def body(x: f32[N, 8, 4, 4], w: f32[8, 8, 3, 3], z: f32[N, 8, 4, 4]):
        y0 = conv2d(x, w, padding=(1, 1))
        y1 = add(y0, z)
        y2 = relu(y1)
        return y2,
    y1: f32[N, 8, 4, 4] = fused((y0, w0, x), body=body)
    y2 = mean(y1, dims=(2, 3))
    y3 = embedding(w1, ids)
    y4 = add(y2, y3)
    y5: f32[N, 8] = aten.cumsum.default(y4, 1)
    y6 = layer_norm(y5)
    y7 = permute(x, dims=(0, 2, 3, 1))
    return y6, y7
"""


def test_a_plan_as_text(golden) -> None:
    text = find_backend("null").compile(parse(PLAN)).text
    assert re.sub("_[0-9a-f]{8}", "_#", text) == golden  # kernels are named by their text


def test_kernel_text(golden) -> None:
    kernels = find_backend("null").compile(parse(PLAN)).kernels
    assert "\n".join(kernels.values()) == golden


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (find_backend("null").compile(parse(PLAN)) for _ in range(2))
    assert first.kernels == second.kernels and first.text == second.text
