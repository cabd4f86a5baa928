"""insert-kv-cache: cached decoding in any chunks is the whole sequence computed again."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effc.instruments import Measure, Verify
from effc.ir import (
    Graph,
    Input,
    PassError,
    Tensor,
    Weight,
    interpret,
    parse,
    symbol,
    verify,
)
from effc.ir.rewrite import op
from effc.ir.specialise import specialise
from effc.ir.symbols import floordiv
from effc.ir.types import boolean, f32, i64
from effc.passes.base import Context, Pipeline
from effc.passes.cache import InsertKvCache, cache_of
from effc.pipeline import run_pipeline
from tests.passes.cached import (
    Positional,
    Session,
    cached,
    captured,
    chunks,
    distance,
    run_in_chunks,
)

VOCABULARY, LENGTH = 61, 17
LIMIT = 1e-5


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.manual_seed(seed))


def assert_same_in_chunks(
    before: Graph, after: Graph, *inputs: torch.Tensor, step: int = 1
) -> None:
    """All at once, one by one, and in random chunks of a multiple of `step`."""
    (want, *_) = interpret(before, inputs)
    total = inputs[0].shape[1]
    one_by_one = list(range(step, total, step)) + [total]
    for ends in ([total], one_by_one, *(chunks(total, seed) for seed in (0, 1))):
        ends = sorted({min(total, -(-end // step) * step) for end in ends})
        assert distance(run_in_chunks(after, inputs, ends), want) <= LIMIT, ends


# ------------------------------------------------------------------ models of transformers


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **options}, num_key_value_heads=2))


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends, **options))


def qwen3(**options: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, **options))


def mistral(**options: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5, **options)
    return MistralForCausalLM(config)


def gpt_neox(**options: Any) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **options))


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {f.__name__: f for f in (llama, gpt2, qwen3, mistral, gpt_neox)}
QUICK = {
    ("llama", "sdpa", "ids"), ("gpt2", "eager", "ids"), ("qwen3", "sdpa", "ids mask"),
    ("mistral", "sdpa", "ids"),
}  # fmt: skip


def moved(model: nn.Module) -> nn.Module:
    """Every parameter off its start: norms of 1 and biases of 0 would hide errors."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.02))
    return model


