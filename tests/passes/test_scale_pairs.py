"""Scale pairs: which constants can pass factors to which, that it is exact, and why others cannot."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effc.ir import PassError, parse, verify
from effc.passes.analysis.scale_pairs import find_scale_pairs, refused_pairs, scaled
from tests.passes.conftest import example, fill
from tests.passes.folding import Decoder, ids, logits, raised, ran, relative


class Logits(nn.Module):
    """A causal language model of transformers as a function of ids."""

    def __init__(self, model):
        super().__init__()
        torch.manual_seed(0)
        self.m = model.eval().requires_grad_(False)
        for p in model.parameters():
            p.normal_(float(p.dim() == 1), 0.2)  # norms and biases around 1

    def forward(self, input_ids):
        return self.m(input_ids, use_cache=False).logits


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=56, max_position_embeddings=64,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, bos_token_id=0, eos_token_id=0, **size))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32,
        )
    )  # fmt: skip


def folded(graph, kinds=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pairs = [p for p in find_scale_pairs(graph) if kinds is None or p.kind in kinds]
    made = scaled(graph, {p: torch.randn(p.size, generator=generator).exp() for p in pairs})
    verify(made)
    return made


# Per block: the kinds and sizes of pairs. Rotary halves share factors, and so do the query heads of
# a key head; relu passes factors on (OPT), gelu does not (GPT-2, whose q, k and v are one layer).
MODELS = {
    "llama": (llama, [("norm, linear", 32), ("q, k", 8), ("linear, linear", 16),
                      ("norm, linear", 32), ("linear, linear", 56)]),
    "gpt2": (gpt2, [("norm, linear", 32), ("linear, linear", 32), ("q, k", 32),
                    ("norm, linear", 32)]),
    "opt": (opt, [("norm, linear", 32), ("q, k", 32), ("linear, linear", 32),
                  ("norm, linear", 32), ("linear, linear", 64)]),
}  # fmt: skip


@cache
def small():
    return raised(Decoder(2))


@cache
def model(name):
    return raised(Logits(MODELS[name][0]()))


@pytest.mark.parametrize("name", MODELS)
def test_folding_is_exact_on_real_architectures(name):
    graph, block = model(name), MODELS[name][1]
    pairs = find_scale_pairs(graph)
    assert [(p.kind, p.size) for p in pairs[: len(block)]] == block
    want = logits(graph, ids())
    for kinds in ({"q, k"}, None):
        made = folded(graph, kinds)
        assert relative(logits(made, ids()), want) < 1e-5
    assert not {e.node for p in pairs for e in p.ends} & {*made.nodes}  # all took their factors


def test_a_wrong_factor_would_show():
    """The tolerance can tell: the same with consumers left out is far off."""
    graph = small()
    pair = find_scale_pairs(graph)[0]
    s = torch.linspace(0.5, 2, pair.size)
    alone = type(pair)(pair.kind, pair.size, pair.producer, ())
    assert relative(logits(scaled(graph, {alone: s}), ids()), logits(graph, ids())) > 1e-2


def test_two_pairs_meet_in_one_matrix():
    """v is a consumer of the norm and a producer for o: rows and columns of one weight."""
    graph = small()
    by_kind = {p.kind: p for p in reversed(find_scale_pairs(graph))}
    norm, v = by_kind["norm, linear"], by_kind["linear, linear"]
    assert v.producer.node in [e.node for e in norm.consumers]
    s = {p: torch.linspace(0.5, 2, p.size) for p in (norm, v)}
    assert relative(logits(scaled(graph, s), ids()), logits(graph, ids())) < 1e-5


HEAD = """\
def graph(x: f32[3, 8]):
    g: f32[8] = weight("gamma", digest="")
    a: f32[8, 8] = weight("a", digest="")
    b: f32[8, 8] = weight("b", digest="")
    n = rms_norm(x, g)
"""
REFUSED = {
    "nonlinear": ("    p = linear(n, a)\n    r = gelu(p)\n    y = linear(r, b)\n", "linear",
                  "gelu of a scaled value is not a scaled gelu"),
    "residual": ("    p = linear(n, a)\n    y = add(x, p)\n", "linear", "as in a residual sum"),
    "unscaled consumer": ("    p = linear(n, a)\n    r = softmax(n, dim=1)\n    y = add(p, r)\n",
                          "rms_norm", "softmax reads it, and would read scaled values"),
    "output": ("    y = n\n", "rms_norm", "it is an output of the graph"),
    "shared weight": ("    p = linear(n, a)\n    y = linear(p, a)\n", "rms_norm",
                      "its weight is also read by linear"),
    "twice": ("    p = linear(n, a)\n    r = mul(p, p)\n    y = linear(r, b)\n", "linear",
              "mul has it on both sides"),
    "shifted": ("    p = linear(n, a)\n    r = add(p, 1.0)\n    y = linear(r, b)\n", "linear",
                "add joins it with what is not scaled"),
    "one of two readers": ("    p = linear(n, a)\n    r = linear(p, b)\n    s = exp(p)\n"
                           "    y = add(r, s)\n", "linear", "exp of a scaled value"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scaled_has_a_reason(case):
    body, op, reason = REFUSED[case]
    out = "n" if case == "output" else "y"
    graph = fill(parse(HEAD + body.replace("    y = n\n", "") + f"    return {out},\n"))
    refused = {r.node.name: str(r.why) for r in reversed(refused_pairs(graph))}
    assert reason in refused[op]
    assert not any(p.producer.node.name == op for p in find_scale_pairs(graph))


PARTIAL = """\
def graph(x: f32[3, 8]):
    a: f32[8, 8] = weight("a", digest="")
    b: f32[8, 4] = weight("b", digest="")
    p = linear(x, a)
    u = slice(p, dim=1, start=0, size=4)
    v = slice(p, dim=1, start=4, size=4)
    s = silu(u)
    m = mul(s, v)
    y = linear(m, b)
    return y,
