"""Compressed weights while they are trained, and rounding that gradients pass straight through.

What a latent weight computes with is at every step what would be stored: scales are rounded to
their type, codes and zeros to integers, groups that are left out are zeros. (GQSA, sections 2.3 and
2.4; the straight-through rule is that of ABQ-LLM, section 2.1.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import DType, Graph, Input, Op, Tensor, Value, Weight, interpret
from effc.ir import op as declared
from effc.ir.formats import (
    Encoded,
    GroupQuant,
    GroupSparse,
    code_range,
    decoded,
    encode,
    least_scale,
)
from effc.passes.base import Context
from effc.passes.fold.objective import inputs_for

from .weights import encoded_weight, layers

INSIDE = 0.49
"""How far from its code a number may start, in codes: it still rounds to that code."""


# ------------------------------------------------------------------ straight through


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return to.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def straight_through(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """The value of `to`, with the gradient of x."""
    return _Straight.apply(x, to.detach().to(x.dtype))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest integer, halves to even; the gradient passes."""
    return straight_through(x, torch.round(x))


def stored(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """As a float type holds it; the gradient passes."""
    return straight_through(x, x.detach().to(dtype.torch))


@declared("straight_through")
class StraightThrough(Op):
    """The value of `to`, whose gradient goes to x alone: what a graph that is trained has where
    the other has a rounding."""

    x: Value
    to: Value

    def infer(self) -> Any:
        if self.x.type != self.to.type:
            raise self.fail("they are of one type")
        return self.x.type

    def reference(self, x: Any, to: Any) -> Any:
        return straight_through(x, to)


def through_activations(graph: Graph) -> dict[Op, Op]:
    """For Graph.substitute: decode(quantize(x)) of values that are no constants, with gradients."""
    return {
        n: StraightThrough(n.x.x, n)
        for n in graph.nodes
        if n.name == "decode" and n.x.name == "quantize" and n.x.x.type == n.type
    }


def unquantized_activations(graph: Graph) -> dict[Op, Op]:
    """For Graph.substitute: the values themselves, where the graph rounds them to codes."""
    return {n: n.x.x for n in through_activations(graph)}


def fake_quantized(
    x: torch.Tensor, t: Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> torch.Tensor:
    """ir.formats.quantize(x, t, low, high).decode(), with gradients to x, low and high."""
    f = t.format
    assert isinstance(f, GroupQuant)
    least, largest = code_range(t.dtype)
    by_group = f.grouped(x)
    low = by_group.amin(-1) if low is None else low
    high = by_group.amax(-1) if high is None else high
    low, high = low.clamp_max(0), high.clamp_min(0)
    if f.zero is None:
        step = torch.maximum(high, -low) / max(largest, 1)
    else:
        step = (high - low) / (largest - least)
    scale = stored(step, f.scale).clamp_min(least_scale(f.scale)).unsqueeze(-1)
    inverse = 1 / scale
    codes = rounded(by_group * inverse)
    if f.zero is None:
        made = codes.clamp(least, largest) * scale
    else:
        zero = rounded(-low.unsqueeze(-1) * inverse) + least
        made = ((codes + zero).clamp(least, largest) - zero) * scale
    return made.flatten(-2)[..., : x.shape[-1]]


# ------------------------------------------------------------------ compressed weights


@dataclass(frozen=True)
class Trained:
    """What of a compressed weight is trained.

    numbers: those that are rounded to codes; else codes stay as they are.
    """

    numbers: bool = False
    scales: bool = True


class Latent:
    """A compressed weight as a function of parameters; at first it has the value it was given.

    All parameters are relative, so that one learning rate fits layers of all sizes: `numbers` are
    from zero, as shares of the range of codes, and `factor` is what the first scale is multiplied
    by.
    """

    def __init__(
        self, value: Encoded, trained: Trained, original: torch.Tensor | None = None
    ) -> None:
        """original: the dense weight before it was compressed: how far from the codes numbers are.

        Raises TypeError for a format that has no scale.
        """
        self.value, self.masks = value, []
        inner: Any = value
        while isinstance(inner, Encoded) and isinstance(inner.type.format, GroupSparse):
            mask = inner.type.format.mask(inner.type, inner.parts)
            if original is not None:
                original = original.unflatten(-1, mask.shape[1:] + (-1,))[mask]
            self.masks.append(mask)
            inner = inner.parts[-1]
        if not (isinstance(inner, Encoded) and isinstance(inner.type.format, GroupQuant)):
            raise TypeError(f"{value.type} has no scale")
        self.inner, self.format = inner, inner.type.format
        parts = self.format.parts(inner.type)
        codes = self.format.grouped(decoded(parts["codes"], inner["codes"], torch.float32))
        self.scale = inner["scale"].float()
        self.zero = inner["zero"].float() if self.format.zero is not None else None
        self.factor = torch.ones_like(self.scale)
        least, largest = code_range(inner.type.dtype)
        self.range = largest - least
        self.codes, self.numbers = codes, None
        if trained.numbers:
            from_zero = codes if self.zero is None else codes - self.zero.unsqueeze(-1)
            if original is not None:
                there = self.format.grouped(original.float()) / self.scale.unsqueeze(-1)
                from_zero = from_zero + (there - from_zero).clamp(-INSIDE, INSIDE)
            self.numbers = from_zero / self.range
        self.parameters: dict[str, torch.Tensor] = {}
        chosen = {"numbers": trained.numbers, "factor": trained.scales}
        for name, wanted in chosen.items():
            start = getattr(self, name)
            if wanted and start is not None:
                self.parameters[name] = start.clone().requires_grad_()
                setattr(self, name, self.parameters[name])

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(codes [.., groups, group], scale [.., groups], zero), float32 numbers as stored."""
        f, (least, largest) = self.format, code_range(self.inner.type.dtype)
        scale = stored(self.scale * self.factor, f.scale).clamp_min(least_scale(f.scale))
        zero = self.zero
        codes = self.codes
        if self.numbers is not None:
            in_codes = self.numbers * self.range
            codes = rounded(in_codes * (self.scale / scale).unsqueeze(-1))
            codes = (codes if zero is None else codes + zero.unsqueeze(-1)).clamp(least, largest)
        return codes, scale, zero

    def dense(self) -> torch.Tensor:
        """What the value decodes to in float32, with gradients to the parameters."""
        codes, scale, zero = self.parts()
        from_zero = codes if zero is None else codes - zero.unsqueeze(-1)
        made = (from_zero * scale.unsqueeze(-1)).flatten(-2)[..., : self.inner.type.shape[-1]]
        for mask in reversed(self.masks):
            rows = torch.zeros(*mask.shape, made.shape[-1])
            rows[mask] = made
            made = rows.flatten(1)
        return made

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """The value as it is now; its type is the one that was given."""
        codes, scale, zero = self.parts()
        f, t = self.format, self.inner.type
        held = codes.flatten(-2)[..., : t.shape[-1]].to(t.dtype.torch)
        parts = [encode(held, f.parts(t)["codes"]), scale.to(f.scale.torch)]
        if zero is not None and f.zero is not None:
            parts.append(zero.to(f.zero.torch))
        return _with_inner(self.value, Encoded(t, tuple(parts)))


def _with_inner(value: Encoded, inner: Encoded) -> Encoded:
    if isinstance(value.type.format, GroupSparse):
        return Encoded(value.type, (*value.parts[:-1], _with_inner(value.parts[-1], inner)))
    return inner


# ------------------------------------------------------------------ in graphs


@dataclass(frozen=True)
class Compressed:
    """An `encoded` constant of a graph, the key of the weight that it stands for, its readers."""

    node: Op
    key: str
    decodes: tuple[Any, ...]

    @property
    def value(self) -> Encoded:
        return value_of(self.node)

    def rewritten(self, value: Encoded) -> dict[Op, Op]:
        """For Graph.substitute: another value of the same type, under the same keys."""
        return {self.node: encoded_weight(self.key, value)}


def compressed(graph: Graph, nodes: Sequence[Op] | None = None) -> tuple[Compressed, ...]:
    """The constants that `decode` reads in the graph (or in some nodes of it), with scales."""
    found: dict[Op, list[Op]] = {}
    wanted = None if nodes is None else {o for n in nodes for o in n.operands}
    for node in graph.nodes:
        if node.name == "decode" and node.x.name == "encoded" and node in graph.constants:
            if wanted is None or node in wanted:
                found.setdefault(node.x, []).append(node)
    return tuple(
        Compressed(node, _key(node), tuple(decodes))
        for node, decodes in found.items()
        if _has_scale(node.type)
    )


def value_of(constant: Op) -> Any:
    """Its value at run time."""
    with torch.no_grad():
        return interpret(Graph.of((), (constant,)), ())[0]


@dataclass(frozen=True)
class Training:
    """Compressed weights of a graph as inputs of it.

    new: for Graph.substitute; inputs: in the order of values(), which are what they are given, with
    gradients to the latents' parameters. Activations are rounded with gradients.
    """

    latents: dict[Compressed, Latent]
    inputs: tuple[Input, ...]
    new: dict[Op, Op]

    @staticmethod
    def of(graph: Graph, latents: Mapping[Compressed, Latent]) -> Training:
        decodes = [d for c in latents for d in c.decodes]
        inputs = inputs_for(graph, "latent", [d.tensor for d in decodes])
        new = {**through_activations(graph), **dict(zip(decodes, inputs))}
        return Training(dict(latents), tuple(inputs), new)

    def values(self) -> list[torch.Tensor]:
        found = []
        for c, latent in self.latents.items():
            dense = latent.dense()
            found += [dense.to(d.dtype_.torch) for d in c.decodes]
        return found

    def parameters(self, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Groups for torch.optim: learning rates by the names of parameters."""
        groups = []
        for name, lr in rates.items():
            here = [x.parameters[name] for x in self.latents.values() if name in x.parameters]
            groups += [{"params": here, "lr": lr}] if here else []
        return groups

    def trained(self) -> dict[Op, Op]:
        """For Graph.substitute: the weights as they are now."""
        return {
            node: new
            for c, latent in self.latents.items()
            for node, new in c.rewritten(latent.encoded()).items()
        }


def _has_scale(t: Any) -> bool:
    while isinstance(t.format, GroupSparse):
        t = t.format.parts(t)["values"]
    return isinstance(t.format, GroupQuant)


def _key(node: Any) -> str:
    """Of `encoded_weight(key, ...)`: its parts are called `key:part`."""
    first = next(x for x in node.xs if isinstance(x, Weight))
    return first.key.rpartition(":")[0]


def originals(found: Sequence[Compressed], ctx: Context) -> dict[Compressed, Op]:
    """The float matrices that compressed ones stand for: those of the same key in the last graph
    that has it dense."""
    wanted = {c.key: c for c in found}
    known: dict[Compressed, Op] = {}
    for graph in reversed(ctx.earlier or [g for g in (ctx.uncompressed,) if g is not None]):
        if not wanted:
            break
        for layer in layers(graph, Context(), head=True):
            c = wanted.get(layer.key)
            if c is not None and all(layer.w.type == d.type for d in c.decodes):
                known[c] = layer.w
                del wanted[layer.key]
    return known


__all__ = [
    "Compressed", "Latent", "StraightThrough", "Trained", "Training", "compressed",
    "fake_quantized", "originals", "rounded", "stored", "straight_through", "through_activations",
    "unquantized_activations", "value_of",
]  # fmt: skip
