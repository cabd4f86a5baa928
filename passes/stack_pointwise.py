"""One 1x1 convolution for a chain of two whose middle value is needed as well (RLFN, fold 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, no, yes
from effc.ir.rewrite import Answer, op
from effc.ir.symbols import product

from .analysis.aliases import shown_values
from .analysis.traffic import estimate
from .base import Context, Pass, exact
from .common import dense_constants, missed, reassociates

RULE = "StackPointwise"
TITLE = "c = conv1x1(b), p = conv1x1(c), f(c) => c, p = slices of one conv1x1(b)"


@dataclass(frozen=True)
class StackPointwise(Pass):
    """Compute a 1x1 convolution and the 1x1 convolutions that read it in one pass over its input.

    rewrite:
        c = conv2d(b, w5, b5); p = conv2d(c, w1, b1)     # and c is read elsewhere
        -->
        s = conv2d(b, cat(w5, w1 @ w5), cat(b5, w1 @ b5 + b1))
        c = slice(s, channels of w5); p = slice(s, channels of w1)

    balance: operations that cost as much as moving one byte.
    """

    name, numerics = "stack-pointwise", exact("rounding")
    balance: float = 8.0

    def run(self, g: Graph, ctx: Context) -> Graph:
        new: dict[Op, Op] = {}
        for first in g.nodes:
            readers = [u for u in g.users[first] if is_pointwise(u) and u.x is first]
            if not is_pointwise(first) or not readers or first in new:
                continue
            answer = self.legal(g, first, readers)
            if not answer:
                missed(ctx, RULE, TITLE, g, first, answer)
                continue
            new |= stacked(first, readers)
            ctx.counted(RULE, TITLE)
        if not new and RULE not in ctx.stats:
            ctx.note("no 1x1 convolution reads a 1x1 convolution")
        return ctx.substitute(g, new)

    def legal(self, g: Graph, first: Any, readers: list[Any]) -> Answer:
        if len(readers) == g.uses(first):
            return no("nothing else reads the middle value: composing is cheaper", at=first)
        shown = next((v for v in (first, *readers) if v in shown_values(g)), None)
        if shown is not None:
            return no("an output must have memory of its own, not a slice", at=shown)
        for conv in (first, *readers):
            answer = reassociates(conv.dtype) and dense_constants(g, conv.w, conv.bias)
            if not answer:
                return answer
        return self.pays(first, readers)

    def pays(self, first: Any, readers: list[Any]) -> Answer:
        """A pixel of each reader costs inner - middle more products, and saves reading `first`."""
        inner, middle = first.w.shape[1], first.w.shape[0]
        more = 2 * sum(r.w.shape[0] for r in readers) * (inner - middle)
        saved = len(readers) * middle * first.dtype.bits // 8
        if estimate(more) > self.balance * estimate(saved):
            return no("{} more operations a pixel to save {} bytes", more, saved, at=first)
        return yes


def is_pointwise(node: Op) -> bool:
    """A 1x1 convolution over all channels, neither strided nor padded."""
    return (
        node.name == "conv2d"
        and node.w.shape[2:] == (1, 1)
        and node.stride == (1, 1)
        and node.groups == 1
        and all(p == 0 for p in node.padding)
    )


def compose(outer: Any, inner: Any) -> tuple[Op, Op | None]:
    """Weight and bias of outer(inner(x)), both linear maps over channels, outer's kernel 1x1."""
    n, m = outer.w.shape[:2]
    w2, w1 = op.reshape(outer.w, (n, m)), inner.w
    flat = op.reshape(w1, (m, product(w1.shape[1:])))
    w = op.reshape(op.matmul(w2, flat), (n, *w1.shape[1:]))
    if inner.bias is None:
        return w, outer.bias
    bias = op.matmul(w2, inner.bias)
    return w, bias if outer.bias is None else op.add(bias, outer.bias)


def zeros_like_channels(w: Op) -> Op:
    return op.full((w.shape[0],), 0.0, w.dtype)


def stacked(first: Any, readers: list[Any]) -> dict[Op, Op]:
    """The value that stands for `first` and for each reader: slices of one convolution."""
    maps = [(first.w, first.bias), *(compose(r, first) for r in readers)]
    bias = None
    if any(b is not None for _, b in maps):
        bias = op.cat(tuple(zeros_like_channels(w) if b is None else b for w, b in maps), 0)
    joined = first.replace(w=op.cat(tuple(w for w, _ in maps), 0), bias=bias)
    joined.from_(first, *readers)
    new: dict[Op, Op] = {}
    start = 0
    for node, (w, _) in zip((first, *readers), maps, strict=True):
        new[node] = op.slice(joined, 1, start, w.shape[0]).from_(node)
        start += w.shape[0]
    return new
