"""The null backend: compiles for the CPU, kernels included, and never runs.

For tests and tools that want plans and kernel text where nothing may be executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effc.ir import EffcError, Graph, Op, yes
from effc.ir.rewrite import Answer

from ..base import Backend, Bound, Constants, Executable, Options

__all__ = ["NullBackend"]


class NullBackend(Backend):
    """Claims everything; the plan and kernel sources are those of the cpu backend, not built."""

    name = "null"

    def supports(self, node: Op) -> Answer:
        return yes

    def compile(self, graph: Graph, options: Any = None) -> Executable:
        from ..cpu import CpuBackend

        return NullExecutable(CpuBackend().plan(graph, Options.of(options)))


class NullExecutable(Executable):
    def __init__(self, planned: Executable) -> None:
        self.graph, self.launches = planned.graph, planned.launches
        self.kernels, self.memory = planned.kernels, planned.memory

    def bind(
        self, weights: Mapping[str, torch.Tensor] | None = None, shared: Constants | None = None
    ) -> Bound:
        raise EffcError(
            f"the null backend compiled {self.graph.name} and does not run it",
            fix='use backend "cpu" or "reference" to run',
        )
