"""quantize-cache: states of codes, rounded once a token, and read as if they were numbers."""

import pytest
import torch

from effc.incremental import with_cache
from effc.ir import PassError, PipelineError, interpret, parse, verify
from effc.ir.formats import GroupQuant, quantize
from effc.ir.types import Tensor, f16, i8
from effc.passes.base import Context, Pipeline
from effc.passes.cache import cache_of
from effc.passes.pipelines import NAMED
from effc.passes.quantize.quantize_cache import QuantizeCache
from effc.pipeline import run_pipeline
from tests.passes.cached import RECIPE, cached, captured, chunks, distance, run_in_chunks
from tests.passes.folding import Decoder, ids

QUANTIZED = f"{RECIPE},quantize-cache"


@pytest.fixture(scope="module")
def graph():
    return captured(Decoder(2), ids())


@pytest.mark.parametrize(
    ("options", "most"), [("", 0.05), ("{scale=f32}", 0.05), ("{bits=4,zero=True}", 0.6)]
)
def test_generation_in_any_chunks_reads_what_was_rounded_once(graph, options, most):
    made = cached(graph, QUANTIZED + options)
    x = ids(length=14)
    want = interpret(graph, [x])[0]
    whole = run_in_chunks(made, [x], [14])
    assert 0 < distance(whole, want) < most
    for seed in (1, 2):
        assert distance(run_in_chunks(made, [x], chunks(14, seed)), whole) < 1e-5


def test_states_are_codes_and_scales_a_token_and_head(graph):
    made = cached(graph, QUANTIZED)
    states = {s.key: str(s.type) for s in made.states}
    assert list(states)[:4] == ["k0_codes", "k0_scale", "v0_codes", "v0_scale"]
    assert states["k0_codes"] == "i8[2, 4, C, 8]" and states["k0_scale"] == "f16[2, 4, C, 1]"
    assert [o.name for o in made.outputs[1:]] == ["update"] * 8
    cache = cache_of(made)
    assert cache.capacity == made.states[0].shape[2] and len(cache.given) == 1


def test_what_attention_reads_is_the_rounded_key(graph):
    """The new rows of the state are exactly quantize(k), where k is what was written before."""
    plain, made = cached(graph), cached(graph, QUANTIZED)
    x, past = ids(), torch.tensor(0)
    empty = [torch.zeros(2, 4, 12, 8) for _ in plain.states]
    keys = interpret(plain, [x, past, *empty])[1]
    states = [torch.zeros(s.shape[0], 4, 12, s.shape[3], dtype=s.dtype.torch) for s in made.states]
    codes, scale = interpret(made, [x, past, *states])[1:3]
    want = quantize(keys, Tensor((2, 4, 12, 8), i8, format=GroupQuant(None, f16)))
    assert torch.equal(codes, want["codes"]) and torch.equal(scale, want["scale"])


def test_errors_across_the_new_interface_are_measured(graph):
    stages = run_pipeline(graph, Pipeline.parse(QUANTIZED), sample_inputs=[ids()])
    error, total = stages[-1].error, stages[-1].total_error
    assert 0 < error.relative_l2 < 0.05 and total.relative_l2 == pytest.approx(error.relative_l2)
    assert stages[-1].notes == ("4 states in 8 bits, with a scale for each row of 8",)


def test_a_state_with_contents_is_rounded_for_comparison(graph):
    plain, made = cached(graph), cached(graph, QUANTIZED)
    given = [ids(), torch.tensor(3)]
    given += [torch.randn(2, 4, 20, 8) for _ in plain.states]
    after = QuantizeCache().inputs_after(plain, made, given)
    assert len(after) == len(made.inputs)
    got, want = (interpret(g, v)[0] for g, v in ((made, after), (plain, given)))
    assert 0 < distance(got, want) < 0.05


def test_sixteen_bits_are_the_same_graph_and_order_matters(graph):
    plain = cached(graph)
    assert QuantizeCache(16).run(plain, Context()) is plain
    with pytest.raises(PipelineError, match="needs a cache of keys and values") as caught:
        Pipeline.parse("raised,quantize-cache").check()
    assert "insert-kv-cache" in str(caught.value)
    with pytest.raises(PassError, match="1 to 8"):
        QuantizeCache(9).run(plain, Context())


NO_ATTENTION = """\
def graph(x: f32[2, 3, 4], past: i64[()], s: State[f32[2, 8, 4]]):
    u = update(s, x, past, dim={dim})
    y = {reader}
    return y, u
"""


@pytest.mark.parametrize(
    ("reader", "dim", "reason"),
    [
        ("exp(u)", 1, "exp reads it, which is no attention"),
        ("exp(s)", 1, "it is read otherwise than by one update"),
    ],
)
def test_other_states_stay_with_a_reason(reader, dim, reason):
    g = parse(NO_ATTENTION.format(reader=reader, dim=dim))
    ctx = Context()
    assert QuantizeCache().run(g, ctx) is g
    assert ctx.stats["QuantizeState"].misses[0].reason == reason


def test_quantised_activations_go_through_a_cache(graph):
    """Each token has a scale of its own, so a token's codes do not depend on others."""
    small = "raised,quantize-weights{bits=8},quantize-activations"
    whole = run_pipeline(graph, Pipeline.parse(small))[-1].graph
    made = cached(graph, f"{small},insert-kv-cache")
    x = ids(length=9)
    got = run_in_chunks(made, [x], chunks(9, 1))
    assert distance(got, interpret(whole, [x])[0]) < 0.01  # noise may turn a code


def test_the_default_passes_leave_it_valid(graph):
    made = run_pipeline(graph, Pipeline.parse(f"{QUANTIZED},default"))[-1].graph
    verify(made)
    x = ids()
    assert distance(run_in_chunks(made, [x], [5, 12]), interpret(graph, [x])[0]) < 0.05


def test_a_decoder_puts_the_cache_where_a_recipe_needs_it():
    default = Pipeline.parse("default")
    assert with_cache("raised", "T", default).endswith(",insert-kv-cache{dim=T}")
    made = with_cache("raised,quantize-cache", "T", default)
    assert made.endswith(",insert-kv-cache{dim=T},quantize-cache")
    named = with_cache("w4a8", "T", default)
    assert named.endswith(",quantize-activations,insert-kv-cache{dim=T}")
    assert NAMED["w4a8"].startswith(named.removesuffix(",insert-kv-cache{dim=T}"))
    made = with_cache("w4a8,quantize-cache", "T", default)
    assert made == f"{named},quantize-cache"
    assert with_cache("", "T", default) == "insert-kv-cache{dim=T}"
