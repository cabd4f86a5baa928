"""calibrate-blocks: what is learnt before numbers are rounded, and what a stopped run leaves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effc.calibration import asked_for
from effc.ir import Graph, OptionError, PassError, Weight, interpret, verify
from effc.passes.base import Context, Pipeline
from effc.passes.quantize.block_losses import (
    Weights,
    attention_map,
    attentions,
    block_loss,
    divergence,
)
from effc.passes.quantize.block_plan import Learnt
from effc.passes.quantize.blockwise import find_blocks, shuffled
from effc.passes.quantize.calibrate_blocks import CalibrateBlocks
from effc.passes.quantize.fold_scales import balance
from effc.passes.quantize.latent import compressed
from effc.passes.quantize.weights import layers
from tests.passes.folding import logits, ran, relative
from tests.passes.trained import batches, loss, text, trained

FAST = "steps=40,clip_lr=0.1,balance_lr=0.03,compensation_lr=0.03"


@pytest.fixture(scope="module")
def graph():
    return trained()


@pytest.fixture(scope="module")
def data():
    return batches(8)


@pytest.fixture(scope="module")
def float_loss(graph) -> float:
    return loss(graph)


def excess(graph, float_loss, way, data) -> float:
    """Nats a token above the float graph, on text that nothing was learnt from."""
    after, _ = ran(graph, way, data)
    verify(after)
    return loss(after) - float_loss


# ------------------------------------------------------------------ what it buys


@pytest.mark.parametrize("bits", ["3", "2", pytest.param("2b", marks=pytest.mark.slow)])
def test_learnt_ranges_beat_the_nearest_codes(graph, data, float_loss, bits) -> None:
    """Clipping by itself: no factors, nothing added."""
    only = "balance=False,compensation=none,acts=16"
    nearest = excess(graph, float_loss, f"calibrate-blocks{{bits={bits},steps=0,{only}}}", data)
    learnt = excess(graph, float_loss, f"calibrate-blocks{{bits={bits},{FAST},{only}}}", data)
    assert learnt < 0.9 * nearest


@pytest.mark.slow
def test_five_levels_beat_four(graph, data, float_loss) -> None:
    for options in ("steps=0", FAST.replace("40", "15")):
        four, five = (
            excess(graph, float_loss, f"calibrate-blocks{{bits={b},{options}}}", data)
            for b in ("2", "2b")
        )
        assert five < four


def test_eight_bits_are_the_float_graph(graph, data) -> None:
    after, _ = ran(graph, "calibrate-blocks{bits=8,steps=5}", data)
    assert relative(logits(after, text(2, 16, 5)), logits(graph, text(2, 16, 5))) < 0.03
    assert ran(graph, "calibrate-blocks{bits=16}")[0] is graph


def test_no_steps_are_plain_quantisation(graph) -> None:
    """And read no data."""
    after, _ = ran(graph, "calibrate-blocks{bits=3,group=8,acts=6,steps=0}")
    plain, _ = ran(graph, "quantize-weights{bits=3,group=8,zero=True},quantize-activations{bits=6}")
    assert torch.equal(logits(after, text(2, 16, 5)), logits(plain, text(2, 16, 5)))
    assert {w.key: w.content for w in after.weights} == {w.key: w.content for w in plain.weights}


def test_types_and_places_are_those_of_plain_quantisation(graph, data) -> None:
    after, _ = ran(graph, "calibrate-blocks{bits=2b,group=8,steps=2}", data)
    plain, _ = ran(graph, "quantize-weights{bits=2b,group=8},quantize-activations")
    assert sorted(n.name for n in after.nodes) == sorted(n.name for n in plain.nodes)
    known = {c.key: c.node.type for c in compressed(plain)}
    assert {c.key: c.node.type for c in compressed(after)} == {
        f"calibrate.{key}": t for key, t in known.items()
    }


# ------------------------------------------------------------------ what is learnt


def state(graph, data, **options) -> list[Learnt]:
    p = CalibrateBlocks(**options)
    plans = p.plans(graph, layers(graph, Context()))
    pairs = [pair for plan in plans for pair in plan.pairs]
    return [Learnt(plan, balance(graph, pairs, data)) for plan in plans]


def test_at_first_factors_leave_the_function_and_nothing_is_added(graph, data) -> None:
    """With codes out of the way, the slots' numbers are the float graph's, but for rounding."""
    new = {}
    for learnt in state(graph, data):
        assert len(learnt.balance) == 4  # norm, linear twice; v, o; up, down
        assert learnt.plan.last.key.endswith("down.weight")
        numbers = [w for _, w, _ in learnt.numbers()]
        dense = [
            Weight.holding(f"d{s.key}", w.detach(), s.constant.tensor)
            for s, w in zip(learnt.plan.slots, numbers)
        ]
        new |= learnt.plan.replaced(dense)
    after = graph.substitute(new)
    assert any(not torch.equal(a.data, b.data) for a, b in zip(after.weights, graph.weights))
    assert relative(logits(after, text(2, 16, 5)), logits(graph, text(2, 16, 5))) < 1e-5


def test_what_is_learnt_is_what_is_stored(graph, data) -> None:
    made = torch.Generator().manual_seed(0)
    for learnt in state(graph, data, bits=3):
        with torch.no_grad():
            for group in learnt.groups(1.0, 1.0, 1.0):
                for p in group["params"]:
                    p.add_(0.1 * torch.randn(p.shape, generator=made))
        tensors = learnt.tensors()
        for slot, value in zip(learnt.plan.slots, learnt.values()):
            (stored,) = interpret(Graph.of((), (slot.made(tensors),)), ())
            assert torch.equal(stored, value)


def test_every_parameter_has_a_gradient(graph, data) -> None:
    learnt = state(graph, data)[0]
    sum(v.square().sum() for v in learnt.values()).backward()
    groups = learnt.groups(1.0, 1.0, 1.0)
    assert len(groups) == 3
    a, b = learnt.added
    assert not b.grad.any() and a.grad.any()  # a is 0 at first
    rest = [p for g in groups for p in g["params"] if p is not b]
    assert all(p.grad is not None and p.grad.any() for p in rest)
    assert len(learnt.groups(1.0, 0.0, 0.0)) == 1


def test_compensation_is_for_the_edges(graph) -> None:
    edges, everything, none = (CalibrateBlocks(compensation=c) for c in ("edges", "all", "none"))
    found = [i for i in range(30) if edges.compensated(i, 30)]
    assert found == [0, 1, 2, 26, 27, 28, 29]
    assert all(everything.compensated(i, 30) for i in range(30))
    assert not any(none.compensated(i, 30) for i in range(30))


def test_layers_that_are_left_out_stay_as_they_are(graph, data) -> None:
    """A whole block of them, and some of another, whose factors the others still get."""
    way = "calibrate-blocks{bits=4,steps=3,skip=layers.0.*|layers.1.up.weight}"
    after, _ = ran(graph, way, data)
    verify(after)
    assert len(compressed(after)) == 6
    dense = {w.key: w for w in after.weights}
    for w in graph.weights:
        if w.key.startswith("layers.0."):
            assert torch.equal(dense[w.key].data, w.data)
    assert "calibrate.layers.1.up.weight" in dense  # its rows have factors that down takes back
    assert relative(logits(after, text(2, 16, 5)), logits(graph, text(2, 16, 5))) < 0.3


@pytest.mark.slow
def test_passes_behind_it_take_what_it_made(graph, data, float_loss) -> None:
    way = "calibrate-blocks{bits=2,steps=4}"
    scales = f"{way},tune-scales{{steps=8,lr=0.01}}"
    assert excess(graph, float_loss, scales, data) < excess(graph, float_loss, way, data)
    # With factors in them, weights no longer stand for the model's own.
    with pytest.raises(PassError, match="no earlier stage has those"):
        ran(graph, f"{way},tune-blocks", data)
    way = "calibrate-blocks{bits=2,steps=4,balance=False}"
    blocks = f"{way},tune-blocks{{steps=10}}"
    assert excess(graph, float_loss, blocks, data) < excess(graph, float_loss, way, data)


# ------------------------------------------------------------------ losses


def test_an_attention_map_is_the_ops_own(graph) -> None:
    """map @ v is what the op gives, where all heads have the same map."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 5, 8, generator=made) for _ in range(3))
    mask = torch.rand(5, 5, generator=made) < 0.8
    mask.fill_diagonal_(True)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}):
        wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3, **options)

        class Node:
            gqa, scale, causal = False, 0.3, options.get("is_causal", False)

        found = attention_map(Node, q, k, options.get("attn_mask"))
        assert torch.allclose(found @ v[:, 0], wanted[:, 0], atol=1e-6)
    assert len(attentions(graph.nodes)) == 2


