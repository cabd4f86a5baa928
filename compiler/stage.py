"""One step of a pipeline: the graph after it, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effc.ir import Cost, Graph, NearMiss, RuleStats

if TYPE_CHECKING:
    from effc.difference import Difference, NodeError
    from effc.passes.base import Numerics

__all__ = ["Stage"]


@dataclass(frozen=True)
class Stage:
    """The graph after one pass (after capture, for stage 0) and what is known about that step.

    error: against the stage before; total_error: against the capture. Both need sample inputs.
    """

    index: int
    name: str  # "capture", or the pass as pipeline text
    title: str
    graph: Graph
    numerics: Numerics | None = None
    seconds: float = 0.0
    rewrites: int = 0
    rules: tuple[RuleStats, ...] = ()
    notes: tuple[str, ...] = ()
    changed: bool = False
    error: Difference | None = None
    total_error: Difference | None = None
    node_errors: tuple[NodeError, ...] = ()
    violation: str | None = None  # how the error breaks what the pass declares

    @property
    def text(self) -> str:
        return self.graph.text

    @property
    def cost(self) -> Cost:
        return self.graph.cost()

    @property
    def nearest_miss(self) -> NearMiss | None:
        """The refusal that came closest to a rewrite, over all rules of the pass."""
        misses = [miss for rule in self.rules for miss in rule.misses]
        return max(misses, key=lambda m: (m.checked, m.depth), default=None)

    @property
    def why_unchanged(self) -> str | None:
        """A sentence for a pass that changed nothing and left no note: its nearest miss."""
        if self.changed or not self.index:
            return None
        miss = self.nearest_miss
        if miss is None:
            return None if self.notes else "matched nothing: no op that its rules start at is here"
        where = f" ({miss.where})" if miss.where else ""
        return f"matched nothing; nearest: {miss.rule} at {miss.node.name}: {miss.reason}{where}"

    def header(self) -> str:
        """Lines for the top of a printed stage."""
        made = "captured" if not self.index else f"made by {self.name}, {self.rewrites} rewrites"
        parts = [f"stage {self.index}: {made}", f"{self.seconds * 1e3:.1f} ms"]
        if self.error is not None:
            parts.append(str(self.error))
        return ", ".join(parts)
