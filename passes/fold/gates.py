"""Learnt gates: which parts of the residual stream a model can do without, judged together.

FoldGPT (arXiv 2407.00928) trains one gate a block with all weights frozen, so that the choice sees
how blocks stand in for each other; the gate itself is the smooth L0 of GDP (arXiv 2109.02220).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, Op, Tensor, Weight, interpret
from effc.ir.rewrite import op
from effc.ir.types import f32
from effc.passes.base import Progress

from .baselines import losses_alone, losses_without
from .objective import Objective, inputs_for, learning, substituted
from .units import Unit, renamed, with_gates, without

TRIED = 0.25
"""Of the units in doubt: the share that is put somewhere between 0 and 1 at a step."""
IN_DOUBT = 8
"""So many units beyond those that go, or as many again, may take the place of one of them."""
EXCHANGED = 4
"""So many of what stays, those worth least, are tried in the place of one that goes."""
KEEP = 0.95
"""Of a running mean: what an older slope counts beside the next one."""
ALONE = 4.0
"""What the loss without a unit counts in its mean, in slopes: those of one batch are noisier, but
only they know what else is left out."""
WAY = 4.0
"""How far Adam may move a theta over all steps; from 1 to 0 is a quarter of that."""
LEAST = 1e-3
"""A gate at 0 has no slope to come back by."""
EPS = (1e-1, 1e-2, 1e-3, 1e-4)
"""One for each quarter of the steps: as it falls, a gate becomes 0 or 1 and little between."""


def smooth_l0(theta: torch.Tensor, eps: float) -> torch.Tensor:
    """g = t^2 / (t^2 + eps), in [0, 1): a count of what is not zero that has a slope."""
    return theta.square() / (theta.square() + eps)


@dataclass(frozen=True)
class GateTraining:
    """min CE(model_g) + w * sum g F / sum F over the gates alone, w such that `rate` of F goes.

    F is what a unit costs, in bytes of its weights. Adam, every theta from 1, begun anew with each
    eps: slopes of g become steeper at 0 and vanish elsewhere, and what Adam remembers of their size
    would hold every gate where it is. A theta beyond 1 is one that was never in doubt.

    What a unit is worth is the mean slope of the loss on its gate's way from 0 to 1, which is what
    leaving it out costs; the slope at 1 alone is next to nothing, for a unit that matters and for
    one that does not. It begins as the loss without the unit alone. Then, at each step, a random
    share TRIED of the units in doubt is put anywhere on that way, and at the mirrored places on the
    same batch (slopes fall along the way: the mean of both varies half as much); all others stand
    where training has brought them, and each keeps a running mean of its slopes. Units far from the
    cut are not tried: without one that the model needs, slopes of all others mean nothing. w is
    where, by these means, the rate is met: a fixed one presses all gates down, or none.

    In the end each unit that goes, the worthiest first and at most `exchanges` of them, is
    exchanged for one that stays and costs no less, if that lowers the loss on all of the data. (Of
    this the paper has the gates, the frozen weights and the objective: how it trains them is not
    published.)
    """

    rate: float
    steps: int = 200
    seed: int = 0
    exchanges: int = 8

    def run(
        self,
        graph: Graph,
        units: Sequence[Unit],
        objective: Objective,
        progress: Progress,
        alone: Sequence[float] | None = None,
    ) -> list[float]:
        """The gates at the last eps; 0 for what goes, as many units as are nearest to `rate`.

        alone: what the loss rises by without each unit, where that is known already.
        """
        cost = torch.tensor([float(u.bytes) for u in units])
        share = cost / cost.sum() if cost.any() else torch.full_like(cost, 1 / len(units))
        start = losses_alone(graph, units, objective) if alone is None else alone
        gates, worth = self.trained(graph, units, objective, progress, share, torch.tensor(start))
        order = sorted(range(len(units)), key=lambda i: (gates[i], worth[i]))
        first = sorted(order[: self.count(units)], key=worth.__getitem__, reverse=True)
        others = sorted(order[self.count(units) :], key=worth.__getitem__)[:EXCHANGED]
        out = self.exchanged(graph, units, objective, progress, first, others)
        for i in first:  # what came back was judged whole
            gates[i] = 1.0
        return [0.0 if i in out else g for i, g in enumerate(gates)]

    def count(self, units: Sequence[Unit]) -> int:
        return round(self.rate * len(units))

    def in_doubt(self, units: Sequence[Unit]) -> int:
        return min(self.count(units) + max(self.count(units), IN_DOUBT), len(units))

    def trained(
        self,
        graph: Graph,
        units: Sequence[Unit],
        objective: Objective,
        progress: Progress,
        share: torch.Tensor,
        alone: torch.Tensor,
    ) -> tuple[list[float], list[float]]:
        """The gates, and what each unit is worth."""
        inputs = inputs_for(graph, "gate", [Tensor((), f32)] * len(units))
        gated = substituted(graph, with_gates(units, inputs), inputs)
        random = torch.Generator().manual_seed(self.seed)
        doubtful = self.in_doubt(units)
        with learning():
            theta = torch.ones(len(units), requires_grad=True)
            eps, adam = 0.0, torch.optim.Adam([theta])
            weights = torch.full((len(units),), ALONE)
            worth = weights * alone.float().clamp(max=1e6)  # finite, for Adam
            for step in progress(range(self.steps), f"training {len(units)} gates"):
                if eps != EPS[len(EPS) * step // self.steps]:
                    eps = EPS[len(EPS) * step // self.steps]
                    adam = torch.optim.Adam([theta], lr=WAY / self.steps)
                place, drawn = torch.rand(2, len(units), generator=random)
                drawn[(worth / weights).argsort()[doubtful:]] = 2
                tried = drawn <= drawn.sort().values[int(TRIED * doubtful)]
                g, slopes = smooth_l0(theta, eps), []
                k = step % len(objective.batches)
                for at in (place, 1 - place):
                    values = torch.where(tried, at, g.detach()).requires_grad_()
                    outputs = interpret(gated, [*objective.batches[k], *values.unbind()])
                    slopes += torch.autograd.grad(objective.loss(k, outputs), values)
                worth = torch.where(tried, KEEP * worth - sum(slopes) / 2, worth)
                weights = torch.where(tried, KEEP * weights + 1, weights)
                mean = worth / weights
                adam.zero_grad()
                g.backward(self.multiplier(mean, share) * share - mean)
                adam.step()
                theta.data.clamp_((LEAST * eps) ** 0.5)
        gates = smooth_l0(theta.detach().double(), EPS[-1])
        return gates.tolist(), (worth / weights).tolist()

    def exchanged(
        self,
        graph: Graph,
        units: Sequence[Unit],
        objective: Objective,
        progress: Progress,
        out: Sequence[int],
        others: Sequence[int],
    ) -> list[int]:
        """`out` after each of it, in this order, was tried against `others`."""
        pool, turns = [*out, *others], list(out)[: self.exchanges]
        out = list(out)
        best = objective.mean(graph.substitute(without(units[i] for i in out)))
        for i in progress(turns, f"exchanging {len(turns)} units"):
            rest = [j for j in out if j != i]
            there = [j for j in pool if j not in out and units[j].bytes >= units[i].bytes]
            losses = losses_without(graph, units, objective, rest, there)
            j = min(losses, key=losses.__getitem__, default=i)
            if losses.get(j, best) < best:
                out, best = [*rest, j], losses[j]
        return out

    def multiplier(self, worth: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """w between what the last unit to go and the first to stay are worth, by their cost."""
        price, order = (worth / share.clamp_min(1e-12)).sort()
        gone = int((share[order].cumsum(0) <= self.rate + 1e-6).sum())
        around = price[max(gone - 1, 0) : gone + 1] if gone else price[:1] - price[:1].abs()
        return around.mean()


def absorbed(graph: Graph, unit: Unit, gate: float) -> dict[Op, Op]:
    """For Graph.substitute: y = x + g * h(x) with g inside h's last projection, where h is one.

    Exact for a unit of one update, and for no other: in x + g * (block(x) - x) the MLP reads
    x + attention(x), and with g in both projections it would read x + g * attention(x). Elsewhere
    (h is no linear layer, or others read it) g stays as a product. Raises ValueError for a unit of
    several updates.
    """
    if len(unit.updates) != 1:
        raise ValueError("the gate of a whole block is not the gate of each of its projections")
    (update,) = unit.updates
    layer: Any = update.h
    held = _held(graph, layer.w) if layer.name == "linear" else None
    if held is None or graph.uses(layer) != 1:
        value = torch.tensor(gate, dtype=update.h.dtype.torch)
        key = next((w.key for w in unit.weights), unit.label.replace(" ", "-"))
        return with_gates([unit], [Weight.holding(renamed("gates", key), value)])
    scaled = {
        name: Weight.holding(renamed("gates", w.key), w.data.detach() * gate, w.of)
        for name, w in (("w", held), ("bias", layer.bias))
        if w is not None
    }
    return {update.y: op.add(unit.x, layer.replace(**scaled))}


def _held(graph: Graph, w: Op) -> Any:
    """The weight itself, where it is one with values that nothing else reads."""
    return w if isinstance(w, Weight) and w.data is not None and graph.uses(w) == 1 else None
