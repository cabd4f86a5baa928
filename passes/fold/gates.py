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

from .objective import Objective, inputs_for, learning, substituted
from .units import Unit, renamed, with_gates

TRIED = 0.25
KEEP = 0.95
"""Of a running mean: what an older slope counts beside the next one."""
EPS = (1e-1, 1e-2, 1e-3, 1e-4)
"""One for each quarter of the steps: as it falls, a gate becomes 0 or 1 and little between."""


def smooth_l0(theta: torch.Tensor, eps: float) -> torch.Tensor:
    """g = t^2 / (t^2 + eps), in [0, 1): a count of what is not zero that has a slope."""
    return theta.square() / (theta.square() + eps)


@dataclass(frozen=True)
class GateTraining:
    """min CE(model_g) + w * sum g F / sum F over the gates alone, w such that `rate` of F goes.

    F is what a unit costs, in bytes of its weights. Adam with `lr`, every theta from 1, begun anew
    with each eps: slopes of g become steeper at 0 and vanish elsewhere, and what Adam remembers of
    their size would hold every gate where it is. A theta beyond 1 is one that was never in doubt.

    What a unit is worth is the mean slope of the loss on its gate's way from 0 to 1, which is what
    leaving it out costs; the slope at 1 alone is next to nothing, for a unit that matters and for
    one that does not. So at each step a random share TRIED of the gates is put anywhere on that
    way, all others stand where training has brought them, and each keeps a running mean of its
    slopes. w is where, by these, the rate is met: a fixed one presses all gates down, or none.
    (Ours: how the paper trains its gates is not published.)
    """

    rate: float
    steps: int = 200
    lr: float = 2e-2
    seed: int = 0

    def run(
        self, graph: Graph, units: Sequence[Unit], objective: Objective, progress: Progress
    ) -> list[float]:
        """The gates at the last eps; the smallest belong to what matters least."""
        inputs = inputs_for(graph, "gate", [Tensor((), f32)] * len(units))
        gated = substituted(graph, with_gates(units, inputs), inputs)
        random = torch.Generator().manual_seed(self.seed)
        with learning():
            cost = torch.tensor([float(u.bytes) for u in units])
            share = cost / cost.sum() if cost.any() else torch.full_like(cost, 1 / len(units))
            theta = torch.ones(len(units), requires_grad=True)
            eps, adam = 0.0, torch.optim.Adam([theta])
            worth, weights = torch.zeros(2, len(units))
            for step in progress(range(self.steps), f"training {len(units)} gates"):
                if eps != EPS[len(EPS) * step // self.steps]:
                    eps = EPS[len(EPS) * step // self.steps]
                    adam = torch.optim.Adam([theta], lr=self.lr)
                place, drawn = torch.rand(2, len(units), generator=random)
                tried = drawn <= drawn.sort().values[int(TRIED * len(units))]
                g = smooth_l0(theta, eps)
                values = torch.where(tried, place, g.detach()).requires_grad_()
                k = step % len(objective.batches)
                outputs = interpret(gated, [*objective.batches[k], *values.unbind()])
                (slope,) = torch.autograd.grad(objective.loss(k, outputs), values)
                worth = torch.where(tried, KEEP * worth - slope, worth)
                weights = torch.where(tried, KEEP * weights + 1, weights)
                mean = worth / weights.clamp_min(1)
                pull = self.multiplier(mean, share) * share - mean
                adam.zero_grad()
                g.backward(torch.where(weights > 0, pull, 0))
                adam.step()
                theta.data.clamp_(0)
        return smooth_l0(theta.detach().double(), EPS[-1]).tolist()

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
