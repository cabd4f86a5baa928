"""Facts about a graph: functions of one graph that change nothing, kept as long as the graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from effc.ir import Graph

Fact = TypeVar("Fact")


def analysis(fn: Callable[[Graph], Fact]) -> Callable[[Graph], Fact]:
    """Compute once per graph. A graph never changes, so the answer is kept in the graph itself."""
    key = f"analysis {fn.__module__}.{fn.__qualname__}"

    @wraps(fn)
    def cached(graph: Graph) -> Fact:
        kept = graph.__dict__
        if key not in kept:
            kept[key] = fn(graph)
        return kept[key]

    return cached
