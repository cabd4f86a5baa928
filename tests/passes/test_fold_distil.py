"""distil: what was compressed learns from what was not."""

import pytest
import torch

from effc.ir import PassError, interpret, verify
from effc.passes.analysis.blocks import find_runs, residual_updates, weight_bytes
from effc.passes.base import Pipeline
from effc.passes.fold.distil import Student, divergence
from effc.passes.fold.objective import NextToken, Objective
from tests.passes.folding import decoder, ids, logits, ran, relative, told, with_weights

DROP, SHARE = "drop-blocks{rate=0.33,by=random}", "share-blocks{rank=4}"


@pytest.fixture(scope="module")
def graph():
    return decoder()


@pytest.fixture(scope="module")
def batches(graph):
    return [[told(graph, seed=s)] for s in range(3)]


def loss(graph, batches):
    return Objective(graph, batches).mean(graph)


@pytest.mark.parametrize("way", [DROP, SHARE, f"{DROP},{SHARE}"])
def test_repair_lowers_the_loss_and_stores_no_byte_more(graph, batches, way):
    compressed, _ = ran(graph, way)
    repaired, ctx = ran(graph, f"{way},distil{{steps=30,lr=3e-3}}", batches)
    verify(repaired)
    assert loss(repaired, batches) < 0.8 * loss(compressed, batches)
    assert weight_bytes(repaired.weights) == weight_bytes(compressed.weights)
    assert len(repaired.nodes) == len(compressed.nodes)
    said = f"next-token loss on the calibration data: {loss(compressed, batches):.4f}, then "
    assert ctx.notes[0].startswith(said)


def test_what_is_merged_is_what_was_trained(graph, batches):
    """The low-rank change of a shared matrix is one for parent and child, so merging it is exact."""
    shared, _ = ran(graph, SHARE)
    student = Student(shared, residual_updates(shared), {w.key for w in graph.weights}, 3, 0)
    readers = {len(r) for r in student.readers.values()}
    assert readers == {2}  # every matrix is read by two blocks
    with torch.no_grad():
        for p in student.parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    training = student.graph(residual_updates(shared)[-1].y)
    with torch.no_grad():
        beside, tail = interpret(training, [ids(), *student.parameters])
    after = shared.substitute(student.trained())
    assert relative(logits(after, ids()), beside) < 1e-5
    assert relative(logits(after, ids()), logits(shared, ids())) > 0.01
    last = after.with_outputs([residual_updates(after)[-1].y])
    assert relative(logits(last, ids()), tail) < 1e-5


def test_before_the_first_step_nothing_has_changed(graph):
    shared, _ = ran(graph, SHARE)
    student = Student(shared, residual_updates(shared), {w.key for w in graph.weights}, 8, 0)
    after = shared.substitute(student.trained())
    assert torch.equal(logits(after, ids()), logits(shared, ids()))


def test_norms_factors_and_matrices_of_blocks_are_trained_and_nothing_else(graph):
    shared, _ = ran(graph, "share-blocks{rank=2,scale=True}")
    student = Student(shared, residual_updates(shared), {w.key for w in graph.weights}, 2, 0)
    (run,) = find_runs(graph)
    norms = {w.key for b in run.blocks for w in b.weights if w.tensor.rank == 1}
    whole = {w.key for w in student.whole}
    assert norms < whole and all(k.startswith("share.") for k in whole - norms)
    assert len(whole - norms) == 3 * 7 * 3  # children, matrices; A, B and the scale of each
    assert len(student.changes) == 3 * 7
    assert not any("embed" in w.key for w in student.values)
    assert not Student(shared, residual_updates(shared), set(), 0, 0).changes


def test_no_steps_are_the_same_graph(graph):
    assert ran(graph, "distil{steps=0}")[0] is graph
    assert [p.calibrated for p in Pipeline.parse("distil{steps=0},distil")] == [False, True]


def test_the_models_own_weights_stay_as_they_are(graph, batches):
    g = with_weights(graph, lambda key, data: torch.nn.Parameter(data.clone()))
    before = {w: w.data.detach().clone() for w in g.weights}
    after, _ = ran(g, "distil{steps=2}", batches)
    assert all(torch.equal(w.data, v) and w.data.grad is None for w, v in before.items())
    own = {w.key for w in g.weights}
    trained = [w for w in after.weights if w.key not in own]
    assert trained and all(w.key.startswith("distil.") for w in trained)
    assert not any(w.data.requires_grad for w in trained)


def test_the_same_seed_gives_the_same_weights(graph, batches):
    made = [ran(graph, f"{SHARE},distil{{steps=3,seed={s}}}", batches)[0] for s in (0, 0, 1)]
    assert made[0] == made[1] and made[0] != made[2]


def test_divergence_is_zero_of_the_same_and_positive_else():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    at = NextToken(0, 0)
    assert divergence(at, [a], [a]).item() == pytest.approx(0, abs=1e-6)
    p, q = b.softmax(-1), a.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1).mean()
    assert divergence(at, [a], [b]).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_bad_options_are_refused(graph):
    with pytest.raises(PassError, match="neither is negative"):
        ran(graph, "distil{rank=-1}", [[ids()]])
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, "distil")


@pytest.mark.slow
def test_the_gap_to_the_teacher_shrinks_as_rank_grows(graph, batches):
    gaps = []
    for rank in (1, 4, 16):
        repaired, _ = ran(
            graph, f"share-blocks{{rank={rank}}},distil{{steps=60,rank=0,lr=3e-3}}", batches
        )
        gaps.append(loss(repaired, batches) - loss(graph, batches))
    assert gaps[0] > gaps[1] > gaps[2]
