"""Recipes by name through effc.compile and effc.decoder, and what they cost a real language model."""

import pytest
import torch
import torch.nn.functional as F

import effc
from effc.ir import interpret
from effc.passes.pipelines import NAMED, quantized
from tests.passes.folding import Decoder, ids, raised, ran, relative


@pytest.fixture(scope="module")
def compiled():
    net = Decoder(1)
    batches = [ids(seed=s) for s in range(3)]
    return net, effc.compile(net, "w4a8", calibrate=batches, target="reference")


def test_a_recipe_by_name_runs(compiled):
    net, fast = compiled
    x = ids(seed=0)
    error = relative(fast(x), net(x))
    assert 0 < error < 0.5
    (record,) = effc.explain(fast).records
    assert record.stages[-1].total_error.relative_l2 == pytest.approx(error, rel=1e-3)


def test_the_report_tells_bytes_bits_and_errors_of_each_pass_and_layer(compiled):
    _, fast = compiled
    (report,) = effc.explain(fast).reports
    stages = {s.name.partition("{")[0]: s for s in report.stages}
    weights, inputs = stages["quantize-weights"], stages["quantize-activations"]
    assert weights.stored < 0.45 * report.stages[0].stored  # the head stays as it is
    assert "bits an element, scales included" in weights.notes[0]
    assert weights.error.relative_l2 > 0 and inputs.error.relative_l2 > 0
    assert stages["fold-scales"].error.relative_l2 < 1e-5
    (record,) = effc.explain(fast).records
    layers = sum(n.name == "encoded" for n in record.stages[-1].graph.nodes)
    for stage in (weights, inputs):
        assert len(stage.node_errors) == stage.rewrites == layers
        assert all(n.before.split(" = ")[1].startswith("linear") for n in stage.node_errors)
        assert all(n.error.relative_l2 > 0 for n in stage.node_errors)
    assert "were" in str(report) and "stored" in str(report)


def test_names_say_how_many_bits():
    assert "quantize-weights{bits=2b,group=64,method=gptq}" in NAMED["w2b"]
    assert "quantize-activations," in NAMED["w8a8"] and "quantize-act" not in NAMED["w8"]
    assert "quantize-activations{bits=4,zero=True}" in NAMED["w4a4"]
    assert quantized(5, 7) != quantized(5) != quantized(4)


# ------------------------------------------------------------------ stories260K


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def tokens(folder):
    """Its stories as rows of 256 tokens, [66, 256]."""
    from examples.zoo import stories260k

    tokenizer = stories260k.tokenizer(folder)
    stream = [t for s in stories260k.stories(folder) for t in [1, *tokenizer.encode(s).ids][:512]]
    return torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)


def loss(graph, rows):
    """Nats a token."""
    with torch.no_grad():
        found = [interpret(graph, [r])[0] for r in rows.split(8)]
    flat = torch.cat(found)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(flat, rows[:, 1:].flatten()))


@pytest.mark.slow
def test_fewer_bits_cost_more_and_correction_gains(shared_data):
    from examples.zoo import stories260k

    folder = shared_data / "llm-stories260k"
    graph = raised(Logits(stories260k.load(folder).requires_grad_(False)))
    rows = tokens(folder)
    learn, judge = [[r] for r in rows[:16].split(4)], rows[16:48]
    found = {"FP": loss(graph, judge)}
    for bits in (8, 4, 3, 2):
        for method in ("rtn", "gptq"):
            options = f"bits={bits},zero={bits < 8},method={method}"
            text = f"quantize-weights{{{options}}},quantize-activations"
            found[f"{bits} {method}"] = loss(ran(graph, text, learn)[0], judge)
    for method in ("rtn", "gptq"):
        row = [found["FP"], *(found[f"{b} {method}"] for b in (8, 4, 3, 2))]
        assert row == sorted(row), found
    assert found["8 rtn"] < 1.01 * found["FP"]  # 1 % of perplexity is 0.01 nats
    assert found["4 gptq"] - found["FP"] < 0.7 * (found["4 rtn"] - found["FP"])
    assert found["3 gptq"] - found["FP"] < 0.7 * (found["3 rtn"] - found["FP"])


@pytest.mark.slow
def test_a_compressed_decoder_with_an_eight_bit_cache_tells_the_story(shared_data):
    from examples.zoo import stories260k

    folder = shared_data / "llm-stories260k"
    model = stories260k.load(folder).requires_grad_(False).eval()
    _, kwargs, _ = stories260k.golden(folder)
    story = kwargs["input_ids"]
    learn = [*tokens(folder)[:8].split(4)]
    made = effc.decoder(model, "w8a8,quantize-cache", calibrate=learn, target="reference")
    told = made.generate(story[0, :16], 40)
    assert (torch.tensor(told) == story[0, 16:56]).float().mean() > 0.8
