"""Blocks, or single residual updates, that a model can do without are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effc.ir import Graph, Op, PassError
from effc.passes.base import Context, Pass, lossy

from .baselines import at_random, block_influence, greedy_loss
from .gates import GateTraining, absorbed
from .objective import Objective
from .units import Unit, find_units, without

BY = ("gates", "influence", "perplexity", "random")
SURVIVORS = ("reset", "absorb")


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Leave out the share `rate` of the blocks that matters least.

    rewrite:
        y = x + h(x)
        -->
        y = x

    by: gates (FoldGPT: learnt together, weights frozen), influence (ShortGPT: cosine between what
    enters and what leaves), perplexity (the loss without it, one by one), random. All but the last
    read calibration data. unit: block, or update for attention and MLP each by itself.
    steps: of training the gates. survivors: gates of what stays are set to 1 (reset) or multiplied
    into the projections (absorb, for unit=update alone: of a whole block it is another function).
    """

    name, numerics = "drop-blocks", lossy("relative_l2")
    rate: float = 0.25
    by: str = "gates"
    unit: str = "block"
    steps: int = 200
    survivors: str = "reset"
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        return self.by != "random"

    def run(self, g: Graph, ctx: Context) -> Graph:
        self.check()
        units = find_units(g, self.unit)
        count = round(self.rate * len(units))
        if not count:
            ctx.note(f"rate {self.rate:g} of {len(units)} {self.unit}s is none")
            return g
        scores = self.scores(g, units, count, ctx)
        order = sorted(range(len(units)), key=scores.__getitem__)
        out = sorted(order[:count])
        new: dict[Op, Op] = without(units[i] for i in out)
        if self.survivors == "absorb":
            for i in order[count:]:
                new |= absorbed(g, units[i], scores[i])
        ctx.counted("DropUnit", "y = x + h(x) => x", count)
        ctx.note(f"dropped {count} of {len(units)}, by {self.by}: {_listed(units, out)}")
        return ctx.substitute(g, new)

    def scores(self, g: Graph, units: Sequence[Unit], count: int, ctx: Context) -> Sequence[float]:
        """One number a unit: the smallest are dropped."""
        if self.by == "random":
            return at_random(len(units), self.seed)
        objective = Objective(ctx.uncompressed or g, ctx.data(self))
        if self.by == "influence":
            return block_influence(g, units, objective)
        if self.by == "perplexity":
            return greedy_loss(g, units, objective, count, ctx.progress)
        training = GateTraining(count / len(units), self.steps, seed=self.seed)
        return training.run(g, units, objective, ctx.progress)

    def check(self) -> None:
        """Raises PassError for options that make no sense, or not together."""
        for name, known in (("by", BY), ("survivors", SURVIVORS)):
            if getattr(self, name) not in known:
                raise PassError(f"{name}={getattr(self, name)}", fix=f"use {', '.join(known)}")
        if not 0 <= self.rate < 1:
            raise PassError(f"rate={self.rate:g} is no share of the blocks", fix="0 <= rate < 1")
        if self.survivors == "absorb" and (self.by, self.unit) != ("gates", "update"):
            raise PassError(
                f"survivors=absorb with by={self.by}, unit={self.unit}",
                why="only gates can be absorbed, and that of a whole block is not the gate of each "
                "of its projections: its MLP reads x + attention(x), not x + g * attention(x)",
                fix="use by=gates, unit=update, or survivors=reset",
            )


def _listed(units: Sequence[Unit], chosen: Sequence[int]) -> str:
    return ", ".join(units[i].label.removeprefix("block ") for i in chosen)
