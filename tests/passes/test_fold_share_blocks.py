"""share-blocks: matrices of neighbours stored once, extras that tell blocks apart."""

import json
import re
import struct
import zipfile

import pytest
import torch

import effc
from effc.ir import PassError, Weight, parse, verify
from effc.passes.analysis.blocks import find_runs, weight_bytes
from effc.passes.fold.share_blocks import low_rank
from tests.passes.folding import (
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Decoder,
    decoder,
    ids,
    logits,
    ran,
    relative,
)  # fmt: skip
from tests.passes.test_fold_drop_blocks import PLAIN

MATRICES = {  # [outputs, inputs]
    "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH),
    "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
}  # fmt: skip


@pytest.fixture(scope="module")
def graph():
    return decoder()


def of_the_card(groups, children, rank, scale):
    """Stored numbers of the blocks by FoldGPT's count (card, 2.5), norms of parents counted too."""
    block = 2 * WIDTH**2 + 2 * WIDTH * WIDTH + 3 * WIDTH * INNER
    extras = sum(min(rank, n, k) * (n + k) + (n if scale else 0) for n, k in MATRICES.values())
    return groups * (block + 2 * WIDTH) + children * (2 * WIDTH + extras)


def outside(graph):
    """Numbers in weights that no block reads."""
    (run,) = find_runs(graph)
    own = {w for b in run.blocks for w in b.weights}
    return sum(w.data.numel() for w in graph.weights if w not in own)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("group", "rank"), [(2, 4), (3, 0), (4, 2), (6, 64)])
def test_stored_numbers_are_the_cards(graph, group, rank, scale):
    after, _ = ran(graph, f"share-blocks{{group={group},rank={rank},scale={scale}}}")
    verify(after)
    groups = -(-LAYERS // group)
    stored = outside(graph) + of_the_card(groups, LAYERS - groups, rank, scale)
    assert weight_bytes(after.weights) == 4 * stored


@pytest.mark.parametrize("options", ["group=1", "group=1,rank=0,scale=True"])
def test_groups_of_one_are_the_same_graph(graph, options):
    assert ran(graph, f"share-blocks{{{options}}}")[0] is graph


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("group", [2, 6])
def test_full_rank_gives_the_model_to_rounding(graph, group, scale):
    after, _ = ran(graph, f"share-blocks{{group={group},rank=64,scale={scale}}}")
    assert relative(logits(after, ids()), logits(graph, ids())) < 1e-5


def test_without_extras_a_child_is_its_parent_with_norms_of_its_own(graph):
    after, ctx = ran(graph, "share-blocks{rank=0}")
    assert ctx.stats["ShareLayer"].hits == 3 * len(MATRICES)
    keys = {w.key for w in after.weights}
    assert keys < {w.key for w in graph.weights}
    read = {k for k in keys if k.startswith("layers.1.")}
    assert read == {"layers.1.norm1.weight", "layers.1.norm2.weight"}
    runs = find_runs(after)
    assert [len(r) for r in runs] == [LAYERS]


def test_factors_are_the_truncated_svd():
    for shape in ((7, 12), (12, 7), (5, 5), (1, 6)):
        m = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        s = torch.linalg.svdvals(m.double())
        for rank in range(1, min(shape) + 1):
            a, b = low_rank(m, rank)
            assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
            left = float((m.double() - b @ a).norm())
            assert left == pytest.approx(float(s[rank:].norm()), abs=1e-6)
            assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    a, b = low_rank(torch.zeros(3, 4), 2)
    assert not (b @ a).any() and a.isfinite().all()


def test_a_higher_rank_is_nearer_and_scales_bring_it_nearer_still(graph):
    (run,) = find_runs(graph)
    parent, child = run.blocks[0], run.blocks[1]
    wanted = next(w for w in child.weights if w.key.endswith("up.weight"))
    base = next(w for w in parent.weights if w.key.endswith("up.weight"))
    missing = {}
    for scale in (False, True):
        for rank in (0, 2, 8):
            after, _ = ran(graph, f"share-blocks{{rank={rank},scale={scale}}}")
            made = {w.key: w.data for w in after.weights}
            w = base.data * made.get(f"share.{wanted.key}.scale", torch.ones(1))[..., None]
            if rank:
                w = w + made[f"share.{wanted.key}.b"] @ made[f"share.{wanted.key}.a"]
            missing[scale, rank] = float((wanted.data - w).norm())
    assert missing[False, 0] > missing[False, 2] > missing[False, 8]
    assert all(missing[True, r] < missing[False, r] for r in (0, 2, 8))


def test_fitted_to_outputs_a_layer_is_nearest_in_what_it_gives(graph):
    """No factors of the rank leave less of the first child's outputs; those of weights leave more."""
    data = [[ids(seed=s)] for s in range(3)]
    (run,) = find_runs(graph)
    layer = next(n for n in run.blocks[1].nodes if n.name == "linear" and ".q." in n.w.key)
    x = torch.cat([logits(graph.with_outputs([layer.x]), b[0]).reshape(-1, WIDTH) for b in data])
    base = next(w for w in run.blocks[0].weights if ".q." in w.key).data
    missing = x.double() @ (layer.w.data - base).double().T
    left = {}
    for fit in ("weights", "outputs"):
        after, _ = ran(graph, f"share-blocks{{rank=3,fit={fit}}}", data)
        made = {w.key: w.data.double() for w in after.weights}
        a, b = (made[f"share.{layer.w.key}.{k}"] for k in "ab")
        left[fit] = float((missing - x.double() @ a.T @ b.T).norm())
    best = float(torch.linalg.svdvals(missing)[3:].norm())
    assert left["outputs"] == pytest.approx(best, rel=0.01) and left["weights"] > 1.05 * best


@pytest.mark.parametrize("scale", [False, True])
def test_fitted_to_outputs_at_full_rank_it_is_the_model(graph, scale):
    options = f"rank=64,fit=outputs,scale={scale}"
    after, _ = ran(graph, f"share-blocks{{{options}}}", [[ids()]])
    assert relative(logits(after, ids()), logits(graph, ids())) < 1e-4
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, "share-blocks{fit=outputs}")
    with pytest.raises(PassError, match="fit=guess"):
        ran(graph, "share-blocks{fit=guess}")


