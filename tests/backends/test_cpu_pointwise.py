"""Pointwise kernels against the interpreter: every op, every element type, every way to walk."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.backends import find_backend
from effc.backends.cpu.lowering import claim
from effc.codegen.cpp import scalar
from effc.ir import DType, Graph, Input, Item, OpError, Tensor, find_op, interpret, parse
from effc.ir.ops.region import Fused
from effc.ir.rewrite import op

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def values(dtype: torch.dtype) -> list:
    t = Tensor((7, 33), DType.of(dtype))
    return [Input("x", t), Input("y", t), Input("c", Tensor((7, 33), DType.of(torch.bool)))]


def nodes(x, y, c) -> list:
    """Every pointwise op on the element type that the target claims."""
    made = [
        lambda: op.leaky_relu(x, 0.2), lambda: op.elu(x, 1.5, 1.1, 0.7), lambda: op.softplus(x),
        lambda: op.softplus(x, 2.0, 10.0), lambda: op.gelu(x), lambda: op.gelu(x, "tanh"),
        lambda: op.clamp(x, -1, 2), lambda: op.clamp(x, None, y), lambda: op.clamp(x, y),
        lambda: op.where(c, x, y), lambda: op.where(c, x, 3), lambda: op.where(c, 1.5, y),
        lambda: op.lerp(x, y, 0.3), lambda: op.add(x, 2), lambda: op.mul(0.1, x),
        lambda: op.sub(1, x), lambda: op.div(x, 3), lambda: op.eq(x, 0.1), lambda: op.gt(x, 1),
        lambda: op.div_floor(x, 3), lambda: op.div_trunc(x, 3), lambda: op.remainder(x, 3),
        lambda: op.fmod(x, -3), lambda: op.remainder(x, -3), lambda: op.div_floor(x, -3),
    ]  # fmt: skip
    made += [lambda e=e: op.pow(x, e) for e in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 2.5)]
    for name in sorted(scalar.EXPRESSIONS):
        fields = [f.name for f in find_op(name).fields]
        if fields == ["x"]:
            made.append(lambda n=name: getattr(op, n)(x))
        elif fields == ["a", "b"]:
            made.append(lambda n=name: getattr(op, n)(x, y))
    found = []
    for make in made:
        try:
            node = make()
        except (OpError, TypeError, AttributeError):
            continue
        if claim(node):
            found.append(node)
    return found


@pytest.mark.parametrize("dtype", FLOATS + INTS, ids=str)
def test_every_op(compiled, inputs_like, dtype) -> None:
    x, y, c = values(dtype)
    found, kept = nodes(x, y, c), []
    tensors = (inputs_like((7, 33), dtype), inputs_like((7, 33), dtype, 1),
               inputs_like((7, 33), torch.bool, 2))  # fmt: skip
    for node in found:
        try:  # torch has no kernel for some ops on some types
            interpret(Graph.of((x, y, c), [node]), tensors)
        except RuntimeError:
            continue
        kept.append(node)
    assert len(kept) > (60 if dtype.is_floating_point else 15)
    if dtype in (torch.bfloat16, torch.float16, torch.int16):
        kept = kept[::4]  # their arithmetic is that of float and int32
    run = compiled(Graph.of((x, y, c), grouped((x, y, c), kept)))
    tolerance = {}
    if dtype in (torch.float32, torch.float64):
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    run(*tensors, **tolerance)


def grouped(inputs: tuple, found: list, size: int = 8) -> list:
    """Nodes in regions of several results: fewer kernels build faster."""
    outs = []
    for i in range(0, len(found), size):
        body = Graph.of([Input(f"a{k}", x.type) for k, x in enumerate(inputs)], [])
        swap = dict(zip(inputs, body.inputs, strict=True))
        part = [n.map_operands(swap.__getitem__) for n in found[i : i + size]]
        region = Fused(inputs, Graph.of(body.inputs, part, "body"))
        outs += [Item(region, k) for k in range(len(part))] if len(part) > 1 else [region]
    return outs


CASTS = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8,
         torch.uint8, torch.bool, torch.float64]  # fmt: skip


def test_casts_between_all_types(compiled) -> None:
    inputs = [Input(f"x{i}", Tensor((40,), DType.of(d))) for i, d in enumerate(CASTS)]
    outs = [op.cast(x, DType.of(d)) for x in inputs for d in CASTS if x.dtype.torch != d]
    tensors = []
    for d in CASTS:
        t = torch.linspace(-20, 20, 40)
        tensors.append((t.abs() if d == torch.uint8 else t).to(d))
    # negative floats to uint8 wrap in torch; keep them inside
    tensors = [t.abs() if t.dtype not in (torch.bool, torch.uint8) else t for t in tensors]
    compiled(Graph.of(inputs, grouped(tuple(inputs), outs, 9)))(*tensors)


def test_a_cast_to_16_bits_rounds_in_the_middle_of_a_region(compiled) -> None:
    run = compiled(
        """
        def graph(x: f32[99]):
            def body(x: f32[99]):
                y0 = cast(x, dtype_=bf16)
                y1 = cast(y0, dtype_=f32)
                y2 = sub(x, y1)
                return y2,
            y0: f32[99] = fused((x,), body=body)
            return y0,
        """.replace("\n        ", "\n")
    )
    (out,) = run(torch.randn(99))
    assert out.abs().max() > 0


# ------------------------------------------------------------------ ways to walk memory

PROGRAM = """
def graph(x: f32[A, B, C], b: f32[C], c: f32[B, 1], d: f32[A, 1, C], s: f32[()], n: size):
    def body(x: f32[A, B, C], b: f32[C], c: f32[B, 1], d: f32[A, 1, C], s: f32[()]):
        y0 = add(x, b)
        y1 = mul(y0, c)
        y2 = sub(y1, d)
        y3 = maximum(y2, s)
        y4 = mul(y3, A)
        return y2, y4
    y0: (f32[A, B, C], f32[A, B, C]) = fused((x, b, c, d, s), body=body)
    y1 = item(y0, index=0)
    y2 = item(y0, index=1)
    y3 = permute(x, dims=(2, 0, 1))
    y4 = exp(y3)
    y5 = slice(y2, dim=2, start=0, size=C, step=1)
    y6 = permute(y5, dims=(0, 2, 1))
    y7 = reshape(y6, to=(A * C, B))
    y8 = neg(y7)
    y9 = add(x, n)
    return y1, y2, y4, y8, y9
