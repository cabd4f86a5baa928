"""Schedules of products on a CPU: what there is to choose, what decides times, how they are taken.

A problem is a product with all its sizes; a schedule is a core with the numbers that are free to
choose. What is measured is the real core on buffers of the real sizes, with an epilogue that only
stores. What follows a product is the same for every schedule, so equal products share one
measurement whatever follows them. Times are kept under CPU, compiler, the cores' sources, the
problem and the number of threads (backends/plan/tuning.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from effc.codegen.toolchain import Toolchain, find_toolchain
from effc.ir import DType
from effc.ir.symbols import Dim

from ..plan import tuning
from ..plan.sizes import has_symbols
from ..plan.tuning import Times, prune, race
from .features import CpuFeatures, detect

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

    @property
    def varies(self) -> bool:
        return has_symbols(self.numbers)


@dataclass(frozen=True)
class Problem:
    """A product as far as its time depends on it.

    text: its op, element type, sizes and strides. The result has rows x columns elements of dtype.
    """

    text: str
    rows: Dim
    columns: Dim
    dtype: DType


class Database(tuning.Database):
    """Times of schedules on this machine with so many threads."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads

    def code(self, schedules: Sequence[Schedule]) -> Any:
        cores = {s.core.name: hashlib.sha256(s.core.code.encode()).hexdigest() for s in schedules}
        return [header_digest(), cores]

    @cached_property
    def machine(self) -> dict[str, Any]:
        cpu, toolchain = detect(), find_toolchain()
        facts: dict[str, Any] = {"cpu": platform.machine()}
        if isinstance(cpu, CpuFeatures):
            facts = {"cpu": cpu.model, "capability": cpu.capability()}
            facts["caches"] = [cpu.l1d, cpu.l2, cpu.l3]
        compiler = toolchain.identity if isinstance(toolchain, Toolchain) else ""
        return {**facts, "compiler": compiler, "threads": self.threads}


# ------------------------------------------------------------------ measuring


def tune(
    problems: Iterable[tuple[Problem, tuple[Schedule, ...]]], database: Database, build: Builder
) -> None:
    """Measure the schedules of every problem and keep their times, one problem after the other.

    Raises BuildError where a core does not build.
    """
    work = list(problems)
    kernels: dict[str, Kernel] = {}
    for problem, schedules in work:
        for s in prune(schedules):
            kernels[s.core.name] = s.core
            end, _ = storing(problem, len(s.reads))
            kernels[end.name] = end
    libraries = build([Unit(unit([k]), k.name) for k in kernels.values()])
    functions = {
        name: library.function(name, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        for name, library in zip(kernels, libraries, strict=True)
    }
    # A lone thread's own time does not count what else the machine does meanwhile.
    clock = thread_time if database.threads == 1 else perf_counter

    def measure(problem: Problem, schedules: list[Schedule]) -> Times:
        return race(calls(problem, schedules, functions, database.threads), clock)

    tuning.tune(work, database, measure)


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


__all__ = ["Database", "Problem", "Schedule", "tune"]
