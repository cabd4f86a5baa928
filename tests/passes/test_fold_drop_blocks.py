"""drop-blocks: what the units of a residual stream are, gates on them, leaving them out."""

import pytest
import torch

import effc
from effc.ir import PassError, PipelineError, Weight, parse, verify
from effc.passes.base import Context, Pipeline
from effc.passes.fold.baselines import (
    block_influence,
    greedy_loss,
    losses_alone,
    losses_without,
)
from effc.passes.fold.gates import EPS, GateTraining, absorbed, smooth_l0
from effc.passes.fold.objective import NextToken, Objective, next_token
from effc.passes.fold.units import find_units, with_gates, without
from tests.passes.folding import decoder, ids, logits, ran, relative, told, weakened, with_weights

SILENT = lambda steps, title: steps  # noqa: E731

WEIGHTS = "".join(
    f'    a{i}: f32[6, 4] = weight("a{i}", digest="")\n    b{i}: f32[4, 6] = weight("b{i}", digest="")\n'
    for i in range(3)
)
BLOCK = """\
    h{i} = linear(x{i}, a{i})
    r{i} = relu(h{i})
    o{i} = linear(r{i}, b{i})
    x{n} = add(x{i}, o{i})
"""
BLOCKS = "".join(BLOCK.format(i=i, n=i + 1) for i in range(3))
PLAIN = f"def graph(x0: f32[2, 4]):\n{WEIGHTS}{BLOCKS}    return x3,\n"


@pytest.fixture(scope="module")
def graph():
    return decoder()


@pytest.fixture(scope="module")
def batches():
    return [[ids(seed=s)] for s in range(3)]


def gate(value):
    return Weight.holding("gate", torch.tensor(float(value)))


def gated(graph, units, values):
    return graph.substitute(with_gates(units, [gate(v) for v in values]))


# ------------------------------------------------------------------ units and gates


def test_units_are_blocks_or_their_updates(graph):
    blocks, updates = find_units(graph, "block"), find_units(graph, "update")
    assert [len(b.updates) for b in blocks] == [2] * 6
    assert [u.y for u in updates] == [v.y for b in blocks for v in b.updates]
    assert [b.bytes for b in blocks] == [
        updates[2 * i].bytes + updates[2 * i + 1].bytes for i in range(6)
    ]
    assert updates[3].label == "update 1 of block 1"


@pytest.mark.parametrize("unit", ["block", "update"])
def test_gates_of_one_are_no_gates_bit_for_bit(graph, unit):
    units = find_units(graph, unit)
    assert torch.equal(logits(gated(graph, units, [1] * len(units)), ids()), logits(graph, ids()))


@pytest.mark.parametrize("unit", ["block", "update"])
def test_dropping_is_the_model_with_gates_of_zero_bit_for_bit(graph, unit):
    units = find_units(graph, unit)
    out = {1, 2, 5}
    zeros = gated(graph, units, [i not in out for i in range(len(units))])
    dropped = graph.substitute(without(units[i] for i in out))
    assert torch.equal(logits(dropped, ids()), logits(zeros, ids()))
    assert not torch.equal(logits(dropped, ids()), logits(graph, ids()))


def test_the_gate_of_one_update_goes_into_its_projection_exactly(graph):
    units = find_units(graph, "update")
    values = [0.3 + 0.1 * (i % 5) for i in range(len(units))]
    new = {}
    for unit, g in zip(units, values):
        new |= absorbed(graph, unit, g)
    inside = graph.substitute(new)
    assert len(inside.nodes) == len(graph.nodes)  # no product is left
    assert relative(logits(inside, ids()), logits(gated(graph, units, values), ids())) < 1e-5


def test_the_gate_of_a_block_is_not_the_gate_of_its_projections(graph):
    """FoldGPT's trap: the MLP of a gated block reads x + attention(x), not x + g * attention(x)."""
    blocks, updates = find_units(graph, "block"), find_units(graph, "update")
    whole = logits(gated(graph, blocks, [0.5] * len(blocks)), ids())
    each = logits(gated(graph, updates, [0.5] * len(updates)), ids())
    assert relative(each, whole) > 0.01
    with pytest.raises(ValueError, match="whole block"):
        absorbed(graph, blocks[0], 0.5)
    with pytest.raises(PassError, match=r"reads x \+ attention\(x\)"):
        ran(graph, "drop-blocks{survivors=absorb}", [[ids()]])


