"""Attention over caches of codes and in pages, written and read as they lie."""

from __future__ import annotations

import pytest
import torch

from effc.backends import find_backend
from effc.ir import Graph, Input, Tensor, interpret, symbol, verify
from effc.ir.formats import GroupQuant
from effc.ir.rewrite import op
from effc.ir.types import bf16, f16, f32, i8, i64
from effc.passes.base import Context, Pipeline
from effc.passes.cache.page_kv_cache import PageKvCache
from effc.pipeline import run_pipeline

B, N, C = symbol("B"), symbol("N"), symbol("C")


def cached(dtype, code, scale, heads=(4, 2), size=16, masked=False, causal=True) -> Graph:
    """New keys and values are quantised and written into states; attention reads those."""
    kept = (B, heads[1], C, size)
    q = Input("q", Tensor((B, heads[0], N, size), dtype))
    new = [Input(f"{n}", Tensor((B, heads[1], N, size), dtype)) for n in "kv"]
    past = Input("past", Tensor((), i64))
    mask = [Input("mask", Tensor((N, C), f32))] if masked else []
    format = GroupQuant(None, scale)
    states, outputs, read = [], [], []
    for x in new:
        codes = Input(f"{x.key}_codes", Tensor(kept, code), True)
        scales = Input(f"{x.key}_scale", Tensor((*kept[:3], 1), scale), True)
        made = op.quantize(x, code, format)
        parts = tuple(
            op.update(s, op.item(made, i), past, 2) for i, s in enumerate((codes, scales))
        )
        value = op.encoded(parts, of=Tensor(kept, code, format=format))
        read.append(op.decode(value, dtype))
        states += [codes, scales]
        outputs += parts
    y = op.attention(q, *read, *mask, causal=causal, gqa=heads[0] != heads[1], past=past)
    return verify(Graph.of((q, *new, *mask, past, *states), (y, *outputs)))


def values(g: Graph, batch: int, n: int, room: int, past: int, seed: int = 0) -> list:
    made = torch.Generator().manual_seed(seed)
    sizes = {B: batch, N: n, C: room}
    found = []
    for i in g.inputs:
        shape = [sizes.get(s, s) for s in i.of.shape]
        if i.key == "past":
            found.append(torch.tensor(past))
        elif i.of.dtype.is_float:
            x = torch.randn(shape, generator=made).to(i.of.dtype.torch)
            found.append(x.abs() * 0.02 if i.state else x)
        else:
            found.append(torch.randint(-7, 8, shape, generator=made).to(i.of.dtype.torch))
    return found


CASES = [
    (f32, f32, False, 1, 1, 40, 33), (f32, f16, False, 2, 1, 9, 0), (f32, bf16, True, 1, 3, 300, 290),
    (bf16, f32, False, 1, 1, 200, 150), (f16, f16, False, 1, 5, 64, 7), (f32, f32, True, 1, 40, 250, 205),
    (bf16, f16, False, 2, 33, 40, 7),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "scale", "masked", "batch", "n", "room", "past"), CASES)
def test_attention_reads_codes(dtype, scale, masked, batch, n, room, past) -> None:
    g = cached(dtype, i8, scale, masked=masked, causal=not masked)
    bound = find_backend("cpu").compile(g)
    assert not bound.fallbacks
    calls = [launch.call for launch in bound.launches]
    assert any("attention_of_codes" in c for c in calls) and not any("decode" in c for c in calls)
    given = values(g, batch, n, room, past)
    want = interpret(g, [x.clone() for x in given])
    mine = [x.clone() for x in given]
    got = bound.bind()(mine)
    loose = {f32: 2e-5, bf16: 2e-2, f16: 2e-3}[dtype]
    torch.testing.assert_close(got[0], want[0], rtol=loose, atol=loose)
    for state, have, expected in zip(mine[-4:], got[1:], want[1:], strict=True):
        assert have.data_ptr() == state.data_ptr()  # in place
        assert torch.equal(have, expected)


def test_default_passes_keep_the_codes_in_sight() -> None:
    g = cached(f32, i8, f32)
    made = run_pipeline(g, Pipeline.parse("default"))[-1].graph
    plan = find_backend("cpu").compile(made)
    assert any("attention_of_codes" in launch.call for launch in plan.launches)
    assert not plan.fallbacks
    given = values(g, 1, 1, 20, 3)
    want = interpret(g, [x.clone() for x in given])
    torch.testing.assert_close(plan.bind()(given)[0], want[0], rtol=2e-5, atol=2e-5)


