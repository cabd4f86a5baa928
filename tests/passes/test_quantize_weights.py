"""quantize-weights, quantize-activations: types, values, which layers, and why others are not."""

import pytest
import torch

from effc.ir import PassError, Weight, interpret, parse, verify
from effc.ir.formats import GroupQuant, bits_per_element, quantize
from effc.passes.base import Context, Pipeline
from effc.passes.quantize.gptq import gptq, output_error
from effc.passes.quantize.observe import Hessian, observe, rows
from effc.passes.quantize.weights import (
    code_type,
    encoded_below,
    encoded_weight,
    layers,
    score_layers,
    stored_bits,
    weight_type,
    with_weight,
)
from tests.passes.conftest import example, fill
from tests.passes.folding import Decoder, ids, logits, raised, ran, relative

ONE = """\
def graph(x: f32[6, 10]):
    w: f32[8, 10] = weight("w", digest="")
    b: f32[8] = weight("b", digest="")
    y = linear(x, w, b)
    return y,
"""


@pytest.fixture(scope="module")
def graph():
    return raised(Decoder(2))


def one():
    return fill(parse(ONE))


def encoded(graph):
    return [n for n in graph.nodes if n.name == "encoded"]


# ------------------------------------------------------------------ which layers


def test_all_layers_but_the_head_are_taken(graph):
    ctx = Context()
    taken = layers(graph, ctx)
    assert len(taken) == 14 and taken[0].key == "layers.0.q.weight"
    assert [n.w.key for n in score_layers(graph)] == ["embed.weight"]
    (miss,) = ctx.stats["CompressWeight"].misses
    assert "'embed.weight' makes the model's scores" in miss.reason
    (head,) = [y for y in layers(graph, Context(), head=True) if y.head]
    assert len(head.linears) == len(head.lookups) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("y = linear(x, w, b)", "v = exp(x)\n    y = linear(x, v)"), "exp is computed from inputs"),
        (("    return y,", "    z = exp(w)\n    return y, z"), "its weight is also read by exp"),
        (("    return y,", "    return y, w"), "its weight is also read by the caller"),
        (("y = linear(x, w, b)", "u = full(to=(8, 10), value=1.0, dtype_=f32)\n    y = linear(x, u)"),
         "computed from no weight of the model"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_compressed_have_a_reason(change, reason):
    text = ONE.replace(*change)
    if "exp(x)" in text:
        text = text.replace("x: f32[6, 10]", "x: f32[8, 10]")
    g = fill(parse(text))
    ctx = Context()
    assert layers(g, ctx) == ()
    assert reason in ctx.stats["CompressWeight"].misses[0].reason


def test_a_weight_without_values_is_refused():
    ctx = Context()
    assert layers(parse(ONE), ctx) == ()
    assert ctx.stats["CompressWeight"].misses[0].reason == "weight 'w' has no values"


def test_names_choose_layers(graph):
    only, ctx = ran(graph, "quantize-weights{bits=8,only=*.down.*|*.o.*}")
    assert len(encoded(only)) == 4
    assert any("is not among only" in m.reason for m in ctx.stats["QuantizeWeight"].misses)
    rest, ctx = ran(only, "quantize-weights{bits=4,skip=*.q.*}")
    assert sorted({e.dtype.name for e in encoded(rest)}) == ["i8", "int4"]
    assert len(encoded(rest)) == 12  # what is compressed stays as it is
    reasons = [m.reason for m in ctx.stats["QuantizeWeight"].misses]
    assert "its weight is compressed already" in reasons


# ------------------------------------------------------------------ types and values


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, "2b"])
@pytest.mark.parametrize("group", [None, 4, 3])
def test_every_width_and_group_is_the_nearest_codes(bits, group):
    """Groups of 3 and 4 leave a short one at the end of rows of 10."""
    g = one()
    zero = bits != "2b" and bits != 8
    after, ctx = ran(g, f"quantize-weights{{bits={bits},group={group},zero={zero}}}")
    verify(after)
    assert parse(after.text) == after
    (layer,) = (n for n in after.nodes if n.name == "linear")
    w = next(n for n in g.weights if n.key == "w").data
    t = weight_type((8, 10), bits, group, zero)
    assert encoded_below(layer.w).type == t
    (x,) = example(g)
    b = next(n for n in g.weights if n.key == "b").data
    want = torch.nn.functional.linear(x, quantize(w, t).decode(), b)
    assert torch.equal(logits(after, x), want)
    keys = [n.key for n in after.weights if n.key != "b"]
    assert keys == ["w:codes", "w:scale", "w:zero"][: 2 + zero]
    assert f"1 matrices at {stored_bits(encoded(after)):.3g} bits" in ctx.notes[0]


def test_what_is_stored_is_packed():
    after, _ = ran(one(), "quantize-weights{bits=3}")
    codes = next(n for n in after.weights if n.key == "w:codes")
    assert codes.data.numel() == 8 * 10 * 3 // 8
    t = weight_type((64, 96), "2b", 32)
    assert bits_per_element(t) == pytest.approx(7 / 3 + 16 / 32, abs=0.01)