def test_a_gated_block_is_x_plus_g_times_what_the_block_adds(graph):
    (block, *_), g = find_units(graph, "block"), 0.25
    x, y = (graph.with_outputs([v]) for v in (block.x, block.y))
    x, y = logits(x, ids()), logits(y, ids())
    new = with_gates([block], [gate(g)])
    got = logits(graph.with_outputs([new[block.y]]), ids())
    assert relative(got, x + g * (y - x)) < 1e-6


@pytest.mark.parametrize(
    ("eps", "theta", "g"),
    [
        (1e-1, 0.01, 0.001),
        (1e-1, 0.5, 0.714),
        (1e-2, 0.05, 0.2),
        (1e-4, 0.01, 0.5),
        (1e-4, 0.1, 0.990),
    ],
)
def test_smooth_l0_has_the_values_of_the_table(eps, theta, g):
    assert smooth_l0(torch.tensor(theta), eps).item() == pytest.approx(g, abs=6e-4)
    assert EPS[0] == 1e-1 and EPS[-1] == 1e-4


# ------------------------------------------------------------------ who is dropped


@pytest.mark.parametrize("by", ["influence", "perplexity"])
def test_blocks_that_add_nothing_are_found(graph, by):
    weak = weakened(graph, {1, 4})
    heard = [[told(weak, seed=s)] for s in range(2)]
    _, ctx = ran(weak, f"drop-blocks{{rate=0.33,by={by}}}", heard)
    assert ctx.notes == [f"dropped 2 of 6, by {by}: 1, 4"]


class Add(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8, bias=False)
        self.layer.weight.data = w

    def forward(self, x):
        return x + self.layer(x)


def test_gates_see_what_the_model_makes_of_a_block_and_influence_does_not():
    """Two blocks add much where nothing reads it; the others add little, where all is read."""
    torch.manual_seed(0)
    unread = torch.zeros(8, 8)
    unread[4:, :4] = torch.randn(4, 4)
    read = [torch.randn(8, 8) * 0.1 for _ in range(4)]
    for w in read:
        w[:, 4:] = 0
    head = torch.nn.Linear(8, 3, bias=False)
    head.weight.data[:, 4:] = 0
    maps = [*map(Add, [*read[:2], unread, unread.clone(), *read[2:]])]
    net = torch.nn.Sequential(*maps, head).requires_grad_(False)
    picked = {}
    for by in ("gates", "influence"):
        recipe = f"raised,drop-blocks{{rate=0.34,by={by},steps=100}}"
        compiled = effc.compile(
            net, recipe=recipe, calibrate=[torch.randn(64, 8)], target="reference"
        )
        (picked[by],) = effc.explain(compiled).records[0].stages[-1].notes
    assert picked["gates"] == "dropped 2 of 6, by gates: 2, 3"
    assert not {"2", "3"} & set(picked["influence"].rpartition(": ")[2].split(", "))


def stand_ins():
    """Blocks 2 and 3 say the same to a head that hears it once; the others each say little."""
    torch.manual_seed(0)
    blocks = [Add(torch.randn(8, 8) * 0.03) for _ in range(6)]
    for i, block in enumerate(blocks):
        block.layer.bias = torch.nn.Parameter(torch.zeros(8))
        block.layer.weight.data[0] = 0
        block.layer.weight.data[:, 0] = 0
        if i in (2, 3):
            block.layer.weight.data[:] = 0
            block.layer.bias.data[0] = 10.0
    first, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)
    first.bias.data[0] = 0
    first.weight.data[0] = 0
    head.weight.data[:] = torch.eye(8)
    net = torch.nn.Sequential(first, *blocks, head, torch.nn.Tanh()).requires_grad_(False)
    compiled = effc.compile(
        net, recipe="raised", target="reference", example_inputs=(torch.randn(64, 8),)
    )
    graph = effc.explain(compiled).records[0].stages[-1].graph
    return graph, find_units(graph, "block"), Objective(graph, [[torch.randn(64, 8)]])


