"""quantize-weights: matrices of linear layers as codes of a few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from effc.ir import Graph, Op, PassError, Tensor
from effc.ir.formats import Encoded, quantize
from effc.passes.base import Context, Pass, lossy

from .gptq import gptq
from .observe import Hessian, observe, within
from .weights import Layer, encoded_weight, layers, stored_bits, weight_type, with_weight

RULE = "QuantizeWeight"
TITLE = "linear(x, w) => linear(x, decode(encoded(codes, scale, zero)))"
METHODS = ("rtn", "gptq")
FLOAT = 16  # so many bits, or more, are no quantisation


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the matrices of linear layers as codes with scales.

    rewrite:
        y = linear(x, w)
        -->
        y = linear(x, decode(encoded((codes, scale, zero), of=uint4[N, K] @ GroupQuant(...))))

    bits: 1 to 8, or 2b for five levels; 16 and more leave the weights as they are. group: elements
    of a row that have a scale (and with `zero` a zero point) of their own, None for one a row.
    method: rtn, each number to the nearest code, or gptq, by the inputs on calibration data
    (damping, act_order: gptq.py). head: bits of a language model's table of tokens and of the layer
    that makes its scores, 0 for as they are. skip, only: patterns on keys (weights.py).
    """

    name, numerics = "quantize-weights", lossy("relative_l2")
    bits: int | str = 4
    group: int | None = None
    zero: bool = False
    method: str = "rtn"
    scale: str = "f16"
    head: int | str = 0
    skip: str = ""
    only: str = ""
    damping: float = 0.01
    act_order: bool = True
    room: int = (
        1 << 30
    )  # bytes of Hessians at a time; more passes over the data where they exceed it

    @property
    def calibrated(self) -> bool:
        return self.method == "gptq" and not self.identity

    @property
    def identity(self) -> bool:
        return isinstance(self.bits, int) and self.bits >= FLOAT

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.method not in METHODS:
            raise PassError(f"method={self.method}", fix=f"use {' or '.join(METHODS)}")
        if self.identity:
            ctx.note(f"bits={self.bits}: weights stay as they are")
            return g
        for head in (False, True):  # options that no type has are refused before anything is done
            self.type_of((1, 1), head)
        taken = layers(g, ctx, RULE, TITLE, head=bool(self.head), skip=self.skip, only=self.only)
        new: dict[Op, Op] = {}
        made: list[Op] = []
        before = 0
        for layer, value in self.values(g, taken, ctx):
            made.append(encoded_weight(layer.key, value))
            new |= with_weight(layer, made[-1])
            before += layer.w.tensor.nbytes  # type: ignore[assignment]
            ctx.counted(RULE, TITLE)
        if made:
            after = sum(e.tensor.nbytes for e in made)  # type: ignore[misc]
            ctx.note(
                f"{len(made)} matrices at {stored_bits(made):.3g} bits an element, scales "
                f"included: {after:,} bytes, were {before:,}"
            )
        return ctx.substitute(g, new)

    def type_of(self, shape: Sequence[int], head: bool) -> Tensor:
        return weight_type(
            shape, self.head if head and self.head else self.bits, self.group, self.zero, self.scale
        )

    def values(
        self, g: Graph, taken: Sequence[Layer], ctx: Context
    ) -> Iterator[tuple[Layer, Encoded]]:
        if self.method == "rtn":
            for layer in taken:
                yield layer, quantize(layer.value, self.type_of(layer.w.shape, layer.head))
            return
        for part in parted(taken, self.room):
            found = hessians(g, part, ctx, self)
            for layer in part:
                yield layer, self.by_inputs(layer, found.get(layer.w))

    def by_inputs(self, layer: Layer, h: torch.Tensor | None) -> Encoded:
        t = self.type_of(layer.w.shape, layer.head)
        if h is None:  # a table that no layer multiplies with
            return quantize(layer.value, t)
        return gptq(layer.value, h, t, self.damping, self.act_order)


def parted(taken: Sequence[Layer], room: int) -> Iterator[tuple[Layer, ...]]:
    """Layers whose Hessians fit into so many bytes at a time."""
    by_w = {layer.w: layer for layer in taken}
    for part in within(by_w, lambda w: 4 * w.shape[1] ** 2, room):
        yield tuple(by_w[w] for w in part)


def hessians(g: Graph, part: Sequence[Layer], ctx: Context, p: Pass) -> dict[Op, torch.Tensor]:
    """X^T X of the inputs of each layer, by its matrix; layers with the same input share it."""
    see = {n.x: Hessian(n.x.shape[-1]) for layer in part for n in layer.linears}
    observe(g, ctx.data(p), see, ctx.progress, f"inputs of {len(part)} layers")
    found: dict[Op, torch.Tensor] = {}
    for layer in part:
        xs = [see[n.x].value for n in layer.linears]
        if xs:
            found[layer.w] = xs[0] if len(xs) == 1 else torch.stack(xs).sum(0)
    return found
