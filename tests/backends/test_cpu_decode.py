"""A step of decoding: products with few rows, states that are updated in place, attention over a
cache, and all of it as one native call."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from effc.backends import find_backend
from effc.backends.cpu import products
from effc.backends.cpu.features import CpuFeatures, detect
from effc.ir import InputError, interpret, parse

from .conftest import close

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CORE = {"f32": "effc_linear", "bf16": "effc_linear_of_bf16", "f16": "effc_linear_of_f16"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(params=list(DTYPES))
def kind(request, monkeypatch) -> str:
    """Each element type, on a CPU without instructions for 16-bit floats."""
    monkeypatch.setattr(products, "_instructions", lambda dtype: False)
    return request.param


def calls(executable) -> list[str]:
    return [e.call for e in executable.launches]


# ------------------------------------------------------------------ few rows

LINEAR = """
def graph(x: {0}[M, L], w: {0}[N, K], v: {0}[K, N], b: {0}[N], z: {0}[M, N]):
    y0 = slice(x, dim=1, start=0, size=K)
    def body(x: {0}[M, K], w: {0}[N, K], b: {0}[N], z: {0}[M, N]):
        y0 = linear(x, w, b)
        y1 = silu(y0)
        y2 = mul(y1, z)
        return y2,
    y1: {0}[M, N] = fused((y0, w, b, z), body=body)
    y2 = matmul(y0, v)
    y3 = linear(y0, w)
    return y1, y2, y3
"""


@pytest.mark.parametrize(
    "level", [pytest.param("default", marks=pytest.mark.slow), "avx2", "avx512"]
)
def test_products_with_few_rows(kind, level, monkeypatch, compiled) -> None:
    """As many rows as tokens of a step, and more; odd sizes; rows that are parts of longer ones."""
    monkeypatch.setenv("EFFC_CPU", level)
    if detect().level != level:
        pytest.skip(f"this CPU has no {level}")
    run = compiled(LINEAR.format(kind))
    assert calls(run.executable) == [CORE[kind]] * 3
    draw, dtype = random.Random(0), DTYPES[kind]
    sizes = [(m, draw.randrange(1, 200), draw.randrange(1, 200)) for m in (*range(10), 33, 100)]
    sizes += [(1, 576, 192), (1, 64, 4500), (3, 129, 1031), (2, 0, 5), (2, 5, 0), (1, 1, 1)]
    for m, k, n in sizes:
        torch.set_num_threads(draw.choice((1, 2, 3)))
        w, v = (torch.randn(s).div(max(1, k) ** 0.5).to(dtype) for s in ((n, k), (k, n)))
        x, b, z = (torch.randn(s).to(dtype) for s in ((m, k + 3), (n,), (m, n)))
        run(x, w, v, b, z)


def test_a_row_of_special_values(kind, compiled, inputs_like) -> None:
    """What is infinite or no number in a row of the weight is so in its result, and in no other."""
    run = compiled(LINEAR.format(kind))
    w, dtype = torch.ones(6, 21), DTYPES[kind]
    w[2, 20], w[4, 3] = float("nan"), float("inf")
    x, z = torch.ones(2, 24, dtype=dtype), torch.ones(2, 6, dtype=dtype)
    run(x, w.to(dtype), w.T.contiguous().to(dtype), z[0], z)


def test_who_multiplies_16_bit_floats(monkeypatch) -> None:
    """The library where it has instructions and rows are many; else our cores."""
    plain = CpuFeatures.has
    text = "def graph(x: bf16[{}, 64], w: bf16[32, 64]):\n    y0 = linear(x, w)\n    return y0\n"
    for has, rows, call in ((False, "M", CORE["bf16"]), (False, 64, CORE["bf16"]),
                            (True, 8, CORE["bf16"]), (True, 9, "torch.linear"),
                            (True, "M", "torch.linear")):  # fmt: skip
        monkeypatch.setattr(
            CpuFeatures, "has",
            lambda cpu, what, has=has: has if what == "avx512_bf16" else plain(cpu, what),
        )  # fmt: skip
        monkeypatch.setattr(products, "amx", lambda: False)
        executable = find_backend("cpu").plan(parse(text.format(rows)))
        assert calls(executable) == [call], (has, rows)


# ------------------------------------------------------------------ attention over a cache


def attention(kind: str, mask: str, causal: bool, depth: int, results: int) -> str:
    given = {"none": "", "added": f", m: {kind}[1, 6, n, C]", "kept": ", m: bool[B, 1, n, C]"}[mask]
    return f"""
