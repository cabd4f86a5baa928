"""Attention in Triton: values against the ops' references, and what compilers make of the kernels."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import sympy
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.gpu import attention as lowering
from effc.codegen.cpp.loops import Operand
from effc.codegen.triton.attention import Attention, attention
from effc.codegen.triton.attention_schedules import schedules
from effc.codegen.triton.compile import compile_kernels, target
from effc.codegen.triton.kernel import Schedule
from effc.codegen.triton.schedules import ANY, GFX942, SM_80, SM_90, SM_100, Choice
from effc.ir import interpret, parse
from effc.ir.types import f16, f32

from .conftest import close

DEVICES = {"cuda:sm_80": SM_80, "cuda:sm_90": SM_90, "cuda:sm_100": SM_100, "hip:gfx942": GFX942}


@lru_cache
def built(source: str, **options):
    graph = parse(source)
    executable = find_backend("ptx-host").compile(graph, options)
    assert not executable.fallbacks, executable.fallbacks
    return graph, executable, executable.bind()


def check(source: str, *inputs, **options):
    """Runs the graph and compares with the interpreter; gives the executable and its results."""
    graph, executable, bound = built(source, **options)
    results, wanted = bound(inputs), interpret(graph, inputs)
    for i, (got, want) in enumerate(zip(results, wanted, strict=True)):
        close(got, want, f"output {i}")
    return executable, results


def kernels(executable) -> list[str]:
    return [e.call.rpartition("_")[0] for e in executable.launches if e.kind == "kernel"]


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------ values

ANY_SIZES = """
def graph(q: f32[B, 4, N, 20], k: f32[B, 2, M, 20], v: f32[B, 2, M, 12], m: f32[N, M]):
    y0 = attention(q, k, v, m, causal=True, gqa=True, scale=-0.3)
    return y0,
"""


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.integers(0, 70), st.integers(0, 70), st.integers(0, 9))
@example(1, 1, 1, 0)
@example(1, 67, 131, 0)
@example(1, 131, 67, 1)
@example(2, 3, 0, 0)
def test_causal_masked_and_shared_heads_of_any_size(batch, queries, keys, seed) -> None:
    """Rows that see nothing give 0 and a NaN in the mask stays one, as in torch."""
    mask = random(queries, keys, seed=seed)
    if mask.numel():
        mask[0], mask[-1] = -torch.inf, torch.finfo().min
        mask[queries // 2, keys // 2] = torch.nan if seed % 2 else -torch.inf
    q, k, v = random(batch, 4, queries, 20), random(batch, 2, keys, 20), random(batch, 2, keys, 12)
    check(ANY_SIZES, q, k, v, mask)


KEPT = """
def graph(q: bf16[3, N, 16], k: bf16[1, M, 16], v: bf16[3, M, 40], m: bool[3, 1, M]):
    y0 = attention(q, k, v, m)
    return y0,
"""


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 70), st.integers(0, 150))
@example(1, 1)
@example(17, 129)
def test_a_bool_mask_and_broadcast_heads_in_bf16(queries, keys) -> None:
    q, k = random(3, queries, 16, dtype=torch.bfloat16), random(1, keys, 16, dtype=torch.bfloat16)
    v, mask = random(3, keys, 40, dtype=torch.bfloat16), random(3, 1, keys) > 0.4
    mask[0] = False
    check(KEPT, q, k, v, mask)


FOLLOWED = """
def graph(q: f16[B, 6, N, 24], k: f16[B, 2, M, 24], v: f16[B, 2, M, 24], m: f16[B, 1, 1, M], z: f16[24], r: f16[B, 6, N, 24]):
    def body(q: f16[B, 6, N, 24], k: f16[B, 2, M, 24], v: f16[B, 2, M, 24], m: f16[B, 1, 1, M], z: f16[24], r: f16[B, 6, N, 24]):
        y0 = attention(q, k, v, m, gqa=True)
        y1 = mul(y0, z)
        y2 = add(y1, r)
        y3 = relu(y2)
        return y3,
    y0: f16[B, 6, N, 24] = fused((q, k, v, m, z, r), body=body)
    return y0,
