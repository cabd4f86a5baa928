"""Which schedule computes a problem: the one that measured fastest here, else the cost model's.

A problem is some work with all its sizes; a schedule is one way to do it. `Schedules` picks while a
plan is made, and notes what nothing is known of. `tune` measures that, and `Database` keeps the
times in the cache folder (codegen/store.py), one small file a problem, under all that decides them.
A schedule never changes a result's meaning, so a wrong time costs speed and nothing else.

What a target adds: its problems and schedules, the facts of a machine that decide times, and how a
schedule is measured (backends/cpu/tuning.py, backends/gpu/tuning.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from effc.codegen.store import Store, cache_dir

KIND = "schedules"  # of entries in the cache folder
FACTOR, MOST = 2.0, 6  # schedules that are measured: so near the best prediction, and so many
MARGIN = 1.05  # below it a difference is noise, and the cost model's pick stays
BUDGET = 0.1  # seconds a problem's rounds may take, beyond two of FEWEST schedules
ROUNDS, FEWEST = 12, 3
FAR, WORSE = 3.0, 1.2  # times the best time, after one round and later, that end a schedule's turns

Times = Mapping[str, float]  # text of a schedule -> seconds


class Problem(Protocol):
    """text: all of it that its time depends on."""

    @property
    def text(self) -> str: ...


class Schedule(Protocol):
    """name: of the method; text: the name and what else is chosen. cost: predicted, in any unit
    that the schedules of a problem share. varies: some of its sizes are known only at a call."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def cost(self) -> float: ...

    @property
    def varies(self) -> bool: ...


S = TypeVar("S", bound=Schedule)


@dataclass
class Schedules:
    """Picks schedules while a plan is made.

    times: what is known of a problem and its schedules. open: problems with a choice of which
    nothing is known. used: the times that decided; with them another process makes the same plan.
    measuring: whether what is open is going to be measured.
    """

    times: Callable[[Any, Sequence[Any]], Times] = lambda problem, schedules: {}
    open: dict[str, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)
    used: dict[str, Times] = field(default_factory=dict)
    measuring: bool = False

    @classmethod
    def recorded(cls, used: object) -> Schedules:
        """Those that pick as the ones did whose `used` this was."""
        known = used if isinstance(used, Mapping) else {}
        return cls(lambda problem, schedules: checked(known.get(problem.text)))

    def pick(self, problem: Problem, schedules: Sequence[S]) -> tuple[S, str]:
        """The schedule to take, and a note that says why; no note where there is no choice."""
        predicted = min(schedules, key=lambda s: s.cost)
        if len(schedules) == 1:
            return predicted, ""
        if any(s.varies for s in schedules):
            return predicted, f"{predicted.text}, by the cost model: sizes vary"
        known = self.times(problem, schedules)
        times = {s.text: known[s.text] for s in schedules if s.text in known} if known else {}
        if not times:
            self.open[problem.text] = problem, tuple(schedules)
            return predicted, f"{predicted.text}, by the cost model"
        self.used[problem.text] = times
        by_text = {s.text: s for s in schedules}
        best = by_text[min(times, key=lambda t: times[t])]
        if times.get(predicted.text, math.inf) <= times[best.text] * MARGIN:
            best = predicted
        return best, _why(best, [by_text[t] for t in times], times)


def _why(best: Schedule, measured: Sequence[Schedule], times: Times) -> str:
    """The pick's time, and the best one of each other method; of its own where there is none."""
    others = [s for s in measured if s.name != best.name] or [s for s in measured if s is not best]
    said, names = [f"{best.text}: {_ms(times[best.text])} measured"], set()
    for s in sorted(others, key=lambda s: times[s.text]):
        if s.name not in names:
            said.append(f"{s.text} {_ms(times[s.text])}")
        names.add(s.name)
    return ", ".join(said)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# ------------------------------------------------------------------ what is known


