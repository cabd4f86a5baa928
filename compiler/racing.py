"""`effc race`: a plan's kernels, or one in PTX, looked at for races by codegen/ptx/race.py.

A model's plan runs on the CPU with random inputs, as target ptx-host runs it. Before each launch
the same kernel runs, on copies of the operands that the launch gets, under every schedule.
"""

from __future__ import annotations

import ctypes
import linecache
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from effc.backends.plan.plan import Plan
from effc.backends.plan.sizes import Numbers
from effc.backends.plan.steps import KernelCall
from effc.backends.ptx_host import HostProgram, PtxHostBackend
from effc.codegen.ptx import Kernel, Report, load, race
from effc.codegen.triton.compile import Compiled
from effc.ir import Graph, InputError, OptionError, nearest
from effc.ir.types import DTYPES
from effc.rerun import environment, random_inputs

__all__ = ["Raced", "race_graph", "race_ptx", "race_saved"]

HIDDEN = 5  # numbers of a host call before the kernel's own: grid, scheduler, word of failures
HEAD = 3  # words of a call before its pointers: function, how many pointers, how many numbers


@dataclass(frozen=True)
class Raced:
    """A launch that was looked at. node: the value it computes."""

    node: str
    report: Report


def race_saved(
    path: Path, only: str | None = None, sizes: Mapping[str, int | float] | None = None,
    tell: Callable[[Raced], None] = lambda _: None, rtol: float = 0.0, atol: float = 0.0,
) -> list[Raced]:  # fmt: skip
    """Race the launches of a saved model's plan for a GPU; `only` those of one kernel.

    sizes: numbers for the model's symbols, where those it was compiled with are too large. tell
    gets each result at once. Raises OptionError for a kernel that the plan does not launch.
    """
    from effc.artefact import read_artefact
    from effc.gpu import PRECISION, gpu_stages

    a = read_artefact(path)
    captured = a.stages[0].graph
    graph = gpu_stages(captured, a.facts["pipeline"])[-1].graph
    precision = a.facts["machine"].get(PRECISION)
    env = environment(graph, sizes or {}, a.report.sizes)
    inputs = random_inputs(graph, env)
    return race_graph(graph, inputs, captured, only, precision, tell, (rtol, atol))


def race_graph(
    graph: Graph, inputs: Sequence[Any], captured: Graph | None = None, only: str | None = None,
    precision: str | None = None, tell: Callable[[Raced], None] = lambda _: None,
    tolerance: tuple[float, float] = (0.0, 0.0),
) -> list[Raced]:  # fmt: skip
    """Race the launches of a graph's plan for a GPU, on one call with `inputs`.

    tolerance: relative and absolute, of results under two schedules.
    """
    backend = _Backend()
    executable = backend.compile(
        graph, {"captured": captured, "float32_matmul_precision": precision}
    )
    names = [s.kernel.name for s in executable.plan.steps if isinstance(s, KernelCall)]
    if only is not None and only not in names:
        raise OptionError(f"the plan launches no kernel {only!r}", fix=nearest(only, names))
    program = executable.program
    assert isinstance(program, _Program)
    found: list[Raced] = []

    def keep(raced: Raced) -> None:
        found.append(raced)
        tell(raced)

    program.watch = _Watch(backend.made, executable.plan, inputs, only, keep, tolerance)
    executable.bind()(inputs)
    return found


# ------------------------------------------------------------------ a plan that is watched


class _Program(HostProgram):
    """Runs call after call, and shows each before it runs."""

    watch: _Watch

    @cached_property
    def run(self) -> Any:
        native = super().run

        def run(words: int, calls: int, addresses: int, threads: int) -> None:
            for _ in range(calls):
                data = (ctypes.c_int64 * HEAD).from_address(words)
                self.watch.look(words, addresses)
                native(words, 1, addresses, threads)
                words += 8 * (HEAD + 2 * data[1] + data[2])

        return run


class _Backend(PtxHostBackend):
    program = _Program

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}  # kernels of any language, compiled

    def compiled(self, kernels: Mapping[str, Any]) -> list[Any]:
        made = super().compiled(kernels)
        self.made |= {c.kernel.name: c for c in made}
        return made


