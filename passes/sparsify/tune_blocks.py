"""Compressed weights are trained block by block to give what the uncompressed block gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, Op, PassError
from effc.passes.base import Context, Pass, lossy
from effc.passes.fold.objective import Objective, distance, learning
from effc.passes.quantize.blockwise import Repeated, Stream, find_blocks, fitted, in_turns
from effc.passes.quantize.latent import (
    Compressed,
    Latent,
    Trained,
    Training,
    compressed,
    originals,
    unquantized_activations,
    value_of,
)

TITLE = "encoded(codes, scale) => the same, trained in its block"


@dataclass(frozen=True)
class TuneBlocks(Pass):
    """Train codes and scales of compressed weights, one block after the other.

    loss: |block(x) - float_block(x_float)|^2 / |float_block(x_float)|^2, where x comes from the
    compressed blocks before and x_float from the uncompressed ones. Numbers are rounded to codes
    in every step and the gradient passes straight through; groups that are left out stay so.
    (GQSA, section 2.3: BQPO.)

    Any compressed weight will do that has scales, with groups left out or not; what it was made of
    is looked up in the graphs of earlier stages. steps: Adam steps a block. lr: of numbers, as a
    share of the range of their codes (0.02 is better where many groups are left out); scale_lr: of
    scales, relative. 0: not trained. Zero points stay: only clipped numbers give them gradients.
    Where a block's error on the calibration data is not lower afterwards, it stays as it was.
    """

    name, numerics = "tune-blocks", lossy("relative_l2")
    steps: int = 100
    lr: float = 0.005
    scale_lr: float = 0.002

    @property
    def calibrated(self) -> bool:
        return self.steps > 0

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.steps < 0 or min(self.lr, self.scale_lr) < 0:
            raise PassError(f"{self}", why="something is negative", fix="0 leaves it out")
        if not self.steps:
            return g
        found = compressed(g)
        dense = originals(found, ctx)
        if not dense:
            raise PassError(
                f"none of {len(found)} compressed weights can be tuned",
                why="blocks learn from the float weights, and no earlier stage has those of the "
                "same keys" if found else "nothing is compressed to codes with scales",
                fix="put quantize-weights or prune-groups before it",
            )  # fmt: skip
        with learning():
            return self.trained(g, found, dense, ctx)

    def trained(
        self, g: Graph, found: Sequence[Compressed], dense: Mapping[Compressed, Op], ctx: Context
    ) -> Graph:
        batches = Objective(g, ctx.data(self)).batches
        floats = {d: w for c, w in dense.items() for d in c.decodes}
        goal = Stream(g, batches, {**unquantized_activations(g), **floats})
        given = Stream(g, batches, {})
        blocks, gone = find_blocks(g), []
        trained = Trained(bool(self.lr), bool(self.scale_lr))
        done: set[Op] = set()
        for number, block in enumerate(blocks):
            wanted = goal.leaving(block, goal.entering(block))
            entered = given.entering(block)
            here = [c for c in compressed(g, block.nodes) if c in dense and c.node not in done]
            if here:
                title = f"block {number + 1} of {len(blocks)}"
                latents = {c: Latent(c.value, trained, value_of(dense[c])) for c in here}
                training = Training.of(g, latents)
                graph = block.graph({**given.new, **training.new}, more=training.inputs)
                loss = BlockLoss(Repeated(graph, given.envs), training, entered, wanted)
                error = self.fit(loss, lambda s: ctx.progress(s, title))  # noqa: B023
                kept = error[1] < error[0]
                gone.append(error if kept else (error[0], error[0]))
                given.new |= training.trained() if kept else {}
                done.update(c.node for c in here)
            given.leaving(block, entered)
        ctx.counted("TuneBlock", TITLE, len(done))
        mean = [sum(side) / len(gone) for side in zip(*gone)] if gone else [0.0, 0.0]
        ctx.note(
            f"relative squared error of a block on the calibration data: {mean[0]:.3g}, then "
            f"{mean[1]:.3g}, the mean of {len(gone)} blocks"
        )
        left = sum(c.node not in done for c in found)
        if left:
            ctx.note(
                f"{left} compressed weights are in no block, or their float weight is not known"
            )
        return ctx.substitute(g, given.new)

    def fit(
        self, loss: BlockLoss, progress: Callable[[Sequence[int]], Iterable[int]]
    ) -> tuple[float, float]:
        rates = {"numbers": self.lr, "factor": self.scale_lr}
        groups = loss.training.parameters(rates)
        return fitted(groups, loss, in_turns(self.steps, len(loss.entered)), progress)


@dataclass(frozen=True)
class BlockLoss:
    """The error of a block on batch k: |y - wanted|^2 / |wanted|^2."""

    block: Repeated
    training: Training
    entered: Sequence[Sequence[Any]]
    wanted: Sequence[Any]

    def __call__(self, k: int) -> torch.Tensor:
        y = self.block(k, [*self.entered[k], *self.training.values()])
        return distance(y, [self.wanted[k]])
