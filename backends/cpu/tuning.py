"""Which schedule computes a product: the one that measured fastest here, else the cost model's.

A problem is a product with all its sizes; a schedule is a core with the numbers that are free to
choose. `Schedules` picks while a plan is made. `tune` measures the problems it met: the real core
on buffers of the real sizes, with an epilogue that only stores. What follows a product is the same
for every schedule, so equal products share one measurement whatever follows them.

Times are kept in the cache folder (codegen/store.py), one small file a problem, under all that
decides them: CPU, compiler, the cores' sources, the problem and the number of threads. A schedule
never changes a result's meaning, so a wrong time costs speed and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch

from effc.codegen.build import Unit
from effc.codegen.compile import header_digest
from effc.codegen.cpp.kernel import Kernel, unit
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.products import epilogue
from effc.codegen.library import Library
from effc.codegen.store import Store, cache_dir
from effc.codegen.toolchain import Toolchain, find_toolchain
from effc.ir import DType
from effc.ir.symbols import Dim

from ..plan.sizes import has_symbols
from .features import CpuFeatures, detect

KIND = "schedules"  # of entries in the cache folder
FACTOR, MOST = 2.0, 6  # schedules that are measured: so near the best prediction, and so many
MARGIN = 1.05  # below it a difference is noise, and the cost model's pick stays
BUDGET = 0.1  # seconds a problem's rounds may take, beyond two of FEWEST schedules
ROUNDS, FEWEST = 12, 3
FAR, WORSE = 3.0, 1.2  # times the best time, after one round and later, that end a schedule's turns

Times = Mapping[str, float]  # text of a schedule -> seconds
Builder = Callable[[Sequence[Unit]], Sequence[Library]]


@dataclass(frozen=True)
class Schedule:
    """One way to compute a product.

    name: of the method; detail: what else is chosen. cost: predicted, in any unit that the
    schedules of a problem share. numbers: what the core takes between the epilogue's address and
    the epilogue's own. reads: element type and count of all that the core reads.
    """

    name: str
    core: Kernel
    numbers: tuple[Dim, ...]
    cost: float
    reads: tuple[tuple[DType, Dim], ...]
    detail: str = ""

    @property
    def text(self) -> str:
        return f"{self.name} {self.detail}".rstrip()


@dataclass(frozen=True)
class Problem:
    """A product as far as its time depends on it.

    text: its op, element type, sizes and strides. The result has rows x columns elements of dtype.
    """

    text: str
    rows: Dim
    columns: Dim
    dtype: DType


@dataclass
class Schedules:
    """Picks schedules while a plan is made.

    times: what is known of a problem and its schedules. open: problems with a choice of which
    nothing is known. used: the times that decided; with them another process makes the same plan.
    """

    times: Callable[[Problem, Sequence[Schedule]], Times] = lambda problem, schedules: {}
    open: dict[str, tuple[Problem, tuple[Schedule, ...]]] = field(default_factory=dict)
    used: dict[str, Times] = field(default_factory=dict)

    @classmethod
    def recorded(cls, used: object) -> Schedules:
        """Those that pick as the ones did whose `used` this was."""
        known = used if isinstance(used, Mapping) else {}
        return cls(lambda problem, schedules: checked(known.get(problem.text)))

    def pick(self, problem: Problem, schedules: Sequence[Schedule]) -> tuple[Schedule, str]:
        """The schedule to take, and a note that says why; no note where there is no choice."""
        predicted = min(schedules, key=lambda s: s.cost)
        if len(schedules) == 1:
            return predicted, ""
        if has_symbols((problem.rows, *(s.numbers for s in schedules))):
            return predicted, f"{predicted.text}, by the cost model: sizes vary"
        known = self.times(problem, schedules)
        times = {s.text: known[s.text] for s in schedules if s.text in known}
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


class Database:
    """Times of schedules on this machine with so many threads, kept between processes."""

    def __init__(self, threads: int) -> None:
        self.threads, self.store = threads, Store(cache_dir())
        self._read: dict[str, Times] = {}

    def times(self, problem: Problem, schedules: Sequence[Schedule]) -> Times:
        """What was measured of a problem; nothing where its entry is absent or damaged."""
        key = self.key(problem, schedules)
        if key not in self._read:
            entry = self.store.load_json(KIND, key) or {}
            known = checked(entry.get("seconds")) if entry.get("problem") == problem.text else {}
            self._read[key] = known
        return self._read[key]

    def add(self, problem: Problem, schedules: Sequence[Schedule], times: Times) -> None:
        """Keep times; where the folder cannot be written, as long as this object lives."""
        key = self.key(problem, schedules)
        self._read[key] = dict(times)
        entry = {"problem": problem.text, "seconds": self._read[key], **self.machine}
        self.store.save_json(KIND, key, entry)

    def key(self, problem: Problem, schedules: Sequence[Schedule]) -> str:
        """A hash of all that decides the times."""
        cores = {s.core.name: hashlib.sha256(s.core.code.encode()).hexdigest() for s in schedules}
        parts = [self.machine, header_digest(), cores, problem.text]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def machine(self) -> dict[str, Any]:
        cpu, toolchain = detect(), find_toolchain()
        facts: dict[str, Any] = {"cpu": platform.machine()}
        if isinstance(cpu, CpuFeatures):
            facts = {"cpu": cpu.model, "capability": cpu.capability()}
            facts["caches"] = [cpu.l1d, cpu.l2, cpu.l3]
        compiler = toolchain.identity if isinstance(toolchain, Toolchain) else ""
        return {**facts, "compiler": compiler, "threads": self.threads}


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
    problems: Iterable[tuple[Problem, tuple[Schedule, ...]]], database: Database, build: Builder
) -> None:
    """Measure the schedules of every problem and keep their times, one problem after the other.

    An interrupt loses the problem at hand and no more. Shows its progress on a terminal. Raises
    BuildError where a core does not build.
    """
    from rich.console import Console
    from rich.progress import track

    work = [(p, s, prune(s)) for p, s in problems]
    kernels = {s.core.name: s.core for _, _, some in work for s in some}
    for problem, _, some in work:
        kernels.update((k.name, k) for k in (storing(problem, len(s.reads))[0] for s in some))
    libraries = build([Unit(unit([k]), k.name) for k in kernels.values()])
    functions = {
        name: library.function(name, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        for name, library in zip(kernels, libraries, strict=True)
    }
    console = Console(stderr=True)
    shown = track(
        work, "measuring schedules", console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    # A lone thread's own time does not count what else the machine does meanwhile.
    clock = thread_time if database.threads == 1 else perf_counter
    for problem, schedules, some in shown:
        runs = calls(problem, some, functions, database.threads)
        database.add(problem, schedules, race(runs, clock))


def prune(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Those worth measuring, best prediction first: near it, and the best of every method before
    a second of any."""
    ordered = sorted(schedules, key=lambda s: s.cost)
    near = [s for s in ordered if s.cost <= FACTOR * ordered[0].cost]
    first = {s.name: s for s in reversed(near)}
    near.sort(key=lambda s: first[s.name] is not s)
    return near[:MOST]


