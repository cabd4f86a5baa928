"""Library routines chosen on purpose: convolutions, matrix products, attention.

Dense products that nothing specialises go to oneDNN and MKL; those libraries are kept better than
we could. float32 stays true float32 under torch's own switch (set_float32_matmul_precision).

A convolution with a constant weight has it reordered when weights are bound, which measured 10 %
faster than eager in channels_last and more in small sizes; one activation after it, or one binary
op with a tensor of its shape, runs inside oneDNN. relu and clamps do not: oneDNN turns NaN into 0
in them. What else follows runs in our own kernel, in place on the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.types import channels_last

from ..plan.builder import Builder
from ..plan.frame import Frame
from ..plan.host import library
from ..plan.memory import Root
from . import codes, products
from .lowering import lowers

Build = Callable[[Frame], Callable[[], torch.Tensor]]
CONVS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
ANCHORS = (*CONVS, "linear", "matmul", "attention")


@dataclass(frozen=True)
class Inside:
    """Epilogue that the routine itself computes: one op after the anchor."""

    node: Op
    unary: tuple[str, list[Any], str | None] | None = None
    binary: str | None = None
    other: Op | None = None  # the outer value of the second operand


def check(node: Any) -> Answer:
    """What ATen's CPU routines take; bf16 and f16 included, integers through matmul only."""
    if not node.tensor.dtype.is_float and node.name != "matmul":
        return no("{} of {}", node.name, node.tensor.dtype, at=node)
    return yes


@dataclass(frozen=True)
class Call:
    """A routine as a plan calls it."""

    name: str
    slots: Sequence[int]  # of the tensors it reads
    build: Build
    strides: tuple[Any, ...] | None = None  # of its result; None: packed in the layout of its type
    note: str = ""


def anchor(
    b: Builder, node: Op, operands: Mapping[Op, Op], shown: Op, inside: Inside | None = None
) -> Root:
    """Emit the routine; the result is memory of its own that later kernels may overwrite.

    operands: the node's operands (which may be a region's inputs) -> values of the plan.
    shown: the node that reports name; the region where the anchor is inside one.
    """
    if node.name in CONVS:
        call = _conv(b, node, operands, inside)
    else:
        makers = {"linear": _linear, "matmul": _matmul, "attention": _attention}
        call = makers[node.name](b, node, operands)
    root = b.new_root("dynamic", shown, node.tensor, call.strides)
    library(b, shown, call.name, call.build, call.slots, root, call.note)
    return root


@lowers(*ANCHORS, check=check, native=False)
def _lower(b: Builder, node: Op) -> None:
    operands = {o: o for o in node.operands}
    product = products.find(b, node, operands)
    if product is not None:
        b.set(node, products.lower(b, node, node, product, operands, {}, (), node))
        return
    b.set(node, anchor(b, node, operands, node))


# ------------------------------------------------------------------ convolutions


def takes_inside(b: Builder, anchor_node: Any, operands: Mapping[Op, Op]) -> bool:
    """Whether the convolution goes to oneDNN with a reordered weight, and may take an op inside.

    In channels-last memory only: its results lie so, and putting them in rows costs more than the
    reordering saves.
    """
    t = anchor_node.tensor
    return (
        anchor_node.name == "conv2d" and t.dtype.name == "f32" and _mkldnn()
        and t.layout == channels_last
        and b.is_constant(operands[anchor_node.w])
    )  # fmt: skip


def _mkldnn() -> bool:
    backend: Any = torch.backends.mkldnn
    return backend.is_available() and backend.enabled


UNARY: dict[str, Callable[[Any], tuple[str, list[Any], str | None] | None]] = {
    "leaky_relu": lambda n: ("leaky_relu", [n.slope], None) if n.slope > 0 else None,
    "sigmoid": lambda n: ("sigmoid", [], None),
    "tanh": lambda n: ("tanh", [], None),
    "silu": lambda n: ("swish", [], None),
    "hardswish": lambda n: ("hardswish", [], None),
    "gelu": lambda n: ("gelu", [], n.approximate),
}


def inside_of(node: Any, anchor_node: Op, outer: Mapping[Op, Op]) -> Inside | None:
    """The op as oneDNN says it, where it directly follows the anchor."""
    if node.name in UNARY and node.x is anchor_node:
        unary = UNARY[node.name](node)
        return Inside(node, unary) if unary else None
    if node.name in ("add", "mul") and isinstance(node.a, Op) and isinstance(node.b, Op):
        other = node.b if node.a is anchor_node else node.a
        if other in outer and other is not anchor_node and other.type == anchor_node.type:
            return Inside(node, None, node.name, outer[other])
    return None