@pytest.mark.parametrize(("steps", "exchanges"), [(60, 0), (0, 4)])
def test_of_two_blocks_that_stand_in_for_each_other_gates_keep_one(steps, exchanges):
    """Training alone sees it, and so do exchanges alone."""
    graph, units, objective = stand_ins()
    alone = losses_alone(graph, units, objective)
    assert sorted(range(6), key=alone.__getitem__)[:2] == [2, 3]
    gates = GateTraining(2 / 6, steps, exchanges=exchanges).run(graph, units, objective, SILENT)
    out = [i for i, g in enumerate(gates) if g == 0]
    assert len(out) == 2 and len({2, 3} & set(out)) == 1
    kept = objective.mean(graph.substitute(without(units[i] for i in out)))
    assert kept < 0.2 * objective.mean(graph.substitute(without(units[i] for i in (2, 3))))


def test_exchanges_give_no_unit_for_a_cheaper_one(graph, batches):
    """Attention saves fewer bytes than an MLP: what was to be saved stays saved."""
    units, objective = find_units(graph, "update"), Objective(graph, batches[:1])
    gates = GateTraining(0.25, 0).run(graph, units, objective, SILENT, [-u.bytes for u in units])
    out = [i for i, g in enumerate(gates) if g == 0]
    assert len(out) == 3 and {units[i].bytes for i in out} == {max(u.bytes for u in units)}


def test_random_needs_no_data_and_follows_its_seed(graph):
    drops = {ran(graph, f"drop-blocks{{by=random,seed={s}}}")[1].notes[0] for s in (0, 0, 1, 2, 3)}
    assert 1 < len(drops) <= 4


def test_losses_without_a_unit_are_those_of_the_graph_without_it(graph, batches):
    units, objective = find_units(graph, "block"), Objective(graph, batches)
    for out in ([], [4, 1]):
        losses = losses_without(graph, units, objective, out)
        assert losses.keys() == set(range(6)) - set(out)
        for i, loss in losses.items():
            assert loss == pytest.approx(
                objective.mean(graph.substitute(without(units[k] for k in (*out, i)))), rel=1e-6
            )
    scores = greedy_loss(graph, units, objective, 2, SILENT)
    first = min(losses_without(graph, units, objective, []).items(), key=lambda p: p[1])[0]
    assert scores[first] == 0.0 and sorted(scores)[1] == 1.0 and sorted(scores)[2] == float("inf")


def test_influence_is_one_minus_the_cosine_of_what_enters_and_leaves(graph, batches):
    units = find_units(graph, "block")
    got = block_influence(graph, units, Objective(graph, batches))
    for u, influence in zip(units, got):
        pairs = [[logits(graph.with_outputs([v]), b[0]) for v in (u.x, u.y)] for b in batches]
        cosines = [torch.cosine_similarity(x, y, -1).mean() for x, y in pairs]
        assert influence == pytest.approx(1 - float(sum(cosines)) / 3, abs=1e-6)


def test_the_data_of_a_language_model_is_its_own_label(graph, batches):
    assert next_token(graph) == NextToken(0, 0)
    scores = logits(graph, batches[0][0])
    want = torch.nn.functional.cross_entropy(
        scores[:, :-1].flatten(0, 1), batches[0][0][:, 1:].flatten()
    )
    assert Objective(graph, batches[:1]).mean(graph) == pytest.approx(float(want), rel=1e-6)
    assert next_token(parse(PLAIN)) is None


# ------------------------------------------------------------------ the pass


@pytest.mark.parametrize("options", ["rate=0", "rate=0,unit=update,survivors=absorb", "rate=0.05"])
def test_a_rate_of_nothing_is_the_same_graph(graph, options):
    after, ctx = ran(graph, f"drop-blocks{{{options}}}", [[ids()]])
    if "update" not in options:
        assert after is graph and "is none" in ctx.notes[0]


def test_text_before_and_after(golden):
    g = parse(PLAIN)
    after, ctx = ran(g, "drop-blocks{rate=0.34,by=random,seed=1}")
    verify(after)
    assert after.text == golden
    assert ctx.stats["DropUnit"].hits == 1