class _Watch:
    """Races launches as they come, in the plan's order."""

    def __init__(
        self, made: Mapping[str, Any], plan: Plan, inputs: Sequence[Any], only: str | None,
        keep: Callable[[Raced], None], tolerance: tuple[float, float],
    ) -> None:  # fmt: skip
        from effc.backends.plan.binding import Binder

        self.made, self.only, self.keep, self.tolerance = made, only, keep, tolerance
        self.calls: Iterator[KernelCall] = (s for s in plan.steps if isinstance(s, KernelCall))
        self.numbers = Numbers(plan.sizes, Binder(plan.graph)(inputs))
        self.kernels: dict[str, Kernel] = {}

    def look(self, words: int, addresses: int) -> None:
        """words: where those of the call are; addresses: where the table of memory is."""
        call = next(self.calls)
        name = call.kernel.name
        if self.only not in (None, name):
            return
        _, pointers, count = (ctypes.c_int64 * HEAD).from_address(words)
        numbers = list((ctypes.c_int64 * count).from_address(words + 8 * (HEAD + 2 * pointers)))
        grid, own = numbers[:3], numbers[HIDDEN:]
        memory = self._memory(call, addresses)
        args = [memory[ref.root.number][self.numbers(ref.offset) :] for ref in call.refs]
        rtol, atol = self.tolerance
        report = race(self._kernel(name), grid, [*args, *own], rtol=rtol, atol=atol)
        self.keep(Raced(call.launch.result, report))

    def _kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            c = self.made[name]
            if isinstance(c, Compiled):  # Triton calls the file of a kernel by its name
                lines = c.source.splitlines(keepends=True)
                linecache.cache[f"<{name}>"] = len(c.source), None, lines, f"<{name}>"
            self.kernels[name] = Kernel(
                load(c.assembly).syntax, name, shared=c.shared, block=c.threads,
                scratch=(c.scratch, 0), names=[p.name for p in c.kernel.pointers],
            )  # fmt: skip
        return self.kernels[name]

    def _memory(self, call: KernelCall, addresses: int) -> dict[int, torch.Tensor]:
        """The memory of each root that the call touches, as a row of elements. Roots that lie at
        one address, where a kernel overwrites what it read, share a storage."""
        roots = {ref.root.number: ref.root for ref in call.refs}
        sizes, at = {}, {}
        for number, root in roots.items():
            shape, strides = self.numbers((root.shape, root.strides))
            extent = sum((n - 1) * s for n, s in zip(shape, strides)) + 1 if 0 not in shape else 0
            at[number] = ctypes.c_int64.from_address(addresses + 8 * number).value
            size = extent * root.dtype.bits // 8
            sizes[at[number]] = max(size, sizes.get(at[number], 0))
        held = {a: _bytes(a, n) for a, n in sizes.items()}
        return {n: held[at[n]].view(r.dtype.torch) for n, r in roots.items()}  # type: ignore[arg-type]


def _bytes(address: int, size: int) -> torch.Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


# ------------------------------------------------------------------ PTX


ARGUMENT = re.compile(r"(?P<dtype>[a-z]+\d+|bool)\[(?P<size>\d+(?:,\d+)*)\]")


def race_ptx(
    path: Path, entry: str | None, grid: Sequence[int], block: Sequence[int] | None,
    arguments: Sequence[str], shared: int = 0, rtol: float = 0.0, atol: float = 0.0,
) -> Report:  # fmt: skip
    """Race one launch of an entry of a PTX file.

    arguments: one a parameter: "f32[4,64]" is a tensor of random values, anything else a number;
    with a point in it, a float. Missing last pointers are null. Raises PtxError for text that
    cannot be read, InputError for arguments that do not fit.
    """
    module = load(path.read_text(encoding="utf-8"))
    kernel = module[entry] if entry else module.only()
    values: list[Any] = [_argument(text, seed) for seed, text in enumerate(arguments)]
    lacking = kernel.params[len(values) :]
    if not values or any(p.size != 8 for p in lacking):
        wanted = ", ".join(f".{p.type} {p.name}" for p in kernel.params)
        raise InputError(
            f"kernel {kernel.name} takes {len(kernel.params)} arguments, {len(values)} were given",
            why=f"its parameters are {wanted}",
            fix="give one --arg for each: f32[1024] is a tensor, 1024 a number",
        )
    values += [None] * len(lacking)
    return race(
        kernel, list(grid), values, block=block, shared=shared or None, rtol=rtol, atol=atol
    )


def _argument(text: str, seed: int) -> Any:
    if (found := ARGUMENT.fullmatch(text)) and found["dtype"] in DTYPES:
        generator = torch.Generator().manual_seed(seed)
        shape = [int(n) for n in found["size"].split(",")]
        dtype = DTYPES[found["dtype"]].torch
        return torch.randn(shape, generator=generator).to(dtype)
    try:
        return float(text) if "." in text else int(text)
    except ValueError as e:
        raise InputError(
            f"not an argument: {text!r}", fix="f32[1024] is a tensor, 1024 a number, 0.5 a float"
        ) from e
