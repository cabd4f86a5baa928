"""Inference batch norms are one multiplication and one addition a channel: fold them away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Match, Op, Rule, no
from effc.ir.rewrite import Answer
from effc.ir.rewrite import op as ops
from effc.ir.types import f32

from .base import Context, Pass, exact
from .common import dense_constants, reassociates

CONVS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold inference batch norms into their neighbours, or into one multiply-add a channel.

    rewrite:
        y = batch_norm(conv2d(x, w, b), mean, var, gamma, beta)
        -->
        s = gamma / sqrt(var + eps)
        y = conv2d(x, w * s, (b - mean) * s + beta)

    The new weights are arithmetic over the old ones, evaluated when weights are bound.
    """

    name, numerics = "fold-batch-norm", exact("rounding")

    def run(self, g: Graph, ctx: Context) -> Graph:
        g = ctx.rewrite(g, [BatchNormIntoConv(), BatchNormIntoLinear(), BatchNormIntoNextConv()])
        return ctx.rewrite(g, [BatchNormToMulAdd()])


def scale_and_shift(bn: Op, bias: Op | None = None) -> tuple[Op, Op]:
    """s, t with batch_norm(y + bias) = y * s + t, each [C], in at least float32."""
    wide = {k: _wide(getattr(bn, k)) for k in ("mean", "var", "weight", "bias")}
    scale = ops.rsqrt(ops.add(wide["var"], bn.eps))
    if wide["weight"] is not None:
        scale = ops.mul(scale, wide["weight"])
    center = wide["mean"] if bias is None else ops.sub(wide["mean"], _wide(bias))
    shift = ops.neg(ops.mul(center, scale))
    return scale, shift if wide["bias"] is None else ops.add(shift, wide["bias"])


def _wide(value: Op | None) -> Any:
    return ops.cast(value, f32) if value is not None and value.dtype.bits < 32 else value


def _statistics(m: Match, bn: Op, *more: Op | None) -> Answer:
    return dense_constants(m.graph, bn.mean, bn.var, bn.weight, bn.bias, *more)


def _narrow(value: Op, like: Op) -> Op:
    return value if value.dtype == like.dtype else ops.cast(value, like.dtype)


class BatchNormIntoConv(Rule):
    """batch_norm(conv(x, w, b)) => conv(x, w', b')"""

    before = CONVS

    def pattern(self, op, x, w):
        y = op.one_of(*self.before)(x, w, bias=op.any).named("layer")
        return op.batch_norm(y, op.any, op.any, op.any, op.any).named("bn")

    def check(self, m, x, w):
        if len(m.layer.shape) != 2 and m.layer.name == "linear":
            return no("dimension 1 of {} is not the features", m.layer.type, at=m.layer)
        answer = reassociates(w.dtype)
        return answer and _statistics(m, m.bn, w, m.layer.bias)

    def rewrite(self, op, m, x, w):
        scale, shift = scale_and_shift(m.bn, m.layer.bias)
        column = op.reshape(scale, (w.shape[0],) + (1,) * (w.tensor.rank - 1))
        folded = _narrow(op.mul(w, column), w)
        return m.layer.replace(w=folded, bias=_narrow(shift, w))


class BatchNormIntoLinear(BatchNormIntoConv):
    """batch_norm(linear(x, w, b)) => linear(x, w', b')"""

    before = ("linear",)


class BatchNormIntoNextConv(Rule):
    """conv(batch_norm(x), w, b) => conv(x, w', b'), without padding"""

    def pattern(self, op, x, w):
        bn = op.batch_norm(x, op.any, op.any, op.any, op.any).named("bn")
        return op.one_of(*CONVS)(bn, w, bias=op.any).named("layer")

    def check(self, m, x, w):
        if any(p != 0 for p in m.layer.padding):
            # conv pads zeros after the norm; folded, it would pad before it
            return no("padding {} adds zeros that the norm does not see", m.layer.padding)
        if x.dtype != m.bn.dtype:
            return no("the norm turns {} into {}", x.dtype, m.bn.dtype)
        answer = reassociates(w.dtype)
        return answer and _statistics(m, m.bn, w, m.layer.bias)

    def rewrite(self, op, m, x, w):
        conv: Any = m.layer
        scale, shift = scale_and_shift(m.bn)
        out, inner, *kernel = w.shape
        ones = (1,) * len(kernel)
        grouped = op.reshape(w, (conv.groups, out // conv.groups, inner, *kernel))
        column = op.reshape(scale, (conv.groups, 1, inner, *ones))
        row = op.reshape(shift, (conv.groups, 1, inner, *ones))
        taps = tuple(range(2, 3 + len(kernel)))
        bias = op.reshape(op.sum(op.mul(grouped, row), taps), (out,))
        bias = bias if conv.bias is None else op.add(bias, conv.bias)
        return conv.replace(x=x, w=op.reshape(op.mul(grouped, column), w.shape), bias=bias)


class BatchNormToMulAdd(Rule):
    """batch_norm(x) => x * s + t"""

    def pattern(self, op, x):
        return op.batch_norm(x, op.any, op.any, op.any, op.any).named("bn")

    def check(self, m, x):
        return _statistics(m, m.bn)

    def rewrite(self, op, m, x):
        scale, shift = scale_and_shift(m.bn)
        channels = (x.shape[1],) + (1,) * (x.tensor.rank - 2)
        y = op.mul(_wide(x), op.reshape(scale, channels))
        return _narrow(op.add(y, op.reshape(shift, channels)), x)
