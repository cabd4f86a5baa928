"""What values inside of a graph are on calibration data, by the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from effc.ir import Graph, Op, interpret
from effc.passes.base import Progress

See = Callable[[torch.Tensor], None]


def observe(
    graph: Graph, batches: Sequence[Sequence[Any]], see: Mapping[Op, See],
    progress: Progress = lambda steps, title: steps, title: str = "watching values",
) -> None:  # fmt: skip
    """Call see[value] with each of these values, once a batch. Computes no more than they need,
    and keeps no value longer than its readers do."""
    if not see:
        return
    part = graph.with_outputs(see)
    part = Graph(part.inputs, part.nodes, (), graph.name)

    def seen(node: Op, value: Any) -> None:
        if node in see:
            see[node](value)

    with torch.no_grad():
        for k in progress(range(len(batches)), title):
            for node, value in zip(graph.inputs, batches[k], strict=True):
                seen(node, value)
            interpret(part, batches[k], observe=seen)


def rows(x: torch.Tensor) -> torch.Tensor:
    """A value as a matrix f32[tokens, channels]."""
    return x.detach().reshape(-1, x.shape[-1]).float()


class Largest:
    """max|x| of every channel (last dimension), over all that was seen: f32[channels]."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def __call__(self, x: torch.Tensor) -> None:
        found = rows(x).abs()
        if len(found):
            self.value = torch.maximum(self.value, found.amax(0))


class Hessian:
    """2/n X^T X over the n tokens that were seen, without the 2/n: f32[K, K]."""

    def __init__(self, size: int) -> None:
        self.value, self.tokens = torch.zeros(size, size), 0

    def __call__(self, x: torch.Tensor) -> None:
        x = rows(x)
        self.value.addmm_(x.T, x)
        self.tokens += len(x)


def within(values: Iterable[Op], size: Callable[[Op], int], room: int) -> Iterable[tuple[Op, ...]]:
    """Values in parts of at most `room` bytes in all, or of one value that is larger."""
    part: list[Op] = []
    used = 0
    for v in values:
        if part and used + size(v) > room:
            yield tuple(part)
            part, used = [], 0
        part.append(v)
        used += size(v)
    if part:
        yield tuple(part)


__all__ = ["Hessian", "Largest", "observe", "rows", "within"]
