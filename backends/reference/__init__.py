"""The reference backend: interprets each op's own `reference`. Slow; the definition of right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effc.ir import Graph, Op, interpret, names, yes
from effc.ir.rewrite import Answer

from ..base import Backend, Bound, Constants, Executable, Launch, Options, weight_values

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    """Claims everything and runs it node by node in plain torch."""

    name = "reference"

    def supports(self, node: Op) -> Answer:
        return yes

    def compile(self, graph: Graph, options: Any = None) -> Executable:
        Options.of(options)
        return ReferenceExecutable(graph)


class ReferenceExecutable(Executable):
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        shown = names(graph)
        self.launches = tuple(
            Launch("library", node.name, node, shown[node], tuple(shown[o] for o in node.operands))
            for node in graph.nodes
            if node not in graph.constants
        )

    def bind(
        self, weights: Mapping[str, torch.Tensor] | None = None, shared: Constants | None = None
    ) -> Bound:
        return ReferenceBound(self.graph, weight_values(self.graph, weights))


class ReferenceBound(Bound):
    def __init__(self, graph: Graph, weights: Mapping[Any, torch.Tensor]) -> None:
        self.graph = graph.substitute(
            {w: type(w).holding(w.key, value, w.of) for w, value in weights.items()}
        )

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        with torch.no_grad():
            return interpret(self.graph, inputs)
