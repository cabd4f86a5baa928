"""Random typed graphs over the whole op set, and inputs for them.

    from tests.ir.strategies import assert_close, cases, graphs, inputs_for, profile, tolerances

    @profile
    @given(graphs(dtypes=(f32,)), st.integers(0, 99))
    def test_plan_is_the_interpreter(graph, seed):
        inputs = inputs_for(graph, seed)
        want = interpret(graph, inputs)
        assert_close(plan(graph)(*inputs), want, tolerances(graph, inputs))

`cases()` draws graph, inputs and sizes at once. Most graphs have 5 to 40 nodes: weights with
values, values used more than once, regions, several outputs and, unless refused, sizes that only
a call knows.

The graphs are tame. Floats stay near 1 (what would grow past LIMIT is scaled down), arguments of
log, sqrt, division and the like are kept inside their domain, and what jumps (floor, comparisons,
casts to integers) reads only values that every implementation agrees on to the bit. How far two
right implementations may differ is measured on each graph by `tolerances`: not guessed.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from effc.ir import (
    Dim,
    DType,
    Graph,
    Input,
    Item,
    Layout,
    Number,
    Op,
    Tensor,
    Weight,
    bind_symbols,
    channels_last,
    evaluate,
    row_major,
    symbol,
)
from effc.ir.interpret import run_node
from effc.ir.ops.aten import Aten
from effc.ir.ops.region import Fused
from effc.ir.rewrite import op
from effc.ir.symbols import dim, product
from effc.ir.types import bf16, boolean, f32, f64, i32, i64

FULL = os.environ.get("EFFC_HYPOTHESIS") == "full"
profile = settings(
    max_examples=1000 if FULL else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

LIMIT = 16.0  # floats that could be larger are scaled down
SMALL = 1 / 16  # errors of smaller floats count as those of this one
ROWS = 8  # integers of an input are row numbers below this
LEAST = {"N": 1, "L": 3, "H": 4, "W": 4, "s": 1}  # the smallest sizes a graph is made for
MOST = {"N": 3, "L": 7, "H": 9, "W": 9, "s": 4}
CAPACITY = 12  # positions of a cache, of which fewer than PAST are taken before a call
PAST = 5


# ------------------------------------------------------------------ what the builder knows


@dataclass(frozen=True)
class Fact:
    """What is known of a value: about its largest element; whether its integers number rows."""

    bound: float = 1.0
    rows: bool = False


MOVES = {
    "reshape", "permute", "expand", "slice", "to_layout", "copy", "cat", "pad", "flip", "item",
    "pixel_shuffle", "pixel_unshuffle", "embedding", "arange", "full", "cast",
    "aten.roll.default", "aten.stack.default", "aten.split_with_sizes.default", "aten.topk.default",
}  # fmt: skip
PICKS = {"neg", "abs", "relu", "maximum", "minimum", "where", "clamp", "amax", "amin", "max_pool2d"}
STEPS = ("floor", "ceil", "trunc", "round", "sign")
JUMPS = {
    *STEPS, "eq", "ne", "lt", "le", "gt", "ge", "div_floor", "div_trunc", "remainder", "fmod",
    "isnan", "isinf", "logical_not", "logical_and", "logical_or", "logical_xor", "any", "all",
}  # fmt: skip


def is_exact(node: Op, exact: dict[Op, bool]) -> bool:
    """Whether every implementation gives the same bits: what is only moved, compared or counted.

    exact: what is known already; grows.
    """
    if node not in exact:
        name = getattr(node, "target", node.name)
        same = name in MOVES | PICKS | JUMPS or isinstance(node, (Input, Weight))
        if isinstance(node, Fused):
            exact |= zip(node.body.inputs, [is_exact(x, exact) for x in node.xs])
            same = all([is_exact(n, exact) for n in node.body.nodes])
        elif name == "mul" and isinstance(node.b, float):
            same = math.frexp(abs(node.b))[0] == 0.5  # a power of two
        elif isinstance(node.type, Tensor) and not node.dtype.is_float:
            same = True
        exact[node] = all([is_exact(o, exact) for o in node.operands]) and same
    return exact[node]


class Builder:
    """Adds values one after another and keeps what is known of each."""

    def __init__(self, seed: int, dtypes: Sequence[DType], symbolic: bool) -> None:
        self.random = random.Random(seed)
        self.dtypes, self.symbolic = tuple(dtypes), symbolic
        self.floats = tuple(d for d in dtypes if d.is_float)
        self.inputs: list[Input] = []
        self.states: dict[Input, Op] = {}  # and their new values
        self.facts: dict[Op, Fact] = {}
        self.exacts: dict[Op, bool] = {}
        self.used: set[Op] = set()
        self.seeds = seed
        self.depth = 0

    # -------------------------------------------------------------- drawing

    def choice(self, options: Sequence[Any]) -> Any:
        return self.random.choice(list(options))

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def pick(self, *wanted: Callable[[Op], bool]) -> Op | None:
        """A value that fits: among the latest ones, and mostly one that nothing reads yet."""
        fit = [v for v in self.facts if isinstance(v.type, Tensor) and all(w(v) for w in wanted)]
        fresh = [v for v in fit if v not in self.used]
        if not fit:
            return None
        return self.choice((fresh if fresh and self.random.random() < 0.75 else fit)[-8:])

    # -------------------------------------------------------------- adding

    def add(self, node: Op, bound: float = 1.0, rows: bool = False) -> Op:
        """Keep a value; scale it down where it could grow too large."""
        self.used.update(node.operands)
        if isinstance(node.type, Tensor):
            if node.dtype.is_float and bound > LIMIT:
                node, bound = op.mul(node, 2.0 ** -math.ceil(math.log2(bound / 2))), 2.0
            if node.dtype.kind == "int" and bound > 1000:
                node, bound = op.remainder(node, 7), 7
        self.facts[node] = Fact(bound, rows)
        return node

    def input(self, key: str, t: Tensor | Number) -> Input:
        node = Input(key, t)
        self.inputs.append(node)
        if isinstance(t, Tensor):
            rows = t.dtype.kind == "int"
            self.facts[node] = Fact(ROWS if rows else 1.0, rows)
        return node

    def weight(self, shape: Sequence[int], dtype: DType, scale: float = 1.0, low: float = -1) -> Op:
        """Values between low * scale and scale."""
        self.seeds += 1
        generator = torch.Generator().manual_seed(self.seeds)
        data = torch.rand(tuple(shape), generator=generator) * (1 - low) + low
        node = Weight.holding(f"w.{self.seeds}", (data * scale).to(dtype.torch))
        self.facts[node] = Fact(scale)
        return node

    # -------------------------------------------------------------- asking

    def least(self, size: Dim) -> int:
        """The size in the smallest call that the graph is made for."""
        return evaluate(size, {symbol(k): v for k, v in LEAST.items()})

    def most(self, size: Dim) -> int:
        """The size in the largest call."""
        return evaluate(size, {symbol(k): v for k, v in MOST.items()})

    def fact(self, x: Op) -> Fact:
        return self.facts[x]

    def bound(self, *values: Any) -> float:
        return max(self.facts[v].bound if isinstance(v, Op) else abs(v) for v in values)

    def exact(self, *values: Any) -> bool:
        return all(is_exact(v, self.exacts) for v in values if isinstance(v, Op))

    def sizes(self) -> list[Dim]:
        """Numbers of the call that can stand for sizes."""
        return [i.symbol for i in self.inputs if isinstance(i.of, Number) and i.of.integer]


def is_float(x: Op) -> bool:
    return x.dtype.is_float


def is_int(x: Op) -> bool:
    return x.dtype.kind == "int"


def is_bool(x: Op) -> bool:
    return x.dtype is boolean


def rank(*ranks: int) -> Callable[[Op], bool]:
    return lambda x: len(x.shape) in ranks


def broadcasts(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    """Surely, not just perhaps."""
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))


# ------------------------------------------------------------------ families of ops

Family = Callable[[Builder], Any]
FAMILIES: dict[str, list[Family]] = {}  # each listed as often as it should come


def family(name: str, weight: int = 1) -> Callable[[Family], Family]:
    """Register a way to add a value. It may find nothing that fits, and then adds nothing."""

    def register(fn: Family) -> Family:
        FAMILIES.setdefault(name, []).extend([fn] * weight)
        return fn

    return register


SMOOTH = {
    "neg": 1, "abs": 1, "relu": 1, "silu": 1, "mish": 1, "hardswish": 1, "gelu": 1, "leaky_relu": 1,
    "elu": 1, "softplus": 1, "log_sigmoid": 1, "sigmoid": 0, "tanh": 0, "hardsigmoid": 0, "erf": 0,
    "erfc": 0, "sin": 0, "cos": 0, "atan": 0, "asinh": 0, "square": 2,
}  # fmt: skip
EXPONENTIAL = ("exp", "exp2", "expm1", "sinh", "cosh")
POSITIVE = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "acosh")
NARROW = ("asin", "acos", "atanh", "tan")


@family("pointwise", 6)
def smooth(b: Builder) -> Any:
    if (x := b.pick(is_float)) is not None:
        name = b.choice(list(SMOOTH))
        options: dict[str, Any] = {}
        if name == "gelu":
            options = {"approximate": b.choice(["none", "tanh"])}
        if name in ("leaky_relu", "elu", "softplus") and b.flag():
            options = {
                "leaky_relu": {"slope": 0.2},
                "elu": {"alpha": 0.5},
                "softplus": {"beta": 2.0},
            }[name]
        return b.add(getattr(op, name)(x, **options), max(1.0, b.bound(x)) ** SMOOTH[name] * 1.6)


@family("pointwise", 3)
def guarded(b: Builder) -> Any:
    """Functions with a domain, on arguments kept inside it."""
    if (x := b.pick(is_float)) is None:
        return None
    name = b.choice(EXPONENTIAL + POSITIVE + NARROW)
    if name in EXPONENTIAL:
        small = op.mul(x, 2.0 / max(2.0, b.bound(x)))
        return b.add(getattr(op, name)(small), 8.0)
    if name in POSITIVE:
        return b.add(getattr(op, name)(op.add(op.abs(x), 1.5)), 4.0 + b.bound(x))
    return b.add(getattr(op, name)(op.mul(op.tanh(x), 0.75)), 3.0)


def other(b: Builder, x: Op, *wanted: Callable[[Op], bool]) -> Any:
    """Something to combine with x: a number, a number of the call, or a value that broadcasts."""
    match b.choice(["value", "value", "value", "number", "symbol"]):
        case "symbol" if b.sizes():
            return b.choice(b.sizes())
        case "number":
            return b.choice([0.5, -1.25, 2, 1, 0.0] if is_float(x) else [1, 2, 3])
    return b.pick(*wanted, lambda y: broadcasts(x.shape, y.shape))


def size_of(b: Builder, *values: Any) -> float:
    return max(b.bound(v) if not hasattr(v, "free_symbols") else MOST["s"] for v in values)


@family("pointwise", 6)
def arithmetic(b: Builder) -> Any:
    x = b.pick(is_float)
    y = other(b, x, is_float) if x is not None else None
    if x is None or y is None:
        return None
    name = b.choice(
        ["add", "sub", "mul", "div", "maximum", "minimum", "atan2", "pow", "lerp", "clamp"]
    )
    large = size_of(b, x, y)
    if name == "div":
        y = op.add(op.abs(y), 1.0) if isinstance(y, Op) else b.choice([2.0, -4.0, 3])
    elif name == "atan2":  # away from the cut
        y = op.add(op.abs(y), 1.0) if isinstance(y, Op) else 2.0
    elif name == "pow":
        return b.add(op.pow(x, b.choice([2, 3.0])), large**3)
    elif name == "lerp":
        if not isinstance(y, Op) or y.dtype != x.dtype:
            return None
        return b.add(op.lerp(x, y, b.choice([0.25, 0.5])), large)
    elif name == "clamp":
        low, high = b.choice([(-0.5, 0.5), (None, 1.0), (0, None), (-1, 6)])
        return b.add(op.clamp(x, low, high), max(large, 6.0))
    swapped = name in ("add", "sub", "mul", "maximum", "minimum") and b.flag()
    node = getattr(op, name)(y, x) if swapped else getattr(op, name)(x, y)
    grown = {"mul": large * large, "add": 2 * large, "sub": 2 * large}.get(name, max(large, 2.0))
    return b.add(node, grown)


@family("pointwise", 3)
def steps(b: Builder) -> Any:
    """Functions with jumps, of values without rounding errors."""
    if (x := b.pick(is_float, b.exact)) is None:
        return None
    match b.choice(["step", "step", "divide", "compare", "compare", "test", "cast"]):
        case "step":
            scaled = op.mul(x, 4.0)  # by a power of two: no rounding
            return b.add(getattr(op, b.choice(STEPS))(scaled), 4 * b.bound(x))
        case "divide":
            made = getattr(op, b.choice(["div_floor", "div_trunc", "remainder", "fmod"]))
            return b.add(made(x, 0.25), 4 * b.bound(x))
        case "compare" if boolean in b.dtypes:
            y = b.pick(is_float, b.exact, lambda y: broadcasts(x.shape, y.shape))
            made = getattr(op, b.choice(["eq", "ne", "lt", "le", "gt", "ge"]))
            return b.add(made(x, b.choice([y, 0.0])))
        case "test" if boolean in b.dtypes:
            return b.add(getattr(op, b.choice(["isnan", "isinf", "logical_not"]))(x))
        case "cast" if i64 in b.dtypes:
            return b.add(op.cast(op.mul(x, 4.0), b.choice([i64, i32])), 4 * b.bound(x))


@family("pointwise", 2)
def integers(b: Builder) -> Any:
    if (x := b.pick(is_int)) is None:
        return None
    y = other(b, x, is_int)
    names = ["add", "sub", "mul", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor", "compare",
             "divide", "divide", "not", "clamp"]  # fmt: skip
    match b.choice(names):
        case "compare" if boolean in b.dtypes:
            made = getattr(op, b.choice(["eq", "ne", "lt", "le", "gt", "ge"]))
            return b.add(made(x, 2 if y is None else y))
        case "divide":
            made = getattr(op, b.choice(["div_floor", "div_trunc", "remainder", "fmod"]))
            return b.add(made(x, b.choice([2, 3, -3])), b.bound(x))
        case "not":
            return b.add(op.bitwise_not(x), b.bound(x) + 1)
        case "clamp":
            return b.add(op.clamp(x, 0, ROWS - 1), ROWS, rows=True)
        case name if y is not None and name != "compare":
            return b.add(getattr(op, name)(x, y), 4 * size_of(b, x, y) ** 2)


@family("pointwise")
def booleans(b: Builder) -> Any:
    if (x := b.pick(is_bool)) is None:
        return None
    y = b.pick(is_bool, lambda y: broadcasts(x.shape, y.shape))
    name = b.choice(["logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_not"])
    if name == "bitwise_not":
        return b.add(op.bitwise_not(x))
    return b.add(getattr(op, name)(x, y))


@family("pointwise", 2)
def select(b: Builder) -> Any:
    if (cond := b.pick(is_bool)) is None:
        return None
    x = b.pick(is_float, lambda y: broadcasts(cond.shape, y.shape))
    y: Any = other(b, x, is_float, lambda y: broadcasts(cond.shape, y.shape)) if x else None
    if x is not None and y is not None:
        return b.add(op.where(cond, x, y), size_of(b, x, y))


@family("pointwise")
def casts(b: Builder) -> Any:
    if (x := b.pick()) is not None:
        to = b.choice(b.floats)
        return b.add(op.cast(x, to), b.bound(x))


@family("reduce", 3)
def reduction(b: Builder) -> Any:
    if (x := b.pick(lambda x: len(x.shape) > 0)) is None:
        return None
    axes = range(len(x.shape))
    dims = tuple(sorted(b.random.sample(axes, min(len(axes), b.choice([1, 1, 2])))))
    count = float(b.least(product(tuple(x.shape[d] for d in dims)))) * 2
    keepdim = b.flag()
    if not is_float(x):
        name = b.choice(["any", "all"] + ["sum", "amax", "amin"] * is_int(x))
        return b.add(getattr(op, name)(x, dims, keepdim), b.bound(x) * count)
    name = b.choice(["sum", "mean", "mean", "amax", "amin", "prod"])
    if name == "prod":
        near_one = op.add(op.mul(op.tanh(x), 0.25), 1.0)
        return b.add(op.prod(near_one, dims, keepdim), 1.25 ** min(count, 20))
    grown = b.bound(x) * (math.sqrt(count) if name == "sum" else 1)
    return b.add(getattr(op, name)(x, dims, keepdim), grown)


@family("reduce")
def rows(b: Builder) -> Any:
    if (x := b.pick(is_float, lambda x: len(x.shape) > 0)) is not None:
        axis = b.choice(range(-1, len(x.shape)))
        return b.add(getattr(op, b.choice(["softmax", "log_softmax"]))(x, axis), 2 * b.bound(x) + 3)


@family("products", 2)
def linear(b: Builder) -> Any:
    if (x := b.pick(is_float, lambda x: len(x.shape) > 0 and isinstance(x.shape[-1], int))) is None:
        return None
    k, n = x.shape[-1], b.choice([1, 3, 4, 8])
    w = b.weight((n, k), x.dtype, 1.7 / math.sqrt(k))
    bias = b.weight((n,), x.dtype) if b.flag() else None
    return b.add(op.linear(x, w, bias), b.bound(x) * 2)


@family("products", 2)
def matmul(b: Builder) -> Any:
    if (x := b.pick(is_float, rank(2, 3, 4))) is None:
        return None
    k = x.shape[-1]
    if b.flag() and isinstance(k, int):
        return b.add(
            op.matmul(x, b.weight((k, b.choice([1, 4])), x.dtype)), b.bound(x) * math.sqrt(k)
        )
    turned = op.permute(x, (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2))
    return b.add(op.matmul(x, turned), b.bound(x) ** 2 * math.sqrt(b.least(k) * 2))


@family("products", 4)
def convolution(b: Builder) -> Any:
    if (x := b.pick(is_float, rank(3, 4, 5), lambda x: isinstance(x.shape[1], int))) is None:
        return None
    spatial = len(x.shape) - 2
    c = x.shape[1]
    depthwise = c > 1 and b.random.random() < 0.25
    groups, out = (c, c) if depthwise else (1, b.choice([1, 2, 4, 8]))
    kernel = tuple(min(b.choice([1, 2, 3]), b.least(s)) for s in x.shape[2:])
    padding = tuple(b.choice([0, k // 2]) for k in kernel)
    dilation = tuple(
        b.choice([1, 1, 2]) if 2 * k - 1 <= b.least(s) else 1 for k, s in zip(kernel, x.shape[2:])
    )
    stride = tuple(b.choice([1, 1, 2]) for _ in kernel)
    taps = c // groups * math.prod(kernel)
    w = b.weight((out, c // groups, *kernel), x.dtype, 1.7 / math.sqrt(taps))
    if spatial == 2 and b.flag():
        w = op.to_layout(w, b.choice([channels_last, row_major]))
    bias = b.weight((out,), x.dtype) if b.flag() else None
    made = getattr(op, f"conv{spatial}d")
    return b.add(made(x, w, bias, stride, padding, dilation, groups), b.bound(x) * 2)


@family("norms", 4)
def norm(b: Builder) -> Any:
    if (x := b.pick(is_float, lambda x: len(x.shape) > 0)) is None:
        return None
    name = b.choice(["layer_norm", "rms_norm", "group_norm", "batch_norm"])
    eps = b.choice([1e-5, 1e-2])
    last, channels = x.shape[-1], x.shape[1] if len(x.shape) > 1 else None

    def vector(n: Dim, low: float = -1) -> Any:
        return b.weight((n,), x.dtype, low=low) if b.flag() else None  # type: ignore[arg-type]

    if name in ("layer_norm", "rms_norm") and isinstance(last, int):
        extra = {"bias": vector(last)} if name == "layer_norm" else {}
        return b.add(getattr(op, name)(x, vector(last), **extra, eps=eps), 3.0)
    if name == "group_norm" and isinstance(channels, int) and len(x.shape) > 2:
        groups = b.choice([g for g in (1, 2, channels) if channels % g == 0])
        return b.add(op.group_norm(x, groups, vector(channels), vector(channels), eps=eps), 3.0)
    if name == "batch_norm" and isinstance(channels, int):
        mean, var = b.weight((channels,), x.dtype), b.weight((channels,), x.dtype, low=0.5)
        node = op.batch_norm(x, mean, var, vector(channels), vector(channels), eps)
        return b.add(node, 2 * b.bound(x) + 2)


@family("attention", 2)
def attention(b: Builder) -> Any:
    if (x := b.pick(is_float, rank(2, 3, 4), lambda x: isinstance(x.shape[-1], int))) is None:
        return None
    d, n = x.shape[-1], x.shape[-2]
    q, k, v = (op.linear(x, b.weight((4, d), x.dtype, 1.7 / math.sqrt(d))) for _ in range(3))
    options: dict[str, Any] = {"causal": b.flag(), "scale": b.choice([None, 0.5])}
    match b.choice(["none", "none", "added", "kept"]):
        case "added" if isinstance(n, int):
            options["mask"] = b.weight((n, n), x.dtype)
        case "kept" if boolean in b.dtypes:  # a band below the diagonal: no row is empty
            steps = op.arange(n, i64)
            rows, columns = op.reshape(steps, (n, 1)), op.reshape(steps, (1, n))
            options["mask"] = op.le(columns, op.add(rows, 1))
    return b.add(op.attention(q, k, v, **options), b.bound(x) * 2)


def cached(b: Builder) -> Any:
    """Keys and values appended to a state each, and attention over these. Only where asked for."""

    def short(x: Op) -> bool:
        return isinstance(x.shape[-1], int) and b.most(x.shape[-2]) <= CAPACITY - PAST

    if (x := b.pick(is_float, rank(2, 3, 4), short)) is None:
        return None
    past = next((i for i in b.inputs if i.key == "past"), None) or b.input("past", Tensor((), i64))
    d, n = x.shape[-1], x.shape[-2]
    q, k, v = (op.linear(x, b.weight((4, d), x.dtype, 1.7 / math.sqrt(d))) for _ in range(3))
    caches = []
    for new in (k, v):
        of = Tensor((*new.shape[:-2], CAPACITY, 4), x.dtype)
        state = Input(f"state{len(b.states)}", of, state=True)
        b.inputs.append(state)
        b.states[state] = op.update(
            state, new, past, len(of.shape) - b.choice([2, len(of.shape) + 2])
        )
        caches.append(b.states[state])
    options: dict[str, Any] = {"causal": b.flag()}
    if boolean in b.dtypes and b.flag():
        rows = op.add(op.reshape(op.arange(n, i64), (n, 1)), past)
        columns = op.reshape(op.arange(CAPACITY, i64), (1, CAPACITY))
        options["mask"] = op.gt(columns, op.sub(rows, 3))  # a window: no row is empty
    return b.add(op.attention(q, *caches, **options, past=past), b.bound(x) * 2)


@family("attention")
def rope(b: Builder) -> Any:
    even = lambda x: isinstance(x.shape[-1], int) and x.shape[-1] % 2 == 0  # noqa: E731
    if (x := b.pick(is_float, rank(2, 3, 4), even)) is None:
        return None
    n, d = x.shape[-2:]
    angle = op.mul(op.reshape(op.arange(n, x.dtype), (n, 1)), b.weight((d,), x.dtype))
    cos, sin = op.cos(angle), op.sin(angle)
    return b.add(op.rope(x, cos, sin, interleaved=b.flag()), 2 * b.bound(x))


@family("images", 4)
def image(b: Builder) -> Any:
    large = lambda x: min(map(b.least, x.shape[2:])) >= 2  # noqa: E731
    if (x := b.pick(is_float, rank(4), large)) is None:
        return None
    *_, h, w = x.shape
    match b.choice(["pool", "pool", "resize", "resize", "shuffle"]):
        case "pool":
            made = getattr(op, b.choice(["max_pool2d", "avg_pool2d"]))
            stride, pad = b.choice([(1, 1), (2, 2), (2, 1)]), b.choice([(0, 0), (1, 1)])
            ceil = isinstance(h, int) and isinstance(w, int) and b.flag()
            return b.add(made(x, (2, 2), stride, pad, ceil_mode=ceil), b.bound(x))
        case "resize":
            size = b.choice([(dim(2 * h), dim(2 * w)), (5, 7), (h, w)])
            mode = b.choice(["nearest", "nearest-exact", "bilinear", "bicubic"])
            aligned = mode.startswith("bi") and b.flag()
            return b.add(op.interpolate(x, size, mode, aligned), 2 * b.bound(x))
        case "shuffle" if isinstance(x.shape[1], int) and x.shape[1] % 4 == 0:
            return b.add(op.pixel_shuffle(x, 2), b.bound(x))
    if isinstance(h, int) and isinstance(w, int) and not h % 2 and not w % 2:
        return b.add(op.pixel_unshuffle(x, 2), b.bound(x))


@family("moves", 8)
def move(b: Builder) -> Any:
    if (x := b.pick(lambda x: len(x.shape) > 0)) is None:
        return None
    node = _moved(b, x, len(x.shape), b.choice(range(len(x.shape))))
    if node is not None:
        return b.add(node, b.bound(x), b.fact(x).rows)


def _moved(b: Builder, x: Op, n: int, axis: int) -> Op | None:
    size = x.shape[axis]
    names = ["merge", "split", "permute", "permute", "expand", "slice", "layout", "copy", "flip",
             "pad", "new"]  # fmt: skip
    match b.choice(names):
        case "merge" if axis + 1 < n:
            both = product(x.shape[axis : axis + 2])
            return op.reshape(x, (*x.shape[:axis], both, *x.shape[axis + 2 :]))
        case "split" if n < 5 and isinstance(size, int) and size % 2 == 0:
            return op.reshape(x, (*x.shape[:axis], 2, size // 2, *x.shape[axis + 1 :]))
        case "permute":
            return op.permute(x, tuple(b.random.sample(range(n), n)))
        case "expand" if n < 4:
            lead = b.choice([1, 2, *b.sizes()])
            return op.expand(x, (lead, *(b.choice([1, 3]) if s == 1 else s for s in x.shape)))
        case "slice" if b.least(size) >= 2:
            if isinstance(size, int) and size >= 5 and b.flag():
                return op.slice(x, axis, b.choice([0, 1]), 2, b.choice([1, 2, 3]))
            return op.slice(x, b.choice([axis, axis - n]), b.choice([0, 1]), dim(size - 1))
        case "layout" if n == 4:
            return op.to_layout(x, b.choice([channels_last, row_major]))
        case "copy":
            return op.copy(x)
        case "flip":
            return op.flip(x, tuple(b.random.sample(range(n), min(n, b.choice([0, 1, 2])))))
        case "pad" if n < 5:
            before = tuple(b.choice([0, 1, 1]) if i == axis else 0 for i in range(n))
            after = tuple(b.choice([0, 1, -1]) if i == axis else 0 for i in range(n))
            if b.least(size) > 1:
                return op.pad(x, before, after, b.choice([0, 1]))
        case "new" if n < 4:
            return op.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))
    return None


@family("moves", 2)
def cat(b: Builder) -> Any:
    if (x := b.pick(lambda x: len(x.shape) > 0)) is None:
        return None
    axis = b.choice(range(len(x.shape)))

    def fits(y: Op) -> bool:
        same = len(y.shape) == len(x.shape) and y.dtype == x.dtype
        return same and all(a == c or i == axis for i, (a, c) in enumerate(zip(x.shape, y.shape)))

    xs = [x, *(b.pick(fits) for _ in range(b.choice([1, 1, 2])))]
    rows = all(b.fact(v).rows for v in xs)
    return b.add(op.cat(tuple(xs), axis), b.bound(*xs), rows)


@family("made", 2)
def made(b: Builder) -> Any:
    size = b.choice([3, *b.sizes()])
    match b.choice(["arange", "full", "embedding", "embedding"]):
        case "arange":
            dtype = b.choice([*b.floats, *(d for d in b.dtypes if d is i64)])
            return b.add(op.arange(size, dtype, 1, 2), 9)
        case "full":
            value = b.choice([0.5, *b.sizes()])
            return b.add(op.full((size, 1), value, b.choice(b.floats)), 4)
    ids = b.pick(is_int, lambda x: b.fact(x).rows, rank(0, 1, 2, 3))
    if ids is not None:
        return b.add(op.embedding(b.weight((ROWS, 4), b.choice(b.floats)), ids))


@family("generic", 2)
def generic(b: Builder) -> Any:
    """Operators without a declaration; some have several results."""
    if (x := b.pick(is_float, lambda x: len(x.shape) > 0 and isinstance(x.shape[-1], int))) is None:
        return None
    t, n = x.tensor.with_(layout=row_major), x.shape[-1]
    match b.choice(["cumsum", "roll", "topk", "split", "stack"]):
        case "cumsum":
            node = Aten("aten.cumsum.default", (x, -1), (), of=t)
            return b.add(node, b.bound(x) * math.sqrt(n) * 2)
        case "roll":
            return b.add(Aten("aten.roll.default", (x, (1,), (-1,)), (), of=t), b.bound(x))
        case "topk":
            two = t.with_(shape=(*t.shape[:-1], 1))
            node = Aten("aten.topk.default", (x, 1), (), of=(two, two.with_(dtype=i64)))
            return b.add(Item(node, 0), b.bound(x))
        case "split" if n > 1:
            parts = tuple(t.with_(shape=(*t.shape[:-1], s)) for s in (1, n - 1))
            node = Aten("aten.split_with_sizes.default", (x, (1, n - 1), -1), (), of=parts)
            return [b.add(Item(node, i), b.bound(x)) for i in (1, 0)]
        case "stack" if len(x.shape) < 4:
            of = t.with_(shape=(2, *t.shape))
            return b.add(Aten("aten.stack.default", ((x, x),), (), of=of), b.bound(x))


@family("regions", 3)
def fused(b: Builder) -> Any:
    """A chain of elementwise ops as a region, perhaps with a region inside."""
    xs = list(dict.fromkeys(v for v in (b.pick(), b.pick(), b.pick(is_float)) if v is not None))
    if not xs or b.depth > 1:
        return None
    inner = Builder(0, b.dtypes, b.symbolic)
    inner.random, inner.depth = b.random, b.depth + 1
    for i, x in enumerate(xs):
        inner.facts[p := Input(f"p{i}", x.tensor)] = b.fact(x)
        inner.exacts[p] = b.exact(x)
    params = tuple(inner.facts)
    for _ in range(b.choice([2, 3, 4])):
        inner.choice([*FAMILIES["pointwise"], fused])(inner)
    made = [v for v in inner.facts if v not in inner.used and v not in params]
    outputs = made[-b.choice([1, 1, 2]) :]
    if not outputs:
        return None
    node = Fused(tuple(xs), Graph.of(params, outputs, b.choice(["body", "region"])))  # type: ignore[arg-type]
    facts = [inner.facts[o] for o in outputs]
    if len(outputs) == 1:
        return b.add(node, **vars(facts[0]))
    b.used.update(xs)
    return [b.add(Item(node, i), **vars(fact)) for i, fact in enumerate(facts)]


# ------------------------------------------------------------------ graphs


@st.composite
def graphs(
    draw: Any,
    *,
    steps: tuple[int, int] = (5, 24),
    dtypes: Sequence[DType] = (f32, f32, f32, f64, bf16, i64, boolean),
    symbolic: bool = True,
    layouts: Sequence[Layout] = (row_major, row_major, channels_last),
    families: Sequence[str] | None = None,
    states: bool = False,
) -> Graph:
    """A valid graph. At least one of `dtypes` must be a float type.

    steps: a step adds a few nodes at most; what no output needs is left out. dtypes: those listed
    twice come twice as often. symbolic: some sizes may be known only to the call. families: those
    of FAMILIES to take ops from (None: all). states: with caches, given back last.

    Each step has a seed of its own, so a failing graph shrinks by losing steps.
    """
    b = Builder(draw(_SEEDS), dtypes, symbolic)
    _inputs(b, layouts)
    smooth(b)
    ways = [fn for name in families or FAMILIES for fn in FAMILIES[name]] + [cached] * 3 * states
    for seed in draw(st.lists(_SEEDS, min_size=steps[0], max_size=steps[1])):
        b.random, b.seeds = random.Random(seed), b.seeds + 100
        b.choice(ways)(b)
    made = [v for v in b.facts if not isinstance(v, (Input, Weight))]
    leaves = [v for v in made if v not in b.used]
    outputs = leaves[-draw(st.integers(1, 4)) :]
    if len(Graph.of(b.inputs, outputs).nodes) < steps[0]:
        outputs = leaves[-8:]
    if made and draw(st.integers(0, 3)) == 3:
        outputs.append(b.choice(made))  # read inside the graph, too, or given back twice
    return Graph.of(b.inputs, [*outputs, *b.states.values()])


# Drawn as bytes: all equally likely, where st.integers prefers small numbers.
_SEEDS = st.binary(min_size=3, max_size=3).map(lambda b: int.from_bytes(b, "big"))


def _inputs(b: Builder, layouts: Sequence[Layout]) -> None:
    def size(name: str, *numbers: int) -> Dim:
        return symbol(name) if b.symbolic and b.flag() else b.choice(numbers)

    n = size("N", 1, 2, 3)
    c, d = b.choice([1, 3, 4, 8]), b.choice([1, 4, 6, 8])
    image = (n, c, size("H", 4, 5, 6), size("W", 4, 7, 8))
    sequence = (n, size("L", 3, 5, 7), d)
    kinds = b.random.choices(["image", "sequence", "row"], k=b.choice([1, 2]))
    shapes = {"image": image, "sequence": sequence, "row": (n, d)}
    for i, kind in enumerate(kinds):
        layout = b.choice(layouts) if kind == "image" else row_major
        b.input(f"x{i}", Tensor(shapes[kind], b.choice(b.floats), layout))
    last = shapes[kinds[-1]]
    if boolean in b.dtypes and b.flag():
        b.input("keep", Tensor((*last[:-1], b.choice([1, last[-1]])), boolean))
    if i64 in b.dtypes and b.flag():
        b.input("ids", Tensor(last[:2], b.choice([i64, i32])))
    if b.flag():
        b.input("c", Tensor(b.choice([(), last[-1:]]), b.choice(b.floats)))
    if b.symbolic and b.flag():
        b.input("s", Number())


# ------------------------------------------------------------------ inputs


def sizes_for(graph: Graph) -> st.SearchStrategy[dict[str, int]]:
    """Sizes of a call, by name."""
    names = sorted(s.name for s in graph.all_symbols)
    return st.fixed_dictionaries({n: st.integers(LEAST[n], MOST[n]) for n in names})


def inputs_for(graph: Graph, seed: int = 0, sizes: dict[str, int] | None = None) -> list[Any]:
    """Values that fit: floats between -1 and 1, row numbers, booleans. sizes: by name."""
    chance = random.Random(seed)
    env = {symbol(k): chance.randint(v, MOST[k]) for k, v in LEAST.items()}
    env |= {symbol(k): v for k, v in (sizes or {}).items()}
    generator = torch.Generator().manual_seed(seed)
    return [_value(i, env, generator) for i in graph.inputs]


def _value(i: Input, env: dict[Any, int], generator: torch.Generator) -> Any:
    if isinstance(i.of, Number):
        return env[i.symbol]
    t: Any = i.of
    shape = evaluate(t.shape, env)
    if i.key == "past":
        return torch.randint(0, PAST, shape, generator=generator)
    if t.dtype.is_float:
        value = torch.rand(shape, generator=generator) * 2 - 1
        coarse = torch.rand(shape, generator=generator) < 0.25  # ties, halves and zeros
        value = torch.where(coarse, (value * 8).round() / 8, value)
    else:
        value = torch.randint(0, ROWS if t.dtype is not boolean else 2, shape, generator=generator)
    return op.to_layout(i, t.layout).reference(value.to(t.dtype.torch))


@st.composite
def cases(draw: Any, **options: Any) -> tuple[Graph, list[Any]]:
    """(graph, inputs); options are those of `graphs`."""
    graph = draw(graphs(**options))
    return graph, inputs_for(graph, draw(st.integers(0, 999)), draw(sizes_for(graph)))


# ------------------------------------------------------------------ how far results may differ


def tolerances(graph: Graph, inputs: Sequence[Any], runs: int = 2, slack: float = 8) -> list[float]:
    """For each output, how far a right implementation may be from the interpreter.

    Measured: the graph is run with every float changed by a unit in its last place or two (of
    SMALL, where it is smaller: exp(x) - 1 may be computed as that) wherever it is read, and the
    largest change of an output, times slack, is allowed. 0 for integers.
    """
    exact: dict[Op, bool] = {}
    want = _noisy(graph, inputs, None, {}, exact)
    found = [4 * _unit(w) * max(float(w.abs().max()), SMALL) if _inexact(w) else 0.0 for w in want]
    for seed in range(runs):
        noise = torch.Generator().manual_seed(seed)
        for i, (got, w) in enumerate(
            zip(_noisy(graph, inputs, noise, {}, exact), want, strict=True)
        ):
            if _inexact(w):
                change = (got.double() - w.double()).abs().nan_to_num(0.0, 0.0, 0.0)
                found[i] = max(found[i], slack * float(change.max()))
    return found


def _inexact(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0


def _unit(value: torch.Tensor) -> float:
    return torch.finfo(value.dtype).eps


def _noisy(
    graph: Graph,
    inputs: Sequence[Any],
    noise: torch.Generator | None,
    env: dict[Any, Any],
    exact: dict[Op, bool],
) -> list[Any]:
    """The interpreter, with every float shaken where it is read, unless the bits stay the same."""
    env = bind_symbols(graph, inputs, env)
    values: dict[Op, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def shaken(value: Any) -> Any:
        if noise is None or not _inexact(value):
            return value
        sign = torch.randint(0, 2, value.shape, generator=noise).double() * 2 - 1
        moved = value.double() + sign * _unit(value) * (value.double().abs() + SMALL)
        return torch.where(value.isfinite(), moved.to(value.dtype), value)

    for node in graph.nodes:
        if isinstance(node, Fused):
            is_exact(node, exact)
            results = _noisy(node.body, [values[x] for x in node.xs], noise, env, exact)
            values[node] = tuple(results) if len(results) > 1 else results[0]
        elif is_exact(node, exact) or node.view:
            values[node] = run_node(node, values, env)
        else:
            values[node] = run_node(node, {o: shaken(values[o]) for o in node.operands}, env)
    return [values[o] for o in graph.outputs]


def assert_close(got: Sequence[Any], want: Sequence[Any], allowed: Sequence[float]) -> None:
    """Same count, shapes and element types; values as near as `tolerances` allows."""
    assert len(got) == len(want)
    for i, (g, w, limit) in enumerate(zip(got, want, allowed, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype, f"output {i}: {g.shape} {g.dtype}"
        torch.testing.assert_close(
            g, w, rtol=0, atol=limit, equal_nan=True, msg=lambda text, i=i: f"output {i}: {text}"
        )


__all__ = [
    "FAMILIES", "LIMIT", "Builder", "Fact", "assert_close", "cases", "family", "graphs",
    "inputs_for", "profile", "sizes_for", "tolerances",
]  # fmt: skip
