"""What tests of cached graphs share: capturing, and running a graph chunk by chunk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import effc.aten  # noqa: F401  registers the converters
from effc.capture import capture_exported
from effc.importer import import_captured
from effc.ir import Graph, evaluate, interpret, parse, symbol, verify
from effc.passes.base import Pipeline
from effc.passes.cache import cache_of
from effc.pipeline import run_pipeline

RECIPE = "raised,insert-kv-cache"


def captured(model: nn.Module, *args: torch.Tensor | None) -> Graph:
    """The graph of a model whose arguments are [batch, T] with a T that varies."""
    model.eval().requires_grad_(False)
    shapes = tuple(None if x is None else {1: torch.export.Dim.DYNAMIC} for x in args)
    with torch.no_grad():
        program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
    return import_captured(capture_exported(program)).graph


class Positional(nn.Module):
    """A model of transformers as a function of ids, attention_mask and position_ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        given = {"attention_mask": mask, "position_ids": positions}
        kwargs = {k: v for k, v in given.items() if v is not None}
        return self.model(ids, **kwargs, use_cache=False).logits


def cached(graph: Graph, recipe: str = RECIPE) -> Graph:
    """The graph with a cache; valid, and equal to its own text."""
    made = run_pipeline(graph, Pipeline.parse(recipe))[-1].graph
    verify(made)
    again = parse(made.text, {w.key: w.data for w in made.weights})
    assert again == made and [i.state for i in again.inputs] == [i.state for i in made.inputs]
    return made


class Session:
    """A cache and the tokens in it. Slots that hold nothing are NaN, or the largest integer."""

    def __init__(self, graph: Graph, capacity: int, batch: int = 2) -> None:
        self.graph, self.cache, self.capacity = graph, cache_of(graph), capacity
        self.past = 0
        env = {self.cache.capacity: capacity, symbol("B"): batch}
        self.states = [_nothing(evaluate(s.shape, env), s.dtype) for s in self.cache.states]

    def append(self, end: int, *inputs: torch.Tensor, graph: Graph | None = None) -> torch.Tensor:
        """The first result for tokens up to `end`; inputs: of all positions."""
        graph = graph or self.graph
        given = {self.cache.past.key: torch.tensor(self.past)}
        for i, x in zip(self.cache.given, inputs, strict=True):
            for axis, size in enumerate(i.of.shape):
                if size == self.cache.size:
                    x = x.narrow(axis, self.past, end - self.past)
                elif size == self.cache.capacity:  # what stands later must not matter
                    shape = [self.capacity - end if a == axis else s for a, s in enumerate(x.shape)]
                    later = torch.randint(0, 2, shape).to(x.dtype)
                    x = torch.cat((x.narrow(axis, 0, end), later), axis)
            given[i.key] = x
        given |= dict(zip((s.key for s in self.cache.states), self.states))
        results = interpret(graph, [given[i.key] for i in graph.inputs])
        self.states = list(results[len(results) - len(self.states) :])
        self.past = end
        return results[0]


def _nothing(shape: Any, dtype: Any) -> torch.Tensor:
    if dtype.is_float:
        return torch.full(shape, torch.nan, dtype=dtype.torch)
    return torch.full(shape, torch.iinfo(dtype.torch).max, dtype=dtype.torch)


def chunks(total: int, seed: int) -> list[int]:
    """Ends of calls with random numbers of tokens."""
    chance, ends = random.Random(seed), [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + chance.choice([1, 1, 2, 3, 5])))
    return ends[1:]


def run_in_chunks(graph: Graph, inputs: Sequence[torch.Tensor], ends: Sequence[int]) -> Any:
    session = Session(graph, capacity=ends[-1] + 3)
    return torch.cat([session.append(end, *inputs) for end in ends], 1)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2."""
    return float((got - want).norm() / want.norm())