def test_losses_are_their_formulas() -> None:
    made = torch.Generator().manual_seed(0)
    y, a, b = (torch.randn(2, 3, 8, generator=made) for _ in range(3))
    p, q = (torch.rand(2, 3, 5, generator=made).softmax(-1) for _ in range(2))
    parts = {}
    for name in ("dlc", "akl", "mse"):
        weights = Weights(**{n: float(n == name) for n in ("dlc", "akl", "mse")})
        parts[name] = block_loss(y, [p], [a, b], [q], weights).item()
        none = block_loss(a, [q], [a, a], [q], weights).item()
        assert none == pytest.approx(0, abs=1e-6)
    cosines = [F.cosine_similarity(y, g, dim=-1).mean().abs() for g in (a, b)]
    assert parts["dlc"] == pytest.approx(-sum(float(c.log()) for c in cosines), rel=1e-5)
    both = (p * (p / q).log()).sum(-1).mean() + (q * (q / p).log()).sum(-1).mean()
    assert parts["akl"] == pytest.approx(float(both), rel=1e-4)
    errors = [(y - g).square().sum() / g.square().sum() for g in (a, b)]
    assert parts["mse"] == pytest.approx(float(sum(errors)), rel=1e-5)
    together = block_loss(y, [p], [a, b], [q], Weights(1, 2, 3)).item()
    assert together == pytest.approx(parts["dlc"] + 2 * parts["akl"] + 3 * parts["mse"], rel=1e-5)
    twice = block_loss(y, [p], [a, b], [q], Weights(0, 1, 0, True)).item()
    assert 0 < twice < parts["akl"]  # a second softmax hides most of the difference