"""
SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 13, 31, 64])


@functools.cache
def walked():
    graph = parse(PROGRAM)
    return graph, find_backend("cpu").compile(graph).bind()


def strided(shape, how: int) -> torch.Tensor:
    """A tensor of the shape that lies in memory in one of several ways."""
    if how == 0 or not shape:
        return torch.randn(shape)
    if how == 1:  # reversed dimension order
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if how == 2:  # every second element, at an offset
        return torch.randn([2 * s + 1 for s in shape])[tuple(slice(1, None, 2) for _ in shape)]
    if how == 3:  # one element repeated
        return torch.randn([1] * len(shape)).expand(shape)
    return torch.randn([*shape, 2])[..., 1]


@settings(max_examples=30)
@given(st.tuples(SIZES, SIZES, SIZES), st.tuples(*[st.integers(0, 4)] * 5), st.integers(-3, 3))
def test_all_sizes_and_strides_with_one_kernel(sizes, how, n) -> None:
    graph, bound = walked()
    a, b, c = sizes
    shapes = [(a, b, c), (c,), (b, 1), (a, 1, c), ()]
    inputs = [*(strided(s, h) for s, h in zip(shapes, how, strict=True)), n]
    for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_channels_last(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[2, 5, 3, 7], b: f32[5, 1, 1]):
    y0 = to_layout(x, layout=channels_last)
    def body(x: f32[2, 5, 3, 7] @ channels_last, b: f32[5, 1, 1]):
        y0 = add(x, b)
        y1 = relu(y0)
        return y1,
    y1: f32[2, 5, 3, 7] @ channels_last = fused((y0, b), body=body)
    y2 = to_layout(y1, layout=row_major)
    return y1, y2
"""
    )
    x, b = torch.randn(2, 5, 3, 7), torch.randn(5, 1, 1)
    last, plain = run(x, b)
    assert last.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    run(x.to(memory_format=torch.channels_last), b)


def test_a_result_takes_the_place_of_an_operand_nobody_needs(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[64]):
    y0 = exp(x)
    y1 = neg(y0)
    y2 = add(y1, 1.0)
    y3 = mul(y2, y0)
    y4 = abs(y3)
    return y4,
"""
    )
    run(torch.randn(64))
    arena = [r for r in run.executable.plan.roots if r.kind == "arena"]
    assert len(arena) == 2  # exp, and one that neg, add and mul share


def test_an_operand_read_in_another_order_is_not_overwritten(compiled) -> None:
    run = compiled(
        """
def graph(x: f32[9, 9]):
    y0 = exp(x)
    y1 = permute(y0, dims=(1, 0))
    y2 = sub(y0, y1)
    y3 = neg(y2)
    return y3,
"""
    )
    run(torch.randn(9, 9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (3, 2051), (64, 33)])
def test_results_past_the_caches(compiled, monkeypatch, dtype, size) -> None:
    """As large results are written, at sizes of whole lines and others."""
    monkeypatch.setattr("effc.backends.cpu.pointwise.past_caches", lambda: 1)
    name = DType.of(dtype).name
    run = compiled(
        f"""
def graph(x: {name}[A, B], b: {name}[B]):
    def body(x: {name}[A, B], b: {name}[B]):
        y0 = add(x, b)
        y1 = relu(y0)
        y2 = mul(y1, y0)
        return y0, y2
    y0: ({name}[A, B], {name}[A, B]) = fused((x, b), body=body)
    y1 = item(y0, index=0)
    y2 = item(y0, index=1)
    y3 = permute(x, dims=(1, 0))
    y4 = add(y3, 1.0)
    return y1, y2, y4
"""
    )
    run(torch.randn(size).to(dtype), torch.randn(size[1]).to(dtype))
