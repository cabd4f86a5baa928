"""roll-blocks: runs of equal blocks as loops, and plans that open them: not one bit changes."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import effc.aten  # registers the converters
import effc.passes  # noqa: F401  registers the passes
from effc.backends import find_backend
from effc.capture import capture_exported
from effc.importer import import_captured
from effc.ir import Graph, Input, OpError, Tensor, Weight, interpret, parse, verify
from effc.ir.errors import VerifyError
from effc.ir.ops.region import Loop
from effc.ir.rewrite import op
from effc.ir.specialise import specialise
from effc.ir.types import f32
from effc.passes.base import Context, Pipeline

ROLL = "roll-blocks"
transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers"
)


def stacked(blocks: int, body: str, args: str = "x0: f32[2, 4]", result: str = "x{n}") -> str:
    """A program of equal blocks; `body` has the lines of block {i}, from x{i} to x{j}."""
    lines = [line.format(i=i, j=i + 1) for i in range(blocks) for line in body.strip().splitlines()]
    text = "".join(f"    {line.strip()}\n" for line in lines)
    return f"def graph({args}):\n{text}    return {result.format(n=blocks)},\n"


RESIDUAL = """
    w{i}: f32[4, 4] = weight("w{i}")
    a{i} = linear(x{i}, w{i})
    x{j} = add(x{i}, a{i})
