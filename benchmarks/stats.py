"""Medians, spreads and means of ratios. Nothing is thrown away here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST = 4  # samples that quartiles can be taken of


@dataclass(frozen=True)
class Summary:
    """Of samples in milliseconds: median, quartiles, and their distance over the median."""

    ms: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        return (self.high - self.low) / self.ms if self.ms else 0.0

    def as_json(self) -> dict[str, Any]:
        digits = 5
        return {
            "ms": _significant(self.ms, digits), "low": _significant(self.low, digits),
            "high": _significant(self.high, digits), "spread": round(self.spread, 4),
            "used": self.samples,
        }  # fmt: skip


def summarise(samples: Sequence[float]) -> Summary:
    """Median and quartiles in milliseconds; of fewer than four samples, the extremes."""
    if not samples:
        raise ValueError("no samples to summarise")
    middle = statistics.median(samples)
    if len(samples) < FEWEST:
        return Summary(middle, min(samples), max(samples), len(samples))
    low, _, high = statistics.quantiles(samples, n=4)
    return Summary(middle, low, high, len(samples))


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """None of no ratios."""
    found = list(ratios)
    return math.exp(statistics.fmean(map(math.log, found))) if found else None


def usable(
    samples: Sequence[float | None], scaling: Sequence[float | None], worth: float
) -> tuple[list[float], bool]:
    """The samples to summarise, and whether they had to include rounds without a second core.

    `scaling[i]` is what the threads did together in round i, as a multiple of one thread's work
    (None: one thread, nothing to check). Rounds below `worth` are left out where enough others
    remain; where they do not, all are used and the answer says so.
    """
    taken = [(s, c) for s, c in zip(samples, scaling, strict=True) if s is not None]
    good = [s for s, c in taken if c is None or c >= worth]
    if len(good) >= min(FEWEST, len(taken)):
        return good, False
    return [s for s, _ in taken], True


def times(entry: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of every way of an entry that was timed."""
    return {n: way["ms"] for n, way in entry.get("ways", {}).items() if way["status"] == "timed"}


def best_peer(entry: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest way that is not effc's."""
    others = {n: ms for n, ms in times(entry).items() if not is_effc(n)}
    return min(others.items(), key=lambda item: item[1]) if others else None


def is_effc(name: str) -> bool:
    return name == "effc" or name.startswith("effc-")


def _significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