def storing(problem: Problem, reads: int) -> tuple[Kernel, tuple[Dim, ...]]:
    """An epilogue that stores sums as they are, and its numbers."""
    nest = Nest((problem.rows, problem.columns), (Operand(problem.dtype, (problem.columns, 1)),))
    made = epilogue(nest, [], lambda statements, total: total, first=1 + reads)
    return made.kernel, made.numbers


def calls(
    problem: Problem, schedules: Sequence[Schedule], functions: Mapping[str, Any], threads: int
) -> dict[str, Callable[[], None]]:
    """A call of each schedule, on memory that those which read equally much of it share."""
    held: dict[Any, torch.Tensor] = {}

    def memory(place: int, dtype: DType, count: Any) -> torch.Tensor:
        key = place, dtype, count
        if key not in held:
            some = torch.rand(4096).to(dtype.torch)
            held[key] = some.repeat(-(-max(1, count) // 4096))
        return held[key]

    def call(s: Schedule) -> Callable[[], None]:
        stored = memory(0, problem.dtype, problem.rows * problem.columns)
        buffers = [stored, *(memory(i, *read) for i, read in enumerate(s.reads, 1))]
        pointers = np.array([b.data_ptr() for b in buffers], dtype=np.int64)
        kernel, more = storing(problem, len(s.reads))
        address = ctypes.cast(functions[kernel.name], ctypes.c_void_p).value
        numbers = np.array([address, *s.numbers, *more], dtype=np.int64)
        core, p, n = functions[s.core.name], pointers.ctypes.data, numbers.ctypes.data

        def run(keep: object = (buffers, pointers, numbers)) -> None:
            core(p, n, threads)

        return run

    return {s.text: call(s) for s in schedules}


def race(
    runs: Mapping[str, Callable[[], None]], clock: Callable[[], float], seconds: float = BUDGET
) -> dict[str, float]:
    """The least time of each run, in seconds.

    All take turns, so that what else the machine does meets them alike, and the memory of one
    drives that of the others out of the near caches, as the layers of a model do. A run that is
    clearly slower takes no further turns. The second round is the first that is warm and always
    taken, others while `seconds` last; where the first alone takes half of them, the runs at the
    end have no turn and no time.
    """
    started, least = clock(), dict.fromkeys(runs, math.inf)
    left = list(runs)
    for turn in range(ROUNDS):
        for i, name in enumerate(left):
            if turn == 0 and i >= FEWEST and clock() - started > seconds / 2:
                break
            began = clock()
            runs[name]()
            least[name] = min(least[name], clock() - began)
        bound = min(least.values()) * (WORSE if turn else FAR)
        left = [name for name in left if least[name] <= bound]
        if turn and (len(left) == 1 or clock() - started > seconds):
            break
    return {name: time for name, time in least.items() if time < math.inf}


__all__ = ["Database", "Problem", "Schedule", "Schedules", "stored", "tune"]
