"""Ops that hold a graph."""

from __future__ import annotations

from typing import Any

from ..graph import Graph
from ..op import Cost, Op, Value, op
from ..types import Type


@op("fused")
class Fused(Op):
    """A region computed by one kernel: its body applied to xs."""

    xs: tuple[Value, ...]
    body: Graph

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(node.random for node in self.body.nodes)

    def infer(self) -> Type:
        if len(self.body.inputs) != len(self.xs):
            raise self.fail(f"the body takes {len(self.body.inputs)} operands")
        types = tuple(o.type for o in self.body.outputs)
        return types[0] if len(types) == 1 else types

    def run_region(self, env: Any, xs: Any) -> Any:
        """Interpret the body; symbols come from the graph around it."""
        from ..interpret import interpret

        results = interpret(self.body, xs, env=env)
        return results[0] if len(results) == 1 else results

    def cost(self) -> Cost:
        return Cost(self.body.cost().flops, self.bytes_moved())
