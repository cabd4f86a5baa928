"""Activations, linear layers and padding written by hand, recognised: rules of raise-ops."""

from __future__ import annotations

import math
from typing import Any

from effc.ir import Op, Rule, no, yes

from .common import dense_constants, is_number, reassociates
from .raise_norms import squared


class RaiseSilu(Rule):
    """x * sigmoid(x) => silu(x)"""

    def pattern(self, op, x):
        return op.mul(x, op.sigmoid(x))

    def check(self, m, x):
        return reassociates(m.root.dtype)

    def rewrite(self, op, m, x):
        return op.silu(x)


def times(node: Any, factor: float) -> Op | None:
    """x where node is x * factor (or x / (1 / factor)), to float32 precision."""
    if not isinstance(node, Op) or node.name not in ("mul", "div"):
        return None
    x, c = node.a, node.b
    if node.name == "mul" and is_number(x):
        x, c = c, x
    if not isinstance(x, Op) or not is_number(c) or c == 0:
        return None
    return x if math.isclose(c if node.name == "mul" else 1 / c, factor, rel_tol=1e-6) else None


def cubed(node: Any) -> Op | None:
    """x where node is x ** 3, in any spelling."""
    if not isinstance(node, Op):
        return None
    if node.name == "pow" and is_number(node.b) and node.b == 3:
        return node.a
    if node.name == "mul":
        for a, b in ((node.a, node.b), (node.b, node.a)):
            if isinstance(a, Op) and isinstance(b, Op) and squared(a) is b:
                return b
    return None


def erf_argument(node: Op) -> Op | None:
    """x where node is x / sqrt(2)."""
    return times(node, math.sqrt(0.5))


def tanh_argument(node: Op) -> Op | None:
    """x where node is sqrt(2 / pi) * (x + 0.044715 * x ** 3)."""
    inner = times(node, math.sqrt(2 / math.pi))
    if inner is None or inner.name != "add":
        return None
    for x, rest in ((inner.a, inner.b), (inner.b, inner.a)):
        if isinstance(x, Op) and (cubed(times(rest, 0.044715)) is x or _chained(rest) is x):
            return x
    return None


def _chained(node: Any) -> Op | None:
    """x where node is 0.044715 * x * x * x, multiplied from the left."""
    first = node
    for _ in range(2):
        if not isinstance(first, Op) or first.name != "mul":
            return None
        x, first = first.b, first.a
        if x is not node.b:
            return None
    return x if times(first, 0.044715) is x else None


class RaiseGelu(Rule):
    """0.5 * x * (1 + erf(x / sqrt(2))), and the tanh form => gelu(x)"""

    def pattern(self, op, x, z):
        bell = op.add(op.one_of("erf", "tanh")(z).named("curve"), 1)
        return op.mul(op.mul(x, 0.5), bell), op.mul(op.mul(x, bell), 0.5)

    def check(self, m, x, z):
        source = erf_argument(z) if m.curve.name == "erf" else tanh_argument(z)
        if source is not x:
            return no("the argument of {} is not that of a gelu of x", m.curve.name, at=m.curve)
        return reassociates(m.root.dtype)

    def rewrite(self, op, m, x, z):
        return op.gelu(x, "none" if m.curve.name == "erf" else "tanh")


class RaisePixelShuffle(Rule):
    """reshape(permute(reshape(x, (b, c, r, r, h, w)), 0 1 4 2 5 3)) => pixel_shuffle(x, r)"""

    def pattern(self, op, x):
        moved = op.permute(op.reshape(x).named("split"), dims=(0, 1, 4, 2, 5, 3))
        return op.reshape(moved), op.reshape(op.copy(moved))

    def check(self, m, x):
        if x.tensor.rank != 4 or m.split.tensor.rank != 6:
            return no("it splits {} into {}", x.type, m.split.type, at=m.split)
        b, c, r, again, h, w = m.split.shape
        if r != again or not isinstance(r, int) or (b, h, w) != (x.shape[0], *x.shape[2:]):
            return no("{} is not (b, c, r, r, h, w)", m.split.shape, at=m.split)
        if m.root.shape != (b, c, h * r, w * r):
            return no("the result is {}", m.root.type)
        return yes

    def rewrite(self, op, m, x):
        return op.pixel_shuffle(x, m.split.shape[2])


