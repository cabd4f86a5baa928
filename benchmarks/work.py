"""FLOPs and bytes of a case by the IR's cost model, and how near a time comes to the limit.

Bytes are those that any way must move: inputs, weights and results, once each. What lies between
operators is a way's own affair: keeping it out of memory is what fusion is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

PIPELINE = "simplify,raise-ops,simplify,eliminate-dead-code"


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes at the boundary in float32."""

    flops: int
    bytes: int

    def in_precision(self, precision: str) -> Work:
        """16 bits an element halve the bytes."""
        return Work(self.flops, self.bytes // 2) if precision in ("bf16", "fp16") else self


def work_of(model: nn.Module, args: tuple[Tensor, ...]) -> Work:
    """Capture the model and add up. Raises EffcError where it cannot be captured whole."""
    import effc
    from effc.ir.op import nbytes

    compiled = effc.compile(
        model, example_inputs=args, target="null", pipeline=PIPELINE, measure=False
    )
    record = effc.explain(compiled).records[0]
    graph = record.stages[-1].graph
    values = [*graph.inputs, *(o for o in graph.outputs)]
    total = sum(int(nbytes(v.type)) for v in values) + sum(int(w.of.nbytes) for w in graph.weights)
    return Work(int(graph.cost().flops), total)


@dataclass(frozen=True)
class Bound:
    """The least time of some work on this machine, in milliseconds, and what sets it."""

    ms: float
    by: str  # "compute", or the memory level that holds the bytes


def bound(work: Work, limits: Mapping[str, Any], threads: int, precision: str) -> Bound | None:
    """None without measured limits for so many threads."""
    found = limits.get("threads", {}).get(str(threads))
    if not found:
        return None
    peak = found["peak"][precision]["gflops"]
    level, rate = _bandwidth(work.bytes, found["read"])
    compute, memory = work.flops / (peak * 1e6), work.bytes / (rate * 1e6)
    return Bound(compute, "compute") if compute >= memory else Bound(memory, level)


def _bandwidth(size: int, read: Mapping[str, Any]) -> tuple[str, float]:
    """The smallest level that holds `size` bytes with room to spare, and its GB/s."""
    for level in ("L1", "L2", "L3"):
        if size <= 0.75 * read[level]["bytes"]:
            return level, read[level]["gbs"]
    return "DRAM", read["DRAM"]["gbs"]
