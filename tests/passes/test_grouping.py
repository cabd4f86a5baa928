"""Groups stay free of cycles, whatever is merged: checked on random graphs."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.ir import Graph, Input, Tensor, interpret, parse, verify
from effc.ir.rewrite import no, op, yes
from effc.ir.types import f32
from effc.passes.analysis.grouping import Grouping
from effc.passes.base import Context
from effc.passes.fuse_regions import FuseRegions
from effc.passes.outline import condense, outline


def random_graph(seed: int, size: int = 24) -> Graph:
    """Pointwise ops, row ops, reductions and an op that nothing fuses with, wired at random."""
    rng = random.Random(seed)
    inputs = [Input("x", Tensor((3, 4), f32)), Input("y", Tensor((3, 4), f32))]
    full, rows = list(inputs), []
    for _ in range(size):
        kind, a, b = rng.random(), rng.choice(full), rng.choice(full)
        if kind < 0.35:
            full.append(getattr(op, rng.choice(["tanh", "neg", "relu", "sigmoid"]))(a))
        elif kind < 0.6:
            full.append(getattr(op, rng.choice(["add", "mul", "sub", "maximum"]))(a, b))
        elif kind < 0.7:
            full.append(op.softmax(a, 1))
        elif kind < 0.8:
            rows.append(op.mean(a, (1,), True))
        elif kind < 0.9 and rows:
            full.append(op.mul(a, rng.choice(rows)))
        elif kind < 0.95 and rows:
            rows.append(op.add(rng.choice(rows), rng.choice([1.0, rng.choice(rows)])))
        else:
            full.append(op.flip(a, (0,)))
    outputs = rng.sample(full, 3)
    return Graph.of(inputs, outputs)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(3, 16), st.sampled_from(["all", "some", "few"]))
def test_fused_graphs_compute_the_same(seed, operands, target):
    def supports(node):
        bad = {"all": (), "some": ("tanh",), "few": ("mean", "relu", "add")}[target]
        at = next((n for n in node.body.nodes if n.name in bad), None)
        return yes if at is None else no("no {}", at.name, at=at)

    g = random_graph(seed)
    fused = verify(FuseRegions(max_operands=operands).run(g, Context(supports=supports)))
    x = [torch.randn(3, 4), torch.randn(3, 4)]
    for got, want in zip(interpret(fused, x), interpret(g, x), strict=True):
        assert torch.equal(got, want)
    assert parse(fused.text) == fused


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6))
def test_whatever_may_be_merged_can_be_outlined(seed):
    g = random_graph(seed, 14)
    rng = random.Random(seed)
    groups = Grouping(g)
    for _ in range(40):
        wanted = {
            groups.group[n] for n in rng.sample(g.nodes, min(len(g.nodes), rng.choice([2, 2, 3])))
        }
        if groups.can_merge(wanted):
            groups.merge(wanted)
    regions = [(m, outline(g, m)) for m in groups.members.values() if len(m) > 1]
    regions = [(m, r) for m, r in regions if r.body.outputs]
    made = verify(condense(g, regions))
    x = [torch.randn(3, 4), torch.randn(3, 4)]
    for got, want in zip(interpret(made, x), interpret(g, x), strict=True):
        assert torch.equal(got, want)


def test_a_path_through_a_third_group_forbids_a_merge():
    g = parse(
        "def graph(x: f32[4]):\n    a = exp(x)\n    b = neg(a)\n    c = add(a, b)\n    return c,\n"
    )
    a, b, c = g.nodes
    groups = Grouping(g)
    assert not groups.can_merge([groups.group[a], groups.group[c]])
    assert groups.can_merge([groups.group[a], groups.group[b]])
    groups.merge_nodes([a, b])
    assert groups.can_merge([groups.group[a], groups.group[c]])
    assert groups.of(a) == [a, b]
