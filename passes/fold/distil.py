"""A compressed graph learns from the uncompressed one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from effc.ir import Graph, Op, PassError, Weight, interpret
from effc.ir.rewrite import op
from effc.passes.analysis.blocks import Update, residual_updates
from effc.passes.base import Context, Pass, lossy

from .objective import NextToken, Objective, Values, distance, inputs_for, learning, substituted
from .units import renamed


@dataclass(frozen=True)
class Distil(Pass):
    """Train what a compressed graph can spare bytes for, against the graph before compression.

    loss: CE(labels) + kl * KL(teacher || student) + tail * |h - h_teacher|^2 / |h_teacher|^2, with
    h the residual stream after the last block. For a graph that is no causal language model the
    first two are the distance of the outputs.

    What is trained: norms and biases of the blocks, what earlier passes added (low-rank factors,
    scales), and of every matrix a change of rank `rank`, merged into it afterwards: no byte more.
    rank=0: no matrix changes. Adam with `lr`, which falls to nothing along a cosine.
    """

    name, numerics = "distil", lossy("relative_l2")
    steps: int = 100
    rank: int = 8
    lr: float = 1e-3
    kl: float = 1.0
    tail: float = 0.5
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        return self.steps > 0

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.steps < 0 or self.rank < 0:
            raise PassError(f"steps={self.steps}, rank={self.rank}", fix="neither is negative")
        if not self.steps:
            return g
        teacher = ctx.uncompressed or g
        updates, taught = residual_updates(g), residual_updates(teacher)
        if not updates or not taught:
            ctx.note("no residual update, so no block to train")
            return g
        student = Student(g, updates, {w.key for w in teacher.weights}, self.rank, self.seed)
        lesson = Objective(teacher.with_outputs((*teacher.outputs, taught[-1].y)), ctx.data(self))
        before = lesson.mean(g)
        self.train(student, updates[-1].y, lesson, ctx)
        after = student.trained()
        title = "what was compressed => the same, trained"
        ctx.counted("TrainConstant", title, len(student.values))
        result = ctx.substitute(g, after)
        ctx.note(
            f"{lesson.name} on the calibration data: {before:.4f}, then {lesson.mean(result):.4f}, "
            f"uncompressed {lesson.mean(teacher):.4f}"
        )
        return result

    def train(self, student: Student, tail: Op, lesson: Objective, ctx: Context) -> None:
        graph, batches = student.graph(tail), lesson.batches
        with learning():
            adam = torch.optim.Adam(student.parameters, lr=self.lr)
            decay = torch.optim.lr_scheduler.LambdaLR(
                adam, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
            )
            for step in ctx.progress(range(self.steps), "distilling"):
                k = step % len(batches)
                outputs = interpret(graph, [*batches[k], *student.parameters])
                adam.zero_grad()
                self.loss(lesson, k, outputs).backward()
                adam.step()
                decay.step()

    def loss(self, lesson: Objective, k: int, outputs: Values) -> torch.Tensor:
        """outputs: the student's, and after them its tail."""
        *own, h = outputs
        *wanted, h_wanted = lesson.taught(k)
        total = lesson.loss(k, own)
        if self.kl and lesson.labels is not None:
            total = total + self.kl * divergence(lesson.labels, own, wanted)
        return total + self.tail * distance([h], [h_wanted]) if self.tail else total


def divergence(labels: NextToken, own: Values, wanted: Values) -> torch.Tensor:
    """KL(teacher || student) in nats a token."""
    a, b = (F.log_softmax(v[labels.logits].float(), -1).flatten(0, -2) for v in (own, wanted))
    return F.kl_div(a, b, reduction="batchmean", log_target=True)


# ------------------------------------------------------------------ what is trained


@dataclass
class Student:
    """A graph with some constants as parameters: whole weights, and low-rank changes of others.

    known: keys of the model's own weights; others were made by passes and are trained whole.
    """

    before: Graph
    updates: Sequence[Update]
    known: set[str]
    rank: int
    seed: int
    whole: dict[Weight, torch.Tensor] = field(default_factory=dict)
    changes: dict[Weight, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    readers: dict[Weight, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False):
            for node in dict.fromkeys(n for u in self.updates for n in u.nodes):
                for w in node.operands:
                    if isinstance(w, Weight) and w.data is not None and w.dtype.is_float:
                        self._sort(node, w, generator)

    def _sort(self, node: Op, w: Weight, generator: torch.Generator) -> None:
        assert w.data is not None
        if w.tensor.rank < 2 or w.key not in self.known:
            self.whole.setdefault(w, w.data.detach().clone().requires_grad_())
        elif self.rank and node.name == "linear" and w is node.w and self._only_layers(w):
            n, k = w.shape
            rank = min(self.rank, n, k)
            if w not in self.changes:
                a = torch.randn(rank, k, generator=generator).to(w.data.dtype) / k**0.5
                b = torch.zeros(n, rank, dtype=w.data.dtype)
                self.changes[w] = a.requires_grad_(), b.requires_grad_()
            self.readers.setdefault(w, []).append(node)

    def _only_layers(self, w: Weight) -> bool:
        """Merged afterwards, a change must be one for every reader."""
        inside = {n for u in self.updates for n in u.nodes}
        layers = (u in inside and u.name == "linear" and u.w is w for u in self.before.users[w])
        return all(layers) and w not in self.before.outputs

    @property
    def values(self) -> list[Weight]:
        return [*self.whole, *self.changes]

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self.whole.values(), *(t for pair in self.changes.values() for t in pair)]

    def graph(self, tail: Op) -> Graph:
        """Outputs, then tail; inputs, then parameters. A change goes beside its layer, not into
        the matrix, whose gradient would cost as much as the layer itself."""
        of = [w.of for w in self.whole] + [
            w.of.with_(shape=tuple(t.shape)) for w, pair in self.changes.items() for t in pair
        ]
        given = inputs_for(self.before, "trained", of)
        new: dict[Op, Op] = dict(zip(self.whole, given))
        pairs = iter(given[len(self.whole) :])
        for w in self.changes:
            a, b = next(pairs), next(pairs)
            for layer in self.readers[w]:
                new[layer] = op.add(layer, op.linear(op.linear(layer.x, a), b))
        watched = self.before.with_outputs((*self.before.outputs, tail))
        return substituted(watched, new, given)

    def trained(self) -> dict[Op, Op]:
        """For Graph.substitute: the weights as they are now."""
        new: dict[Op, Op] = {}
        for w, value in self.whole.items():
            key = w.key if w.key not in self.known else renamed("distil", w.key)
            new[w] = Weight.holding(key, value.detach(), w.of)
        for w, (a, b) in self.changes.items():
            change = b.detach().float() @ a.detach().float()
            assert w.data is not None
            merged = (w.data.detach().float() + change).to(w.data.dtype)
            new[w] = Weight.holding(renamed("distil", w.key), merged, w.of)
        return new
