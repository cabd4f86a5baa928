"""A norm's scale and shift move into the linear layers that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, no, yes
from effc.ir.rewrite import Answer, op

from .base import Context, Pass, exact
from .common import dense_constants, missed, reassociates

RULE = "NormAffineIntoLinear"
TITLE = "linear(norm(x, g, b), w, c) => linear(norm(x), w * g, c + w @ b)"


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold weight and bias of layer_norm and rms_norm into the linear layers after them.

    rewrite:
        y = linear(layer_norm(x, g, b), w, c)
        -->
        y = linear(layer_norm(x), w * g, c + w @ b)

    Only where every reader of the norm is a linear layer. Quantisers want weights in this form.
    """

    name, numerics = "fold-norm-affine", exact("rounding")

    def run(self, g: Graph, ctx: Context) -> Graph:
        new: dict[Op, Op] = {}
        for norm in g.nodes:
            if norm.name in ("layer_norm", "rms_norm"):
                answer = legal(g, norm)
                if answer:
                    new |= folded(g, norm)
                    ctx.counted(RULE, TITLE)
                else:
                    missed(ctx, RULE, TITLE, g, norm, answer)
        return ctx.substitute(g, new)


def legal(g: Graph, norm: Any) -> Answer:
    bias = getattr(norm, "bias", None)
    if norm.weight is None and bias is None:
        return no("the norm has neither weight nor bias", at=norm)
    if norm.dims != 1:
        return no("the norm is over {} dimensions", norm.dims, at=norm)
    if norm in g.outputs or not g.users[norm]:
        return no("the norm is an output", at=norm)
    for user in g.users[norm]:
        if user.name != "linear" or user.x is not norm:
            return no("{} reads the norm, too", user.name, at=user)
        answer = dense_constants(g, user.w, user.bias, norm.weight, bias)
        if not answer:
            return answer
    return yes if (answer := reassociates(norm.dtype)) else answer


def folded(g: Graph, norm: Any) -> dict[Op, Op]:
    plain = norm.replace(weight=None, **({"bias": None} if norm.name == "layer_norm" else {}))
    new: dict[Op, Op] = {norm: plain}
    shift = getattr(norm, "bias", None)
    for layer in dict.fromkeys(g.users[norm]):
        w = layer.w if norm.weight is None else op.mul(layer.w, norm.weight)
        bias = layer.bias
        if shift is not None:
            moved = op.matmul(layer.w, shift)
            bias = moved if bias is None else op.add(moved, bias)
        new[layer] = layer.replace(x=plain, w=w, bias=bias)
    return new
