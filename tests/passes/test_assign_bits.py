"""assign-bits: budgets are kept, errors are backed off from, and the report names the layers."""

import pytest
import torch

from effc.ir import PassError, interpret, verify
from effc.passes.quantize.assign_bits import Choice, steps, worthwhile
from tests.passes.folding import Decoder, ids, logits, raised, ran, relative, with_weights


@pytest.fixture(scope="module")
def graph():
    return raised(Decoder(2))


@pytest.fixture(scope="module")
def batches():
    return [[ids(seed=s)] for s in range(2)]


def bits_of(graph):
    """Element types of the codes, by the key of the weight."""
    return {
        n.xs[0].key.removesuffix(":codes"): n.dtype.name for n in graph.nodes if n.name == "encoded"
    }


def stored(graph):
    made = [n for n in graph.nodes if n.name == "encoded"]
    dense = [n.w for n in graph.nodes if n.name == "linear" and n.w.name == "weight"]
    layers = [w for w in dense if w.key != "embed.weight"]
    nbytes = sum(n.tensor.nbytes for n in (*made, *layers))
    return 8 * nbytes / sum(n.tensor.numel for n in (*made, *layers))


def c(nbytes, harm):
    return Choice("", nbytes, 0.0, None, harm)


def test_choices_that_another_beats_are_left_out():
    best = [c(1, 9.0), c(2, 4.0), c(4, 1.0), c(8, 0.0)]
    assert worthwhile([*best, c(3, 5.0), c(4, 2.0)]) == best
    assert worthwhile([c(1, 9.0), c(2, 8.9), c(3, 1.0)]) == [c(1, 9.0), c(3, 1.0)]


def test_steps_take_what_gains_most_for_a_byte_first():
    table = [[c(1, 8.0), c(2, 2.0), c(4, 1.0)], [c(1, 3.0), c(2, 0.0)]]
    assert steps(table) == [(0, 0), (1, 0), (1, 1), (2, 1)]


@pytest.mark.parametrize("budget", [4.0, 5.5, 8.0])
def test_a_budget_is_kept_and_used(graph, batches, budget):
    text = f"assign-bits{{budget={budget},group=None,method=rtn}}"
    after, ctx = ran(graph, text, batches)
    verify(after)
    assert budget - 1.5 < stored(after) <= budget
    assert f"{stored(after):.3g} an element" in ctx.notes[0]
    assert "largest errors of a layer's output: " in ctx.notes[1]


def test_a_layer_that_matters_little_gets_fewer_bits(graph, batches):
    """down of block 1 adds next to nothing, so its rounding does next to nothing either."""
    quiet = "layers.1.down.weight"
    g = with_weights(graph, lambda key, data: data * 1e-3 if key == quiet else data)
    after, _ = ran(g, "assign-bits{budget=5.0,choices=8|4|2,group=None,method=rtn}", batches)
    chosen = bits_of(after)
    assert chosen[quiet] == "uint2" and set(chosen.values()) != {"uint2"}


def test_an_error_is_held_and_layers_that_went_back_are_named(graph, batches):
    few, _ = ran(graph, "quantize-weights{bits=4,group=64,zero=True,method=gptq}", batches)
    after, ctx = ran(graph, "assign-bits{error=0.1,choices=16|8|4}", batches)

    def error(g):
        return max(relative(interpret(g, b)[0], interpret(graph, b)[0]) for b in batches)

    with torch.no_grad():
        assert error(few) > 0.1 >= error(after)
    assert ctx.notes[0].startswith(f"error {error(after):.3g} of 0.1 allowed, {error(few):.3g}")
    chosen = bits_of(after)
    back = [k for k in chosen if chosen[k] != "uint4"] + [
        n.w.key for n in after.nodes if n.name == "linear" and n.w.name == "weight"
    ]
    named = ctx.notes[0].rpartition("went back to more: ")[2]
    counted = sum(int(part.split()[0]) for part in named.split("; ") if part[0].isdigit())
    listed = [k for k in back if f" {k}" in f" {named}".replace(",", " ").replace(":", " ")]
    assert back and len(listed) + counted == len([k for k in back if k != "embed.weight"])


def test_nothing_goes_back_where_the_error_is_large(graph, batches):
    after, ctx = ran(graph, "assign-bits{error=100.0,choices=8|4,method=rtn}", batches)
    assert set(bits_of(after).values()) == {"uint4"} and "went back to more: none" in ctx.notes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "one of them says how far to go"),
        ("budget=4.0,error=0.1", "one of them says how far to go"),
        ("budget=0.5", "bytes are too few"),
        ("error=1e-6,choices=8|4,method=rtn", "cannot be held"),
        ("budget=4.0,choices=9|4", "1 to 8, or 2b"),
    ],
)
def test_what_cannot_be_done_is_refused(graph, batches, options, said):
    with pytest.raises(PassError) as caught:
        ran(graph, f"assign-bits{{{options}}}", batches)
    assert said in str(caught.value)


def test_a_graph_that_is_no_language_model_is_judged_by_its_outputs(captured):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 8),
    )  # fmt: skip
    x = torch.randn(64, 32)
    g = captured(net.requires_grad_(False), x)
    g, _ = ran(g, "raised")
    sizes = [
        relative(logits(ran(g, f"assign-bits{{budget={b},group=None}}", [[x]])[0], x), logits(g, x))
        for b in (3.5, 5.0, 9.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
