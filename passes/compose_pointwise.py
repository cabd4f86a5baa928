"""Multiply linear maps that follow one another into one (RLFN, fold 1), where that is less work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from effc.ir import Dim, Graph, Input, Op, Rates, Rule, no, yes
from effc.ir.ops.region import Fused
from effc.ir.rewrite import Answer
from effc.ir.rewrite import op as ops
from effc.ir.symbols import product

from .analysis.traffic import estimate
from .base import Context, Pass, exact
from .common import dense_constants, reassociates
from .stack_pointwise import compose, is_pointwise


@dataclass(frozen=True)
class ComposePointwise(Pass):
    """One layer for two linear layers without anything nonlinear between them.

    rewrite:
        y = conv2d(conv2d(x, w1, b1), w2, b2)      # w2 is 1x1; likewise linear(linear(x))
        -->
        y = conv2d(x, w2 @ w1, w2 @ b1 + b2)

    A 1x1 convolution of an enlarged picture is taken before it is enlarged.

    balance: operations that cost as much as moving one byte; None: as the target says.
    force: also where it costs more; for kernels that read both maps of a sum in one pass.
    """

    name, numerics = "compose-pointwise", exact("rounding")
    balance: float | None = None
    force: bool = False

    def run(self, g: Graph, ctx: Context) -> Graph:
        rates = ctx.rates
        if self.balance is not None:
            rates = replace(rates, operations=self.balance)
        rules = (ComposeConv, ComposeLinear, ComposeSum, ConvBeforeInterpolate)
        return ctx.rewrite(g, [rule(rates, self.force, ctx.supports) for rule in rules])


SAMPLE = 7  # operations of one value between four pixels


class ComposeConv(Rule):
    """conv1x1(conv(x, w1, b1), w2, b2) => conv(x, w2 @ w1, w2 @ b1 + b2)"""

    def __init__(
        self, rates: Rates, force: bool = False, supports: Callable[[Op], Answer] = lambda n: yes
    ) -> None:
        self.rates, self.force, self.supports = rates, force, supports

    def pattern(self, op, x, w1, w2):
        inner = op.conv2d(x, w1, bias=op.any, groups=1).named("first")
        return op.conv2d(inner, w2, bias=op.any).named("outer")

    def check(self, m, x, w1, w2):
        outer, first = m.outer, m.first
        if outer.name == "conv2d" and not is_pointwise(outer):
            return no("the second convolution is not 1x1", at=outer)
        answer = reassociates(x.dtype)
        answer = answer and dense_constants(m.graph, w1, w2, first.bias, outer.bias)
        if not answer:
            return answer
        taps = estimate(w1.tensor.numel) / estimate(w1.shape[0])  # products an output value
        more = taps * w2.shape[0] - taps * w1.shape[0] - w1.shape[0] * w2.shape[0]
        saved = 2 * w1.shape[0] * x.dtype.bits / 8  # written and read again
        return self.pays(2 * more, saved, outer, more)

    def pays(self, more: Dim | float, saved: Dim | float, at: Any, weights: Dim | float) -> Answer:
        """more, saved: operations and bytes of each pixel or row of `at`. One launch less saves its
        time too, as far as reading so many more weights leaves any of it."""
        each = estimate(at.tensor.numel) / estimate(at.w.shape[0])
        spared = self.rates.launch - max(0.0, estimate(weights)) * at.dtype.bits / 8
        saved = estimate(saved) + max(0.0, spared) / max(1.0, each)
        if self.force or estimate(more) <= self.rates.operations * saved:
            return yes
        return no("{:g} more operations to save {:g} bytes, each time", more, saved, at=at)

    def rewrite(self, op, m, x, w1, w2):
        w, bias = compose(m.outer, m.first)
        return m.first.replace(w=w, bias=bias)


class ComposeLinear(ComposeConv):
    """linear(linear(x, w1, b1), w2, b2) => linear(x, w2 @ w1, w2 @ b1 + b2)"""

    def pattern(self, op, x, w1, w2):
        inner = op.linear(x, w1, bias=op.any).named("first")
        return op.linear(inner, w2, bias=op.any).named("outer")


class ComposeSum(ComposeConv):
    """conv1x1(u + conv1x1(p, w1), w2) => conv1x1(u, w2) + conv1x1(p, w2 @ w1), with biases"""

    def pattern(self, op, u, p, w1, w2):
        inner = op.conv2d(p, w1, bias=op.any).named("first")
        return op.conv2d(op.add(u, inner).named("sum"), w2, bias=op.any).named("outer")

    def check(self, m, u, p, w1, w2):
        for conv in (m.outer, m.first):
            if not is_pointwise(conv):
                return no("a convolution is not 1x1", at=conv)
        if not isinstance(u, Op) or u.type != m.first.type:
            return no("u is not of the type of the convolution it is added to", at=m.sum)
        answer = reassociates(p.dtype)
        answer = answer and dense_constants(m.graph, w1, w2, m.first.bias, m.outer.bias)
        if not answer:
            return answer
        n, mid, k = w2.shape[0], w1.shape[0], w1.shape[1]
        # one product of p more at full width, none in the middle; the sum is never stored
        more, saved = 2 * (n * k - mid * k) + n, (4 * mid - 2 * n) * p.dtype.bits / 8
        if self.read_between_pixels(m, u):
            # nor are u and the map of it, whose product is then one of the picture before
            shrunk = estimate(product(u.x.shape[-2:])) / estimate(product(u.shape[-2:]))
            more = 2 * (n * k - mid * k - n * mid * (1 - shrunk)) + SAMPLE * (n - mid)
            saved = 4 * mid * p.dtype.bits / 8
        return self.pays(more, saved, m.outer, n * k - mid * k)

    def read_between_pixels(self, m: Any, u: Any) -> bool:
        """Whether u is an enlarged picture that the kernel of a convolution beside it can read."""
        if u.name != "interpolate" or m.graph.uses(u) > 1:
            return False
        if not ConvBeforeInterpolate.grows(u):
            return False
        types = u.x.type, m.first.x.type, m.first.w.type
        small, p, w = (Input(f"a{i}", t) for i, t in enumerate(types))
        conv = m.first.replace(x=p, w=w, bias=None)
        enlarged = u.replace(x=small)
        total = ops.add(enlarged, conv)
        body = Graph((small, p, w), (conv, enlarged, total), (total,), "r")
        return bool(self.supports(Fused((small, p, w), body)))

    def rewrite(self, op, m, u, p, w1, w2):
        w, bias = compose(m.outer, m.first)
        rest = m.first.replace(w=w, bias=bias)
        return ops.add(m.outer.replace(x=u, bias=None), rest)


class ConvBeforeInterpolate(ComposeConv):
    """conv1x1(interpolate(x), w, b) => interpolate(conv1x1(x, w, b)), where the picture grows

    One mixes channels, the other pixels, with weights that sum to 1: they commute.
    """

    def pattern(self, op, x, w1):
        enlarged = op.interpolate(x).named("enlarged")
        return op.conv2d(enlarged, w1, bias=op.any).named("outer")

    def check(self, m, x, w1):
        if not is_pointwise(m.outer):
            return no("the convolution is not 1x1", at=m.outer)
        answer = reassociates(x.dtype) and dense_constants(m.graph, w1, m.outer.bias)
        if not answer:
            return answer
        return self.grows(m.enlarged)

    @staticmethod
    def grows(enlarged: Any) -> Answer:
        before, after = (estimate(product(v.shape[-2:])) for v in (enlarged.x, enlarged))
        if after <= before:
            return no("the picture does not grow: {:g} pixels become {:g}", before, after)
        return yes

    def rewrite(self, op, m, x, w1):
        return m.enlarged.replace(x=m.outer.replace(x=x))