def graph(q: {kind}[B, 6, n, {depth}], k: {kind}[B, C, 2, {depth}], v: {kind}[B, 2, C, {results}], past: i64[()]{given}):
    y0 = permute(k, dims=(0, 2, 1, 3))
    y1 = attention(q, y0, v{", mask=m" if mask != "none" else ""}, causal={causal}, gqa=True, past=past)
    return y1
"""


@pytest.mark.parametrize("mask, causal, depth, results", [
    ("none", True, 64, 64), ("none", False, 20, 24), ("added", True, 7, 33), ("kept", True, 16, 16),
])  # fmt: skip
def test_attention_over_a_cache(kind, mask, causal, depth, results, compiled) -> None:
    """Few and many queries over a cache that is full, nearly empty or between; heads in memory
    order or inside; and no number where no key was written yet."""
    run = compiled(attention(kind, mask, causal, depth, results))
    core = {"f32": "", "bf16": "_of_bf16", "f16": "_of_f16"}[kind]
    assert calls(run.executable) == [f"effc_attention{core}"]
    draw, dtype = random.Random(1), DTYPES[kind]
    for n in (1, 1, 1, 2, 3, 5, 9, 40, 200, 0):
        past = draw.choice((0, 1, 31, 32, 33, draw.randrange(700)))
        room, batch = draw.choice((0, 1, 300)), draw.choice((1, 2))
        torch.set_num_threads(draw.choice((1, 2, 5)))
        size = past + n + room
        q, k, v = (torch.randn(s).to(dtype) for s in (
            (batch, 6, n, depth), (batch, size, 2, depth), (batch, 2, size, results)))  # fmt: skip
        k[:, past + n :], v[:, :, past + n :] = float("nan"), float("nan")
        masks = {
            "none": [], "added": [torch.randn(1, 6, n, size).to(dtype)],
            "kept": [torch.rand(batch, 1, n, size) < 0.7],
        }[mask]  # fmt: skip
        for m in masks:
            m[..., past + n :] = True if mask == "kept" else float("nan")
        run(q, k, v, torch.tensor(past), *masks)
        for wrong in (-1, room + past + 1):
            with pytest.raises(IndexError):
                run.bound((q, k, v, torch.tensor(wrong), *masks))


def test_threads_share_the_keys_of_a_head(compiled) -> None:
    """However the keys are split, with all of a part masked away too."""
    run = compiled(attention("f32", "kept", True, 32, 32))
    size = 900
    q, k, v = (torch.randn(s) for s in ((1, 6, 1, 32), (1, size, 2, 32), (1, 2, size, 32)))
    seen = torch.zeros(1, 1, 1, size, dtype=torch.bool)
    seen[..., 500:700] = True
    for count in range(1, 9):
        torch.set_num_threads(count)
        run(q, k, v, torch.tensor(size - 1), seen)
    for nothing in run.bound((q, k, v, torch.tensor(size - 1), torch.zeros_like(seen))):
        assert not nothing.any()


# ------------------------------------------------------------------ states


def stepped(text: str, *inputs: torch.Tensor, kernels: bool = True) -> list[str]:
    """Run a graph; states come back as the tensors that were given, with their new values. What was
    called."""
    graph = parse(text)
    executable = find_backend("cpu").compile(graph, {"kernels": kernels})
    want = interpret(graph, [x.clone() for x in inputs])
    got = executable.bind()(inputs)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        close(g, w, f"output {i}")
    given = [x for node, x in zip(graph.inputs, inputs, strict=True) if node.state]
    first = len(got) - len(given)
    assert all(a is b for a, b in zip(got[first:], given, strict=True))
    taken = {x.untyped_storage()._cdata for x in given}
    assert not any(o.untyped_storage()._cdata in taken for o in got[:first])
    return calls(executable)


APPEND = """
def graph(k: State[{0}[2, H, C, 5]], new: {0}[2, H, n, 5], past: i64[()]):
    y0 = update(k, new, past, dim=2)
    y1 = sum(y0, dims=(2,))
    return y1, y0