def test_dropped_blocks_leave_no_weight_behind(graph):
    after, ctx = ran(graph, "drop-blocks{rate=0.5,by=random}")
    verify(after)
    before, left = (
        {w.key.split(".")[1] for w in g.weights if w.key.startswith("layers.")}
        for g in (graph, after)
    )
    assert before - left == set(ctx.notes[0].rpartition(": ")[2].split(", "))
    assert [i.type for i in after.inputs] == [i.type for i in graph.inputs]


def test_surviving_gates_are_absorbed(graph, batches):
    after, _ = ran(graph, "drop-blocks{rate=0.25,unit=update,survivors=absorb,steps=20}", batches)
    verify(after)
    made = [w.key for w in after.weights if w.key.startswith("gates.")]
    assert len(made) == 9 and all(".o." in k or ".down." in k for k in made)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("by=guess", "by=guess"),
        ("unit=head", "unit=head is unknown"),
        ("rate=1.0", "no share of the blocks"),
        ("survivors=absorb,unit=update,by=influence", "only gates can be absorbed"),
        ("survivors=halve", "survivors=halve"),
    ],
)
def test_options_that_make_no_sense_are_refused(graph, options, said):
    with pytest.raises(PassError) as caught:
        ran(graph, f"drop-blocks{{{options}}}", [[ids()]])
    assert said in str(caught.value)


def test_a_graph_without_blocks_is_refused_with_the_reason():
    g = parse("def graph(x: f32[4]):\n    y = exp(x)\n    return y,\n")
    with pytest.raises(PassError, match="no run of equal residual blocks") as caught:
        ran(g, "drop-blocks{by=random}")
    assert '"raised"' in str(caught.value)


def test_data_that_is_missing_is_asked_for(graph):
    with pytest.raises(PassError, match="needs calibration data") as caught:
        ran(graph, "drop-blocks")
    assert "calibrate=batches" in str(caught.value)
    with pytest.raises(PipelineError, match="no option"):
        Pipeline.parse("drop-blocks{ratio=1}")


# ------------------------------------------------------------------ training leaves no trace


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gates_train_in_every_mode_and_leave_the_weights_alone(graph, batches, mode):
    g = with_weights(graph, lambda key, data: torch.nn.Parameter(data.clone()))
    before = {w: w.data.detach().clone() for w in g.weights}
    units = find_units(g, "block")
    with mode():
        data = [[b.clone() for b in batch] for batch in batches]
        scores = GateTraining(0.34, steps=3).run(g, units, Objective(g, data), SILENT)
    assert len(scores) == 6 and len(set(scores)) > 1
    assert all(torch.equal(w.data, v) and w.data.grad is None for w, v in before.items())


def test_ctrl_c_leaves_nothing_behind(graph, batches):
    closed = []

    def interrupted(steps, title):
        try:
            yield from steps[:2]
            raise KeyboardInterrupt
        finally:
            closed.append(title)

    before = {w.key: w.data.clone() for w in graph.weights}
    grad = torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt):
        ran(graph, "drop-blocks{steps=9}", batches, progress=interrupted)
    assert closed == ["training 6 gates"] and torch.is_grad_enabled() is grad
    assert all(torch.equal(w.data, before[w.key]) for w in graph.weights)
    first, _ = ran(graph, "drop-blocks{steps=4}", batches)
    again, _ = ran(graph, "drop-blocks{steps=4}", batches)
    assert first == again


def test_the_context_of_a_pipeline_keeps_what_exact_passes_made(graph, batches):
    seen = []
    from effc.passes.base import Pass, lossy
    from effc.pipeline import run_pipeline

    class Look(Pass):
        """Look at what is known."""

        name, numerics = "look-at-uncompressed", lossy("relative_l2")

        def run(self, g, ctx):
            seen.append(ctx.uncompressed)
            return g

    stages = run_pipeline(
        graph,
        Pipeline.parse("look-at-uncompressed,drop-blocks{by=random},look-at-uncompressed,default"),
    )
    assert seen == [graph, graph] and stages[2].graph is not graph
    assert Context().uncompressed is None
