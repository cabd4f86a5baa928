"""Ops that hold a graph."""

from __future__ import annotations

from typing import Any

from ..graph import Graph
from ..op import Cost, Op, Value, op
from ..types import Tensor, Type, type_text


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


@op("loop")
class Loop(Op):
    """The body applied `trip` times, each time to what the time before gave.

    body(*carries, *shared, *rows) -> (*carries, *kept), where rows are row i of each of `stacked`
    [trip, ...] at time i. Results: the last carries, then all values of the first kept one in order
    of time, then those of the next.
    """

    carries: tuple[Value, ...]
    shared: tuple[Value, ...]
    stacked: tuple[Value, ...]
    body: Graph
    trip: int

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(node.random for node in self.body.nodes)

    @property
    def region_types(self) -> tuple[Type, ...]:
        rows = (Tensor(s.shape[1:], s.dtype) for s in self.stacked)
        return (*(v.type for v in (*self.carries, *self.shared)), *rows)

    def infer(self) -> Type:
        if self.trip < 1:
            raise self.fail(f"trip={self.trip} is no number of times", fix="leave the loop out")
        for s in self.stacked:
            t = s.tensor
            if not t.rank or t.shape[0] != self.trip:
                raise self.fail(f"{t} is stacked for {self.trip} times")
            if t != Tensor(t.shape, t.dtype):
                raise self.fail(f"{t} has no rows of its own")
        want = len(self.carries) + len(self.shared) + len(self.stacked)
        if len(self.body.inputs) != want:
            raise self.fail(f"the body takes {len(self.body.inputs)} values, not {want}")
        given = [type_text(o.type) for o in self.body.outputs[: len(self.carries)]]
        carried = [type_text(c.type) for c in self.carries]
        if given != carried:
            raise self.fail(f"the body gives ({', '.join(given)}) for ({', '.join(carried)})")
        kept = [o.type for o in self.body.outputs[len(carried) :] for _ in range(self.trip)]
        types = (*(c.type for c in self.carries), *kept)
        return types[0] if len(types) == 1 else types

    def run_region(self, env: Any, carries: Any, shared: Any, stacked: Any) -> Any:
        """Interpret the body time after time; symbols come from the graph around it."""
        from ..interpret import interpret

        kept: list[list[Any]] = [[] for _ in self.body.outputs[len(carries) :]]
        for i in range(self.trip):
            rows = [s[i] for s in stacked]
            results = interpret(self.body, [*carries, *shared, *rows], env=env)
            carries, more = results[: len(carries)], results[len(carries) :]
            for values, value in zip(kept, more, strict=True):
                values.append(value)
        results = (*carries, *(v for values in kept for v in values))
        return results[0] if len(results) == 1 else results

    def cost(self) -> Cost:
        once = self.body.cost()
        return Cost(self.trip * once.flops, self.trip * once.bytes)
