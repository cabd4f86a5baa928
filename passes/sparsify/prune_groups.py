"""prune-groups: groups of weights that matter least are left out, the others stored as codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from effc.ir import Graph, Op, PassError, Tensor, nearest, no, yes
from effc.ir.formats import INDEXES, Encoded, GroupQuant, GroupSparse, decoded, encode, quantize
from effc.ir.rewrite import Answer
from effc.ir.types import type_of
from effc.passes.base import Context, Pass, lossy
from effc.passes.common import missed
from effc.passes.quantize.latent import Compressed, compressed
from effc.passes.quantize.quantize_weights import hessians, parted
from effc.passes.quantize.weights import (
    Layer,
    encoded_weight,
    layers,
    named,
    score_layers,
    stored_bits,
    weight_type,
    with_weight,
)

from .importance import BUDGETS, SCORES, corrected, group_scores, keep

RULE = "PruneGroups"
TITLE = "linear(x, w) => linear(x, decode(encoded(mask, codes, scale, zero)))"
FLOAT = 16  # so many bits, or more, are no quantisation


@dataclass(frozen=True)
class PruneGroups(Pass):
    """Leave out the share `rate` of the groups of every matrix, and store the others as codes.

    rewrite:
        y = linear(x, w)
        -->
        y = linear(x, decode(encoded((mask, encoded((codes, scale, zero))),
                                     of=uint4[N, K] @ GroupSparse(..., of=GroupQuant(...)))))

    A group is `group` neighbours in a row that share a scale, and with `zero` a zero point. score:
    what they are ranked by (importance.py): hessian or obs, on calibration data, or magnitude.
    budget: ranked in every row by itself, or in the whole matrix. bits: as of quantize-weights; 16
    and more leave the numbers of kept groups as they are. index: how kept groups are told.
    correct: later columns make up for what is lost in earlier ones, as in SparseGPT and GPTQ.

    A matrix that is compressed already keeps the codes and scales of the groups that stay. One
    whose rows are no whole groups is quantised alone. rate=0 is quantize-weights. (GQSA, 2.1, 2.2.)
    """

    name, numerics = "prune-groups", lossy("relative_l2")
    rate: float = 0.5
    group: int = 16
    bits: int | str = 4
    zero: bool = True
    score: str = "hessian"
    budget: str = "row"
    index: str = "bitmap"
    correct: bool = False
    scale: str = "f16"
    skip: str = ""
    only: str = ""
    damping: float = 0.01
    room: int = 1 << 30  # bytes of Hessians at a time

    @property
    def calibrated(self) -> bool:
        return self.correct or (self.score != "magnitude" and self.rate > 0)

    @property
    def codes(self) -> bool:
        return not isinstance(self.bits, int) or self.bits < FLOAT

    def check(self) -> None:
        """Raises PassError for options that make no sense, or not together."""
        for name, known in (("score", SCORES), ("budget", BUDGETS), ("index", INDEXES)):
            given = getattr(self, name)
            if given not in known:
                raise PassError(f"{name}={given}", fix=nearest(given, known))
        if not 0 <= self.rate < 1:
            raise PassError(f"rate={self.rate:g} is no share of the groups", fix="0 <= rate < 1")
        if self.group < 1:
            raise PassError(f"group={self.group}", fix="at least 1")
        if self.codes:
            weight_type((1, 1), self.bits, self.group, self.zero, self.scale)
        elif self.correct:
            raise PassError("correct=True needs codes to round to", fix="bits below 16")

    def run(self, g: Graph, ctx: Context) -> Graph:
        self.check()
        new: dict[Op, Op] = {}
        made: list[Op] = []
        for c, value in self.pruned(g, ctx):
            made.append(encoded_weight(c.key, value))
            new[c.node] = made[-1]
        for layer, value in self.values(g, self.taken(g, ctx), ctx):
            made.append(encoded_weight(layer.key, value))
            new |= with_weight(layer, made[-1])
        ctx.counted(RULE, TITLE, len(made))
        if made:
            elements = sum(e.tensor.numel for e in made)  # type: ignore[misc]
            stays = sum(map(kept_elements, made))
            ctx.note(
                f"{len(made)} matrices at {stored_bits(made):.3g} bits an element, scales and "
                f"indices included; {1 - stays / elements:.1%} of the elements are left out"
            )
        return ctx.substitute(g, new)

    def taken(self, g: Graph, ctx: Context) -> tuple[Layer, ...]:
        return layers(g, ctx, RULE, TITLE, skip=self.skip, only=self.only)

    def chosen(self, key: str) -> bool:
        return not named(key, self.skip) and (not self.only or named(key, self.only))

    # -------------------------------------------------------------- one matrix

    def values(
        self, g: Graph, taken: Sequence[Layer], ctx: Context
    ) -> Iterator[tuple[Layer, Encoded]]:
        """Float matrices, compressed."""
        for part in parted(taken, self.room) if self.calibrated else [taken]:
            found = hessians(g, part, ctx, self) if self.calibrated else {}
            for layer in part:
                value = self.value(layer, found.get(layer.w), self.whole(g, layer.w, ctx))
                if value is not None:
                    yield layer, value

    def value(self, layer: Layer, h: torch.Tensor | None, whole: bool) -> Encoded | None:
        w = layer.value
        mask = self.mask(w, h) if whole and self.rate else None
        if not self.codes:
            return None if mask is None else self.floats(w.to(layer.w.dtype.torch), mask)
        t = weight_type(w.shape, self.bits, self.group, self.zero, self.scale)
        if self.correct and whole:
            stays = torch.ones_like(w[:, :: self.group]) if mask is None else mask
            assert h is not None
            made = corrected(w, h, stays.bool(), self.group, t, self.damping)
        else:
            made = quantize(w, t)
        return made if mask is None else picked(made, mask, self.group, self.index)

    def mask(self, w: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        scores = group_scores(w, self.group, self.score, h, self.damping)
        return keep(scores, self.rate, self.budget)

    def floats(self, w: torch.Tensor, mask: torch.Tensor) -> Encoded:
        format = GroupSparse(self.group, int(mask.sum()), self.index)
        t = replace(type_of(w), format=format)
        values = w.unflatten(-1, (-1, self.group))[mask]
        return Encoded(t, (*format.encode_index(mask), values))

    def whole(self, g: Graph, w: Op, ctx: Context) -> bool:
        """Whether rows are whole groups; a miss that says so where they are not."""
        if not self.rate or w.shape[1] % self.group == 0:
            return True
        why = no(
            "rows of {} are no whole groups of {}: quantised alone", w.shape[1], self.group, at=w
        )
        missed(ctx, RULE, TITLE, g, w, why, 2)
        return False

    # -------------------------------------------------------------- compressed before

    def pruned(self, g: Graph, ctx: Context) -> Iterator[tuple[Compressed, Encoded]]:
        """Matrices that are codes with scales, with the codes of the groups that stay."""
        found = {layer.w: (c, layer) for c, layer in self.coded(g, ctx)} if self.rate else {}
        for part in parted([layer for _, layer in found.values()], self.room):
            inputs = hessians(g, part, ctx, self) if self.calibrated else {}
            for layer in part:
                mask = self.mask(layer.value, inputs.get(layer.w))
                c = found[layer.w][0]
                yield c, picked(c.value, mask, self.group, self.index)

    def coded(self, g: Graph, ctx: Context) -> Iterator[tuple[Compressed, Layer]]:
        heads = score_layers(g)
        for c in compressed(g):
            readers = [n for d in c.decodes for n in g.users[d]]
            linears = tuple(dict.fromkeys(n for n in readers if n.name == "linear"))
            head = any(n in heads for n in linears)
            if head or len(linears) < len(readers) or not self.chosen(c.key):
                continue
            answer = self.legal(c.node.tensor)
            if not answer:
                missed(ctx, RULE, TITLE, g, c.node, answer, 2)
            elif self.whole(g, c.node, ctx):
                yield c, Layer(c.key, c.decodes[0], linears)

    def legal(self, t: Tensor) -> Answer:
        if not isinstance(t.format, GroupQuant):
            return no("groups of it are left out already: {}", t)
        size = t.format.group or t.shape[-1]
        if size % self.group and self.group % size:
            return no("its scales are for {} elements, which are no groups of {}", size, self.group)
        if self.correct:
            return no("codes that were chosen before are not corrected: correct=False")
        return yes


def picked(value: Encoded, mask: torch.Tensor, group: int, index: str) -> Encoded:
    """The groups of codes that stay, with their scales. Decodes to the value where mask [rows,
    groups] holds, bit for bit, and to 0 elsewhere."""
    t, f = value.type, value.type.format
    assert isinstance(f, GroupQuant)
    parts, columns = f.parts(t), mask.shape[1]
    size = f.group or t.shape[-1]
    each = max(group // size, 1)  # scales of a group
    at = torch.arange(columns * each) // max(size // group, 1)
    inner = Tensor((int(mask.sum()), group), t.dtype, format=replace(f, group=min(size, group)))
    codes = decoded(parts["codes"], value["codes"], t.dtype.torch)  # type: ignore[arg-type]
    kept = [encode(codes.unflatten(-1, (columns, group))[mask], inner.format.parts(inner)["codes"])]
    for name in list(parts)[1:]:
        kept.append(value[name][:, at].unflatten(-1, (columns, each))[mask])
    format = GroupSparse(group, inner.shape[0], index, inner.format)
    sparse = t.with_(format=format)
    return Encoded(sparse, (*format.encode_index(mask), Encoded(inner, tuple(kept))))


def kept_elements(encoded: Op) -> int:
    t = encoded.tensor
    return t.format.kept * t.format.group if isinstance(t.format, GroupSparse) else t.numel  # type: ignore[return-value]