def test_eight_bits_are_close_and_fewer_are_further(graph):
    """Of the last layer's input, which is before the scores of a model with random weights."""
    want = logits(graph, ids())
    off = [
        relative(logits(ran(graph, f"quantize-weights{{bits={b},group=16}}")[0], ids()), want)
        for b in (8, 6, 4)
    ]
    assert off[0] < 0.05 and off[0] < off[1] < off[2]


@pytest.mark.parametrize("text", ["quantize-weights{bits=16}", "quantize-weights{bits=32,method=gptq}",
                                  "quantize-activations{bits=16}"])  # fmt: skip
def test_sixteen_bits_are_the_same_graph(graph, text):
    (p,) = Pipeline.parse(text)
    ctx = Context()
    assert p.run(graph, ctx) is graph and not p.calibrated
    assert "stay as they are" in ctx.notes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("bits=9", "1 to 8, or 2b"), ("bits=0", "1 to 8, or 2b"), ("bits=4b", "1 to 8, or 2b"),
        ("bits=2b,zero=True", "five levels lie around 0"), ("group=0", "group=0"),
        ("scale=f17", "f16"), ("method=best", "rtn or gptq"),
        ("bits=4,head=9", "1 to 8, or 2b"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(graph, options, said):
    with pytest.raises(PassError) as caught:
        ran(graph, f"quantize-weights{{{options}}}", [[ids()]])
    assert said in str(caught.value)


def test_options_come_back_from_text():
    for text in ("quantize-weights{bits=2b,group=32}", "quantize-weights{head=8,only=a|b}"):
        assert str(Pipeline.parse(text)) == text
    assert code_type(8, True).name == "u8" and code_type("2b", False).name == "int2b"


def test_the_head_and_the_table_of_tokens_share_codes(graph):
    after, _ = ran(graph, "quantize-weights{bits=4,head=8}")
    (table,) = (n.table for n in after.nodes if n.name == "embedding")
    head = next(n for n in score_layers(after))
    assert table.x is head.w.x and table.x.dtype.name == "i8"
    assert not any(w.key == "embed.weight" for w in after.weights)
    other = after.with_outputs([n for n in after.nodes if n.name == "embedding"])
    given = graph.with_outputs([n for n in graph.nodes if n.name == "embedding"])
    assert relative(logits(other, ids()), logits(given, ids())) < 0.01


def test_a_transposed_weight_is_compressed_as_it_is_read():
    g = fill(parse(ONE.replace("f32[8, 10]", "f32[10, 8]").replace(
        "y = linear(x, w, b)", "t = permute(w, dims=(1, 0))\n    y = linear(x, t, b)")))  # fmt: skip
    after, _ = ran(g, "quantize-weights{bits=8}")
    (x,) = example(g)
    assert [n.key for n in after.weights] == ["b", "w:codes", "w:scale"]
    assert relative(logits(after, x), logits(g, x)) < 0.02


def test_parts_of_parts_have_names():
    from effc.ir.formats import Encoded, GroupSparse
    from effc.ir.types import DTYPES, Tensor, f16

    inner = GroupQuant(None, f16)
    of = Tensor((2, 8), DTYPES["int4"], format=GroupSparse(4, 3, "bitmap", inner))
    mask = torch.tensor([[True, False], [True, True]])
    kept = quantize(torch.randn(3, 4), Tensor((3, 4), DTYPES["int4"], format=inner))
    node = encoded_weight("w", Encoded(of, (*of.format.encode_index(mask), kept)))
    assert [p.key for p in node.xs if isinstance(p, Weight)] == ["w:mask"]
    assert [p.key for p in node.xs[1].xs] == ["w:values:codes", "w:values:scale"]


# ------------------------------------------------------------------ one-shot correction


@pytest.fixture(scope="module")
def correlated():
    """(w, X) with inputs that are mixtures of few: rounding errors can make up for each other."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=made) @ torch.randn(8, 70, generator=made)
    x = x + 0.3 * torch.randn(400, 70, generator=made)
    return torch.randn(24, 70, generator=made), x


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "zero"), [(8, None, False), (4, None, True), (3, 32, True), ("2b", 16, False)]
)
def test_gptq_is_nearer_than_rounding_on_correlated_inputs(correlated, bits, group, zero, by_size):
    w, x = correlated
    t = weight_type(w.shape, bits, group, zero)
    h = x.T @ x
    made, rounded = gptq(w, h, t, by_size=by_size), quantize(w, t)
    assert made.type == t and [p.dtype for p in made.parts] == [p.dtype for p in rounded.parts]
    error = output_error(w, made.decode(), h)
    assert error < 0.6 * output_error(w, rounded.decode(), h)
    true = relative(x @ made.decode().T, x @ w.T)
    assert error == pytest.approx(true, rel=1e-3)  # X^T X says what X would


def test_gptq_without_correlation_is_rounding():
    w = torch.randn(5, 12)
    t = weight_type(w.shape, 4, 4, True)
    made, rounded = gptq(w, torch.eye(12), t), quantize(w, t)
    assert all(torch.equal(a, b) for a, b in zip(made.parts, rounded.parts))


def test_gptq_takes_inputs_that_are_zero_and_refuses_what_is_no_hessian():
    w = torch.randn(5, 12)
    t = weight_type(w.shape, 4)
    h = torch.zeros(12, 12)
    assert gptq(w, h, t).decode().isfinite().all()
    h[0, 0] = 1.0
    assert gptq(w, h, t).decode().isfinite().all()
    with pytest.raises(PassError, match="no inverse covariance"):
        gptq(w, torch.full((12, 12), torch.nan), t)


def test_hessians_are_of_what_layers_read_however_many_fit(graph):
    batches = [[ids(seed=s)] for s in range(2)]
    whole, _ = ran(graph, "quantize-weights{bits=3,method=gptq}", batches)
    parts, _ = ran(graph, "quantize-weights{bits=3,method=gptq,room=1}", batches)
    assert whole == parts
    rounded, _ = ran(graph, "quantize-weights{bits=3}")
    layer = next(n for n in graph.nodes if n.name == "linear")
    h = Hessian(layer.x.shape[-1])
    observe(graph, batches, {layer.x: h})
    x = torch.cat([rows(interpret(graph.with_outputs([layer.x]), b)[0]) for b in batches])
    assert h.tokens == len(x) and relative(h.value, x.T @ x) < 1e-5
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, "quantize-weights{method=gptq}")
    assert whole != rounded


def test_inputs_of_the_graph_can_be_watched():
    g = one()
    (x,) = example(g)
    h = Hessian(10)
    observe(g, [[x]], {g.inputs[0]: h})
    assert torch.allclose(h.value, x.T @ x)


# ------------------------------------------------------------------ activations


def test_layers_that_read_one_value_read_its_codes(graph):
    both, ctx = ran(graph, "quantize-weights{bits=8},quantize-activations")
    verify(both)
    made = [n for n in both.nodes if n.name == "quantize"]
    assert len(made) == 4 * 2  # q, k, v; o; gate, up; down
    assert ctx.notes == ["14 layers read 8 values in 8 bits"]
    assert "run quantize-weights before" in ctx.stats["QuantizeActivation"].misses[0].reason
    assert relative(logits(both, ids()), logits(graph, ids())) < 0.06
    again, ctx = ran(both, "quantize-activations")
    assert again is both
    assert ctx.stats["QuantizeActivation"].misses[0].reason.startswith("what it reads is quantised")


def test_w8a8_is_linear_on_decoded_codes():
    g = one()
    (x,) = example(g)
    after, _ = ran(g, "quantize-weights{bits=8},quantize-activations{bits=8}")
    w, b = (next(n for n in g.weights if n.key == k).data for k in "wb")
    xq = torch.round(x / (x.abs().amax(1, True) / 127)).clamp(-128, 127)
    wq = quantize(w, weight_type(w.shape, 8)).decode()
    want = (xq * (x.abs().amax(1, True) / 127)) @ wq.T + b
    assert relative(logits(after, x), want) < 1e-5
    assert relative(logits(after, x), logits(g, x)) < 0.02


@pytest.mark.parametrize("options", ["bits=4,zero=True", "bits=4,group=4", "bits=1,zero=True"])
def test_activations_in_few_bits(options):
    g = one()
    after, _ = ran(g, f"quantize-weights{{bits=8}},quantize-activations{{{options}}}")
    verify(after)
    assert parse(after.text) == after and logits(after, example(g)[0]).isfinite().all()


def test_sixteen_bit_models_keep_their_type():
    g = fill(parse(ONE.replace("f32", "bf16")))
    (x,) = example(g)
    after, _ = ran(
        g, "fold-scales,quantize-weights{bits=8,method=gptq},quantize-activations", [[x]]
    )
    verify(after)
    y = logits(after, x)
    assert y.dtype == torch.bfloat16 and relative(y, logits(g, x)) < 0.03


def test_activations_without_compressed_weights_stay(graph):
    after, ctx = ran(graph, "quantize-activations{only=*.q.*}")
    assert after is graph and not ctx.notes
    half, _ = ran(graph, "quantize-weights{bits=8},quantize-activations{only=*.q.*}")
    assert len([n for n in half.nodes if n.name == "quantize"]) == 2


def test_compressed_layers_are_not_joined_into_dense_ones(graph):
    """merge-qkv and others must not make dense weights of codes again."""
    small, _ = ran(graph, "quantize-weights,quantize-activations")
    done, _ = ran(small, "default")
    assert len(encoded(done)) == 14 and not any(n.name == "cat" for n in done.constants)
    assert all(
        n.w.name == "decode" for n in done.nodes if n.name == "linear" and n.w.name != "weight"
    )


def test_with_weight_leaves_other_readers_alone(graph):
    (layer, *_) = layers(graph, Context())
    value = quantize(layer.value, weight_type(layer.w.shape, 8))
    made = graph.substitute(with_weight(layer, encoded_weight(layer.key, value)))
    assert len(encoded(made)) == 1 and layer.w not in made.nodes