class Database(ABC):
    """Times of schedules on this machine, kept between processes."""

    def __init__(self) -> None:
        self.store = Store(cache_dir())
        self._read: dict[str, Times] = {}

    @cached_property
    @abstractmethod
    def machine(self) -> dict[str, Any]:
        """What of the machine decides times; JSON data, kept with them for people."""

    def code(self, schedules: Sequence[Any]) -> Any:
        """What of the schedules' code does, as JSON data."""
        return None

    def times(self, problem: Problem, schedules: Sequence[Any]) -> Times:
        """What was measured of a problem; nothing where its entry is absent or damaged."""
        key = self.key(problem, schedules)
        if key not in self._read:
            entry = self.store.load_json(KIND, key) or {}
            known = checked(entry.get("seconds")) if entry.get("problem") == problem.text else {}
            self._read[key] = known
        return self._read[key]

    def add(self, problem: Problem, schedules: Sequence[Any], times: Times) -> None:
        """Keep times; where the folder cannot be written, as long as this object lives."""
        key = self.key(problem, schedules)
        self._read[key] = dict(times)
        entry = {"problem": problem.text, "seconds": self._read[key], **self.machine}
        self.store.save_json(KIND, key, entry)

    def key(self, problem: Problem, schedules: Sequence[Any]) -> str:
        """A hash of all that decides the times."""
        parts = [self.machine, self.code(schedules), problem.text]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def checked(times: object) -> Times:
    """Times that another process wrote, or none where they cannot be that."""
    if not isinstance(times, Mapping):
        return {}
    sound = all(
        isinstance(k, str) and isinstance(v, float) and 0 < v < math.inf for k, v in times.items()
    )
    return dict(times) if sound else {}


def stored() -> tuple[Path, int]:
    """Where the database lies, and of how many problems it knows times."""
    folder = Store(cache_dir()).root / KIND
    return folder, sum(1 for _ in folder.glob("*.json"))


# ------------------------------------------------------------------ measuring


def tune(
    problems: Iterable[tuple[Any, Sequence[Any]]], database: Database,
    measure: Callable[[Any, list[Any]], Times],
) -> None:  # fmt: skip
    """Measure the schedules of every problem and keep their times, one problem after the other.

    measure: gives the times of those schedules of a problem that are worth it. An interrupt loses
    the problem at hand and no more. Shows its progress on a terminal.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    shown = track(
        list(problems), "measuring schedules", console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    for problem, schedules in shown:
        database.add(problem, schedules, measure(problem, prune(schedules)))


def prune(schedules: Sequence[S]) -> list[S]:
    """Those worth measuring, best prediction first: near it, and the best of every method before
    a second of any."""
    ordered = sorted(schedules, key=lambda s: s.cost)
    near = [s for s in ordered if s.cost <= FACTOR * ordered[0].cost]
    first = {s.name: s for s in reversed(near)}
    near.sort(key=lambda s: first[s.name] is not s)
    return near[:MOST]


def race(
    runs: Mapping[str, Callable[[], None]], clock: Callable[[], float], seconds: float = BUDGET,
    timed: Callable[[Callable[[], None]], float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The least time of each run, in seconds.

    All take turns, so that what else the machine does meets them alike, and the memory of one
    drives that of the others out of the near caches, as the layers of a model do. A run that is
    clearly slower takes no further turns. The second round is the first that is warm and always
    taken, others while `seconds` last; where the first alone takes half of them, the runs at the
    end have no turn and no time.

    timed: the time of one run; None: what passes on the clock meanwhile.
    """

    def passed(run: Callable[[], None]) -> float:
        began = clock()
        run()
        return clock() - began

    timed = timed or passed
    started, least = clock(), dict.fromkeys(runs, math.inf)
    left = list(runs)
    for turn in range(ROUNDS):
        for i, name in enumerate(left):
            if turn == 0 and i >= FEWEST and clock() - started > seconds / 2:
                break
            least[name] = min(least[name], timed(runs[name]))
        bound = min(least.values()) * (WORSE if turn else FAR)
        left = [name for name in left if least[name] <= bound]
        if turn and (len(left) == 1 or clock() - started > seconds):
            break
    return {name: time for name, time in least.items() if time < math.inf}


__all__ = [
    "Database", "Problem", "Schedule", "Schedules", "Times", "checked", "prune", "race", "stored",
    "tune",
]  # fmt: skip