@pytest.mark.parametrize(
    "family, attention, given",
    [
        pytest.param(*case, id=" ".join(case), marks=() if case in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for attention in ("sdpa", "eager")
        for given in ("ids", "ids mask", "ids positions", "ids mask positions")
        for case in [(family, attention, given)]
    ],
)
def test_models_of_transformers(family: str, attention: str, given: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2} if family == "llama" else {}
    model = Positional(moved(FAMILIES[family](attn_implementation=attention, **options)))

    def arguments(length: int) -> list[Any]:
        places = torch.arange(length).expand(2, length).contiguous()
        values = {"ids": tokens(2, length), "mask": torch.ones_like(places), "positions": places}
        return [values[k] if k in given.split() else None for k in values]

    before = captured(model, *arguments(7))
    after = cached(before)
    found = [n for n in after.nodes if n.name == "attention"]
    assert all(n.past is not None for n in found) and len(after.states) == 2 * len(found) > 0
    heads = 4 if family in ("gpt2", "gpt_neox") else 2
    assert {str(s.of) for s in after.states} == {f"f32[2, {heads}, C, 8]"}
    if given == "ids":  # nothing is left of the mask, but for the window
        masks = [n.mask is not None for n in found]
        assert masks == [family == "mistral"] * len(masks)
    assert_same_in_chunks(before, after, *(x for x in arguments(LENGTH) if x is not None))


def test_sequences_of_different_lengths_are_padded_on_the_left() -> None:
    """A batch of 9, 4 and 1 tokens and then 5 more each, against each sequence by itself."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Positional(moved(llama()))
    lengths, total = (9, 4, 1), 14
    ids, mask = tokens(3, total), torch.ones(3, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : 9 - length] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    after = cached(captured(model, ids, mask, places))
    session = Session(after, 20)
    got = [session.append(end, ids, mask, places) for end in range(9, 15)]
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 9 - length :], None, None)[0]
        ours = torch.cat([step[row, -1:] for step in got])
        assert distance(ours, alone[length - 1 :]) <= LIMIT


# ------------------------------------------------------------------ a plain model


class Attention(nn.Module):
    """Attention written by hand. see(i, j): whether query i sees key j, or an additive mask."""

    def __init__(self, width: int, heads: int, see: Callable[..., torch.Tensor] | None) -> None:
        super().__init__()
        self.heads, self.see = heads, see
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("triangle", torch.ones(64, 64).tril()[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        if self.see is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.see is BUFFER:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            hidden = self.triangle[:, :, :length, :length] == 0
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        else:
            i = torch.arange(length)
            y = F.scaled_dot_product_attention(q, k, v, self.see(i[:, None], i[None]))
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Plain(nn.Module):
    """A GPT without a word about caches; positions are looked up, or the first T of a table."""

    def __init__(self, see: Any = None, looked_up: bool = True, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.looked_up = looked_up
        self.attention = nn.ModuleList(Attention(width, 2, see) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        table = self.places.weight[:length]
        places = self.places(torch.arange(length)) if self.looked_up else table
        x = self.tokens(ids) + places
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + attention(norm(x))
        return self.head(F.gelu(x))


def BUFFER(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the mask is a slice of a buffer")


def additive(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return torch.full((i.shape[0], j.shape[1]), float("-inf")).triu(1)


@pytest.mark.parametrize("see, looked_up", [(None, True), (additive, False)])
def test_a_plain_model(see: Any, looked_up: bool) -> None:
    torch.manual_seed(0)
    before = captured(Plain(see, looked_up), tokens(2, 7))
    after = cached(before)
    found = [n for n in after.nodes if n.name == "attention"]
    assert len(found) == 2 and all(n.causal and n.mask is None for n in found)
    assert_same_in_chunks(before, after, tokens())


def test_a_mask_in_a_buffer_is_trusted() -> None:
    """Weights are not read: the note says so."""
    torch.manual_seed(0)
    before = captured(Plain(BUFFER), tokens(2, 7))
    stage = run_pipeline(before, Pipeline.parse("raised,insert-kv-cache"))[-1]
    assert list(stage.notes) == [
        "a mask of attention is computed from inputs or weights: that no query sees a key of a "
        "later call is taken on trust"
    ]
    assert_same_in_chunks(before, stage.graph, tokens())


class Shifted(nn.Module):
    """Position i reads token i - 1, a mixture with its neighbour, and what attention said there."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width))
        self.tokens, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.attention = nn.ModuleList(Attention(width, 2, None) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.first.expand(ids.shape[0], 1, -1)
        x = torch.cat((first, self.tokens(ids[:, :-1])), 1)
        x = x + 0.5 * F.pad(x, (0, 0, 2, -2))
        y = self.attention[0](x)
        y = y + F.pad(y, (0, 0, 1, -1), value=0.25)
        return self.head(y + self.attention[1](y))


def test_values_of_earlier_positions_come_out_of_states() -> None:
    torch.manual_seed(0)
    before = captured(Shifted(), tokens(2, 7))
    after = cached(before)
    types = [str(s.of) for s in after.states]
    assert types.count("i64[2, C]") == 1 and types.count("f32[2, 2, C, 8]") == 5
    assert_same_in_chunks(before, after, tokens())


# ------------------------------------------------------------------ what a session may do

PROGRAM = """
def graph(ids: i64[B, T]):
    w0: f32[61, 8] = weight("table")
    w1: f32[24, 8] = weight("qkv")
    w2: f32[64, 8] = weight("places")
    y0: f32[B, T, 8] = embedding(w0, ids)
    y1: f32[T, 8] = slice(w2, dim=0, start=0, size=T)
    y2: f32[B, T, 8] = add(y0, y1)
    y3: f32[B, T, 24] = linear(y2, w1)
    y4: f32[B, T, 8] = slice(y3, dim=2, start=0, size=8)
    y5: f32[B, T, 8] = slice(y3, dim=2, start=8, size=8)
    y6: f32[B, T, 8] = slice(y3, dim=2, start=16, size=8)
    y7: f32[B, T, 8] = attention(y4, y5, y6, causal=True)
    y8: f32[B, T, 8] = add(y2, y7)
    return y8,
"""


def filled(source: str) -> Graph:
    graph = parse(source)
    generator = torch.Generator().manual_seed(0)
    for w in graph.weights:
        data = torch.randn(w.of.shape, generator=generator).to(w.of.dtype.torch)
        object.__setattr__(w, "data", data)
    return graph


@pytest.fixture(scope="module")
def small() -> tuple[Graph, Graph]:
    before = filled(PROGRAM)
    return before, InsertKvCache().run(before, Context())


def test_the_text_of_a_cached_graph(small: tuple[Graph, Graph], golden: Any) -> None:
    assert verify(small[1]).text == golden


def test_going_back_is_a_smaller_past(small: tuple[Graph, Graph]) -> None:
    before, after = small
    first, second = tokens(seed=1), tokens(seed=2)
    session = Session(after, LENGTH)
    session.append(LENGTH, first)
    session.past = 6
    changed = torch.cat((first[:, :6], second[:, 6:]), 1)
    got = [session.append(end, changed) for end in (7, 12, LENGTH)]
    assert distance(torch.cat(got, 1), interpret(before, [changed])[0][:, 6:]) <= LIMIT


def test_a_fork_shares_what_went_before(small: tuple[Graph, Graph]) -> None:
    before, after = small
    left, right = Session(after, LENGTH), Session(after, LENGTH)
    first, second = tokens(seed=1), tokens(seed=2)
    second[:, :5] = first[:, :5]
    left.append(5, first)
    right.states, right.past = list(left.states), 5
    for end in (6, 11, LENGTH):
        for session, ids in ((left, first), (right, second)):
            start = session.past
            got = session.append(end, ids)
            assert distance(got, interpret(before, [ids])[0][:, start:end]) <= LIMIT


def test_growing_is_a_longer_state(small: tuple[Graph, Graph]) -> None:
    before, after = small
    session, ids = Session(after, 4), tokens()
    got = [session.append(4, ids)]
    with pytest.raises(IndexError, match=r"positions 4\.\.5 of dimension 1 with 4"):
        session.append(5, ids)
    session.states = [F.pad(s, (0, 0, 0, LENGTH - 4), value=math.nan) for s in session.states]
    got.append(session.append(LENGTH, ids))
    assert distance(torch.cat(got, 1), interpret(before, [ids])[0]) <= LIMIT


def test_one_token_and_a_fixed_capacity(small: tuple[Graph, Graph]) -> None:
    before, after = small
    cache = cache_of(after)
    assert (cache.size, cache.capacity) == (symbol("T"), symbol("C"))
    assert (cache.past.key, [i.key for i in cache.given]) == ("past", ["ids"])
    one = verify(specialise(after, {cache.size: 1, cache.capacity: 20, "B": 2}))
    assert (cache_of(one).size, cache_of(one).capacity) == (1, 20)
    assert not one.all_symbols
    ids = tokens()
    for recipe in ("none", "canonical", "raised", "default"):
        session = Session(after, 20)
        got = [session.append(3, ids)]
        last = run_pipeline(one, Pipeline.parse(recipe), instruments=[Verify()])[-1].graph
        got += [session.append(end, ids, graph=last) for end in range(4, LENGTH + 1)]
        assert distance(torch.cat(got, 1), interpret(before, [ids])[0]) <= LIMIT, recipe


def test_the_error_of_the_pass_is_measured(small: tuple[Graph, Graph]) -> None:
    """All positions as new ones, into empty states; and later passes on the new interface."""
    ids = tokens()
    pipeline = Pipeline.parse("canonical,insert-kv-cache,default")
    stages = run_pipeline(
        small[0], pipeline, sample_inputs=[ids], instruments=[Verify(), Measure(strict=True)]
    )
    inserted = next(s for s in stages if s.name == "insert-kv-cache")
    assert inserted.rewrites == 1 and inserted.error is not None
    assert inserted.error.relative_l2 <= LIMIT
    assert stages[-1].total_error is not None and stages[-1].total_error.relative_l2 <= LIMIT


# ------------------------------------------------------------------ what is mapped


def attended(x: Any, mask: Any = None) -> Any:
    """Causal attention of [B, T, 8] to itself."""
    return op.attention(x, op.mul(x, 0.5), op.add(x, 0.25), mask, causal=True)


T, B = symbol("T"), symbol("B")
HALF = floordiv(T, 2)
IDS, X = Input("ids", Tensor((B, T), i64)), Input("x", Tensor((B, T, 8), f32))


ROW, COLUMN = (op.reshape(op.arange(T, i64), shape) for shape in ((T, 1), (1, T)))
BEFORE = op.le(COLUMN, ROW)


def inserted(*outputs: Any, inputs: Any = (X,), **options: Any) -> Graph:
    graph = verify(Graph.of(inputs, outputs))
    return verify(InsertKvCache(**options).run(graph, Context()))


def random_program(seed: int) -> Graph:
    """Ops over positions, at random: each keeps [B, T, 8]."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    count = 0

    def weight(*shape: int) -> Weight:
        nonlocal count
        count += 1
        return Weight.holding(f"w{count}", torch.randn(shape, generator=generator) * 0.5)

    def steps(x: Any) -> dict[str, Callable[[], Any]]:
        arange = op.arange(T, i64, chance.choice([0, 3]), chance.choice([1, 2]))
        column = op.cast(op.reshape(arange, (T, 1)), f32)
        return {
            "attention": lambda: attended(x),
            "grouped": lambda: op.reshape(
                op.permute(
                    op.attention(
                        op.permute(op.reshape(x, (B, T, 4, 2)), (0, 2, 1, 3)),
                        *(
                            op.permute(op.reshape(op.linear(x, w), (B, T, 2, 2)), (0, 2, 1, 3))
                            for w in (weight(4, 8), weight(4, 8))
                        ),
                        causal=True,
                        gqa=True,
                    ),
                    (0, 2, 1, 3),
                ),
                (B, T, 8),
            ),
            "linear": lambda: op.linear(x, weight(8, 8), weight(8)),
            "norm": lambda: op.layer_norm(x, weight(8)),
            "merged": lambda: op.reshape(
                op.matmul(op.reshape(x, (B * T, 8)), weight(8, 8)), (B, T, 8)
            ),
            "place": lambda: op.mul(x, op.add(op.mul(op.cos(column), 0.5), 1.0)),
            "count": lambda: op.mul(x, op.rsqrt(op.add(column, 1))),
            "table": lambda: op.add(x, op.slice(weight(40, 8), 0, chance.choice([0, 2]), T)),
            "earlier": lambda: op.add(x, op.pad(x, (0, 2, 0), (0, -2, 0), 0.5)),
            "first": lambda: op.cat(
                (op.expand(weight(1, 3, 8), (B, 3, 8)), op.slice(x, 1, 0, T - 3)), 1
            ),
            "turned": lambda: op.permute(
                op.softmax(op.mul(op.permute(x, (2, 1, 0)), 2.0), 0), (2, 1, 0)
            ),
            "summed": lambda: op.mul(x, op.sum(op.square(x), (2,), True)),
        }

    x: Any = X
    for _ in range(chance.choice([2, 3, 5])):
        made = steps(x)
        x = op.tanh(made[chance.choice(list(made))]())
    return Graph.of((X,), (attended(x),))


@pytest.mark.parametrize("seed", range(20))
def test_random_programs(seed: int) -> None:
    before = verify(random_program(seed))
    after = verify(InsertKvCache().run(before, Context()))
    x = torch.randn(2, 13, 8, generator=torch.manual_seed(seed))
    assert_same_in_chunks(before, after, x)


def test_inputs_of_all_positions() -> None:
    """A padding mask is given whole; read at the new positions too, these are taken from it."""
    mask = Input("mask", Tensor((B, T), boolean))
    keys = op.reshape(mask, (B, 1, T))
    y = attended(X, keys)
    graph = inserted(y, inputs=(X, mask))
    assert [str(i.of) for i in graph.inputs] == [
        "f32[B, T, 8]", "bool[B, C]", "i64[()]", "f32[B, C, 8]", "f32[B, C, 8]",
    ]  # fmt: skip
    rows = op.mul(y, op.reshape(mask, (B, T, 1)))
    before, after = (Graph.of((X, mask), (rows,)), inserted(rows, inputs=(X, mask)))
    assert str(after.inputs[1].of) == "bool[B, C]"
    keep = torch.rand(2, 13, generator=torch.manual_seed(0)) < 0.7
    keep[:, 0] = True
    assert_same_in_chunks(before, after, torch.randn(2, 13, 8), keep)


def either(a: Any, b: Any) -> Any:
    return op.bitwise_or(a, b)


MASKS = {
    "sink and window": (
        lambda: op.bitwise_and(
            BEFORE, either(op.gt(COLUMN, op.sub(ROW, 5)), op.lt(COLUMN, 2))
        ), 1, "a mask of attention is causal, as seen for 96 positions",
    ),
    "slopes": (
        lambda: op.where(BEFORE, op.mul(op.cast(op.sub(COLUMN, ROW), f32), 0.5), -math.inf),
        1, "a mask of attention is causal, as seen for 96 positions",
    ),
    "blocks": (
        lambda: op.le(op.div_floor(COLUMN, 4), op.div_floor(ROW, 4)),
        4, "queries see later keys: a call may end only after 4, 8, 12, 16 ... positions",
    ),
    "prefix": (
        lambda: either(BEFORE, op.lt(COLUMN, 6)),
        6, "queries see later keys: a call may end only after 6, 7, 8, 9 ... positions",
    ),
    "next blocks": (  # of 1, 2, 4, 8 ... positions
        lambda: op.le(*(op.floor(op.log2(op.cast(op.add(x, 1), f32))) for x in (COLUMN, ROW))),
        0, "queries see later keys: a call may end only after 1, 3, 7, 15 ... positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_positions(name: str) -> None:
    """Under a block-causal mask a call gives whole blocks; the prefix comes in one call."""
    build, step, note = MASKS[name]
    before = Graph.of((X,), (op.attention(attended(X), X, X, build()),))
    ctx, x = Context(), torch.randn(2, 24, 8, generator=torch.manual_seed(0))
    after = verify(InsertKvCache().run(before, ctx))
    assert ctx.notes == [note]
    if step:
        assert_same_in_chunks(before, after, x, step=step)
    else:
        want = interpret(before, [x[:, :15]])[0]
        assert distance(run_in_chunks(after, [x], [1, 3, 7, 15]), want) <= LIMIT


def test_a_mask_from_outside() -> None:
    mask = Input("mask", Tensor((B, T, T), f32))
    y = op.attention(X, X, X, mask)
    after = inserted(y, inputs=(X, mask))
    assert [str(i.of) for i in after.inputs][1] == "f32[B, T, C]"
    allowed = torch.full((2, 13, 13), -torch.inf).triu(1) + torch.randn(2, 13, 13)
    assert_same_in_chunks(Graph.of((X, mask), (y,)), after, torch.randn(2, 13, 8), allowed)


def test_keys_that_two_attentions_read_are_kept_once() -> None:
    k, v = op.mul(X, 0.5), op.add(X, 1)
    y = op.attention(op.attention(X, k, v, causal=True), k, v, causal=True)
    assert len(inserted(y).states) == 2


def test_cumulative_sums_are_of_all_positions() -> None:
    from effc.ir.ops.aten import Aten

    keep = Input("keep", Tensor((B, T), i64))
    places = Aten("aten.cumsum.default", (keep, 1), (), of=Tensor((B, T), i64))
    y = attended(op.mul(X, op.reshape(op.cast(places, f32), (B, T, 1))))
    before, after = Graph.of((X, keep), (y,)), inserted(y, inputs=(X, keep))
    assert str(after.inputs[1].of) == "i64[B, C]"
    assert_same_in_chunks(before, after, torch.randn(2, 13, 8), torch.randint(0, 2, (2, 13)))


def test_the_last_position_alone() -> None:
    y = op.slice(attended(X), 1, T - 1, 1)
    after, x = inserted(y), torch.randn(2, 9, 8)
    session = Session(after, 9)
    got = [session.append(end, x) for end in (4, 5, 9)]
    for end, value in zip((4, 5, 9), got, strict=True):
        assert distance(value, interpret(Graph.of((X,), (y,)), [x[:, :end]])[0]) <= LIMIT


def test_cross_attention_is_each_position_for_itself() -> None:
    memory = Input("memory", Tensor((B, symbol("S"), 8), f32))
    y = op.attention(attended(X), memory, memory)
    before, after = Graph.of((X, memory), (y,)), inserted(y, inputs=(X, memory))
    assert len(after.states) == 2
    x, given = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    session = Session(after, 9)
    got = []
    for end in (4, 5, 9):
        start, session.cache = session.past, cache_of(after)
        values = {"x": x[:, start:end], "memory": given, "past": torch.tensor(start)}
        values |= dict(zip((s.key for s in after.states), session.states))
        out, *session.states = interpret(after, [values[i.key] for i in after.inputs])
        session.past = end
        got.append(out)
    assert distance(torch.cat(got, 1), interpret(before, [x, given])[0]) <= LIMIT


def test_names_that_are_taken() -> None:
    past, k0 = Input("past", Tensor((B, T, 8), f32)), Input("k0", Tensor((symbol("C"),), f32))
    y = attended(op.add(past, op.reshape(op.sum(k0, (0,), True), (1, 1, 1))))
    graph = inserted(y, inputs=(past, k0))
    assert [i.key for i in graph.inputs] == ["past", "k0", "past_0", "k0_0", "v0"]
    assert str(graph.states[0].of) == "f32[B, C_0, 8]"


# ------------------------------------------------------------------ refusals

W = Weight("w", Tensor((8, 8, 3), f32), "00")
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: op.mul(attended(X), op.mean(X, (1,), True)), "mean mixes positions along dimension 1"),
    (lambda: attended(op.softmax(X, 1)), "softmax mixes positions along dimension 1"),
    (lambda: attended(op.flip(X, (1,))), "flip turns positions round"),
    (
        lambda: attended(op.permute(op.conv1d(op.permute(X, (0, 2, 1)), W, padding=(1,)), (0, 2, 1))),
        "conv1d mixes positions along dimension 2",
    ),
    (
        lambda: attended(op.matmul(op.matmul(X, op.permute(X, (0, 2, 1))), X)),
        "matmul sums over positions, and is no attention that raise-ops knows",
    ),
    (lambda: op.attention(attended(X), X, X), "every query of attention sees every key: not causal"),
    (
        lambda: op.attention(attended(X), X, X, op.full((1, T), True, boolean)),
        "the mask of attention is the same for every query: not causal",
    ),
    (lambda: op.add(attended(X), T), "add computes with the number of positions"),
    (
        lambda: op.add(attended(X), op.full((T, 8), T, f32)),
        "full computes with the number of positions",
    ),
    (
        lambda: attended(op.slice(op.pad(X, (0, 0, 0), (0, 1, 0)), 1, 1, T)),
        "pad puts something after the last position, or takes the first",
    ),
    (
        lambda: op.add(attended(X), op.slice(op.cat((X, op.full((B, 1, 8), 0.0, f32)), 1), 1, 1, T)),
        "cat puts something after the last position",
    ),
    (
        lambda: op.slice(op.cat((op.full((B, 1, 8), 0.0, f32), attended(X)), 1), 1, 1, T - 1),
        "result 0: f32[B, T - 1, 8] is over T - 1, not T positions",
    ),
    (
        lambda: op.matmul(attended(X), op.permute(X, (0, 2, 1))),
        "result 0: f32[B, T, T] has 2 dimensions over positions",
    ),
    (
        lambda: op.add(attended(X), op.slice(attended(X), 1, 0, 1)),
        "the result of attention is needed at every position",
    ),
    (
        lambda: op.add(op.slice(X, 1, 0, T - 2), op.slice(attended(X), 1, 2, T - 2)),
        "result 0: f32[B, T - 2, 8] is over T - 2, not T positions",
    ),
    (
        lambda: op.slice(attended(X), 1, T - 3, 3),
        "slice takes 3 positions from T - 3 on",
    ),
    (
        lambda: op.mul(attended(X), op.reshape(op.slice(op.reshape(X, (B, 8 * T)), 1, 0, T), (B, T, 1))),
        "slice takes some of the positions",
    ),
    (
        lambda: op.reshape(attended(X), (B, HALF, 16)),
        "result 0: f32[B, T // 2, 16] is over (T//2), not T positions",
    ),
    (
        lambda: attended(op.reshape(op.softmax(op.reshape(X, (B, floordiv(T, 4), 32)), 2), (B, T, 8))),
        "reshape of (T//4) to T takes positions apart",
    ),
    (
        lambda: op.attention(attended(X), X, X, op.lt(op.abs(op.sub(ROW, COLUMN)), 4)),
        "under the mask of attention every query sees later keys: not causal",
    ),
]  # fmt: skip


@pytest.mark.parametrize("build, why", REFUSED, ids=[why[:50] for _, why in REFUSED])
def test_refusals_name_the_node_and_the_reason(build: Callable[[], Any], why: str) -> None:
    with pytest.raises(PassError) as e:
        inserted(build())
    assert e.value.why == why
    assert why in (e.value.context or "")


def test_every_obstacle_is_listed() -> None:
    y = attended(op.softmax(X, 1))
    z = op.add(op.attention(y, X, X), op.mean(X, (1,), True))
    with pytest.raises(PassError) as e:
        inserted(z)
    assert str(e.value) == (
        "graph cannot be computed token by token: 3 obstacles\n"
        "  why   mean mixes positions along dimension 1\n"
        "  y5: f32[B, 1, 8] = mean(x, dims=(1,), keepdim=True)\n"
        "    why   mean mixes positions along dimension 1\n"
        "  y4: f32[B, T, 8] = attention(y3, x, x)\n"
        "    why   every query of attention sees every key: not causal\n"
        "  y0: f32[B, T, 8] = softmax(x, dim=1)\n"
        "    why   softmax mixes positions along dimension 1"
    )


def test_the_sequence_is_inferred_or_named() -> None:
    other = Input("other", Tensor((B, symbol("S"), 8), f32))
    two = Graph.of((X, other), (attended(X), attended(other)))
    with pytest.raises(PassError) as e:
        InsertKvCache().run(two, Context())
    assert str(e.value) == (
        "attention runs over several sizes, T, S\n  fix   name the sequence: insert-kv-cache{dim=T}"
    )
    made = Pipeline.parse("insert-kv-cache{dim=S}").passes[0].run(two, Context())
    assert [str(i.of) for i in verify(made).inputs[:2]] == ["f32[B, T, 8]", "f32[B, S, 8]"]
    assert len(made.states) == 2 and cache_of(made).size == symbol("S")
    for graph, name, said in (
        (two, "N", "the graph has no size 'N'\n  why   its sizes are B, S, T"),
        (Graph.of((X,), (op.relu(X),)), "", "no causal attention in the graph"),
        (
            specialise(Graph.of((X,), (attended(X),)), {T: 7}), "",
            "the length of the sequence is fixed, 7\n  fix   capture with a dynamic size",
        ),
        (inserted(attended(X)), "", "the graph has states already"),
    ):  # fmt: skip
        with pytest.raises(PassError, match=re.escape(said)):
            InsertKvCache(name).run(graph, Context())


def test_a_graph_without_a_cache_has_none() -> None:
    with pytest.raises(PassError, match="the graph has no cache\n  fix   run insert-kv-cache"):
        cache_of(Graph.of((X,), (attended(X),)))