"""


def test_a_joined_layer_passes_factors_where_its_slices_do():
    """gate and up as one layer: the half that goes through silu stays as it is."""
    graph = fill(parse(PARTIAL))
    (pair,) = find_scale_pairs(graph)
    assert pair.producer.index.tolist() == [-1] * 4 + [0, 1, 2, 3]
    (x,) = example(graph)
    made = scaled(graph, {pair: torch.tensor([0.5, 3.0, 7.0, 0.1])})
    assert relative(logits(made, x), logits(graph, x)) < 1e-6


def test_rotary_embeddings_tie_the_channels_they_mix():
    pairs = [p for p in find_scale_pairs(model("llama")) if p.kind == "q, k"]
    q, k = (e.index.reshape(-1, 8) for e in pairs[0].ends)
    assert torch.equal(q[:, :4], q[:, 4:])  # halves of a head
    assert torch.equal(q[0], q[1]) and torch.equal(q[0], k[0])  # two query heads, their key head
    assert not torch.equal(q[1], q[2])


class Joined(nn.Module):
    """Attention as vision transformers write it: one layer, taken apart along a new dimension."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(2, 5, 16))


def test_queries_keys_and_values_of_one_layer(captured):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    graph, _ = ran(captured(Joined().requires_grad_(False), x), "raised")
    pairs = find_scale_pairs(graph)
    assert [(p.kind, p.size) for p in pairs] == [("linear, linear", 16), ("q, k", 16)]
    assert relative(logits(folded(graph), x), logits(graph, x)) < 1e-5


def test_factors_must_be_positive_and_as_many_as_the_pair_has():
    graph = small()
    pair = find_scale_pairs(graph)[0]
    for s in (torch.ones(3), -torch.ones(pair.size), torch.full((pair.size,), torch.nan)):
        with pytest.raises(PassError, match="no factors for layers"):
            scaled(graph, {pair: s})


def test_factors_are_rounded_once_in_16_bits():
    text = HEAD.replace("f32", "bf16") + "    y = linear(n, a)\n    return y,\n"
    graph = fill(parse(text))
    (x,) = example(graph)
    (pair,) = find_scale_pairs(graph)
    made = scaled(graph, {pair: torch.linspace(0.5, 2, 8)})
    verify(made)
    assert relative(logits(made, x), logits(graph, x)) < 2**-7


# ------------------------------------------------------------------ the pass


def test_fold_scales_levels_weights_and_inputs():
    graph = small()
    after, ctx = ran(graph, "fold-scales", [[ids(seed=1)], [ids(seed=2)]])
    verify(after)
    assert relative(logits(after, ids()), logits(graph, ids())) < 1e-5
    assert ctx.notes[0].startswith("8 pairs: 4 (norm, linear), 4 (linear, linear)")
    assert ctx.stats["FoldScale"].hits == 8
    assert any("silu" in m.reason for m in ctx.stats["FoldScale"].misses)


def test_fold_scales_takes_an_outlier_out_of_what_a_layer_reads():
    """One channel a hundred times the others; afterwards both sides share it (alpha = 0.5)."""
    graph = fill(parse(HEAD + "    y = linear(n, a)\n    return y,\n"))
    gamma = next(w for w in graph.weights if w.key == "gamma")
    gamma.data[:] = 1.0
    gamma.data[3] = 100.0
    (x,) = example(graph)

    def spread(g):
        (layer,) = (n for n in g.nodes if n.name == "linear")
        value = logits(g.with_outputs([layer.x]), x).abs().amax(0)
        return float(value.max() / value.median())

    plain, (after, _) = spread(graph), ran(graph, "fold-scales", [[x]])
    assert plain > 30 and spread(after) < plain / 4
    none, _ = ran(graph, "fold-scales{alpha=0.0}", [[x]])
    assert spread(none) > spread(after)


def test_fold_scales_without_pairs_says_so():
    graph = fill(parse("def graph(x: f32[3]):\n    y = exp(x)\n    return y,\n"))
    after, ctx = ran(graph, "fold-scales", [example(graph)])
    assert after is graph and ctx.notes == ["no pair of constants between which factors can move"]
    with pytest.raises(PassError, match="no share"):
        ran(graph, "fold-scales{alpha=2.0}", [example(graph)])