"""


def followed(source: str, batch: int, queries: int, keys: int):
    half = torch.float16
    q, r = random(batch, 6, queries, 24, dtype=half), random(batch, 6, queries, 24, dtype=half)
    k, v = random(batch, 2, keys, 24, dtype=half), random(batch, 2, keys, 24, dtype=half)
    mask = random(batch, 1, 1, keys, dtype=half)
    if batch and keys:
        mask[0] = -torch.inf
    inputs = q, k, v, mask, random(24, dtype=half), r
    executable, (first,) = check(source, *inputs)
    assert torch.equal(first, check(source, *inputs)[1][0]), "results repeat exactly"
    return kernels(executable)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(0, 600))
@example(1, 1)
@example(1, 2049)
def test_few_queries_split_the_keys(batch, keys) -> None:
    """What follows is computed where the parts are joined."""
    called = followed(FOLLOWED.replace("N,", "1,"), batch, 1, keys)
    assert called == ["attention_parts", "attention_join"]


def test_what_follows_is_computed_on_the_sums() -> None:
    # Few queries, of which a call may have some or many, have launches of their own.
    names = ["attention_parts", "attention_join", "attention"]
    for queries, keys in ((1, 1), (37, 65), (0, 5)):
        assert followed(FOLLOWED, 2, queries, keys) == names


def test_the_longest_program_and_the_result_in_torchs_order() -> None:
    """A causal product whose blocks see whole tiles, some of a tile, and nothing; [B, N, H, D]."""
    source = """
def graph(q: f16[1, 2, 200, 64], k: f16[1, 2, 150, 64], v: f16[1, 2, 150, 64]):
    y0 = attention(q, k, v, causal=True)
    return y0,
"""
    q, k, v = (random(1, 2, n, 64, dtype=torch.float16, seed=n) for n in (200, 150, 151))
    _, (y,) = check(source, q, k, v[:, :, :150].contiguous())
    assert y.stride() == (200 * 2 * 64, 64, 2 * 64, 1)


def test_operands_as_they_lie_in_memory() -> None:
    """Slices, permutations and an expanded query are read in place, at any offset."""
    source = """
def graph(x: f32[2, 33, 3, 4, 8], e: f32[4, 1, 8]):
    a = slice(x, dim=2, start=0, size=1, step=1)
    a1 = reshape(a, to=(2, 33, 4, 8))
    q = permute(a1, dims=(0, 2, 1, 3))
    b = slice(x, dim=2, start=1, size=1, step=1)
    b1 = reshape(b, to=(2, 33, 4, 8))
    k = permute(b1, dims=(0, 2, 3, 1))
    c = slice(x, dim=2, start=2, size=1, step=1)
    c1 = reshape(c, to=(2, 33, 4, 8))
    v = permute(c1, dims=(0, 2, 1, 3))
    kt = permute(k, dims=(0, 1, 3, 2))
    y0 = attention(q, kt, v)
    r = expand(e, to=(2, 4, 5, 8))
    y1 = attention(r, kt, v)
    return y0, y1
"""
    executable, _ = check(source, random(2, 33, 3, 4, 8), random(4, 1, 8))
    assert kernels(executable) == ["attention"] * 2, "no copies"


def test_not_a_number_and_infinite_scores() -> None:
    source = """
def graph(q: f32[1, 5, 16], k: f32[1, 40, 16], v: f32[1, 40, 16]):
    y0 = attention(q, k, v)
    return y0,
"""
    q, k, v = random(1, 5, 16), random(1, 40, 16), random(1, 40, 16)
    q[0, 0, 0], q[0, 1, 0], q[0, 2] = torch.nan, torch.inf, 1e4
    check(source, q, k, v)


def test_refusals_say_why() -> None:
    text = """
