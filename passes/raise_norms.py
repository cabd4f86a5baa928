"""Norms, softmax and pooling written by hand, recognised: rules of raise-ops."""

from __future__ import annotations

from typing import Any

from effc.ir import Op, Rule, no, row_major, yes

from .common import holds, is_number, reassociates


def squared(node: Op) -> Op | None:
    """x where node is x * x, in any spelling."""
    if node.name == "square":
        return node.x
    if node.name == "pow" and is_number(node.b) and node.b == 2:
        return node.a
    if node.name == "mul" and node.a is node.b and isinstance(node.a, Op):
        return node.a
    return None


def over_rows(node: Any) -> bool:
    """A reduction over the last dimension, which stays as size 1."""
    return node.keepdim and node.dims == (node.x.tensor.rank - 1,)


def per_column(w: Any, x: Op) -> bool:
    """One value for each element of the last dimension, the same for all rows."""
    if not isinstance(w, Op) or not holds(x.dtype, w.dtype) or w.tensor.rank == 0:
        return False
    return w.shape[-1] == x.shape[-1] and w.shape[-1] != 1 and all(s == 1 for s in w.shape[:-1])


def column(op: Any, w: Op, x: Op) -> Op:
    """w as [n], in the element type of x, which holds all its values."""
    w = op.reshape(w, w.shape[-1:]) if w.tensor.rank > 1 else w
    return w if w.dtype == x.dtype else op.cast(w, x.dtype)


class RaiseRmsNorm(Rule):
    """x * rsqrt(mean(x ** 2) + eps), x / sqrt(mean(x ** 2) + eps) => rms_norm(x)"""

    def pattern(self, op, x, sq, eps):
        shifted = op.add(op.mean(sq).named("mean"), eps)
        return op.mul(x, op.rsqrt(shifted)), op.div(x, op.sqrt(shifted))

    def check(self, m, x, sq, eps):
        base = squared(sq)
        if base is None or not (base is x or (base.name == "cast" and base.x is x)):
            return no("the mean is of {}, not of the square of x", sq.name, at=sq)
        if not is_number(eps):
            return no("eps is not a number", at=m.root)
        if not over_rows(m.mean):
            return no("the mean is not along rows", at=m.mean)
        if m.root.type != base.type:
            return no("it is computed in {}, the square in {}", m.root.type, base.type, at=base)
        return reassociates(base.dtype)

    def rewrite(self, op, m, x, sq, eps):
        return op.rms_norm(squared(sq), eps=float(eps))


class RaiseLayerNorm(Rule):
    """rms_norm(x - mean(x)) => layer_norm(x)"""

    def pattern(self, op, x):
        center = op.sub(x, op.mean(x).named("mean"))
        return op.rms_norm(center, weight=op.any).named("norm")

    def check(self, m, x):
        if not over_rows(m.mean) or m.norm.dims != 1:
            return no("the mean is not along rows", at=m.mean)
        return yes

    def rewrite(self, op, m, x):
        return op.layer_norm(x, m.norm.weight, eps=m.norm.eps)


class NormWeight(Rule):
    """norm(x) * w[n] => norm(x, weight=w)"""

    def pattern(self, op, x, w):
        return op.mul(op.one_of("rms_norm", "layer_norm")(x).named("norm"), w)

    def check(self, m, x, w):
        if not per_column(w, x) or m.norm.dims != 1 or m.root.type != m.norm.type:
            return no("the factor is not one {} a column", x.dtype, at=m.root)
        return reassociates(x.dtype)  # in 16 bits the product rounds once more than the norm

    def rewrite(self, op, m, x, w):
        return m.norm.replace(weight=column(op, w, x))


class NormBias(Rule):
    """layer_norm(x, w) + b[n] => layer_norm(x, w, b)"""

    def pattern(self, op, x, w, b):
        return op.add(op.layer_norm(x, w).named("norm"), b)

    def check(self, m, x, w, b):
        if not per_column(b, x) or m.norm.dims != 1 or m.root.type != m.norm.type:
            return no("the addend is not one {} a column", x.dtype, at=m.root)
        return reassociates(x.dtype)

    def rewrite(self, op, m, x, w, b):
        return m.norm.replace(bias=column(op, b, x))


class NarrowRmsNorm(Rule):
    """cast(rms_norm(cast(x, f32)), bf16) => rms_norm(x): a 16-bit norm computes in f32 anyway"""

    def pattern(self, op, x):
        return op.cast(op.rms_norm(op.cast(x).named("wide")).named("norm"))

    def check(self, m, x):
        if x.dtype.name not in ("bf16", "f16") or m.wide.dtype.name != "f32":
            return no("it goes from {} to {}", x.dtype, m.wide.dtype, at=m.wide)
        if m.root.dtype != x.dtype:
            return no("it comes back as {}, not as {}", m.root.dtype, x.dtype, at=m.root)
        return yes

    def rewrite(self, op, m, x):
        return m.norm.replace(x=x)


class RaiseSoftmax(Rule):
    """exp(x - amax(x)) / sum(exp(x - amax(x))) => softmax(x)"""

    def pattern(self, op, e):
        return op.div(e, op.sum(e).named("sum"))

    def check(self, m, e):
        total: Any = m.sum
        if self.source(e) is None:
            return no("the terms are not exp(x - amax(x))", at=e)
        peak = e.x.b
        if len(total.dims) != 1 or not total.keepdim or not peak.keepdim or peak.dims != total.dims:
            return no("maximum and sum are not along one same dimension", at=total)
        return reassociates(m.root.dtype)

    def source(self, e: Any) -> Op | None:
        if not isinstance(e, Op) or e.name != "exp" or e.x.name != "sub":
            return None
        x, peak = e.x.a, e.x.b
        return x if isinstance(peak, Op) and peak.name == "amax" and peak.x is x else None

    def rewrite(self, op, m, e):
        return op.softmax(self.source(e), m.sum.dims[0])


class PoolAllToMean(Rule):
    """avg_pool2d(x, window of the whole image) => mean(x, (2, 3))"""

    def pattern(self, op, x):
        return op.avg_pool2d(x).named("pool")

    def check(self, m, x):
        pool: Any = m.pool
        if x.tensor.rank != 4 or tuple(pool.kernel) != x.shape[2:]:
            return no("the window {} is not the image", pool.kernel)
        if any(pool.padding) or pool.divisor is not None:
            return no("it pads, or divides by another number")
        return yes if x.tensor.layout == row_major else no("x is {}", x.type)

    def rewrite(self, op, m, x):
        return op.mean(x, (2, 3), True)


RULES = (
    RaiseRmsNorm(), RaiseLayerNorm(), NormWeight(), NormBias(), NarrowRmsNorm(), RaiseSoftmax(),
    PoolAllToMean(),
)  # fmt: skip
