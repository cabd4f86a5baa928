"""tune-blocks and tune-scales: what training of compressed weights buys, and leaves alone."""

from __future__ import annotations

import pytest
import torch

from effc.ir import PassError, verify
from effc.ir.formats import Encoded
from effc.passes.base import Context, Pipeline
from effc.passes.quantize.blockwise import Stream, find_blocks
from effc.passes.quantize.latent import compressed, originals
from tests.passes.folding import logits, ran
from tests.passes.trained import batches, loss, trained

PRUNE = "prune-groups{rate=0.4,group=8,score=magnitude}"
BLOCKS = "tune-blocks{steps=60,lr=0.02}"
SCALES = "tune-scales{steps=40,lr=0.01}"


@pytest.fixture(scope="module")
def graph():
    return trained()


@pytest.fixture(scope="module")
def data():
    return batches(8)


@pytest.fixture(scope="module")
def stages(graph, data):
    """The graph with groups left out, then after each stage of training, and what they noted."""
    found, notes = [graph], []
    for p in (PRUNE, BLOCKS, SCALES):
        ctx = Context(calibration=data, uncompressed=graph, earlier=found)
        (parsed,) = Pipeline.parse(p)
        found.append(parsed.run(found[-1], ctx))
        notes.append(ctx.notes)
    return found, notes


def parts(value: Encoded, kind: str) -> torch.Tensor:
    if kind in value.type.format.parts(value.type):
        return value[kind]
    return parts(value["values"], kind)


def test_the_loss_falls_with_every_stage(stages) -> None:
    """On text that nothing was trained on (GQSA, section 6.6)."""
    found, notes = stages
    float_, masked, tuned, scaled = map(loss, found)
    assert float_ < scaled < tuned < masked
    assert tuned - float_ < 0.7 * (masked - float_)
    assert "relative squared error of a block" in notes[1][0]
    assert notes[2][0].startswith("divergence on the calibration data: ")
    for g in found:
        verify(g)


def test_masks_stay_in_stage_1_and_codes_too_in_stage_2(stages) -> None:
    (_, masked, tuned, scaled), _ = stages
    values = [{c.key: c.value for c in compressed(g)} for g in (masked, tuned, scaled)]
    changed = 0
    for key in values[0]:
        a, b, c = (v[key] for v in values)
        assert a.type == b.type == c.type
        assert torch.equal(a["mask"], b["mask"]) and torch.equal(a["mask"], c["mask"])
        assert torch.equal(parts(b, "codes"), parts(c, "codes"))
        assert torch.equal(parts(b, "zero"), parts(c, "zero"))
        assert not torch.equal(parts(b, "scale"), parts(c, "scale"))
        changed += int((parts(a, "codes") != parts(b, "codes")).sum())
    assert changed > 100
    keys = [[w.key for w in g.weights] for g in (masked, tuned, scaled)]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])


@pytest.mark.parametrize("weights", ["bits=2b,group=8", "bits=3,zero=True", "bits=2,zero=True"])
def test_both_stages_take_any_weights_with_scales(graph, data, weights) -> None:
    """Nothing in them knows where the codes come from."""
    before, _ = ran(graph, f"quantize-weights{{{weights}}}")
    blocks, _ = ran(graph, f"quantize-weights{{{weights}}},tune-blocks{{steps=25,lr=0.01}}", data)
    scales, _ = ran(graph, f"quantize-weights{{{weights}}},tune-scales{{steps=15,lr=0.01}}", data)
    assert loss(blocks) < loss(before) and loss(scales) < loss(before)


def test_activations_are_trained_through(graph, data) -> None:
    way = "quantize-weights{bits=3,zero=True},quantize-activations{bits=4}"
    before, _ = ran(graph, way)
    after, _ = ran(graph, f"{way},tune-blocks{{steps=25,lr=0.01}}", data)
    assert loss(after) < loss(before)
    assert sum(n.name == "quantize" for n in after.nodes) == 8


def test_no_steps_are_the_same_graph(graph) -> None:
    coded, _ = ran(graph, PRUNE)
    for p in ("tune-blocks{steps=0}", "tune-scales{steps=0}"):
        assert ran(coded, p)[0] is coded
        assert not Pipeline.parse(p).passes[0].calibrated


def test_scales_that_training_makes_worse_stay_as_they_were(graph, data) -> None:
    coded, _ = ran(graph, PRUNE)
    after, ctx = ran(coded, "tune-scales{steps=3,lr=5.0}", data)
    assert after is coded and "the scales stay as they were" in ctx.notes[0]


def test_the_same_run_gives_the_same_weights(graph, data) -> None:
    way = f"{PRUNE},tune-blocks{{steps=4}},tune-scales{{steps=3}}"
    assert ran(graph, way, data)[0] == ran(graph, way, data)[0]


def test_a_block_alone_is_the_block_in_its_graph(graph, data) -> None:
    stream = Stream(graph, data, {})
    for block in find_blocks(graph):
        ends = graph.with_outputs([block.unit.y])
        entered = stream.entering(block)
        for y, batch in zip(stream.leaving(block, entered), data):
            assert torch.equal(y, logits(ends, batch[0]))


def test_the_float_weights_are_those_of_the_last_stage_that_had_them(graph) -> None:
    halved = graph.substitute({w: type(w).holding(w.key, w.data / 2, w.of) for w in graph.weights})
    coded, _ = ran(halved, "quantize-weights")
    found = compressed(coded)
    ctx = Context(uncompressed=graph, earlier=[graph, halved])
    known = originals(found, ctx)
    assert len(known) == len(found) == 14
    assert all(known[c] in halved.nodes for c in found)
    assert all(w in graph.nodes for w in originals(found, Context(uncompressed=graph)).values())


def test_what_cannot_be_tuned_is_refused(graph, data) -> None:
    with pytest.raises(PassError, match="nothing is compressed"):
        ran(graph, "tune-blocks", data)
    coded, _ = ran(graph, PRUNE)
    with pytest.raises(PassError, match="no earlier stage has those"):
        ran(coded, "tune-blocks", data)
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, f"{PRUNE},tune-blocks")
    with pytest.raises(PassError, match="something is negative"):
        ran(coded, "tune-scales{lr=-1.0}", data)
    with pytest.raises(PassError, match="leave no loss"):
        ran(coded, "tune-scales{kl=0.0}", data)
    after, ctx = ran(graph, "tune-scales", data)
    assert after is graph and "nothing is compressed" in ctx.notes[0]
