"""Scales of compressed weights are trained on the whole graph's loss; codes stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, PassError, bind_symbols
from effc.passes.base import Context, Pass, lossy
from effc.passes.fold.distil import divergence
from effc.passes.fold.objective import Objective, distance, learning, substituted
from effc.passes.quantize.blockwise import Repeated, fitted, in_turns
from effc.passes.quantize.latent import Latent, Trained, Training, compressed


@dataclass(frozen=True)
class TuneScales(Pass):
    """Train the scales of all compressed weights together; codes and left-out groups stay.

    loss: labels * (next-token loss) + kl * KL(uncompressed || graph) in nats a token; for a graph
    that is no causal language model the distance of its outputs from the uncompressed graph's.
    With w = scale * (code - zero), d loss / d scale = sum over its group of
    (code - zero) * d loss / d w. (GQSA, section 2.4: E2E-OQP.)

    It knows no format: groups left out, zero points and planes are what `decode` makes of them.
    lr: of scales, relative. Where the loss on the calibration data is not lower afterwards, the
    graph stays as it was.
    """

    name, numerics = "tune-scales", lossy("relative_l2")
    steps: int = 100
    lr: float = 0.002
    labels: float = 0.0
    kl: float = 1.0

    @property
    def calibrated(self) -> bool:
        return self.steps > 0

    def run(self, g: Graph, ctx: Context) -> Graph:
        if min(self.steps, self.lr, self.labels, self.kl) < 0:
            raise PassError(f"{self}", why="something is negative", fix="0 leaves it out")
        if not self.labels + self.kl:
            raise PassError("labels=0 and kl=0 leave no loss", fix="give one of them a weight")
        if not self.steps:
            return g
        found = compressed(g)
        if not found:
            ctx.note("nothing is compressed to codes with scales")
            return g
        with learning():
            latents = {c: Latent(c.value, Trained()) for c in found}
            training = Training.of(g, latents)
            graph = substituted(g, training.new, training.inputs)
            lesson = Objective(ctx.uncompressed or g, ctx.data(self))
            before, after = self.fit(graph, training, lesson, ctx)
        said = f"{self.title_of(lesson)} on the calibration data: {before:.4f}, then {after:.4f}"
        if not after < before:
            ctx.note(f"{said}: not lower, so the scales stay as they were")
            return g
        ctx.counted("TuneScales", "encoded(codes, scale) => encoded(codes, scale')", len(found))
        ctx.note(said)
        return ctx.substitute(g, training.trained())

    def fit(
        self, graph: Graph, training: Training, lesson: Objective, ctx: Context
    ) -> tuple[float, float]:
        envs = [bind_symbols(lesson.teacher, b) for b in lesson.batches]
        student, teacher = Repeated(graph, envs), Repeated(lesson.teacher, envs)

        def loss(k: int) -> torch.Tensor:
            outputs = student(k, [*lesson.batches[k], *training.values()])
            if lesson.labels is not None and not self.kl:
                return self.loss(lesson, k, outputs, ())
            with torch.no_grad():  # each time: the logits of all batches would fill the memory
                wanted = teacher(k, lesson.batches[k])
            return self.loss(lesson, k, outputs, wanted)

        return fitted(
            training.parameters({"factor": self.lr}), loss,
            in_turns(self.steps, len(lesson.batches)), lambda s: ctx.progress(s, "tuning scales"),
        )  # fmt: skip

    def loss(
        self, lesson: Objective, k: int, outputs: Sequence[Any], wanted: Sequence[Any]
    ) -> torch.Tensor:
        if lesson.labels is None:
            return distance(outputs, wanted)
        total = torch.zeros(())
        if self.labels:
            total = total + self.labels * lesson.loss(k, outputs)
        if self.kl:
            total = total + self.kl * divergence(lesson.labels, outputs, wanted)
        return total

    def title_of(self, lesson: Objective) -> str:
        if lesson.labels is None:
            return "relative squared error"
        parts = [(self.labels, "next-token loss"), (self.kl, "divergence")]
        return " + ".join(name if w == 1 else f"{w:g} * {name}" for w, name in parts if w)
