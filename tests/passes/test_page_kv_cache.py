"""page-kv-cache: rows in pages are the rows of a cache, wherever its pages lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effc.ir import Graph, Input, PassError, PipelineError, Tensor, evaluate, interpret, verify
from effc.ir.rewrite import op
from effc.ir.types import f32, i64
from effc.passes.base import Context, Pipeline
from effc.passes.cache import cache_of
from effc.passes.cache.page_kv_cache import PageKvCache
from effc.pipeline import run_pipeline
from tests.passes.cached import RECIPE, Session, cached, captured

PAGE = 4


class Two(nn.Module):
    """Two layers of attention with keys shared by two heads, and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(19, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.head = nn.Linear(16, 19)

    def forward(self, ids, mask):
        x = self.table(ids)
        batch, length = ids.shape
        seen = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
        for layer in self.layers:
            y = layer(x)
            q = y[..., :16].view(batch, length, 4, 4).transpose(1, 2)
            k, v = (t.view(batch, length, 2, 4).transpose(1, 2) for t in y[..., 16:].split(8, -1))
            z = nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            x = x + z.transpose(1, 2).reshape(batch, length, 16)
        return self.head(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return captured(Two(), torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool))


class PagedSession(Session):
    """Pages lie anywhere in pools that hold NaN elsewhere."""

    def __init__(self, graph: Graph, table: torch.Tensor, pages: int) -> None:
        self.graph, self.cache, self.past = graph, cache_of(graph), 0
        self.capacity, self.table = table.shape[1] * PAGE, table
        (pool,) = {s.shape[0] for s in self.cache.states}
        shapes = [evaluate(s.shape, {pool: pages}) for s in self.cache.states]
        self.states = [torch.full(shape, torch.nan) for shape in shapes]

    def append(self, end, *inputs, graph=None):
        given = {self.cache.past.key: torch.tensor(self.past), self.cache.table.key: self.table}
        for i, x in zip(self.cache.given, inputs, strict=True):
            if self.cache.size in i.of.shape:
                x = x[:, self.past : end]
            else:  # of all positions
                x = torch.cat((x[:, :end], torch.ones(2, self.capacity - end, dtype=x.dtype)), 1)
            given[i.key] = x
        given |= dict(zip((s.key for s in self.cache.states), self.states))
        results = interpret(graph or self.graph, [given[i.key] for i in self.graph.inputs])
        self.states = list(results[len(results) - len(self.states) :])
        self.past = end
        return results[0]


def test_rows_in_pages_are_the_rows_of_a_cache(graph) -> None:
    plain = cached(graph)
    paged = cached(graph, f"{RECIPE},page-kv-cache{{page={PAGE}}}")
    assert {s.shape[2] for s in cache_of(paged).states} == {PAGE}
    ids, mask = torch.randint(19, (2, 14)), torch.rand(2, 14) < 0.8
    mask[:, 0] = True
    whole, table = Session(plain, 16), torch.randperm(11)[:8].view(2, 4)
    pieces = PagedSession(paged, table, 11)
    for end in (5, 6, 7, 12, 13, 14):
        got = pieces.append(end, ids, mask)
        assert torch.equal(got, whole.append(end, ids, mask))
    untouched = [i for i in range(11) if i not in table]
    assert all(s[untouched].isnan().all() for s in pieces.states)


def test_sequences_that_begin_alike_share_pages(graph) -> None:
    paged = cached(graph, f"{RECIPE},page-kv-cache{{page={PAGE}}}")
    ids = torch.randint(19, (1, 14)).repeat(2, 1)
    ids[1, 9:] = ids[1, 9:] * 7 % 19 + 0
    mask = torch.ones(2, 14, dtype=torch.bool)
    apart = PagedSession(paged, torch.arange(8).view(2, 4), 8)
    shared = PagedSession(paged, torch.tensor([[0, 1, 2, 3], [0, 1, 6, 7]]), 8)
    for end in (8, 14):
        assert torch.equal(shared.append(end, ids, mask), apart.append(end, ids, mask))


def test_the_pipeline_measures_it_as_exact(graph) -> None:
    ids, mask = torch.randint(19, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    stages = run_pipeline(
        graph, Pipeline.parse(f"{RECIPE},page-kv-cache{{page={PAGE}}}"), sample_inputs=[ids, mask]
    )
    assert stages[-1].error is not None and stages[-1].error.max_abs == 0


def test_the_last_row_alone_is_computed_on_pages_too(graph) -> None:
    paged = cached(graph, f"{RECIPE},page-kv-cache{{page={PAGE}}}")
    last = run_pipeline(paged, Pipeline.parse("keep-last,default"))[-1].graph
    verify(last)
    ids, mask = torch.randint(19, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    table = torch.randperm(8).view(2, 4)
    every, one = PagedSession(paged, table, 8), PagedSession(paged, table, 8)
    want = every.append(9, ids, mask)[:, -1:]
    torch.testing.assert_close(one.append(9, ids, mask, graph=last), want, rtol=1e-5, atol=1e-6)


def test_positions_and_pages_that_are_not_there_are_index_errors() -> None:
    pool, new = torch.zeros(5, 1, PAGE, 2), torch.ones(1, 1, 3, 2)
    args = Input("p", Tensor(pool.shape, f32)), Input("n", Tensor(new.shape, f32))
    table, start = Input("t", Tensor((1, 2), i64)), Input("s", Tensor((), i64))
    node = op.update_pages(*args, table, start)
    with pytest.raises(IndexError, match=r"positions 6\.\.9 of 8"):
        node.reference(pool, new, torch.tensor([[0, 4]]), torch.tensor(6))
    with pytest.raises(IndexError, match=r"pages 0\.\.5 of a pool of 5"):
        node.reference(pool, new, torch.tensor([[0, 5]]), torch.tensor(0))
    with pytest.raises(IndexError, match=r"pages -1\.\.0 of a pool of 5"):
        op.gather_pages(args[0], table).reference(pool, torch.tensor([[0, -1]]))


def test_a_state_that_is_no_pages_is_refused(graph) -> None:
    plain = cached(graph)
    state = plain.states[0]
    with pytest.raises(PassError, match="pages of 0 rows"):
        PageKvCache(0).run(plain, Context())
    twice = plain.with_outputs((op.neg(state), *plain.outputs))
    with pytest.raises(PassError, match=f"state {state.key} cannot lie in pages"):
        PageKvCache().run(twice, Context())
    with pytest.raises(PassError, match="the graph has no cache"):
        PageKvCache().run(graph, Context())
    with pytest.raises(PipelineError, match="needs a cache of keys and values"):
        run_pipeline(graph, Pipeline.parse("page-kv-cache"))