def test_of_weights_with_nothing_in_common_a_scale_leaves_the_parents_out(graph):
    """The child is then its own matrix at low rank, and not that of a stranger beside it."""
    gaps = {}
    for scale in (False, True):
        after, _ = ran(graph, f"share-blocks{{rank=8,scale={scale}}}")
        gaps[scale] = relative(logits(after, ids()), logits(graph, ids()))
    scales = torch.cat([w.data for w in after.weights if w.key.endswith(".scale")])
    assert scales.abs().mean() < 0.3 and gaps[True] < gaps[False]


def test_biases_stay_each_blocks_own():
    lines = PLAIN
    for i in range(3):
        own = f'    c{i}: f32[4] = weight("c{i}", digest="")\n'
        lines = lines.replace(f"(r{i}, b{i})", f"(r{i}, b{i}, c{i})").replace(
            f"    h{i} =", f"{own}    h{i} ="
        )
    generator = torch.Generator().manual_seed(0)
    bare = parse(lines)
    values = {w.key: torch.randn(w.of.shape, generator=generator) for w in bare.weights}
    g = parse(lines, values)
    x = torch.randn(2, 4, generator=generator)
    for scale in (False, True):
        after, _ = ran(g, f"share-blocks{{group=3,rank=6,scale={scale}}}")
        assert {"c0", "c1", "c2"} < {w.key for w in after.weights}
        assert relative(logits(after, x), logits(g, x)) < 1e-5
    after, _ = ran(g, "share-blocks{group=3,rank=0,scale=True}")
    assert {"c0", "c1", "c2"} < {w.key for w in after.weights}


def test_text_before_and_after(golden):
    bare = parse(PLAIN)
    g = parse(PLAIN, {w.key: torch.eye(*w.of.shape) for w in bare.weights})
    text = ran(g, "share-blocks{group=3,rank=1,scale=True}")[0].text
    assert re.sub(', digest="[0-9a-f]+"', "", text) == golden  # signs of factors are LAPACK's


def test_weights_without_values_are_refused_with_the_reason():
    g = parse(PLAIN)
    after, ctx = ran(g, "share-blocks")
    assert after is g and "has no values" in ctx.stats["ShareLayer"].misses[0].reason
    with pytest.raises(PassError, match="group=0"):
        ran(g, "share-blocks{group=0}")


def test_a_shared_model_runs_on_the_cpu_and_saves_each_matrix_once(tmp_path):
    recipe = "raised,share-blocks{rank=4},default"
    compiled = effc.compile(Decoder(2), recipe=recipe, example_inputs=(ids(),))
    stages = effc.explain(compiled).records[0].stages
    shared = next(s for s in stages if s.name.startswith("share"))
    got = compiled(ids())
    assert relative(got, logits(shared.graph, ids())) < 1e-5
    assert shared.error.relative_l2 > 0.01
    compiled.save(tmp_path / "shared.effc")
    assert torch.equal(effc.load(tmp_path / "shared.effc")(ids()), got)
    with zipfile.ZipFile(tmp_path / "shared.effc") as file:
        data = file.read("weights.safetensors")
    (header,) = struct.unpack("<Q", data[:8])
    stored = json.loads(data[8 : 8 + header])
    held = [
        e["data_offsets"][1] - e["data_offsets"][0]
        for n, e in stored.items()
        if n != "__metadata__"
    ]
    assert sum(held) == weight_bytes(shared.graph.weights) == len(data) - 8 - header
    assert sum(held) == 4 * (VOCABULARY * WIDTH + WIDTH + of_the_card(1, 1, 4, False))


def test_what_a_pass_made_is_not_taken_from_the_model(graph):
    """Keys of new weights are their own, so that binding the model's tensors does not touch them."""
    after, _ = ran(graph, "share-blocks{rank=2}")
    own = {w.key for w in graph.weights}
    new = [w for w in after.weights if w.key not in own]
    assert new and all(w.key.startswith("share.") for w in new)
    assert all(isinstance(w, Weight) and w.data is not None for w in new)
