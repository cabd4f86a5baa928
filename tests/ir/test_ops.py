"""Every declared op: its type, its meaning, its cost and its text, on awkward shapes and types."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from effc.ir import (
    OPS,
    Graph,
    Input,
    Item,
    Number,
    Op,
    OpError,
    Tensor,
    evaluate,
    interpret,
    parse,
    symbol,
)
from effc.ir.formats import Encoded
from effc.ir.op import op as declare
from effc.ir.ops.aten import Aten
from effc.ir.ops.common import promote
from effc.ir.ops.region import Fused
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, bf16, boolean, f32, f64, i32, i64, u8
from tests.ir import samples_moved  # noqa: F401  (they fill the table)
from tests.ir.samples import SAMPLERS, Maker

OURS = sorted(name for name, cls in OPS.items() if cls.__module__.startswith("effc.ir."))


@cache
def samples(name: str) -> tuple[tuple[Op, Maker], ...]:
    maker = Maker()
    return tuple((node, maker) for node in SAMPLERS[name](maker))


def graph_of(node: Op) -> Graph:
    """The sample as a graph whose inputs are what it reads."""
    found: dict[Input, None] = {}
    stack: list[Op] = [node]
    while stack:
        top = stack.pop()
        if isinstance(top, Input):
            found[top] = None
        stack += reversed(top.operands)
    return Graph.of(found, (node,))


@cache
def run(node: Op, maker: Maker) -> Any:
    graph = graph_of(node)
    return interpret(graph, [maker.values[i] for i in graph.inputs])[0]


@pytest.mark.parametrize("name", OURS)
def test_every_op_has_samples(name: str) -> None:
    assert name in SAMPLERS, f"give {name} a sampler in this file"


def described(value: Any) -> Any:
    """Shape and element type of a real value."""
    if isinstance(value, (tuple, list)):
        return tuple(map(described, value))
    if isinstance(value, Encoded):
        return value.type.shape, value.type.dtype.torch
    return tuple(value.shape), value.dtype


def declared(t: Any) -> Any:
    return tuple(map(declared, t)) if isinstance(t, tuple) else (t.shape, t.dtype.torch)


@pytest.mark.parametrize("name", OURS)
def test_infer_says_what_reference_gives(name: str) -> None:
    for node, maker in samples(name):
        assert described(run(node, maker)) == declared(node.type), graph_of(node).text


LAYOUT_IS_OURS = {
    # Views show the strides of what they look at; the layout of their type is that of a copy.
    "permute", "expand", "slice", "reshape", "item",
    # Ours keep the layout of x, as all ops that give one element for each; torch's write rows.
    "softmax", "log_softmax", "log_sigmoid",
    "attention",  # rows; torch's CPU kernel happens to write [batch, n, heads, d]
    "aten", "fused", "loop",  # whatever the annotation or the body says
    "encoded", "quantize",  # of several tensors
}  # fmt: skip


def order_of_memory(value: torch.Tensor) -> list[int]:
    """Dimensions by stride, outermost first; those of size 1 have no place."""
    real = [d for d in range(value.dim()) if value.shape[d] != 1]
    return sorted(real, key=lambda d: value.stride(d), reverse=True)


@pytest.mark.parametrize("name", [n for n in OURS if n not in LAYOUT_IS_OURS])
def test_layout_is_that_of_the_real_result(name: str) -> None:
    for node, maker in samples(name):
        value = run(node, maker)
        if value.numel():
            order = [d for d in node.tensor.layout.order(value.dim()) if value.shape[d] != 1]
            assert order_of_memory(value) == order, graph_of(node).text


@pytest.mark.parametrize("name", OURS)
def test_cost_is_finite_and_not_negative(name: str) -> None:
    for node, _ in samples(name):
        cost = node.cost()
        assert 0 <= cost.flops < math.inf and 0 <= cost.bytes < math.inf, node


@pytest.mark.parametrize("name", OURS)
def test_text_comes_back(name: str) -> None:
    for node, _ in samples(name):
        graph = graph_of(node)
        again = parse(graph.text, {w.key: w.data for w in graph.weights})
        assert again == graph and again.text == graph.text


# ------------------------------------------------------------------ symbolic sizes


def symbolic(node: Op, made: dict[Op, Op]) -> Op:
    """The same program where every input size above 1 is a symbol: 5 becomes n5."""
    if node not in made:
        if isinstance(node, Input):
            shape = tuple(symbol(f"n{s}") if s > 1 else s for s in node.of.shape)
            made[node] = Input(node.key, node.of.with_(shape=shape))
        else:
            made[node] = node.map_operands(lambda o: symbolic(o, made))
    return made[node]


SIZES = {symbol(f"n{s}"): s for s in range(2, 21)}
TYPE_IS_GIVEN = {"aten", "encoded", "fused", "item", "loop", "weight"}


@pytest.mark.parametrize("name", [n for n in OURS if n not in TYPE_IS_GIVEN])
def test_symbols_give_the_type_and_cost_that_numbers_give(name: str) -> None:
    tried: set[str] = set()
    for node, _ in samples(name):
        if (shapes := f"{[o.shape for o in node.operands]} {node.attrs}") in tried:
            continue  # another element type
        try:
            general = symbolic(node, {})
        except OpError as e:
            assert e.what.endswith("ceil_mode needs known sizes")
            continue
        tried.add(shapes)
        assert evaluate(general.tensor.shape, SIZES) == node.tensor.shape
        assert general.dtype == node.dtype
        cost = general.cost()
        assert evaluate(cost.flops, SIZES) == node.cost().flops
        assert evaluate(cost.bytes, SIZES) == node.cost().bytes
    assert tried


# ------------------------------------------------------------------ caches


def test_update_writes_where_it_is_told_and_leaves_its_operand() -> None:
    node = op.update(X(2, 5), X(2, 2), I(), 1)
    x, new = torch.zeros(2, 5), torch.ones(2, 2)
    got = node.reference(x, new, torch.tensor(3))
    assert got.tolist() == [[0, 0, 0, 1, 1]] * 2 and not x.any()
    for at in (-1, 4):
        with pytest.raises(IndexError, match=rf"positions {at}\.\.{at + 2} of dimension 1 with 5"):
            node.reference(x, new, torch.tensor(at))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, boolean, f32])
@pytest.mark.parametrize("past, n", [(0, 1), (0, 4), (3, 1), (3, 4), (5, 4)])
def test_attention_over_a_cache_is_the_last_rows_of_attention_over_all(
    causal: bool, masked: Any, past: int, n: int
) -> None:
    t, end, room = Maker(), past + n, 9
    q, k, v = (t(2, heads, end, 4) for heads in (4, 2, 2))
    mask = None if masked is None else t(end, end, dtype=masked)
    (q_, k_, v_), m = (t.values[x] for x in (q, k, v)), None
    if mask is not None:
        m = t.values[mask].clone()
        m.fill_diagonal_(True if masked is boolean else 0.0)
    everything = op.attention(q, k, v, mask, causal=causal, gqa=True)
    want = everything.reference(q_, k_, v_, m, None)[..., past:, :]

    def padded(x: torch.Tensor, dim: int, value: float) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = room - x.shape[dim]
        return torch.cat((x, torch.full(shape, value).to(x.dtype)), dim)

    cached = op.attention(X(2, 4, n, 4), X(2, 2, room, 4), X(2, 2, room, 4), causal=causal,
                          gqa=True, past=I())  # fmt: skip
    k_, v_ = padded(k_, 2, math.nan), padded(v_, 2, math.nan)
    m = None if m is None else padded(m[past:], 1, math.nan)
    got = cached.reference(q_[..., past:, :], k_, v_, m, torch.tensor(past))
    torch.testing.assert_close(got, want)


def test_attention_refuses_positions_that_the_cache_has_not() -> None:
    node = op.attention(X(2, 4), X(5, 4), X(5, 4), past=I())
    values = [torch.zeros(n, 4) for n in (2, 5, 5)]
    for past, text in ((4, r"4\.\.6"), (-1, r"-1\.\.1")):
        with pytest.raises(IndexError, match=f"positions {text} of a cache of 5"):
            node.reference(*values, None, torch.tensor(past))


# ------------------------------------------------------------------ promotion of element types


def test_promotion_is_that_of_torch() -> None:
    t = Maker()
    dtypes = (f32, f64, bf16, i64, i32, u8, boolean, DTYPES["c64"])
    numbers: list[Any] = [True, 3, 2.5, 1j]
    nodes = [Input("x", Tensor(shape, dtype)) for dtype in dtypes for shape in ((2,), ())]
    for a, b in itertools.product(nodes, [*nodes, *numbers]):
        values = [
            torch.zeros(v.of.shape, dtype=v.of.dtype.torch) if isinstance(v, Input) else v
            for v in (a, b)
        ]
        assert promote(a, b).torch == torch.result_type(*values), (a, b)
    assert promote(t(2, dtype=i64), symbol("N")) == i64
    assert promote(t(2, dtype=bf16), symbol("N")) == bf16


# ------------------------------------------------------------------ refusals, as text


def X(*shape: int) -> Input:
    return Input("x", Tensor(shape, f32))


def I(*shape: int) -> Input:  # noqa: E743
    return Input("i", Tensor(shape, i64))


MANY = Aten("aten.topk.default", (X(3), 2), (), of=(Tensor((2,), f32), Tensor((2,), i64)))

REFUSED: list[tuple[Callable[[], Op], str]] = [
    (lambda: op.relu(3), "relu: x must be a value of a graph, not 3"),
    (lambda: op.relu(None), "relu: x must be a value of a graph, not None"),
    (lambda: op.relu((X(1),)), "relu: x must be a value of a graph, not (<input: f32[1]>,)"),
    (lambda: op.relu(MANY), "aten gives (f32[2], i64[2]), not one tensor"),
    (lambda: op.add(X(1), "2"), "add: b must be a value of a graph, not '2'"),
    (lambda: op.add(1, 2), "add(): no operand is a tensor"),
    (
        lambda: op.add(X(2, 3), X(2, 4)),
        "add(f32[2, 3], f32[2, 4]): shapes [2, 3] and [2, 4] do not broadcast in dimension -1",
    ),
    (
        lambda: op.mul(X(0), X(2)),
        "mul(f32[0], f32[2]): shapes [0] and [2] do not broadcast in dimension -1",
    ),
    (
        lambda: op.add(Input("q", Tensor((2,), DTYPES["int4"])), X(2)),
        "torch has no arithmetic for int4",
    ),
    (lambda: op.clamp(X(2)), "clamp(f32[2]): neither low nor high is given"),
    (
        lambda: op.where(X(2), 1, 2),
        "where(f32[2]): the condition is f32, not bool",
    ),
    (
        lambda: op.sum(X(2, 3), (1, 0)),
        "sum(f32[2, 3]): dimensions (1, 0) must be distinct, sorted and non-negative",
    ),
    (lambda: op.sum(X(2), (1,)), "sum(f32[2]): dimension 1 of a tensor with 1 dimensions"),
    (lambda: op.mean(I(2), (0,)), "mean(i64[2]): mean of i64"),
    (lambda: op.softmax(X(2), 2), "softmax(f32[2]): dimension 2 of a tensor with 1 dimensions"),
    (lambda: op.softmax(I(2), 0), "softmax(i64[2]): x is i64, not a float type"),
    (
        lambda: op.linear(X(2, 3), X(4, 5)),
        "linear(f32[2, 3], f32[4, 5]): the last dimension of x must be the second of w",
    ),
    (lambda: op.linear(X(3), I(4, 3)), "linear(f32[3], i64[4, 3]): x is f32, w is i64"),
    (
        lambda: op.linear(X(3), X(4, 3), X(3)),
        "linear(f32[3], f32[4, 3], f32[3]): bias has shape [3], not [4]",
    ),
    (lambda: op.matmul(X(), X(2)), "matmul(f32[()], f32[2]): operands need at least one dimension"),
    (lambda: op.matmul(X(2, 3), X(2, 3)), "matmul(f32[2, 3], f32[2, 3]): inner sizes differ"),
    (lambda: op.matmul(X(3), I(3)), "matmul(f32[3], i64[3]): a is f32, b is i64"),
    (
        lambda: op.conv2d(X(3, 5, 5), X(4, 3, 1, 1)),
        "conv2d(f32[3, 5, 5], f32[4, 3, 1, 1]): x and w need 4 dimensions",
    ),
    (
        lambda: op.conv1d(X(1, 3, 5), X(4, 2, 1)),
        "conv1d(f32[1, 3, 5], f32[4, 2, 1]): x has 3 channels, w takes 2",
    ),
    (
        lambda: op.conv1d(X(1, 4, 5), X(3, 2, 1), groups=2),
        "conv1d(f32[1, 4, 5], f32[3, 2, 1]): 3 results do not split into 2 groups",
    ),
    (
        lambda: op.conv1d(X(1, 1, 5), X(4, 1, 1), X(3)),
        "conv1d(f32[1, 1, 5], f32[4, 1, 1], f32[3]): bias has shape [3], not [4]",
    ),
    (
        lambda: op.conv1d(X(1, 1, 2), X(1, 1, 3)),
        "conv1d(f32[1, 1, 2], f32[1, 1, 3]): "
        "the kernel is larger than the padded input in dimension 0",
    ),
    (lambda: op.layer_norm(I(3)), "layer_norm(i64[3]): x is i64, not a float type"),
    (
        lambda: op.layer_norm(X(3), dims=2),
        "layer_norm(f32[3]): x has 1 dimensions, 2 are to be normalised",
    ),
    (
        lambda: op.rms_norm(X(2, 3), X(2)),
        "rms_norm(f32[2, 3], f32[2]): weight has shape [2], not [3]",
    ),
    (
        lambda: op.group_norm(X(1, 5, 2), 2),
        "group_norm(f32[1, 5, 2]): 5 channels do not split into 2 groups",
    ),
    (lambda: op.group_norm(X(5), 1), "group_norm(f32[5]): x needs a channel dimension"),
    (
        lambda: op.batch_norm(X(2, 3), X(3), X(2)),
        "batch_norm(f32[2, 3], f32[3], f32[2]): var has shape [2], not [3]",
    ),
    (
        lambda: op.attention(X(4), X(4), X(4)),
        "attention(f32[4], f32[4], f32[4]): q, k and v need at least two dimensions",
    ),
    (
        lambda: op.attention(X(2, 4), X(2, 3), X(2, 4)),
        "attention(f32[2, 4], f32[2, 3], f32[2, 4]): "
        "q and k differ in their last size, or k and v in the one before",
    ),
    (
        lambda: op.attention(X(2, 4), X(2, 4), X(2, 4), I(2, 2)),
        "attention(f32[2, 4], f32[2, 4], f32[2, 4], i64[2, 2]): "
        "the mask is i64, neither f32 nor bool",
    ),
    (
        lambda: op.attention(X(2, 4), X(5, 4), X(5, 4), past=I(1)),
        "attention(f32[2, 4], f32[5, 4], f32[5, 4], i64[1]): past is i64[1], not i64[()]",
    ),
    (
        lambda: op.attention(X(6, 4), X(5, 4), X(5, 4), past=I()),
        "attention(f32[6, 4], f32[5, 4], f32[5, 4], i64[()]): 6 new positions of 5",
    ),
    (
        lambda: op.rope(X(3), X(3), X(3)),
        "rope(f32[3], f32[3], f32[3]): the last dimension (3) must be even",
    ),
    (
        lambda: op.max_pool2d(X(4, 4), (2, 2), (2, 2)),
        "max_pool2d(f32[4, 4]): x needs 3 or 4 dimensions",
    ),
    (
        lambda: op.avg_pool2d(X(1, 2, 4), (3, 2), (1, 1)),
        "avg_pool2d(f32[1, 2, 4]): the window is larger than the padded input in dimension 0",
    ),
    (lambda: op.interpolate(X(1, 4, 4), (2, 2)), "interpolate(f32[1, 4, 4]): x needs 4 dimensions"),
    (
        lambda: op.interpolate(X(1, 1, 4, 4), (2, 2), "cubic"),
        "interpolate(f32[1, 1, 4, 4]): unknown mode 'cubic'",
    ),
    (
        lambda: op.pixel_shuffle(X(6, 2, 2), 2),
        "pixel_shuffle(f32[6, 2, 2]): channels must be a multiple of 4",
    ),
    (
        lambda: op.pixel_unshuffle(X(1, 3, 4), 2),
        "pixel_unshuffle(f32[1, 3, 4]): height and width must be multiples of 2",
    ),
    (
        lambda: op.reshape(X(2, 3), (5,)),
        "reshape(f32[2, 3]): 6 elements do not fill shape [5]",
    ),
    (lambda: op.reshape(X(2, 3), (2, -1)), "reshape(f32[2, 3]): negative size in [2, -1]"),
    (
        lambda: op.permute(X(2, 3), (0, 0)),
        "permute(f32[2, 3]): (0, 0) is not a permutation of 2 dimensions",
    ),
    (
        lambda: op.expand(X(2, 3), (3,)),
        "expand(f32[2, 3]): cannot expand to fewer dimensions [3]",
    ),
    (lambda: op.expand(X(2), (3,)), "expand(f32[2]): size 2 does not expand to 3"),
    (lambda: op.expand(X(2), (-1,)), "expand(f32[2]): negative size in [-1]"),
    (
        lambda: op.slice(X(4), 0, 2, 3),
        "slice(f32[4]): elements 2..4 of dimension 0 with 4",
    ),
    (lambda: op.slice(X(4), 0, -2, 1), "slice(f32[4]): negative size in [-2, 1]"),
    (
        lambda: op.slice(X(4), 0, 0, 1, step=0),
        "slice(f32[4]): step 0 in a tensor with 1 dimensions",
    ),
    (
        lambda: op.slice(X(), 0, 0, 1),
        "slice(f32[()]): step 1 in a tensor with 0 dimensions",
    ),
    (lambda: op.cat((), 0), "cat(): nothing to concatenate"),
    (lambda: op.cat((X(2), 3), 0), "cat: xs must be a value of a graph, not (<input: f32[2]>, 3)"),
    (
        lambda: op.cat((X(2), X(2, 2)), 0),
        "cat(f32[2], f32[2, 2]): operands have no dimensions, or different numbers of them",
    ),
    (
        lambda: op.cat((X(2, 3), X(2, 4)), 0),
        "cat(f32[2, 3], f32[2, 4]): sizes 3 and 4 of dimension 1 differ",
    ),
    (lambda: op.update(X(2, 3), X(3), I(), 0), "update(f32[2, 3], f32[3], i64[()]): "
        "1 dimensions are written into 2"),
    (lambda: op.update(X(2, 3), X(2, 4), I(), 0), "update(f32[2, 3], f32[2, 4], i64[()]): "
        "sizes 3 and 4 of dimension 1 differ"),
    (lambda: op.update(X(2, 3), X(3, 3), I(), 0), "update(f32[2, 3], f32[3, 3], i64[()]): "
        "3 new positions of 2"),
    (lambda: op.update(X(2), I(1), I(), 0), "update(f32[2], i64[1], i64[()]): "
        "i64 is written into f32"),
    (lambda: op.update(X(2), X(1), X(), 0), "update(f32[2], f32[1], f32[()]): "
        "start is f32[()], not i64[()]"),
    (lambda: op.pad(X(2, 3), (1,), (1,)), "pad(f32[2, 3]): 1 paddings for 2 dimensions"),
    (lambda: op.pad(X(2), (-2,), (-1,)), "pad(f32[2]): negative size after cropping"),
    (lambda: op.flip(X(2, 3), (1, -1)), "flip(f32[2, 3]): a dimension appears twice in (1, -1)"),
    (
        lambda: op.embedding(X(3), I(2)),
        "embedding(f32[3], i64[2]): the table needs 2 dimensions, ids an integer type",
    ),
    (lambda: op.arange(-1, i64), "arange(): negative size in [-1]"),
    (lambda: op.full((2, -1), 0, i64), "full(): negative size in [2, -1]"),
    (lambda: Item(X(2), 0), "item(f32[2]): the operand has one result"),
    (lambda: Item(MANY, 2), "item((f32[2], i64[2])): index 2 of 2 results"),
    (
        lambda: Aten("aten.no_such.default", (), (), of=Tensor((), f32)),
        "this torch has no operator aten.no_such.default",
    ),
    (
        lambda: Aten("aten.relu", (), (), of=Tensor((), f32)),
        "this torch has no operator aten.relu",
    ),
    (
        lambda: Fused((X(2),), Graph.of((), (op.full((2,), 0, f32),), "body")),
        "fused(f32[2]): the body takes 0 operands",
    ),
    (lambda: Input("a.b", Tensor((), f32)), "input(): 'a.b' cannot be the name of an input"),
    (lambda: Input("n", Number(), True), "input(): n is size; a state is one tensor"),
    (lambda: Input("class", Tensor((), f32)), "input(): 'class' cannot be the name of an input"),
]  # fmt: skip


@pytest.mark.parametrize("build, text", REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refusals_say_what_is_wrong(build: Callable[[], Op], text: str) -> None:
    with pytest.raises(OpError) as e:
        build()
    assert e.value.what == text


def test_unknown_op_names_the_nearest() -> None:
    with pytest.raises(OpError) as e:
        op.leaky_rely
    assert str(e.value) == "unknown op 'leaky_rely'\n  fix   did you mean 'leaky_relu'?"


# ------------------------------------------------------------------ declaring


def test_a_name_is_declared_once_and_is_an_identifier() -> None:
    class Again(Op):
        x: Op

    with pytest.raises(OpError, match="op 'relu' is already declared by effc"):
        declare("relu")(Again)
    with pytest.raises(OpError, match="op name 're lu' is not an identifier"):
        declare("re lu")(Again)


def test_fields_are_sorted_by_their_annotations() -> None:
    kinds = {
        name: [f.kind for f in OPS[name].fields] for name in ("conv2d", "fused", "weight", "aten")
    }
    assert kinds == {
        "conv2d": ["operand"] * 3 + ["attr"] * 4,
        "fused": ["operand", "region"],
        "weight": ["attr", "type", "attr", "attr"],
        "aten": ["attr", "operand", "operand", "type"],
    }


def test_nodes_are_frozen() -> None:
    node = op.relu(X(2))
    with pytest.raises(AttributeError):
        node.x = X(3)


def test_a_random_operator_and_a_view_say_so() -> None:
    x = X(4)
    of = Tensor((4,), f32)
    assert Aten("aten.rand_like.default", (x,), (), of=of).random
    assert not Aten("aten.cumsum.default", (x, 0), (), of=of).random
    assert Aten("aten.t.default", (x,), (), of=of).view
    assert not Aten("aten.cumsum.default", (x, 0), (), of=of).view
    a = Input("a", of)
    body = Graph.of((a,), (Aten("aten.rand_like.default", (a,), (), of=of),), "body")
    assert Fused((x,), body).random and not Fused((x,), Graph.of((a,), (op.relu(a),))).random
