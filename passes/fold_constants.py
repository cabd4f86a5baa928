"""Make more of the graph constant: what needs no input is computed once per set of weights.

The plan evaluates `graph.constants` when weights are bound, so this pass computes no values. It
moves constants together so that more nodes need no input.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Match, Op, Rule, Weight, no, yes
from effc.ir.rewrite import Answer, op

from .analysis.traffic import estimate
from .base import Context, Pass, exact
from .common import dense_constants, is_number, missed, reassociates


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Bring constants together, and report what is computed when weights are bound.

    rewrite:
        y = mul(mul(x, w1), w2); z = mul(linear(x, w), 0.125); s = add(slice(linear(x, w, b)), 1)
        -->
        y = mul(x, mul(w1, w2)); z = linear(x, mul(w, 0.125)); s = slice(linear(x, w, b + (0, 1)))
    """

    name, numerics = "fold-constants", exact("rounding")

    def run(self, g: Graph, ctx: Context) -> Graph:
        result = ctx.rewrite(g, [MulConstants(), AddConstants(), ScaleIntoLayer()])
        result = offsets_into_biases(result, ctx)
        computed = Counter(n.name for n in result.constants if not isinstance(n, Weight))
        if computed:
            listed = ", ".join(f"{count} {name}" for name, count in sorted(computed.items()))
            ctx.note(f"computed once, when weights are bound: {listed}")
        else:
            ctx.note("nothing but the weights themselves is constant")
        return result


class MulConstants(Rule):
    """mul(mul(x, c1), c2) => mul(x, mul(c1, c2)), for constants c1 and c2"""

    def pattern(self, op, x, c1, c2):
        return op.mul(op.mul(x, c1).named("first"), c2)

    def parts(self, m: Match, x, c1, c2) -> tuple:
        """The operands again, the computed one first: the pattern matches either way round."""
        return (c1, x, c2) if m.is_constant(x) else (x, c1, c2)

    def check(self, m, x, c1, c2):
        x, c1, c2 = self.parts(m, x, c1, c2)
        if m.is_constant(x):
            return no("all three are constants already")
        for c in (c1, c2):
            if not m.is_constant(c) or not (isinstance(c, Op) or is_number(c)):
                return no("{} is not a constant", c.name if isinstance(c, Op) else c)
        answer = reassociates(m.root.dtype)
        if not answer or not (m.root.dtype == m.first.dtype == x.dtype):
            return answer and no("the two are computed in {} and {}", m.first.dtype, m.root.dtype)
        answer = self.legal(c1, c2)
        if not answer:
            return answer
        made = self.rewrite_parts(m, x, c1, c2)
        if made.type != m.root.type:
            return no("the short form is {}, not {}", made.type, m.root.type)
        return self.small(made, c1, c2)

    def legal(self, c1, c2) -> Answer:
        if is_number(c1) and is_number(c2) and c1 and c2:
            if not 1e-30 < abs(c1 * c2) < 1e30:
                return no("{} * {} leaves the range of f32", c1, c2)
        return yes

    def small(self, made: Op, c1, c2) -> Answer:
        """The combined constant must not be larger than what is read today."""
        sizes = [estimate(c.tensor.numel) if isinstance(c, Op) else 0.0 for c in (c1, c2)]
        joined = made.operands[-1] if isinstance(made.b, Op) else None
        if joined is not None and estimate(joined.tensor.numel) > max(sizes):
            return no("the combined constant {} is larger than both", joined.type)
        return yes

    def rewrite_parts(self, m: Match, x, c1, c2) -> Op:
        op = type(m.root)
        return op(x, self.numbers(c1, c2) if is_number(c1) and is_number(c2) else op(c1, c2))

    def numbers(self, c1, c2) -> int | float:
        return c1 * c2

    def rewrite(self, op, m, x, c1, c2):
        return self.rewrite_parts(m, *self.parts(m, x, c1, c2))


class AddConstants(MulConstants):
    """add(add(x, c1), c2) => add(x, add(c1, c2)), for constants c1 and c2"""

    def pattern(self, op, x, c1, c2):
        return op.add(op.add(x, c1).named("first"), c2)

    def numbers(self, c1, c2) -> int | float:
        return c1 + c2

    def legal(self, c1, c2) -> Answer:
        # (x + 2**23) - 2**23 rounds x on purpose
        if is_number(c1) and is_number(c2) and math.fabs(c1 + c2) < 0.5 * max(abs(c1), abs(c2)):
            return no("{} and {} nearly cancel: the first sum rounds on purpose", c1, c2)
        return yes