def _conv(b: Builder, node: Any, operands: Mapping[Op, Op], inside: Inside | None) -> Call:
    x, w = operands[node.x], operands[node.w]
    bias = None if node.bias is None else operands[node.bias]
    b.sizes.add((node.padding, node.x.shape))
    if not takes_inside(b, node, operands):
        slots = b.reads(x, w, *([bias] if bias is not None else []))
        return Call(f"torch.{node.name}", slots, _plain_conv(node, slots))
    packed = bias is not None and b.is_constant(bias)
    values = [x] + ([bias] if bias is not None and not packed else [])
    if inside and inside.other is not None:
        values.append(inside.other)
    slots = b.reads(*values)
    # oneDNN reads a bias without its strides, so it has to be packed
    at = -1
    if bias is not None:
        at = b.derived(bias, "packed", torch.Tensor.contiguous) if packed else slots[1]
    weight = b.derived(w, "reordered", _reorder(node))
    note = f"with {inside.node.name}" if inside else ""
    build = _mkldnn_conv(node, slots, weight, at, packed, inside)
    return Call("mkldnn._convolution_pointwise", slots, build, note=note)


def _plain_conv(node: Any, slots: Sequence[int]) -> Build:
    fn = CONVS[node.name]

    def build(frame: Frame) -> Callable[[], torch.Tensor]:
        v, padding = frame.values, frame.numbers(node.padding)
        stride, dilation, groups = node.stride, node.dilation, node.groups
        x, w, bias = (*slots, None)[:3]
        if bias is None:
            return lambda: fn(v[x], v[w], None, stride, padding, dilation, groups)
        return lambda: fn(v[x], v[w], v[bias], stride, padding, dilation, groups)

    return build


def _reorder(node: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weight -> the order oneDNN likes; the input's size is a hint, and 1 image where unknown."""
    size = list(node.x.shape)
    hint = size if all(isinstance(s, int) for s in size) else None
    last = node.tensor.layout == channels_last

    def reorder(w: torch.Tensor) -> torch.Tensor:
        w = w.contiguous(memory_format=torch.channels_last) if last else w.contiguous()
        padding = [p if isinstance(p, int) else 0 for p in node.padding]
        return torch.ops.mkldnn._reorder_convolution_weight(
            w, padding, list(node.stride), list(node.dilation), node.groups, hint
        )

    return reorder


def _mkldnn_conv(
    node: Any,
    slots: Sequence[int],
    weight: int,
    bias: int,
    packed: bool,
    inside: Inside | None,
) -> Build:
    stride, dilation, groups = list(node.stride), list(node.dilation), node.groups
    unary = inside.unary if inside and inside.unary else ("none", [], None)

    def build(frame: Frame) -> Callable[[], torch.Tensor]:
        v, padding = frame.values, list(frame.numbers(node.padding))
        x = slots[0]
        given = frame.nothing if bias < 0 else bias

        def offset() -> torch.Tensor:
            return v[given] if packed or bias < 0 else v[given].contiguous()

        if inside is None or inside.binary is None:
            run = torch.ops.mkldnn._convolution_pointwise.default
            return lambda: run(v[x], v[weight], offset(), padding, stride, dilation, groups, *unary)
        binary, other = inside.binary, slots[-1]
        join = torch.ops.mkldnn._convolution_pointwise.binary
        return lambda: join(
            v[x], v[other], v[weight], offset(), padding, stride, dilation, groups, binary, 1.0,
            None, [], None,
        )  # fmt: skip

    return build


# ------------------------------------------------------------------ products


def _linear(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Call:
    slots = b.reads(*(operands[o] for o in (node.x, node.w, node.bias) if o is not None))

    def build(frame: Frame) -> Callable[[], torch.Tensor]:
        v, run = frame.values, torch._C._nn.linear
        x, w, bias = (*slots, frame.nothing)[:3]
        return lambda: run(v[x], v[w], v[bias])

    return Call("torch.linear", slots, build, note=codes.remark(b, node, operands))


def _matmul(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Call:
    slots = b.reads(operands[node.a], operands[node.b])

    def build(frame: Frame) -> Callable[[], torch.Tensor]:
        v, run, (a, c) = frame.values, torch.matmul, slots
        return lambda: run(v[a], v[c])

    return Call("torch.matmul", slots, build)


def _attention(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Call:
    given = (node.q, node.k, node.v, node.mask, node.past)
    slots = b.reads(*(operands[o] for o in given if o is not None))

    def build(frame: Frame) -> Callable[[], torch.Tensor]:
        v, run = frame.values, torch._C._nn.scaled_dot_product_attention
        causal, scale, gqa = node.causal, node.scale, node.gqa
        left = iter(slots)
        q, k, value, mask, past = (frame.nothing if o is None else next(left) for o in given)
        if node.past is not None or (causal and node.mask is not None):  # not both in ATen's
            return lambda: node.reference(v[q], v[k], v[value], v[mask], v[past])
        return lambda: run(v[q], v[k], v[value], v[mask], 0.0, causal, scale=scale, enable_gqa=gqa)

    return Call("torch.scaled_dot_product_attention", slots, build, _heads_inside(node))


def _heads_inside(node: Any) -> tuple[Any, ...]:
    """Strides that torch's CPU attention gives a result of four dimensions: [*, n, heads, d]."""
    t = node.tensor
    if t.rank != 4:
        return t.strides
    _, heads, rows, size = t.shape
    return (rows * heads * size, size, heads * size, 1)
