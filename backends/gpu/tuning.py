"""Schedules of GPU kernels, measured on the device: their launches, on memory of their own.

A problem is what one choice of a plan computes (lowering.py): the kernels of the cost model's pick,
text and all, so also what is fused with a product, and the numbers they are launched with. Sizes
that only a call knows are those that the cost model guesses. Times are kept under the device, its
driver, what compiles its kernels, and the problem (backends/plan/tuning.py).

A candidate that does not compile, load, launch or fit into memory is left out with a warning; the
others are raced without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from effc.codegen import cuda, triton
from effc.codegen.gpu.compile import AnyCompiled, compile_kernels
from effc.codegen.library import Library
from effc.ir import EffcError
from effc.ir.symbols import free_symbols

from ..plan import tuning
from ..plan.memory import Root
from ..plan.sizes import Numbers
from ..plan.steps import KernelCall
from ..plan.tuning import Times, race
from ..plan.words import Words
from .device import Gpu
from .driver import Function
from .lowering import Candidate, Problem, launches
from .program import launching


class Database(tuning.Database):
    """Times of candidates on a device of this machine.

    compilers: asks for what compiles the candidates, with versions.
    """

    def __init__(self, gpu: Gpu, compilers: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self.gpu, self.compilers = gpu, compilers

    @cached_property
    def machine(self) -> dict[str, Any]:
        return {**self.gpu.facts, **self.compilers(), "effc": _code()}


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of what the text of kernels is made by, and of what they include."""
    digest = hashlib.sha256()
    for package in (triton, cuda):
        for path in sorted(Path(package.__path__[0]).iterdir()):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()


class Bench:
    """Measures candidates on a device. What it loads and allocates is given back by `close`."""

    def __init__(self, gpu: Gpu, native: Library) -> None:
        self.gpu, self.native = gpu, native
        self.before = set(gpu.driver.loaded)
        self.compiled: list[AnyCompiled] = []

    def measure(self, problem: Problem, candidates: list[Candidate]) -> Times:
        """The times of the candidates that run here."""
        runs: dict[str, Callable[[], None]] = {}
        left_out: dict[str, str] = {}
        memory = Memory(self.gpu)
        try:
            for c in candidates:
                try:
                    runs[c.text] = run = self._run(problem, c, memory)
                    self.gpu.seconds(run)  # whatever is wrong with it shows here, not in the race
                except (EffcError, torch.OutOfMemoryError) as e:
                    runs.pop(c.text, None)
                    left_out[c.text] = _first(e)
            return race(runs, perf_counter, timed=self.gpu.seconds) if runs else {}
        except torch.OutOfMemoryError as e:  # of what a race needs itself
            left_out |= dict.fromkeys(runs, _first(e))
            return {}
        finally:
            memory.free()
            if left_out:
                shown = "; ".join(f"{name}: {why}" for name, why in left_out.items())
                warnings.warn(
                    f"effc: of {len(candidates)} schedules {len(left_out)} could not be measured "
                    f"on {self.gpu.name}: {shown}",
                    RuntimeWarning, stacklevel=2,
                )  # fmt: skip

    def _run(self, problem: Problem, candidate: Candidate, memory: Memory) -> Callable[[], None]:
        """What launches the candidate, on memory of the sizes it has."""
        calls, sizes = launches(problem, candidate)
        made = compile_kernels({c.kernel.name: c.kernel for c in calls}.values(), self.gpu.target)
        for c in made:
            if self.gpu.shared and c.shared > self.gpu.shared:
                raise EffcError(f"{c.shared} bytes of shared memory, a block has {self.gpu.shared}")
        functions = {c.kernel.name: self.gpu.driver.load(c, self.gpu.index) for c in made}
        self.compiled += made
        roots = list(dict.fromkeys(ref.root for call in calls for ref in call.refs))
        varying = free_symbols((*sizes.index, *(root.shape for root in roots)))
        numbers = Numbers(sizes, {**dict.fromkeys(varying, problem.guess), **problem.known})
        table = (ctypes.c_int64 * len(roots))(*(memory.of(root, numbers) for root in roots))
        words = Words(_numbered(calls, roots), _address(functions), sizes).fill(numbers)
        launch = launching(self.native, self.gpu)
        count, kept = len(calls), (functions, words, table)

        def run() -> None:
            launch(kept[1].ctypes.data, count, ctypes.addressof(kept[2]), self.gpu.stream())

        return run

    def close(self) -> None:
        """Unload what nothing but the measuring loaded."""
        for c in self.compiled:
            if (self.gpu.index, f"{c.kernel.name} {c.target}") not in self.before:
                self.gpu.driver.unload(c, self.gpu.index)


class Memory:
    """Tensors behind the roots of one problem, the same for all candidates that read them."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.held: dict[Root, torch.Tensor] = {}

    def of(self, root: Root, numbers: Numbers) -> int:
        """Address of memory for a root. Numbers in it are small; indices are all 0."""
        if root not in self.held:
            count = max(1, int(numbers(root.elements)))
            dtype: Any = root.dtype.torch
            made = torch.empty(count, dtype=dtype, device=self.gpu.place)
            self.held[root] = made.uniform_(-1, 1) if dtype.is_floating_point else made.zero_()
        return self.held[root].data_ptr()

    def free(self) -> None:
        """Back to the device, not only to torch's cache, where a model may need it in one piece."""
        self.held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _numbered(calls: Sequence[KernelCall], roots: Sequence[Root]) -> list[KernelCall]:
    """The calls on roots that are numbered as they stand in a table of their own."""
    ours = {root: replace(root, number=i, pins=set()) for i, root in enumerate(roots)}
    return [
        KernelCall(c.kernel, tuple(r.with_(root=ours[r.root]) for r in c.refs), c.numbers, c.launch)
        for c in calls
    ]


def _address(functions: dict[str, Function]) -> Callable[[Any], int]:
    return lambda kernel: ctypes.addressof(functions[kernel.name])


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


__all__ = ["Bench", "Database"]