class ScaleIntoLayer(Rule):
    """layer(x, w, b) * c => layer(x, w * c, b * c), for a number or one constant a feature"""

    def pattern(self, op, x, w, c):
        layer = op.one_of("linear", "conv1d", "conv2d", "conv3d")(x, w, bias=op.any)
        return op.mul(layer.named("layer"), c)

    def check(self, m, x, w, c):
        answer = reassociates(w.dtype) and dense_constants(m.graph, w, m.layer.bias)
        if not answer:
            return answer
        if m.root.type != m.layer.type:
            return no("the product is {}", m.root.type)
        if not isinstance(c, Op):
            normal = is_number(c) and 1e-30 < abs(c) < 1e30
            return yes if normal else no("{} is not a normal number", c)
        return dense_constants(m.graph, c) and self.per_feature(m, w, c)

    def per_feature(self, m: Match, w: Op, c: Op) -> Answer:
        rank = m.layer.tensor.rank
        axis = rank - 1 if m.layer.name == "linear" else 1
        wanted = tuple(w.shape[0] if i == axis else 1 for i in range(rank))
        if c.shape != wanted[rank - c.tensor.rank :] or c.tensor.numel != w.shape[0]:
            return no("{} is not one value an output feature", c.type, at=c)
        return yes if c.dtype == w.dtype else no("{} times {}", w.dtype, c.dtype, at=c)

    def rewrite(self, op, m, x, w, c):
        column = row = c
        if isinstance(c, Op):
            column = op.reshape(c, (w.shape[0],) + (1,) * (w.tensor.rank - 1))
            row = op.reshape(c, (w.shape[0],))
        bias = None if m.layer.bias is None else op.mul(m.layer.bias, row)
        return m.layer.replace(w=op.mul(w, column), bias=bias)


OFFSET = (
    "OffsetIntoBias",
    "add(slice(linear(x, w, b), i), 1) => slice(linear(x, w, b + 1 there), i)",
)


def offsets_into_biases(g: Graph, ctx: Context) -> Graph:
    """A number added to a slice of a linear layer's result becomes part of the layer's bias.

    The `1 + scale` of adaptive layer norms: a launch, or a pass over memory, for each of them.
    """
    found: dict[Any, list[tuple[Any, Any]]] = {}  # layer -> (slice, the sum)
    for node in g.nodes:
        if node.name == "add" and (cut := _offset_of(node)) is not None:
            answer = _in_bias(g, node, cut)
            if answer:
                found.setdefault(cut.x, []).append((cut, node))
                ctx.counted(*OFFSET)
            else:
                missed(ctx, *OFFSET, g, node, answer)
    new: dict[Op, Op] = {}
    for layer, sums in found.items():
        bias, parts, at = layer.bias, [], 0
        for cut, node in sorted(sums, key=lambda s: s[0].start):
            parts.append(op.slice(bias, 0, at, cut.start - at))
            parts.append(op.add(op.slice(bias, 0, cut.start, cut.size), _number(node)))
            at = cut.start + cut.size
        parts.append(op.slice(bias, 0, at, layer.w.shape[0] - at))
        made = op.cat(tuple(p for p in parts if p.shape[0] != 0), 0)
        new[layer] = layer.replace(bias=made)
        for _, node in sums:
            new[node] = _shown(node)
    return ctx.substitute(g, new)


def _number(node: Any) -> Any:
    return node.b if is_number(node.b) else node.a


def _shown(node: Any) -> Op:
    return node.a if isinstance(node.a, Op) else node.b


def _offset_of(node: Any) -> Any:
    """The slice of a linear layer's result to which the node adds a number, through views."""
    if not is_number(_number(node)):
        return None
    x = _shown(node)
    while x.name in ("reshape", "permute"):
        x = x.x
    taken = x.name == "slice" and x.x.name == "linear" and x.step == 1
    return x if taken and x.dim % x.tensor.rank == x.tensor.rank - 1 else None


def _in_bias(g: Graph, node: Any, cut: Any) -> Answer:
    layer = cut.x
    answer = reassociates(node.dtype) and dense_constants(g, layer.w, layer.bias)
    if not answer:
        return answer
    if layer.bias is None:
        return no("the layer has no bias", at=layer)
    if node.dtype != layer.dtype or not isinstance(layer.w.shape[0], int):
        return no("the sum is {}, the layer {}", node.type, layer.type)
    value = _shown(node)
    while value is not layer:
        if value in g.outputs or g.uses(value) > 1:
            return no("{} is also used without the offset", value.name, at=value)
        value = value.operands[0]
    if layer in g.outputs:
        return no("{} is an output", layer.name, at=layer)
    for other in g.users[layer]:
        if other is cut:
            continue
        apart = (
            other.name == "slice" and other.dim % other.tensor.rank == other.tensor.rank - 1
            and isinstance(other.start, int) and isinstance(other.size, int)
            and isinstance(cut.start, int) and isinstance(cut.size, int)
            and (_last(other) < cut.start or other.start >= cut.start + cut.size)
        )  # fmt: skip
        if not apart:
            return no("{} reads the same features without the offset", other.name, at=other)
    return yes


def _last(cut: Any) -> int:
    return cut.start + (cut.size - 1) * cut.step