PAGE = 8


def in_pages(g: Graph) -> Graph:
    return PageKvCache(PAGE).run(g, Context())


def floats(dtype, heads=(4, 2), size=16) -> Graph:
    """New keys and values are written into states as they are."""
    q = Input("q", Tensor((B, heads[0], N, size), dtype))
    new = [Input(f"{n}", Tensor((B, heads[1], N, size), dtype)) for n in "kv"]
    past = Input("past", Tensor((), i64))
    states = [Input(f"{n}0", Tensor((B, heads[1], C, size), dtype), True) for n in "kv"]
    rows = [op.update(s, x, past, 2) for s, x in zip(states, new)]
    y = op.attention(q, *rows, causal=True, gqa=True, past=past)
    return verify(Graph.of((q, *new, past, *states), (y, *rows)))


@pytest.mark.parametrize(
    ("dtype", "coded", "batch", "n", "past"),
    [
        (f32, False, 1, 1, 33), (f32, False, 2, 3, 7), (bf16, False, 1, 1, 8), (f16, False, 1, 20, 0),
        (f32, True, 2, 1, 30), (bf16, True, 1, 21, 14), (f32, True, 1, 1, 0),
    ],
)  # fmt: skip
def test_attention_reads_pages(dtype, coded, batch, n, past) -> None:
    """Against the same cache in one piece; pages lie in any order, and others are not touched."""
    whole = cached(dtype, i8, f32) if coded else floats(dtype)
    g = in_pages(whole)
    plan = find_backend("cpu").compile(g)
    assert not plan.fallbacks
    calls = [launch.call for launch in plan.launches]
    assert not any("gather" in c or "decode" in c for c in calls), calls
    given = values(whole, batch, n, 5 * PAGE, past)
    want = interpret(whole, [x.clone() for x in given])
    table = torch.randperm(5 * batch + 2)[: 5 * batch].view(batch, 5)
    mine, pools = [], []
    old = {i.key: x for i, x in zip(whole.inputs, given)}
    for i in g.inputs:
        if i.state:
            pages = old[i.key].unflatten(2, (5, PAGE)).transpose(1, 2)
            pool = torch.full((5 * batch + 2, *pages.shape[2:]), 77).to(pages.dtype)
            pool[table] = pages
            pools.append(pool)
            mine.append(pool)
        else:
            mine.append(table if i.key == "table" else old[i.key])
    got = plan.bind()(mine)
    loose = {f32: 2e-5, bf16: 2e-2, f16: 2e-3}[dtype]
    torch.testing.assert_close(got[0], want[0], rtol=loose, atol=loose)
    for pool, have, rows in zip(pools, got[1:], want[1:], strict=True):
        assert have.data_ptr() == pool.data_ptr()
        assert torch.equal(have[table].transpose(1, 2).flatten(2, 3), rows)
        assert (have[[i for i in range(len(have)) if i not in table]] == 77).all()


@pytest.mark.parametrize("page", [-1, 99])
def test_a_table_that_names_no_page_is_an_index_error(page) -> None:
    g = in_pages(floats(f32))
    plan = find_backend("cpu").compile(g).bind()
    shapes = {"q": (1, 4, 1, 16), "k": (1, 2, 1, 16), "v": (1, 2, 1, 16)}
    given = {k: torch.randn(s) for k, s in shapes.items()}
    given |= {"past": torch.tensor(3), "table": torch.tensor([[page]])}
    given |= {k: torch.zeros(4, 2, PAGE, 16) for k in ("k0", "v0")}
    with pytest.raises(IndexError):
        plan([given[i.key] for i in g.inputs])
    assert not given["k0"].any()


def test_what_no_kernel_reads_is_decoded_first() -> None:
    """Keys with groups of half a row: right all the same."""
    k = Input("k", Tensor((1, 2, 5, 64), f32))
    q = Input("q", Tensor((1, 2, 3, 64), f32))
    keys = op.decode(op.quantize(k, i8, GroupQuant(32, f32)), f32)
    g = Graph.of((q, k), (op.attention(q, keys, keys),))
    given = [torch.randn(1, 2, 3, 64), torch.randn(1, 2, 5, 64)]
    plan = find_backend("cpu").compile(g)
    want = interpret(g, given)
    torch.testing.assert_close(plan.bind()(given)[0], want[0], rtol=2e-5, atol=2e-5)
