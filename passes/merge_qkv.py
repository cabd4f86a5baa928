"""Layers that read the same value become one layer: query, key and value, and their like."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, no, yes
from effc.ir.rewrite import Answer, op

from .analysis.aliases import shown_values
from .analysis.traffic import estimate
from .base import Context, Pass, exact
from .common import dense_constants, missed
from .fuse_regions import fusable
from .join_slices import alike, loop_after
from .outline import outline

RULE = "MergeSiblings"
TITLE = "linear(x, w1), linear(x, w2) => slices of linear(x, cat(w1, w2)); convolutions likewise"


@dataclass(frozen=True)
class MergeQkv(Pass):
    """Compute the linear layers (or equal convolutions) that read one value as one layer.

    rewrite:
        q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv)
        -->
        y = linear(x, cat(wq, wk, wv), cat(bq, bk, bv))
        q = slice(y, ...); k = slice(y, ...); v = slice(y, ...)

    x is read once instead of three times. Where a layer's result goes straight into a pointwise op
    that the target would compute in the same kernel, its own region may be worth more: then not.
    """

    name, numerics = "merge-qkv", exact("rounding")

    def run(self, g: Graph, ctx: Context) -> Graph:
        families: dict[object, list[Any]] = defaultdict(list)
        for node in g.nodes:
            if node.name in ("linear", "conv1d", "conv2d", "conv3d") and node not in g.constants:
                families[(node.x, _alike(node))].append(node)
        new: dict[Op, Op] = {}
        for layers in families.values():
            answer = legal(g, layers) and pays(g, ctx, layers)
            if answer:
                new |= merged(layers)
                ctx.counted(RULE, TITLE)
            else:
                missed(ctx, RULE, TITLE, g, layers[0], answer, near=len(layers))
        if not families:
            ctx.note("no linear layer and no convolution")
        return ctx.substitute(g, new)


def _alike(node: Any) -> tuple[object, ...]:
    """What layers must have in common to be one layer."""
    same = (node.name, node.bias is not None, node.w.dtype, node.w.shape[1:])
    if node.name == "linear":
        return same
    return (*same, node.stride, node.padding, node.dilation, node.groups)


def legal(g: Graph, layers: list[Any]) -> Answer:
    first = layers[0]
    if len(layers) == 1:
        others = [u for u in g.users[first.x] if u.name == first.name and u is not first]
        if others:
            return no(
                "{} layers that read it differ in bias or geometry", len(others) + 1, at=first.x
            )
        return no("no other {} reads its operand", first.name, at=first)
    if first.name != "linear" and first.groups != 1:
        return no("grouped convolutions see different channels when joined", at=first)
    for layer in layers:
        answer = dense_constants(g, layer.w, layer.bias)
        if not answer:
            return answer
        if layer in shown_values(g):
            return no("an output must have memory of its own, not a slice", at=layer)
    return yes


def pays(g: Graph, ctx: Context, layers: list[Any]) -> Answer:
    """Reading x once against storing results that would have stayed inside a region."""
    followers = [u for layer in layers for u in g.users[layer]]
    if len(followers) == len(layers) and alike(followers):
        if all(loop_after(g, u) is None and u not in shown_values(g) for u in followers):
            return yes  # join-slices has the one op follow the one layer
    saved = (len(layers) - 1) * estimate(layers[0].x.tensor.nbytes)
    lost, example = 0.0, None
    for layer in layers:
        users = g.users[layer]
        if len(users) == 1 and fusable(users[0]) and users[0].shape == layer.shape:
            if ctx.supports(outline(g, [layer, users[0]])):
                # written and read again; of two that meet in one op, one is stored anyway
                lost, example = max(lost, 2 * estimate(layer.tensor.nbytes)), users[0]
    if lost > saved:
        return no("{} joins its layer instead, which saves {:g} bytes for {:g}",
                  example.name if example else "", lost, saved, at=example)  # fmt: skip
    return yes


def merged(layers: list[Any]) -> dict[Op, Op]:
    """The slice that stands for each layer."""
    first = layers[0]
    axis = first.tensor.rank - 1 if first.name == "linear" else 1
    biases = tuple(layer.bias for layer in layers)
    bias = None if first.bias is None else op.cat(biases, 0)
    joined = first.replace(w=op.cat(tuple(layer.w for layer in layers), 0), bias=bias)
    joined.from_(*layers)
    new: dict[Op, Op] = {}
    start: Any = 0
    for layer in layers:
        size = layer.w.shape[0]
        new[layer] = op.slice(joined, axis, start, size).from_(layer)
        start += size
    return new