def test_divergence_bears_zeros() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]])
    assert divergence(p, p).item() == 0
    assert divergence(p, torch.tensor([[1.0, 0.0, 0.0]])).isfinite()


# ------------------------------------------------------------------ stopped and taken up


class Stop(Exception):
    pass


def stopping(after: int):
    """A progress that stops the run when its nth block is begun."""
    begun = []

    def progress(steps, title):
        if title.startswith("calibrating"):
            begun.append(title)
            if len(begun) > after:
                raise Stop
        return steps

    return progress


def test_a_stopped_run_goes_on_to_the_same_result(graph, data, tmp_path) -> None:
    options = "bits=3,steps=6"
    whole, _ = ran(graph, f"calibrate-blocks{{{options}}}", data)
    way = f"calibrate-blocks{{{options},checkpoint={tmp_path}/c}}"
    with pytest.raises(Stop):
        ran(graph, way, data, progress=stopping(1))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "block-000.safetensors", "calibration.json",
    ]  # fmt: skip
    again, ctx = ran(graph, way, data)
    assert again == whole
    assert "1 of 2 blocks are those of" in ctx.notes[0]


def test_a_finished_folder_stands_for_the_data(graph, data, tmp_path) -> None:
    way = f"calibrate-blocks{{bits=2,steps=2,checkpoint={tmp_path}}}"
    (calibrate,) = Pipeline.parse(way)
    assert calibrate.calibrated and not calibrate.remembers
    with pytest.raises(OptionError, match="needs calibration data"):
        asked_for(Pipeline((calibrate,)), None)
    whole, _ = ran(graph, way, data)
    assert calibrate.remembers
    for given in (None, data):
        asked_for(Pipeline((calibrate,)), given)
    again, ctx = ran(graph, way)  # no data
    assert again == whole
    assert "2 of 2 blocks" in ctx.notes[0]
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert size < 0.5 * sum(w.tensor.nbytes for w in graph.weights)


def test_a_folder_of_another_run_is_refused(graph, data, tmp_path) -> None:
    ran(graph, f"calibrate-blocks{{bits=3,steps=1,checkpoint={tmp_path}}}", data)
    for way, given, reason in (
        ("bits=2,steps=1", data, "its pass is"),
        ("bits=3,steps=1", batches(2, 50), "its data is"),
    ):
        with pytest.raises(PassError, match=reason):
            ran(graph, f"calibrate-blocks{{{way},checkpoint={tmp_path}}}", given)
    other = graph.substitute({w: type(w).holding(w.key, w.data * 2, w.of) for w in graph.weights})
    with pytest.raises(PassError, match="its graph is"):
        ran(other, f"calibrate-blocks{{bits=3,steps=1,checkpoint={tmp_path}}}", data)
    (tmp_path / "block-001.safetensors").write_bytes(b"cut short")
    with pytest.raises(PassError, match="cannot be read"):
        ran(graph, f"calibrate-blocks{{bits=3,steps=1,checkpoint={tmp_path}}}", data)


def test_a_seed_is_an_order_of_batches() -> None:
    assert shuffled(7, 3, 0) == shuffled(7, 3, 0) != shuffled(7, 3, 1)
    assert sorted(shuffled(6, 3, 0)) == [0, 0, 1, 1, 2, 2]


def test_bad_options_are_refused(graph) -> None:
    for options, reason in {
        "bits=9": "bits=9", "bits=2b,zero=True": "zero=True", "acts=0": "bits=0",
        "compensation=some": "compensation=some", "alpha=2.0": "no share", "steps=-1": "negative",
        "dlc=0.0,akl=0.0,mse=0.0": "leave no loss",
    }.items():  # fmt: skip
        with pytest.raises(PassError, match=reason):
            ran(graph, f"calibrate-blocks{{{options}}}", [[text(2, 8, 0)]])
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, "calibrate-blocks")
    assert len(find_blocks(graph)) == 2