def graph(q: {t}[{lead}3, {d}], k: {t}[{lead}4, {d}], v: {t}[{lead}4, 8]):
    y0 = attention(q, k, v)
    return y0,
"""
    for what, reason in (
        ({"t": "f64", "lead": "", "d": 8}, "f64 has no kernel"),
        ({"t": "f32", "lead": "2, 2, 2, ", "d": 8}, "3 dimensions before the queries"),
        ({"t": "f32", "lead": "", "d": 512}, "head size of 512 is above 256"),
        ({"t": "f32", "lead": "", "d": "D"}, "known only at a call"),
    ):
        node = parse(text.format(**what)).outputs[0]
        answer = lowering.check(node)
        assert not answer and reason in str(answer)


# ------------------------------------------------------------------ over a cache

CACHED = """
def graph(q: {t}[B, 6, {n}, 24], k: {t}[B, 2, C, 24], v: {t}[B, 2, C, 20], {m}p: i64[()]):
    y0 = attention(q, k, v, {given}causal={causal}, gqa=True, past=p)
    return y0,
"""


def cache(batch: int, capacity: int, past: int, new: int, dtype, seed: int):
    """q, k and v, where nothing but what must be read is a number."""
    q = random(batch, 6, new, 24, dtype=dtype, seed=seed)
    k = random(batch, 2, capacity, 24, dtype=dtype, seed=seed + 1)
    v = random(batch, 2, capacity, 20, dtype=dtype, seed=seed + 2)
    k[:, :, past + new :] = v[:, :, past + new :] = torch.nan
    return q, k, v


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(0, 150), st.integers(0, 60), st.integers(0, 9))
@example(1, 0, 0, 0)
@example(1, 63, 0, 1)
@example(2, 64, 1, 2)
@example(1, 2047, 3, 3)
def test_one_query_over_a_cache(batch, past, spare, seed) -> None:
    """Parts of the keys there are, joined; any number of keys is one plan, and one launch's sizes."""
    source = CACHED.format(t="f16", n=1, m="", given="", causal=True)
    inputs = cache(batch, past + 1 + spare, past, 1, torch.float16, seed)
    executable, (first,) = check(source, *inputs, torch.tensor(past))
    assert kernels(executable) == ["attention_parts", "attention_join"]
    assert torch.equal(first, check(source, *inputs, torch.tensor(past))[1][0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(0, 90), st.integers(0, 40), st.integers(0, 60))
@example(1, 0, 1, 0)
@example(1, 17, 0, 3)
@example(2, 64, 7, 0)
@example(1, 1, 40, 20)
def test_a_few_queries_over_a_cache(batch, past, new, spare) -> None:
    """Each sees what lies before it; the mask has the cache's columns, of which some are unused."""
    source = CACHED.format(t="f16", n="N", m="m: f16[N, C], ", given="m, ", causal=True)
    inputs = cache(batch, past + new + spare, past, new, torch.float16, new)
    mask = random(new, past + new + spare, dtype=torch.float16)
    if mask.numel():
        mask[:, 0] = -torch.inf
        mask[:, past + new :] = torch.nan
    check(source, *inputs, mask, torch.tensor(past))


def test_queries_over_a_cache_that_see_all_of_it() -> None:
    """And what follows, in one region with it."""
    source = """
def graph(q: bf16[B, 6, 4, 24], k: bf16[B, 2, C, 24], v: bf16[B, 2, C, 20], m: bool[B, 1, 4, C], p: i64[()], r: bf16[20]):
    def body(q: bf16[B, 6, 4, 24], k: bf16[B, 2, C, 24], v: bf16[B, 2, C, 20], m: bool[B, 1, 4, C], p: i64[()], r: bf16[20]):
        y0 = attention(q, k, v, m, gqa=True, past=p)
        y1 = mul(y0, r)
        return y1,
    y0: bf16[B, 6, 4, 20] = fused((q, k, v, m, p, r), body=body)
    return y0,
"""
    for past in (0, 5, 40):
        inputs = cache(2, 64, past, 4, torch.bfloat16, past)
        r = random(20, dtype=torch.bfloat16)
        check(source, *inputs, random(2, 1, 4, 64) > -1.0, torch.tensor(past), r)


@pytest.mark.parametrize(("past", "new"), [(-1, 1), (10, 1), (2**63 - 1, 1), (-(2**63), 1), (8, 3)])
def test_a_past_that_does_not_fit_raises(past, new) -> None:
    source = CACHED.format(t="f16", n="N", m="m: f16[N, C], ", given="m, ", causal=True)
    inputs = *cache(1, 10, 4, new, torch.float16, 0), torch.zeros(new, 10).half()
    check(source, *inputs, torch.tensor(4))
    with pytest.raises(IndexError):
        built(source)[2]([*inputs, torch.tensor(past)])
    check(source, *inputs, torch.tensor(4))


DECODE = """
def graph(q: f16[1, 4, 1, 16], a: f16[1, 2, 1, 16], b: f16[1, 2, 1, 16], p: i64[()], k: State[f16[1, 2, C, 16]], v: State[f16[1, 2, C, 16]]):
    k1 = update(k, a, p, dim=2)
    v1 = update(v, b, p, dim=2)
    y0 = attention(q, k1, v1, causal=True, gqa=True, past=p)
    return y0, k1, v1
"""


def test_steps_of_a_decoder_write_into_their_cache() -> None:
    """Every step is the same four launches on the same memory; only `p` differs."""
    graph, executable, bound = built(DECODE)
    assert kernels(executable) == ["update", "update", "attention_parts", "attention_join"]
    k, v = (torch.full((1, 2, 40, 16), torch.nan, dtype=torch.float16) for _ in range(2))
    for step in range(40):
        given = [random(1, h, 1, 16, dtype=torch.float16, seed=step + h) for h in (4, 2, 2)]
        inputs = [*given, torch.tensor(step), k, v]
        want = interpret(graph, [x.clone() for x in inputs])
        got = bound(inputs)
        assert got[1].data_ptr() == k.data_ptr() and got[2].data_ptr() == v.data_ptr()
        close(got[0], want[0], f"step {step}")
        for mine, theirs in zip((k, v), want[1:]):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(IndexError):
        bound([*given, torch.tensor(40), k, v])
    assert torch.equal(k, want[1]), "nothing is written past the end"


# ------------------------------------------------------------------ schedules


def problem(dtype=f16, size: int = 64, queries=4096, keys=4096, sharing: int = 1, **more):
    """A causal attention of a transformer, [batch, rows, heads, size] in memory."""
    heads = 8

    def walk(count: int, rows) -> Operand:
        return Operand(dtype, (rows * count * size, size, count * size, 1))

    q, k = walk(heads * sharing, queries), walk(heads, keys)
    made = Attention(2, heads, queries, keys, size, size, q, k, k, sharing=sharing,
                     scale=size**-0.5, causal=queries != 1, **more)  # fmt: skip
    return made, q


def test_every_schedule_of_a_small_problem_computes_the_same() -> None:
    """The ones to choose from differ in time only: the plan is made with each of some of them."""
    source = """
def graph(q: f16[1, 2, 21, 32], k: f16[1, 2, 75, 32], v: f16[1, 2, 75, 32]):
    y0 = attention(q, k, v, causal=True)
    return y0,
"""
    graph = parse(source)
    inputs = [random(1, 2, n, 32, dtype=torch.float16, seed=n) for n in (21, 75, 76)]
    inputs[2] = inputs[2][:, :, :75].contiguous()
    (want,) = interpret(graph, inputs)
    for rows, keys, piece, splits in ((16, 16, 32, 1), (32, 16, 16, 1), (16, 32, 32, 4)):
        blocks = ("rows", rows), ("keys", keys), ("piece", piece), ("splits", splits)
        with pytest.MonkeyPatch.context() as patch:
            choice = Choice(Schedule(2, 2, blocks), 0.0, 0, 0, "asked for")
            patch.setattr(lowering, "schedules", lambda a, device, choice=choice: [choice])
            (got,) = find_backend("ptx-host").compile(graph).bind()(inputs)
        close(got, want, str(blocks))


@pytest.mark.parametrize("precision", ["f16", "highest", "high", "medium"])
def test_schedules_fit_their_device_and_the_best_comes_first(precision) -> None:
    kind = {"dtype": f16} if precision == "f16" else {"dtype": f32, "precision": precision}
    for size in (8, 32, 64, 80, 128, 256):
        for device in (ANY, *DEVICES.values()):
            if precision == "high" and device is GFX942:
                continue
            for queries, sharing in ((4096, 1), (1, 4)):
                a, _ = problem(size=size, queries=queries, sharing=sharing, **kind)
                found = schedules(a, device)
                assert found == sorted(found, key=lambda c: c.seconds)
                assert all(c.shared <= device.shared for c in found)
                splits = dict(found[0].schedule.blocks)["splits"]
                assert (splits > 1) == (queries == 1), "16 programs do not fill a GPU"


def test_causal_programs_stop_at_the_diagonal() -> None:
    a, y = problem()
    source = attention(a, schedules(a)[0].schedule, y)[0].kernel.source
    whole, partial = source.split("for key in range")[1:]
    assert "tl.where(seen" not in whole and "tl.where(seen" in partial
    assert "end = min(4096, last_query + 1)" in source


def figures(compiled) -> tuple[int, int]:
    """(spilled registers, instructions of tensor cores), from what a compiler reports."""
    from effc.codegen.gpu import resources

    found = resources(compiled)
    return found.spills, found.tensor


@pytest.mark.parametrize("to", DEVICES)
@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_tensor_cores_are_used_and_nothing_spills(size, to) -> None:
    _compiles_well(problem(size=size), DEVICES[to], to)


@pytest.mark.parametrize("to", DEVICES)
@pytest.mark.parametrize("queries", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "size", [64, *(pytest.param(s, marks=pytest.mark.slow) for s in (32, 128))]
)
def test_decoding_uses_tensor_cores_and_spills_nothing(size, queries, to) -> None:
    """Over a cache of any capacity, of which the kernels read how much there is."""
    capacity = sympy.Symbol("C", integer=True, positive=True)
    a = problem(size=size, queries=queries, keys=capacity, sharing=4, past=True)
    _compiles_well(a, DEVICES[to], to)


@pytest.mark.slow
@pytest.mark.parametrize("to", DEVICES)
@pytest.mark.parametrize("queries", [4096, 1])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("precision", ["f16", "highest", "high", "medium"])
def test_no_schedule_that_is_taken_spills(precision, size, queries, to) -> None:
    if precision == "high" and to.startswith("hip"):
        pytest.skip("lowered as highest: the compiler has no tf32x3 for AMD")
    kind = {"dtype": f16} if precision == "f16" else {"dtype": f32, "precision": precision}
    a = problem(size=size, queries=queries, sharing=4 if queries == 1 else 1, **kind)
    for device in (DEVICES[to], ANY):
        _compiles_well(a, device, to, exact=precision == "highest")


def _compiles_well(a, device, to: str, exact: bool = False) -> None:
    choice = schedules(a[0], device)[0]
    made = [m.kernel for m in attention(a[0], choice.schedule, a[1])]
    for compiled in compile_kernels(made, target(to)):
        spilled, tensor = figures(compiled)
        assert spilled == 0, f"{choice}\n{compiled.kernel.source}"
        assert compiled.shared <= DEVICES[to].shared
        if not exact and not re.match("attention_join", compiled.kernel.name):
            assert tensor > 0, choice