"""


def cache(kind: str, heads: int = 3, size: int = 9) -> torch.Tensor:
    return torch.randn(2, heads, size, 5).to(DTYPES[kind])


@pytest.mark.parametrize("kernels", [True, False])
def test_update_writes_into_the_state(kind, kernels) -> None:
    for n, past in ((1, 0), (1, 8), (4, 5), (9, 0), (0, 9)):
        found = stepped(
            APPEND.format(kind), cache(kind), cache(kind, size=n), torch.tensor(past),
            kernels=kernels,
        )  # fmt: skip
        assert not kernels or [c.split("_")[0] for c in found] == ["update", "rows"]


def test_states_that_lie_otherwise(kind) -> None:
    """A part of a larger cache, rows with others between them, new values that are a view."""
    text, past = APPEND.format(kind), torch.tensor(2)
    new = torch.randn(2, 4, 3, 5).to(DTYPES[kind]).transpose(1, 2)
    stepped(text, cache(kind, 9, 3).transpose(1, 2)[:, :, 1:8], new, past)
    stepped(text, torch.stack([cache(kind)] * 2)[1], new, past)


def test_a_place_outside_the_state(kind) -> None:
    graph = parse(APPEND.format(kind))
    run = find_backend("cpu").compile(graph).bind()
    for past in (-1, 7, 1 << 40):
        k = cache(kind)
        before = k.clone()
        with pytest.raises(IndexError):
            run((k, cache(kind, size=3), torch.tensor(past)))
        assert torch.equal(k, before)


HEAD = (
    "def graph(k: State[f32[2, C, 4]], v: State[f32[2, C, 4]], new: f32[2, n, 4], at: i64[()]):\n"
)


@pytest.mark.parametrize("body, copies", [
    # two updates of one state, one after the other: both in place
    ("y0 = update(k, new, at, dim=1)\n    y1 = update(y0, new, at, dim=1)\n    return y1, v", 0),
    # the old value is read afterwards, itself and by way of a view
    ("y0 = update(k, new, at, dim=1)\n    y1 = mul(k, 2.0)\n    return y1, y0, v", 1),
    ("y0 = permute(k, dims=(1, 0, 2))\n    y1 = update(k, new, at, dim=1)\n"
     "    y2 = relu(y0)\n    return y2, y1, v", 1),
    # the old value, or the new one, is a result
    ("y0 = update(k, new, at, dim=1)\n    return k, y0, v", 1),
    ("y0 = update(k, new, at, dim=1)\n    y1 = relu(y0)\n    return y0, y1, v, y0", None),
    # the new value of one is the old one of the other
    ("return v, k", None),
    ("y0 = update(k, new, at, dim=1)\n    return v, y0", None),
    # a look ahead that nobody keeps
    ("y0 = update(k, new, at, dim=1)\n    y1 = sum(y0, dims=(1,))\n    return y1, k, v", 1),
    # what is written is a part of the state
    ("y0 = slice(k, dim=1, start=1, size=3)\n    y1 = update(k, y0, at, dim=1)\n"
     "    return y1, v", 1),
    # a state that is computed otherwise: a window that slides
    ("y0 = slice(k, dim=1, start=2, size=C - 2)\n    y1 = slice(v, dim=1, start=0, size=2)\n"
     "    y2 = cat((y0, y1), dim=1)\n    return y2, v", None),
    # one value for both
    ("y0 = update(k, new, at, dim=1)\n    return y0, y0", None),
    # an update of a value that is no state
    ("y0 = add(k, v)\n    y1 = update(y0, new, at, dim=1)\n    return y1, k, v", None),
])  # fmt: skip
@pytest.mark.parametrize("kernels", [True, False])
def test_the_old_value_is_there_for_those_who_read_it(body, copies, kernels) -> None:
    k, v, new = torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.randn(2, 2, 4)
    found = stepped(f"{HEAD}    {body}\n", k, v, new, torch.tensor(3), kernels=kernels)
    if kernels and copies is not None:
        assert sum(c.startswith("copy_") and c != "copy_" for c in found) == copies


def test_sizes_that_a_plan_does_not_take() -> None:
    """A size that broadcasts after all: the graph is interpreted, and the state is updated still."""
    text = """
def graph(k: State[f32[M, 4]], z: f32[N, 4]):
    y0 = add(k, z)
    return k, y0