"""


def loop_of(ran) -> Loop:
    [loop] = [n for n in ran.after.nodes if isinstance(n, Loop)]
    return loop


def rolled(graph: Graph, pipeline: str = ROLL) -> Graph:
    for p in Pipeline.parse(pipeline):
        graph = p.run(graph, Context())
    return verify(graph)


# ------------------------------------------------------------------ hits


def test_a_run_becomes_one_loop(run, golden):
    ran = run(stacked(3, RESIDUAL), ROLL)
    assert ran.ops() == ["stack", "loop"] and ran.hits("RollBlocks") == 1
    assert loop_of(ran).trip == 3
    assert ran.body == golden


def test_the_text_comes_back_with_and_without_values(run):
    after = run(stacked(3, RESIDUAL), ROLL).after
    assert parse(after.text) == after
    assert parse(after.text, {w.key: w.data for w in after.weights}).text == after.text


def test_the_work_is_that_of_all_blocks(run):
    ran = run(stacked(5, RESIDUAL), ROLL)
    assert ran.after.cost() == ran.before.cost()


def test_weights_of_all_blocks_are_shared_not_stacked(run):
    body = "a{i} = linear(x{i}, w)\n x{j} = add(x{i}, a{i})"
    text = stacked(4, body).replace("    a0", '    w: f32[4, 4] = weight("w")\n    a0', 1)
    loop = loop_of(run(text, ROLL))
    assert [v.name for v in loop.shared] == ["weight"] and not loop.stacked


def test_tables_are_shared_and_values_of_one_block_are_rows(run):
    body = RESIDUAL.replace("linear(x{i}, w{i})", "linear(mul(x{i}, t), w{i})").replace(
        "a{i} = linear(mul(x{i}, t), w{i})", "m{i} = mul(x{i}, t)\n    g{i} = slice(g, dim=0, "
        "start={i}, size=2)\n    b{i} = mul(m{i}, g{i})\n    a{i} = linear(b{i}, w{i})"
    )  # fmt: skip
    ran = run(stacked(3, body, "x0: f32[2, 4], t: f32[4], g: f32[5, 4]"), ROLL)
    loop = loop_of(ran)
    assert [v.key for v in loop.shared] == ["t"]
    assert [v.name for v in loop.stacked] == ["stack", "stack"]
    assert [r.name for r in loop.stacked[1].xs] == ["slice"] * 3


def test_values_that_the_caller_gets_come_out_of_the_loop(run):
    ran = run(stacked(3, RESIDUAL, result="x{n}, a0, a1, a2, x1"), ROLL)
    loop = loop_of(ran)
    assert isinstance(loop.type, tuple) and len(loop.type) == 1 + 2 * 3
    assert [n.name for n in ran.after.outputs] == ["item"] * 5


def test_two_runs_become_two_loops(run):
    first = stacked(2, RESIDUAL)
    second = "".join(
        f'    v{i}: f32[4, 4] = weight("v{i}")\n    b{i} = linear(z{i}, v{i})\n'
        f"    z{i + 1} = tanh(b{i})\n"
        for i in range(3)
    )
    text = first.replace("    return x2,\n", f"    z0 = relu(x2)\n{second}    return z3,\n")
    assert run(text, ROLL).ops() == ["stack", "loop", "relu", "stack", "loop"]


def test_sizes_that_a_call_knows(run):
    ran = run(stacked(3, RESIDUAL, "x0: f32[s0, 4]"), ROLL, sizes={"s0": 3})
    fixed = verify(specialise(ran.after, {"s0": 7}))
    assert fixed.outputs[0].shape == (7, 4) and loop_of(ran).body.inputs[0].key != "s0"
    again = run(stacked(2, RESIDUAL, "x0: f32[a0, 4]"), ROLL)  # a size named like an input
    assert loop_of(again).body.inputs[0].key == "a1"


# ------------------------------------------------------------------ near misses


def test_a_run_that_is_too_short_stays(run):
    ran = run(stacked(3, RESIDUAL), "roll-blocks{blocks=4}")
    assert ran.unchanged and ran.reasons("RollBlocks") == ["3 equal blocks, of at least 4"]


def test_blocks_that_differ_stay(run):
    text = stacked(2, RESIDUAL).replace("x2 = add(x1, a1)", "x2 = sub(x1, a1)")
    ran = run(text, ROLL)
    assert ran.unchanged and ran.ctx.notes == ["no two equal blocks follow each other"]


def test_random_numbers_keep_their_order():
    body = RESIDUAL.replace(
        "x{j} = add(x{i}, a{i})",
        "r{i}: f32[2, 4] = aten.rand_like.default(a{i})\n    x{j} = add(x{i}, r{i})",
    )
    graph = parse(stacked(2, body))
    assert any(n.random for n in graph.nodes)
    ctx = Context()
    [p] = Pipeline.parse(ROLL)
    assert p.run(graph, ctx) is graph
    assert "whose order must stay" in ctx.stats["RollBlocks"].misses[0].reason


def test_values_with_two_parts_in_a_block(run):
    body = (
        "a{i} = linear(x{i}, p{i})\n    b{i} = relu(a{i})\n    c{i} = linear(b{i}, q{i})\n"
        "    x{j} = add(x{i}, c{i})"
    )
    text = stacked(2, body)
    for name, key in {"p0": "v", "q0": "v", "p1": "u", "q1": "u"}.items():
        text = text.replace(f", {name})", f", {key})")
    text = text.replace(
        "    a0", '    u: f32[4, 4] = weight("u")\n    v: f32[4, 4] = weight("v")\n    a0', 1
    )
    loop = loop_of(run(text, ROLL))
    assert len(loop.stacked) == 1  # one value in two places, in every block: one row
    two = text.replace("c0 = linear(b0, v)", "c0 = linear(b0, u)")  # block 0: v, u; block 1: u, u
    assert run(two, ROLL).hits("RollBlocks") == 1
    both = two.replace("a1 = linear(x1, u)", "a1 = linear(x1, v)")  # v, u twice: shared by both
    assert not loop_of(run(both, ROLL)).stacked


def test_parts_that_fall_together_otherwise_in_each_block_stay(run):
    names = ("a", "a", "b"), ("c", "d", "d")
    lines = [f'    {n}: f32[4, 4] = weight("{n}")\n' for n in "abcd"]
    for i, (p, q, r) in enumerate(names):
        lines += [f"    p{i} = linear(x{i}, {p})\n", f"    q{i} = linear(p{i}, {q})\n"]
        lines += [f"    r{i} = linear(q{i}, {r})\n", f"    x{i + 1} = add(x{i}, r{i})\n"]
    ran = run(f"def graph(x0: f32[2, 4]):\n{''.join(lines)}    return x2,\n", ROLL)
    assert ran.unchanged
    assert ran.reasons("RollBlocks") == ["a value has one part in some blocks and two in others"]


# ------------------------------------------------------------------ the op


def body_of(*types: Tensor) -> Graph:
    inputs = tuple(Input(f"a{i}", t) for i, t in enumerate(types))
    return Graph.of(inputs, (op.add(*inputs),), "body")


X, W = Tensor((4,), f32), Tensor((3, 4), f32)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda x, w: Loop((x,), (), (w,), body_of(X, X), 0), "trip=0 is no number of times"),
        (lambda x, w: Loop((x,), (), (w,), body_of(X, X), 2), r"f32\[3, 4\] is stacked for 2 times"),
        (lambda x, w: Loop((x,), (), (), body_of(X, X), 3), "the body takes 2 values, not 1"),
        (lambda x, w: Loop((x,), (w,), (), body_of(X, W), 3),
         r"the body gives \(f32\[3, 4\]\) for \(f32\[4\]\)"),
    ],
)  # fmt: skip
def test_loops_that_cannot_be(make, why):
    with pytest.raises(OpError, match=why):
        make(Input("x", X), Input("w", W))


def test_the_verifier_compares_rows_with_the_body():
    x, w = Input("x", X), Input("w", Tensor((3, 1), f32))
    with pytest.raises(VerifyError, match="its region takes"):
        verify(Graph.of((x, w), (Loop((x,), (), (w,), body_of(X, X), 3),)))


# ------------------------------------------------------------------ plans


def same_on(target: str, before: Graph, after: Graph, inputs: list) -> None:
    """The same launches, and the same bits."""
    weights = {w.key: w.data for w in before.weights}
    backend = find_backend(target)
    plans = [backend.compile(g, None) for g in (before, after)]
    calls = [sorted((launch.kind, launch.call) for launch in p.launches) for p in plans]
    assert calls[0] == calls[1]
    assert plans[0].kernels.keys() == plans[1].kernels.keys()  # named by what they compute
    results = [p.bind(weights)(inputs) for p in plans]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def llama(layers: int, width: int = 32, **more) -> tuple[Graph, list]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, use_cache=False,
        **more,
    )  # fmt: skip
    ids = torch.randint(0, 37, (2, 5))
    with torch.no_grad():
        net = LlamaForCausalLM(config).eval()
        program = torch.export.export(net, (), {"input_ids": ids}, strict=False)
    return import_captured(capture_exported(program)).graph, [ids]


@transformers
@pytest.mark.parametrize("pipeline", [pytest.param("raised", marks=pytest.mark.slow), "default"])
def test_a_rolled_llama_is_the_same_plan(pipeline):
    graph, inputs = llama(12)
    before = rolled(graph, pipeline)
    after = rolled(before)
    [loop] = [n for n in after.nodes if isinstance(n, Loop)]
    assert loop.trip == 12 and len(after.nodes) < len(before.nodes) / 2
    assert parse(after.text, {w.key: w.data for w in after.weights}) == after
    for a, b in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
        assert torch.equal(a, b)
    same_on("cpu", before, after, inputs)


@transformers
def test_hidden_states_of_all_blocks():
    graph, inputs = llama(3, output_hidden_states=True)
    before = rolled(graph, "default")
    after = rolled(before)
    assert any(isinstance(n, Loop) for n in after.nodes) and len(after.outputs) == 5
    same_on("cpu", before, after, inputs)


@transformers
@pytest.mark.slow
def test_a_rolled_llama_on_the_gpu_plan():
    graph, inputs = llama(4, width=16)
    before = rolled(graph, "default")
    same_on("ptx-host", before, rolled(before), inputs)


def test_passes_behind_it_see_a_body_of_values():
    before = parse(stacked(4, RESIDUAL), {f"w{i}": torch.randn(4, 4) for i in range(4)})
    x = [torch.randn(2, 4)]
    after = rolled(before, f"{ROLL},default")
    assert torch.equal(interpret(before, x)[0], interpret(after, x)[0])
    same_on("cpu", before, after, x)


def test_rows_of_one_stored_tensor_are_views():
    """A loop written by hand, whose constants lie in one tensor: no row is copied."""
    weights = torch.randn(3, 4, 4)
    x = Input("x", Tensor((2, 4), f32))
    a, w = Input("a", x.of), Input("b", Tensor((4, 4), f32))
    body = Graph.of((a, w), (op.add(a, op.linear(a, w)),), "body")
    graph = verify(Graph.of((x,), (Loop((x,), (), (Weight.holding("w", weights),), body, 3),)))
    plan = find_backend("cpu").compile(graph, None)
    value = torch.randn(2, 4)
    bound = plan.bind()
    want = interpret(graph, [value])[0]
    torch.testing.assert_close(bound([value])[0], want)
    storage = weights.untyped_storage().data_ptr()
    rows = [t for t in bound.constants.values() if t.shape == (4, 4)]
    assert all(t.untyped_storage().data_ptr() == storage for t in rows)
    changed = plan.bind({"w": weights * 2})([value])[0]
    assert not torch.equal(changed, want)


def test_loops_inside_of_loops_are_opened():
    text = stacked(2, RESIDUAL)
    inner = rolled(parse(text, {f"w{i}": torch.randn(4, 4) for i in range(2)}))
    [loop] = [n for n in inner.nodes if isinstance(n, Loop)]
    x = Input("x", Tensor((2, 4), f32))
    a, w = Input("a", x.of), Input("w", Tensor((2, 4, 4), f32))
    nested = Graph.of((a, w), (loop.replace(carries=(a,), stacked=(w,)),), "outer")
    data = torch.randn(3, 2, 4, 4)
    graph = verify(Graph.of((x,), (Loop((x,), (), (Weight.holding("v", data),), nested, 3),)))
    value = want = torch.randn(2, 4)
    for i in range(3):
        for k in range(2):
            want = want + want @ data[i, k].T
    torch.testing.assert_close(interpret(graph, [value])[0], want)
    assert parse(graph.text, {"v": data}) == graph
    torch.testing.assert_close(find_backend("cpu").compile(graph, None).bind()([value])[0], want)
