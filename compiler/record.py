"""What the compiler remembers of one graph it compiled: the material of reports and dumps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effc.report import Report
    from effc.stage import Stage

__all__ = ["Break", "Guard", "Record"]


@dataclass(frozen=True)
class Guard:
    """A fact about a call that the compiled code relies on; `where` is the user's line."""

    expr: str
    where: str = ""


@dataclass(frozen=True)
class Break:
    """Why capture had to stop, so that Python goes on by itself; `where` is the user's line."""

    reason: str
    where: str = ""


@dataclass
class Record:
    """One captured graph on its way. Filled in phase by phase; `refusal` ends it early.

    executable: what the backend built (`launches`, `fallbacks`, `kernels`, `memory`).
    refusal: why the whole graph went to PyTorch or Inductor (`kind`, `reason`, `where`).
    sizes: numbers behind the graph's symbols in the first call, for costs.
    """

    name: str
    pipeline: str = ""
    target: str = ""
    stages: list[Stage] = field(default_factory=list)
    executable: Any = None
    refusal: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    recompile_cause: str = ""
    graph_break: Break | None = None
    sizes: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """Name of this graph's own folder in a dump; "" for a model that is one graph."""
        match = re.fullmatch(r"graph (\d+)/(\d+)(?:\D.*)?", self.name)
        return f"graph_{match[1]}_{match[2]}" if match else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase: `with record.phase("capture"): ...`; repeated phases add up."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def report(self) -> Report:
        from effc.report import Report

        return Report.of(self)
