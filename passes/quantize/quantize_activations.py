"""quantize-activations: what layers with compressed weights read is rounded too, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, PassError, Tensor, no, yes
from effc.ir.formats import GroupQuant
from effc.ir.rewrite import Answer, op
from effc.ir.types import Dense, f32
from effc.passes.analysis.blocks import weights_below
from effc.passes.base import Context, Pass, lossy
from effc.passes.common import missed

from .quantize_weights import FLOAT
from .weights import code_type, encoded_below, named

RULE = "QuantizeActivation"
TITLE = "linear(x, decode(w)) => linear(decode(quantize(x)), decode(w))"


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Round what layers read to codes, with a scale for each token from its own range.

    rewrite:
        y = linear(x, decode(w))
        -->
        y = linear(decode(quantize(x, dtype_=i8, format=GroupQuant(None, f32))), decode(w))

    Layers that read one value (queries, keys and values) read its codes together. bits: 1 to 8; 16
    and more leave activations as they are. group: elements of a token with a scale (and with `zero`
    a zero point) of their own, None for all. skip, only: patterns on the keys of layers' weights.
    """

    name, numerics = "quantize-activations", lossy("relative_l2")
    bits: int = 8
    group: int | None = None
    zero: bool = False
    skip: str = ""
    only: str = ""

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.bits >= FLOAT:
            ctx.note(f"bits={self.bits}: activations stay as they are")
            return g
        codes = code_type(self.bits, self.zero)
        if self.group is not None and self.group < 1:
            raise PassError(f"group={self.group}", fix="at least 1, or None: all of a token")
        read: dict[Op, Op] = {}
        new: dict[Op, Op] = {}
        for node in g.nodes:
            if node.name != "linear" or node in g.constants:
                continue
            answer = self.legal(node)
            if not answer:
                missed(ctx, RULE, TITLE, g, node, answer)
                continue
            x = node.x
            if x not in read:
                read[x] = op.decode(op.quantize(x, codes, self.format(x, codes)), x.dtype)
            new[node] = node.replace(x=read[x])
            ctx.counted(RULE, TITLE)
        if new:
            ctx.note(f"{len(new)} layers read {len(read)} values in {self.bits} bits")
        return ctx.substitute(g, new)

    def format(self, x: Op, codes: Any) -> GroupQuant:
        size = x.shape[-1]
        whole = self.group is None or (isinstance(size, int) and self.group >= size)
        return GroupQuant(None if whole else self.group, f32, codes if self.zero else None)

    def legal(self, node: Any) -> Answer:
        if node.x.name == "decode":
            return no("what it reads is quantised already", at=node.x)
        if encoded_below(node.w) is None:
            return no("its weight is not compressed: run quantize-weights before", at=node.w)
        t = node.x.type
        if not isinstance(t, Tensor) or not isinstance(t.format, Dense) or not t.dtype.is_float:
            return no("it reads {}", t, at=node.x)
        key = weights_below([node.w])[0].key.partition(":")[0]
        if named(key, self.skip):
            return no("{!r} is left out by skip={}", key, self.skip, at=node)
        if self.only and not named(key, self.only):
            return no("{!r} is not among only={}", key, self.only, at=node)
        return yes


__all__ = ["QuantizeActivations"]
