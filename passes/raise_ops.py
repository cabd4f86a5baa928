"""Recognise layers that models write by hand: one op where a kernel can be one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from effc.ir import Graph

from . import raise_attention, raise_layers, raise_norms, raise_rope
from .base import Context, Pass, exact


@dataclass(frozen=True)
class RaiseOps(Pass):
    """Replace hand-written norms, rotary embeddings, attention and activations by their ops.

    rewrite:
        y = mul(w, mul(x, rsqrt(add(mean(square(x)), eps))))
        -->
        y = rms_norm(x, w, eps=eps)

    In 16-bit types a hand-written form rounds between its steps and the op does not, so there only
    forms that cast to float32 first, and forms that only move elements, are replaced.
    """

    name, numerics = "raise-ops", exact("rounding")

    def run(self, g: Graph, ctx: Context) -> Graph:
        rules = (
            *raise_norms.RULES,
            *raise_rope.RULES,
            *raise_layers.RULES,
            raise_attention.RaiseAttention(),
            raise_attention.GroupHeads(),
            raise_attention.ConstantMask(),
            raise_attention.CausalMask(),
        )
        return ctx.rewrite(g, rules)
