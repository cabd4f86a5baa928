"""fold-scales: what is hard to round in activations is moved into weights, or from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, Op, PassError, interpret
from effc.passes.analysis.scale_pairs import (
    End,
    ScalePair,
    find_scale_pairs,
    refused_pairs,
    substitution,
)
from effc.passes.base import Context, Pass, Progress, exact
from effc.passes.common import missed

from .observe import Largest, observe
from .weights import score_layers

RULE = "FoldScale"
TITLE = "norm or layer, then layers => the same, with s between their constants"
LEAST = 1e-2  # of a factor, by the geometric mean of its pair


@dataclass(frozen=True)
class FoldScales(Pass):
    """Move a factor for each channel from what makes it into the layers that read it.

    rewrite:
        y = linear(rms_norm(x, g), w)
        -->
        y = linear(rms_norm(x, g / s), w * s)

    s = max|x|^alpha / max|w|^(1 - alpha), of each channel, on calibration data: with alpha = 0.5
    both sides are equally hard to round (SmoothQuant; the start of ABQ-LLM, section 2.4). Pairs are
    those of analysis/scale_pairs.py. queries: those of queries and keys too, which matter where a
    cache of keys is rounded. head: those that end in a language model's scores alone.
    """

    name, numerics = "fold-scales", exact("rounding")
    alpha: float = 0.5
    queries: bool = False
    head: bool = False

    @property
    def calibrated(self) -> bool:
        return True

    def run(self, g: Graph, ctx: Context) -> Graph:
        if not 0 <= self.alpha <= 1:
            raise PassError(f"alpha={self.alpha:g} is no share", fix="0 <= alpha <= 1")
        pairs = list(filter(self.wanted(g), find_scale_pairs(g)))
        for refusal in refused_pairs(g):
            missed(ctx, RULE, TITLE, g, refusal.node, refusal.why)
        if not pairs:
            ctx.note("no pair of constants between which factors can move")
            return g
        factors = balance(g, pairs, ctx.data(self), self.alpha, ctx.progress)
        ctx.counted(RULE, TITLE, len(pairs))
        kinds = [p.kind for p in pairs]
        listed = ", ".join(f"{kinds.count(k)} ({k})" for k in dict.fromkeys(kinds))
        spread = max(float(s.max() / s.min()) for s in factors.values())
        ctx.note(f"{len(pairs)} pairs: {listed}; factors of a pair differ by up to {spread:.3g}")
        return ctx.substitute(g, substitution(factors))

    def wanted(self, g: Graph) -> Callable[[ScalePair], bool]:
        scores = score_layers(g)

        def worth(pair: ScalePair) -> bool:
            if pair.kind == "q, k":
                return self.queries
            return self.head or any(e.node not in scores for e in pair.consumers)

        return worth


def balance(
    g: Graph, pairs: Sequence[ScalePair], batches: Sequence[Sequence[Any]], alpha: float = 0.5,
    progress: Progress = lambda steps, title: steps,
) -> dict[ScalePair, torch.Tensor]:  # fmt: skip
    """s of each pair, f32[size]: max|x|^alpha / max|w|^(1 - alpha), by its geometric mean.

    x: what consumers read; w: the columns it meets there. Of queries and keys: x the queries, w the
    keys.
    """
    see: dict[Op, Largest] = {}
    for pair in pairs:
        for value in _seen(pair):
            see.setdefault(value, Largest())
    observe(g, batches, see, progress, f"ranges of {len(see)} values")
    return {p: _factors(p, see, alpha) for p in pairs}


def _seen(pair: ScalePair) -> list[Op]:
    if pair.kind == "q, k":
        return [e.node for e in pair.ends]
    return [e.node.x for e in pair.consumers]


def _factors(pair: ScalePair, see: Mapping[Op, Largest], alpha: float) -> torch.Tensor:
    if pair.kind == "q, k":
        x, w = (_largest(pair.size, [(e, see[e.node].value)]) for e in pair.ends)
    else:
        x = _largest(pair.size, [(e, see[e.node.x].value) for e in pair.consumers])
        w = _largest(pair.size, [(e, _columns(e)) for e in pair.consumers])
    s = x.clamp_min(1e-30) ** alpha / w.clamp_min(1e-30) ** (1 - alpha)
    live = (x > 0) & (w > 0)  # where one side is nothing, no factor is better than another
    if not bool(live.any()):
        return torch.ones_like(s)
    s = s / s[live].log().mean().exp()
    return torch.where(live, s.clamp(LEAST, 1 / LEAST), 1.0)


def _largest(size: int, given: Sequence[tuple[End, torch.Tensor]]) -> torch.Tensor:
    """Of each factor, over the channels that it stands for."""
    found = torch.zeros(size)
    for end, value in given:
        used = end.index >= 0
        value = value.expand(len(end.index))
        found.scatter_reduce_(0, end.index[used], value[used], "amax")
    return found


def _columns(end: End) -> torch.Tensor:
    with torch.no_grad():
        return interpret(Graph.of((), (end.node.w,)), ())[0].detach().float().abs().amax(0)


__all__ = ["FoldScales", "balance"]
