"""What a compressed graph is judged by on calibration data, and how its constants are trained.

A causal language model is judged by its cross-entropy on the next token: the data is its own label.
Any other graph is judged by the distance of its outputs from the uncompressed graph's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from effc.ir import Graph, Input, InputError, Op, Tensor, Weight, interpret

Values = Sequence[Any]


@dataclass(frozen=True)
class NextToken:
    """Where a causal language model has its ids [B, T] among inputs, its logits among outputs."""

    ids: int
    logits: int


def next_token(graph: Graph) -> NextToken | None:
    """Of a graph that embeds ids [B, T] and gives a score for each row of the table, [B, T, V]."""
    for node in graph.nodes:
        if node.name != "embedding" or node.ids not in graph.inputs:
            continue
        rows, ids = node.table.shape[0], node.ids
        for position, output in enumerate(graph.outputs):
            if isinstance(output.type, Tensor) and output.shape == (*ids.shape, rows):
                return NextToken(graph.inputs.index(ids), position)
    return None


class Objective:
    """Losses on sets of inputs, against labels or against `teacher`, the uncompressed graph."""

    def __init__(self, teacher: Graph, batches: Sequence[Values]) -> None:
        self.teacher, self.batches = substituted(teacher, {}), [[*map(_usable, b)] for b in batches]
        self.labels = next_token(teacher)
        self._known: dict[int, Values] = {}
        if self.labels is not None:
            for batch in self.batches:
                if batch[self.labels.ids].shape[1] < 2:
                    raise InputError("a set of calibration data is one token long: nothing follows")

    @property
    def name(self) -> str:
        return "next-token loss" if self.labels is not None else "relative squared error"

    def taught(self, k: int) -> Values:
        """The teacher's outputs on batch k; computed once."""
        if k not in self._known:
            with torch.no_grad():
                self._known[k] = interpret(self.teacher, self.batches[k])
        return self._known[k]

    def loss(self, k: int, outputs: Values) -> torch.Tensor:
        """Of a graph's outputs on batch k."""
        if self.labels is None:
            return distance(outputs, self.taught(k))
        ids = self.batches[k][self.labels.ids]
        logits = outputs[self.labels.logits].float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def mean(self, graph: Graph) -> float:
        """The mean loss of a graph over all batches; infinite where it is not a number."""
        with torch.no_grad():
            losses = [self.loss(k, interpret(graph, b)) for k, b in enumerate(self.batches)]
        total = float(torch.stack(losses).mean())
        return total if math.isfinite(total) else math.inf


def distance(outputs: Values, wanted: Values) -> torch.Tensor:
    """Mean over float outputs of |a - b|^2 / |b|^2."""
    found = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp_min(1e-30)
        for a, b in zip(outputs, wanted)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    return torch.stack(found).mean()


# ------------------------------------------------------------------ graphs that train


def substituted(graph: Graph, new: Mapping[Op, Op], more: Sequence[Input] = ()) -> Graph:
    """graph.substitute(new) with the weights' values apart from the model's, so that autograd
    records nothing of theirs. more: further inputs that replacements read."""
    plain: dict[Op, Op] = {
        w: Weight.holding(w.key, _usable(w.data), w.of)
        for w in graph.weights
        if w.data is not None and w not in new
    }
    made = graph.substitute({**plain, **new})
    return replace(made, inputs=(*made.inputs, *more))


def inputs_for(graph: Graph, stem: str, types: Sequence[Tensor]) -> list[Input]:
    """New inputs with names that the graph has not."""
    taken = {i.key for i in graph.inputs}
    while any(key.startswith(stem) for key in taken):
        stem += "_"
    return [Input(f"{stem}{i}", t) for i, t in enumerate(types)]


@contextmanager
def learning() -> Iterator[None]:
    """Gradients are recorded here, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _usable(value: Any) -> Any:
    """A tensor as autograd may save it: no gradient of its own, not made in inference mode."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value.detach()