class LinearOverRows(Rule):
    """reshape(linear(reshape(x, (rows, k)), w), (..., n)) => linear(reshape(x, (..., k)), w)"""

    def pattern(self, op, x, w):
        return op.reshape(op.linear(op.reshape(x).named("rows"), w, bias=op.any).named("layer"))

    def check(self, m, x, w):
        if m.rows.tensor.rank != 2 or m.root.tensor.rank == 0 or m.root.shape[-1] != w.shape[0]:
            return no("the result {} is not rows of {}", m.root.type, w.shape[0])
        return yes

    def rewrite(self, op, m, x, w):
        return m.layer.replace(x=op.reshape(x, (*m.root.shape[:-1], w.shape[1])))


class MatmulToLinear(Rule):
    """matmul(x, w) => linear(x, permute(w)), for a constant matrix w"""

    def pattern(self, op, x, w):
        return op.matmul(x, w)

    def check(self, m, x, w):
        if m.is_constant(x) or w.tensor.rank != 2:
            return no("{} by {} is no layer", x.type, w.type)
        return dense_constants(m.graph, w)

    def rewrite(self, op, m, x, w):
        turned = w.x if w.name == "permute" else op.permute(w, (1, 0))
        return op.linear(x, turned)


class AddToBias(Rule):
    """layer(x, w) + b => layer(x, w, b), for a constant b with one value an output feature"""

    def pattern(self, op, x, w, b):
        return op.add(op.one_of("linear", "conv1d", "conv2d", "conv3d")(x, w).named("layer"), b)

    def check(self, m, x, w, b):
        if not isinstance(b, Op) or b.dtype != w.dtype or m.root.type != m.layer.type:
            return no("the addend is not a tensor of {}", w.dtype)
        axis = m.layer.tensor.rank - 1 if m.layer.name == "linear" else 1
        wanted = tuple(w.shape[0] if i == axis else 1 for i in range(m.layer.tensor.rank))
        if b.shape != wanted[len(wanted) - b.tensor.rank :] or b.tensor.numel != w.shape[0]:
            return no("{} is not one value an output feature", b.type, at=b)
        answer = reassociates(w.dtype)
        return answer and dense_constants(m.graph, w, b)

    def rewrite(self, op, m, x, w, b):
        return m.layer.replace(bias=op.reshape(b, (w.shape[0],)) if b.tensor.rank > 1 else b)


class PadIntoConv(Rule):
    """conv(pad(x, p zeros each side), w) => conv(x, w, padding=p)"""

    def pattern(self, op, x, w):
        padded = op.pad(x).named("pad")
        return op.one_of("conv1d", "conv2d", "conv3d")(padded, w, bias=op.any).named("conv")

    def check(self, m, x, w):
        pad: Any = m.pad
        if pad.value != 0 or any(p != 0 for p in (*pad.before[:2], *pad.after[:2])):
            return no("it pads with {}, or pads channels", pad.value, at=pad)
        if pad.before != pad.after:
            return no("it pads {} before and {} after", pad.before[2:], pad.after[2:], at=pad)
        if any(not isinstance(p, int) or p < 0 for p in pad.before):
            return no("it crops", at=pad)
        return yes

    def rewrite(self, op, m, x, w):
        padding = tuple(p + q for p, q in zip(m.conv.padding, m.pad.before[2:], strict=True))
        return m.conv.replace(x=x, padding=padding)


RULES = (
    RaiseSilu(), RaiseGelu(), RaisePixelShuffle(), LinearOverRows(), MatmulToLinear(), AddToBias(),
    PadIntoConv(),
)  # fmt: skip