"""
    for rows in (3, 1):
        stepped(text, torch.randn(3, 4), torch.randn(rows, 4))


def test_one_tensor_for_two_states_is_refused() -> None:
    graph = parse(f"{HEAD}    y0 = update(k, new, at, dim=1)\n    return y0, v\n")
    run = find_backend("cpu").compile(graph).bind()
    k, new = torch.zeros(2, 8, 4), torch.ones(2, 2, 4)
    with pytest.raises(InputError, match="inputs k and v are the same memory"):
        run((k, k, new, torch.tensor(0)))
    assert not k.any()
    both = torch.zeros(2, 2, 8, 4)
    run((both[0], both[1], new, torch.tensor(0)))  # parts of one tensor
    empty = torch.zeros(2, 0, 4)
    run((empty, torch.zeros(2, 0, 4), torch.zeros(2, 0, 4), torch.tensor(0)))


# ------------------------------------------------------------------ a whole step

STEP = """
def graph(ids: i64[B, n], past: i64[()], k: State[{0}[B, 2, C, 8]], v: State[{0}[B, 2, C, 8]]):
    w0: {0}[50, 32] = weight("embedding", digest="")
    w1: {0}[32] = weight("norm", digest="")
    w2: {0}[64, 32] = weight("qkv", digest="")
    w3: {0}[32, 32] = weight("out", digest="")
    w4: f32[4] = weight("frequencies", digest="")
    y0 = embedding(w0, ids)
    y1 = rms_norm(y0, w1)
    y2 = linear(y1, w2)
    y3 = reshape(y2, to=(B, n, 8, 8))
    y4 = permute(y3, dims=(0, 2, 1, 3))
    a0 = arange(size=n, dtype_=i64)
    a1 = add(a0, past)
    a2 = cast(a1, dtype_=f32)
    a3 = reshape(a2, to=(1, 1, n, 1))
    a4 = mul(a3, w4)
    a5 = cat((a4, a4), dim=3)
    a6 = cos(a5)
    a7 = sin(a5)
    a8 = cast(a6, dtype_={0})
    a9 = cast(a7, dtype_={0})
    y5 = slice(y4, dim=1, start=0, size=6)
    y6 = rope(y5, a8, a9)
    y7 = slice(y6, dim=1, start=0, size=4)
    y8 = slice(y6, dim=1, start=4, size=2)
    y9 = slice(y4, dim=1, start=6, size=2)
    k1 = update(k, y8, past, dim=2)
    v1 = update(v, y9, past, dim=2)
    z0 = attention(y7, k1, v1, causal=True, gqa=True, past=past)
    z1 = permute(z0, dims=(0, 2, 1, 3))
    z2 = reshape(z1, to=(B, n, 32))
    def body(x: {0}[B, n, 32], w: {0}[32, 32], r: {0}[B, n, 32]):
        y0 = linear(x, w)
        y1 = add(r, y0)
        return y1,
    z3: {0}[B, n, 32] = fused((z2, w3, y0), body=body)
    z4 = rms_norm(z3, w1)
    z5 = linear(z4, w0)
    return z5, k1, v1
"""


def test_a_step_is_one_native_call(kind) -> None:
    """Every node has a kernel, nothing comes between them, and no step plans anew; and the tokens
    one by one give what they give together."""
    dtype, graph = DTYPES[kind], parse(STEP.format(kind))
    weights = {w.key: torch.randn(w.shape).to(w.dtype.torch) / 4 for w in graph.weights}
    executable = find_backend("cpu").compile(graph)
    assert not executable.fallbacks
    assert {e.segment for e in executable.launches} == {0}
    run = executable.bind(weights)
    whole = graph.substitute(
        {w: type(w).holding(w.key, weights[w.key], w.of) for w in graph.weights}
    )
    ids, size = torch.randint(50, (2, 12)), 20

    def states() -> list[torch.Tensor]:
        return [torch.full((2, 2, size, 8), float("nan"), dtype=dtype) for _ in range(2)]

    want, *_ = interpret(whole, (ids, torch.tensor(0), *states()))
    held = states()
    for i in range(12):
        one, *new = run((ids[:, i : i + 1], torch.tensor(i), *held))
        close(one, want[:, i : i + 1], f"token {i}", rtol=3e-2, atol=3e-2)
        assert all(a is b for a, b in zip(new, held, strict=True))
    assert run._made == 1
    together, *new = run((ids, torch.tensor(0), *states()))
    close(together, want, "prefill", rtol=3e-2, atol=3e-2)
    for a, b in zip(new, held, strict=True):
        close(a[:, :, :12], b[:, :, :12], "cache", rtol=3e-2, atol=3e-2)
