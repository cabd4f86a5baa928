"""Other ways to judge what can be dropped, on the same interface as gates.

block influence: ShortGPT (arXiv 2403.03853). Loss without the unit, greedily: Shortened LLaMA
(arXiv 2402.02834). Both look at the calibration data; a random choice looks at nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from effc.ir import Graph, Op, interpret
from effc.passes.base import Progress

from .objective import Objective, inputs_for, substituted
from .units import Unit, without


def block_influence(graph: Graph, units: Sequence[Unit], objective: Objective) -> list[float]:
    """1 - mean over tokens of cos(x, y), of what enters and leaves a unit: small is redundant."""
    ends = {v for u in units for v in (u.x, u.y)}
    cosines: list[list[float]] = [[] for _ in units]
    for batch in objective.batches:
        seen: dict[Op, Any] = {i: v for i, v in zip(graph.inputs, batch) if i in ends}

        def observe(node: Op, value: Any, seen: dict[Op, Any] = seen) -> None:
            if node in ends:
                seen[node] = value.float()

        with torch.no_grad():
            interpret(graph, batch, observe=observe)
            for found, u in zip(cosines, units):
                found.append(float(torch.cosine_similarity(seen[u.x], seen[u.y], -1).mean()))
    return [1 - sum(c) / len(c) for c in cosines]


def greedy_loss(
    graph: Graph, units: Sequence[Unit], objective: Objective, count: int, progress: Progress
) -> list[float]:
    """Units out one by one, each time the one whose loss is least missed.

    The score of a unit is its turn, of those that stay infinite: small is dropped first.
    """
    out: list[int] = []
    for _ in progress(range(count), f"dropping {count} of {len(units)} one by one"):
        losses = losses_without(graph, units, objective, out)
        out.append(min(losses, key=losses.__getitem__))
    return [float(out.index(i)) if i in out else math.inf for i in range(len(units))]


def losses_alone(graph: Graph, units: Sequence[Unit], objective: Objective) -> list[float]:
    """What the mean loss rises by without each unit, all others there."""
    whole = objective.mean(graph)
    return [loss - whole for loss in losses_without(graph, units, objective, ()).values()]


def losses_without(
    graph: Graph,
    units: Sequence[Unit],
    objective: Objective,
    out: Sequence[int],
    only: Iterable[int] | None = None,
) -> dict[int, float]:
    """The mean loss with one unit more left out than those in `out`, for all others or `only` some.

    What comes before a unit is computed once for all of them: its own place is where the stream
    that enters it is given.
    """
    left = [i for i in (range(len(units)) if only is None else only) if i not in out]
    gone = without(units[i] for i in out)
    streams = substituted(graph.with_outputs(units[i].x for i in left), gone)
    tails = []
    for i in left:
        (given,) = inputs_for(graph, "stream", [units[i].y.tensor])
        tails.append(substituted(graph, {**gone, units[i].y: given}, [given]))
    losses = dict.fromkeys(left, 0.0)
    with torch.no_grad():
        for k, batch in enumerate(objective.batches):
            entering = interpret(streams, batch)
            for i, tail, x in zip(left, tails, entering):
                losses[i] += float(objective.loss(k, interpret(tail, [*batch, x])))
    mean = {i: total / len(objective.batches) for i, total in losses.items()}
    return {i: value if math.isfinite(value) else math.inf for i, value in mean.items()}


def at_random(count: int, seed: int) -> list[float]:
    """Scores that mean nothing."""
    return random.Random(seed).sample([float(i) for i in range(count)], count)
