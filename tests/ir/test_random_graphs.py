"""Random graphs: text, verifier, interpreter and rewriting hold for all of them.

The interpreter is compared with a second evaluation, written here by the textbook and without any
op's `reference`: floats in double precision, rounded to the element type of each value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from effc.ir import (
    OPS,
    Graph,
    Input,
    Item,
    Op,
    Rule,
    Tensor,
    Weight,
    evaluate,
    interpret,
    no,
    parse,
    row_major,
    verify,
    yes,
)
from effc.ir.op import map_values
from effc.ir.rewrite import Engine
from effc.ir.rewrite import op as ops
from effc.ir.types import f32
from tests.ir.strategies import assert_close, cases, graphs, inputs_for, profile, tolerances

# ------------------------------------------------------------------ the second evaluation

Double = torch.Tensor | int | float
MEANING: dict[str, Callable[..., Any]] = {
    # numbers and tensors meet by Python's own operators
    "add": lambda n, a, b: a + b, "sub": lambda n, a, b: a - b, "mul": lambda n, a, b: a * b,
    "div": lambda n, a, b: a / b, "pow": lambda n, a, b: a**b,
    "maximum": lambda n, a, b: pick(a > b, a, b), "minimum": lambda n, a, b: pick(a < b, a, b),
    "atan2": lambda n, a, b: torch.arctan(a / b),  # b is positive
    "div_floor": lambda n, a, b: floor(a, b), "remainder": lambda n, a, b: a - floor(a, b) * b,
    "div_trunc": lambda n, a, b: truncated(a, b), "fmod": lambda n, a, b: a - truncated(a, b) * b,
    "eq": lambda n, a, b: a == b, "ne": lambda n, a, b: a != b, "lt": lambda n, a, b: a < b,
    "le": lambda n, a, b: a <= b, "gt": lambda n, a, b: a > b, "ge": lambda n, a, b: a >= b,
    "logical_and": lambda n, a, b: (a != 0) & (b != 0),
    "logical_or": lambda n, a, b: (a != 0) | (b != 0),
    "logical_xor": lambda n, a, b: (a != 0) ^ (b != 0), "logical_not": lambda n, x: x == 0,
    "bitwise_and": lambda n, a, b: a & b, "bitwise_or": lambda n, a, b: a | b,
    "bitwise_xor": lambda n, a, b: a ^ b, "bitwise_not": lambda n, x: ~x,
    "where": lambda n, c, a, b: pick(c, a, b), "lerp": lambda n, a, b, t: a * (1 - t) + b * t,
    "clamp": lambda n, x, low, high: clamped(x, low, high), "cast": lambda n, x: x,
    # elementwise
    "neg": lambda n, x: 0 - x, "abs": lambda n, x: pick(x < 0, 0 - x, x),
    "relu": lambda n, x: pick(x > 0, x, 0 * x), "square": lambda n, x: x * x,
    "sign": lambda n, x: (x > 0).double() - (x < 0).double(),
    "floor": lambda n, x: x // 1, "ceil": lambda n, x: -((-x) // 1),
    "trunc": lambda n, x: x.long().double(), "round": lambda n, x: x.round(),
    "exp": lambda n, x: math.e**x, "exp2": lambda n, x: 2**x, "expm1": lambda n, x: math.e**x - 1,
    "sinh": lambda n, x: (math.e**x - math.e**-x) / 2,
    "cosh": lambda n, x: (math.e**x + math.e**-x) / 2, "tanh": lambda n, x: tanh(x),
    "log": lambda n, x: x.log(), "log2": lambda n, x: x.log() / math.log(2),
    "log10": lambda n, x: x.log() / math.log(10), "log1p": lambda n, x: (1 + x).log(),
    "sqrt": lambda n, x: x**0.5, "rsqrt": lambda n, x: x**-0.5, "reciprocal": lambda n, x: 1 / x,
    "sin": lambda n, x: x.sin(), "cos": lambda n, x: (x + math.pi / 2).sin(),
    "tan": lambda n, x: x.sin() / x.cos(),
    "asin": lambda n, x: torch.arctan(x / (1 - x * x) ** 0.5),
    "acos": lambda n, x: math.pi / 2 - torch.arctan(x / (1 - x * x) ** 0.5),
    "atan": lambda n, x: torch.arctan(x), "asinh": lambda n, x: (x + (x * x + 1) ** 0.5).log(),
    "acosh": lambda n, x: (x + (x * x - 1) ** 0.5).log(),
    "atanh": lambda n, x: ((1 + x) / (1 - x)).log() / 2,
    "erf": lambda n, x: 1 - torch.erfc(x), "erfc": lambda n, x: 1 - torch.erf(x),
    "sigmoid": lambda n, x: sigmoid(x), "silu": lambda n, x: x * sigmoid(x),
    "mish": lambda n, x: x * tanh((1 + math.e**x).log()),
    "hardsigmoid": lambda n, x: clamped(x / 6 + 0.5, 0, 1),
    "hardswish": lambda n, x: x * clamped(x + 3, 0, 6) / 6,
    "log_sigmoid": lambda n, x: -((1 + math.e**-x).log()),
    "isnan": lambda n, x: x != x, "isinf": lambda n, x: abs(x) == math.inf,
    "leaky_relu": lambda n, x: pick(x > 0, x, n.slope * x),
    "elu": lambda n, x: n.scale * pick(x > 0, x, n.alpha * (math.e ** (n.input_scale * x) - 1)),
    "gelu": lambda n, x: x * gaussian(x, n.approximate),
    "softplus": lambda n, x: pick(
        n.beta * x > n.threshold, x, (1 + math.e ** (n.beta * x)).log() / n.beta
    ),
    # reductions and products
    "sum": lambda n, x: reduced(n, x, torch.add), "prod": lambda n, x: reduced(n, x, torch.mul),
    "mean": lambda n, x: reduced(n, x, torch.add) / math.prod(x.shape[d] for d in n.dims),
    "amax": lambda n, x: reduced(n, x, torch.maximum),
    "amin": lambda n, x: reduced(n, x, torch.minimum),
    "any": lambda n, x: reduced(n, x != 0, torch.logical_or),
    "all": lambda n, x: reduced(n, x != 0, torch.logical_and),
    "softmax": lambda n, x: softmax(x, n.dim), "log_softmax": lambda n, x: softmax(x, n.dim).log(),
    "linear": lambda n, x, w, bias: torch.einsum("...k,nk->...n", x, w) + given_or(bias, 0),
    "matmul": lambda n, a, b: torch.einsum("...ik,...kj->...ij", a, b),
    "conv1d": lambda n, *a: convolution(n, *a), "conv2d": lambda n, *a: convolution(n, *a),
    "conv3d": lambda n, *a: convolution(n, *a),
    "layer_norm": lambda n, x, w, b: normalised(x, -1, n.eps) * given_or(w, 1) + given_or(b, 0),
    "rms_norm": lambda n, x, w: x * ((x * x).mean(-1, True) + n.eps) ** -0.5 * given_or(w, 1),
    "group_norm": lambda n, x, w, b: channelwise(
        normalised(x.reshape(x.shape[0], n.groups, -1), -1, n.eps).reshape(x.shape), w, b
    ),
    "batch_norm": lambda n, x, mean, var, w, b: channelwise(
        channelwise(x, (var + n.eps) ** -0.5, -mean * (var + n.eps) ** -0.5), w, b
    ),
    "attention": lambda n, q, k, v, mask, past: attention(n, q, k, v, mask, past),
    "rope": lambda n, x, cos, sin: x * cos + turned(x, n.interleaved) * sin,
    # images
    "max_pool2d": lambda n, x: pooled(n, x), "avg_pool2d": lambda n, x: pooled(n, x),
    "interpolate": lambda n, x: F.interpolate(
        x, n.size, mode=n.mode, align_corners=n.align_corners if n.mode[:2] == "bi" else None
    ),
    "pixel_shuffle": lambda n, x: shuffled(x, n.factor),
    "pixel_unshuffle": lambda n, x: unshuffled(x, n.factor),
    # movement
    "reshape": lambda n, x: x.contiguous().view(n.to),
    "permute": lambda n, x: torch.movedim(x, n.dims, tuple(range(len(n.dims)))),
    "expand": lambda n, x: x + torch.zeros(n.to, dtype=x.dtype) if x.dtype != torch.bool
    else x | torch.zeros(n.to, dtype=x.dtype),
    "slice": lambda n, x: x.index_select(n.dim, n.start + n.step * torch.arange(n.size)),
    "to_layout": lambda n, x: x, "copy": lambda n, x: x,
    "cat": lambda n, xs: torch.concatenate(same_type(xs), n.dim), "pad": lambda n, x: padded(n, x),
    "stack": lambda n, xs: torch.concatenate([x[None] for x in xs]),
    "flip": lambda n, x: flipped(x, n.dims),
    "update": lambda n, x, new, at: x.index_copy(
        n.dim, int(at) + torch.arange(new.shape[n.dim]), new.to(x.dtype)
    ),
    "embedding": lambda n, table, ids: table[ids.long()],
    "arange": lambda n: torch.tensor([n.start + n.step * i for i in range(n.size)]).double(),
    "full": lambda n: torch.ones(n.to, dtype=torch.double) * n.value,
}  # fmt: skip


def given_or(value: Any, default: float) -> Any:
    return default if value is None else value


def pick(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition != 0, a, b)


def clamped(x: Any, low: Any, high: Any) -> Any:
    x = x if low is None else pick(x < low, low, x)
    return x if high is None else pick(x > high, high, x)


def floor(a: Any, b: Any) -> Any:
    return torch.floor((a if a.is_floating_point() else a.double()) / b)


def truncated(a: Any, b: Any) -> Any:
    return ((a if a.is_floating_point() else a.double()) / b).long()


def sigmoid(x: Any) -> Any:
    return 1 / (1 + math.e**-x)


def tanh(x: Any) -> Any:
    return 1 - 2 / (1 + math.e ** (2 * x))


def gaussian(x: Any, approximate: str) -> Any:
    if approximate == "none":
        return torch.erfc(-x / math.sqrt(2)) / 2
    return (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def reduced(n: Any, x: Any, step: Any) -> Any:
    for d in reversed(n.dims):
        slices = x.unbind(d)
        total = slices[0]
        for s in slices[1:]:
            total = step(total, s)
        x = total.unsqueeze(d) if n.keepdim else total
    return x


def softmax(x: Any, dim: int) -> Any:
    e = math.e ** (x - x.amax(dim, True))
    return e / e.sum(dim, True)


def normalised(x: Any, dim: int, eps: float) -> Any:
    centred = x - x.mean(dim, True)
    return centred * ((centred * centred).mean(dim, True) + eps) ** -0.5


def channelwise(x: Any, scale: Any, shift: Any) -> Any:
    column = (-1, *(1,) * (x.dim() - 2))
    x = x if scale is None else x * scale.reshape(column)
    return x if shift is None else x + shift.reshape(column)


def convolution(n: Any, x: Any, w: Any, bias: Any) -> Any:
    """A sum over taps: each multiplies a strided view of the padded input."""
    k = w.dim() - 2
    x = F.pad(x, [p for p in reversed(n.padding) for _ in (0, 1)])
    reach = [n.dilation[i] * (w.shape[i + 2] - 1) + 1 for i in range(k)]
    sizes = [(x.shape[i + 2] - reach[i]) // n.stride[i] + 1 for i in range(k)]
    x = x.reshape(x.shape[0], n.groups, x.shape[1] // n.groups, *x.shape[2:])
    w = w.reshape(n.groups, w.shape[0] // n.groups, *w.shape[1:])
    total: Any = 0
    for tap in itertools.product(*(range(s) for s in w.shape[3:])):
        view = x
        for i in range(k):
            at = torch.arange(sizes[i]) * n.stride[i] + tap[i] * n.dilation[i]
            view = view.index_select(i + 3, at)
        total = total + torch.einsum("bgc...,goc->bgo...", view, w[(..., *tap)])
    total = total.reshape(total.shape[0], -1, *total.shape[3:])
    return channelwise(total, None, bias)


def attention(n: Any, q: Any, k: Any, v: Any, mask: Any, past: Any) -> Any:
    rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    if past is not None:  # what is not there yet is never read: it may be no number
        rows, end = rows + int(past), int(past) + q.shape[-2]
        k, v = (torch.where((columns < end)[:, None], x, 0.0) for x in (k, v))
    scores = torch.einsum("...id,...jd->...ij", q, k)
    scores = scores * given_or(n.scale, q.shape[-1] ** -0.5)
    if mask is not None:
        scores = pick(mask, scores, -math.inf) if mask.dtype is torch.bool else scores + mask
    if past is not None:
        scores = pick(columns < end, scores, -math.inf)
    if n.causal:
        scores = pick(columns <= rows, scores, -math.inf)
    return torch.einsum("...ij,...jd->...id", softmax(scores, -1), v)


def turned(x: Any, interleaved: bool) -> Any:
    d = x.shape[-1]
    source = [i ^ 1 for i in range(d)] if interleaved else [(i + d // 2) % d for i in range(d)]
    negative = [i % 2 == 0 if interleaved else i < d // 2 for i in range(d)]
    return x[..., source] * torch.tensor([-1.0 if s else 1.0 for s in negative]).double()


def pooled(n: Any, x: Any) -> Any:
    """A loop over the elements of the window; outside the image is -inf, or 0 for a mean."""
    mean = n.name == "avg_pool2d"
    rows, columns = n.tensor.shape[-2:]
    (kh, kw), (sh, sw), (ph, pw) = n.kernel, n.stride, n.padding
    inside = F.pad(torch.ones_like(x), [pw, pw, ph, ph], value=1.0)
    far = [0, (rows - 1) * sw + kw, 0, (rows - 1) * sh + kh]
    far = [0, max(0, (columns - 1) * sw + kw - inside.shape[-1]),
           0, max(0, (rows - 1) * sh + kh - inside.shape[-2])]  # fmt: skip
    wide = F.pad(x, [pw, pw, ph, ph], value=0.0 if mean else -math.inf)
    wide = F.pad(wide, far, value=0.0 if mean else -math.inf)
    counted = F.pad(inside, far, value=0.0)
    windows, counts = [], []
    for i, j in itertools.product(range(kh), range(kw)):
        at = torch.arange(rows) * sh + i, torch.arange(columns) * sw + j
        windows.append(wide.index_select(-2, at[0]).index_select(-1, at[1]))
        counts.append(counted.index_select(-2, at[0]).index_select(-1, at[1]))
    stack = torch.stack(windows)
    return stack.sum(0) / torch.stack(counts).sum(0) if mean else stack.amax(0)


def shuffled(x: Any, r: int) -> Any:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = x.reshape(*lead, c // (r * r), r, r, h, w)
    x = x.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return x.reshape(*lead, c // (r * r), h * r, w * r)


def unshuffled(x: Any, r: int) -> Any:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = x.reshape(*lead, c, h // r, r, w // r, r)
    x = x.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*lead, c * r * r, h // r, w // r)


def padded(n: Any, x: Any) -> Any:
    for d, (before, after) in enumerate(zip(n.before, n.after, strict=True)):
        x = x.narrow(d, -min(before, 0), x.shape[d] + min(before, 0) + min(after, 0))
        for extra, first in ((before, True), (after, False)):
            shape = list(x.shape)
            shape[d] = max(extra, 0)
            edge = torch.ones(shape, dtype=x.dtype) * n.value
            x = torch.cat(same_type([edge, x] if first else [x, edge]), d)
    return x


def same_type(xs: Sequence[Any]) -> list[Any]:
    return [x.double() for x in xs] if any(x.is_floating_point() for x in xs) else list(xs)


def flipped(x: Any, dims: Sequence[int]) -> Any:
    for d in dims:
        x = x.index_select(d, torch.arange(x.shape[d] - 1, -1, -1))
    return x


def eager(graph: Graph, inputs: Sequence[Any], env: dict[Any, Any] | None = None) -> list[Any]:
    """The graph by MEANING; each value is rounded to its element type."""
    env = dict(env or {})
    for i, value in zip(graph.inputs, inputs, strict=True):
        if isinstance(value, torch.Tensor):
            env |= {
                s: n
                for s, n in zip(i.of.shape, value.shape)
                if hasattr(s, "is_Symbol") and s.is_Symbol
            }
        else:
            env[i.symbol] = value
    values: dict[Op, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        if isinstance(value, Op):
            value = values[value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        return evaluate(value, env)

    for node in graph.nodes:
        if isinstance(node, Weight):
            values[node] = node.data
        elif isinstance(node, Item):
            values[node] = values[node.x][node.index]
        elif node.name == "fused":
            results = eager(node.body, [values[x] for x in node.xs], env)
            values[node] = tuple(results) if len(results) > 1 else results[0]
        elif node.name == "aten":
            args = tuple(map_values(a, values.__getitem__) for a in node.args)
            values[node] = node.reference(args, ())  # by its schema, there is no other meaning
        else:
            args = [wide(getattr(node, f.name)) for f in node.fields if f.kind == "operand"]
            bound = node.bind(env)
            object.__setattr__(bound, "type", node.tensor.with_(shape=evaluate(node.shape, env)))
            values[node] = MEANING[node.name](bound, *args).to(node.dtype.torch)
    return [values[o] for o in graph.outputs]


def test_every_declared_op_has_a_second_meaning() -> None:
    declared = {n for n, c in OPS.items() if c.__module__.startswith("effc.ir.")}
    of_graphs = {"aten", "fused", "input", "item", "loop", "weight"}
    # ir/test_formats.py and passes/test_page_kv_cache.py have what these mean
    elsewhere = {"encoded", "decode", "quantize", "gather_pages", "update_pages"}
    assert declared - MEANING.keys() == of_graphs | elsewhere


# ------------------------------------------------------------------ properties


@profile
@given(graphs(states=True))
def test_text_and_verifier(graph: Graph) -> None:
    """Every graph is valid, its text is Python and comes back, with and without values."""
    verify(graph)
    source = "from __future__ import annotations\n" + graph.text
    compile(source, "dump.py", "exec", dont_inherit=True)
    again = parse(source)
    assert again == graph and hash(again) == hash(graph) and again.text == graph.text
    verify(parse(source, {w.key: w.data for w in graph.weights}))


@profile
@given(cases(states=True))
def test_the_interpreter_is_the_textbook(case: tuple[Graph, list[Any]]) -> None:
    graph, inputs = case
    got = interpret(graph, inputs)
    for value, output in zip(got, graph.outputs, strict=True):
        assert value.dtype == output.dtype.torch
    allowed = tolerances(graph, inputs)
    for i, value in enumerate(got):
        if value.dtype is torch.float64:  # the textbook has no digits to spare there
            allowed[i] = max(allowed[i], 1e-13)
    assert_close(got, eager(graph, inputs), allowed)


class Unwrap(Rule):
    """reshape(copy(x), x.shape) => x"""

    def pattern(self, op, x):
        return op.reshape(op.copy(x))

    def check(self, m, x):
        return yes if m.root.type == x.type else no("it changes the shape")

    def rewrite(self, op, m, x):
        return x


@profile
@given(cases(), st.integers(0, 2**16))
def test_replacing_values_by_equals_changes_nothing(case: Any, seed: int) -> None:
    """Any set of values is wrapped in ops that change no bit; then a rule takes them off again."""
    graph, inputs = case
    before = graph.text
    assert graph.rebuild(lambda n: n) is graph and graph.live() == graph
    chosen = [v for i, v in enumerate((*graph.inputs, *graph.nodes)) if seed >> (i % 16) & 1]
    new = {v: ops.reshape(ops.copy(v), v.shape) for v in chosen if isinstance(v.type, Tensor)}
    wrapped = verify(graph.substitute(new))
    assert_close(interpret(wrapped, inputs), interpret(graph, inputs), tolerances(graph, inputs, 1))
    assert graph.text == before
    unwrapped = verify(Engine([Unwrap()]).run(wrapped))
    assert in_order(unwrapped) == in_order(graph)


def in_order(graph: Graph) -> Graph:
    """The graph in depth-first order, to compare whatever order it is in."""
    return Graph.of(graph.inputs, graph.outputs)


def assert_bits(got: Sequence[Any], want: Sequence[Any]) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w) or (torch.equal(g.isnan(), w.isnan()) and g.isnan().any())


@profile
@given(graphs(symbolic=False, dtypes=(f32,), layouts=(row_major,)))
def test_what_is_not_asked_for_does_not_come(graph: Graph) -> None:
    """Only the element types named, but for the integers of `topk`, which nothing reads."""
    types = [n.type for n in (*graph.inputs, *graph.nodes) if isinstance(n.type, Tensor)]
    assert {t.dtype for t in types} == {f32} and not graph.all_symbols
    assert all(i.of.layout is row_major for i in graph.inputs)


@profile
@given(graphs(symbolic=False))
def test_inputs_fit_and_are_the_same_for_a_seed(graph: Graph) -> None:
    first, again = inputs_for(graph, 3), inputs_for(graph, 3)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, again)
    )
    for i, value in zip(graph.inputs, first, strict=True):
        assert isinstance(i, Input) and (value.shape, value.dtype) == (i.of.shape, i.of.dtype.torch)
        assert value.stride() == i.of.strides or 1 in value.shape
