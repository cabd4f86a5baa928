"""The ptx-host target: the plan of a GPU, its kernels executed on the CPU.

Triton compiles each kernel for sm_80, as for a GPU; the PTX becomes C++ on a small runtime that
gives it threads, barriers, shared memory and tensor-core instructions. So what a GPU would run is
what is tested, on a machine without one. Plans, memory and calls are those of the cpu backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from effc.codegen.cpp.kernel import Kernel
from effc.codegen.gpu.compile import AnyCompiled, compile_kernels
from effc.codegen.ptx.kernel import load
from effc.codegen.ptx.plan import flags, plan_function, scheduler_source
from effc.codegen.triton.compile import target, triton_version
from effc.ir import EffcError, Graph, No, OptionError, UnsupportedError, no

from ..base import Options
from ..cpu import CpuBackend, CpuProgram
from ..gpu.lowering import GPU
from ..plan.executable import PlanExecutable
from ..plan.plan import Plan
from ..plan.steps import KernelCall
from ..plan.tuning import Schedules

ARCH = target("cuda:sm_80")  # what the runtime has the instructions of


@dataclass(frozen=True)
class HostKernel(Kernel):
    """The C++ of a translated kernel. shown: the text that it was generated from."""

    shown: str = ""

    @property
    def source(self) -> str:
        return self.shown


class _Failed:
    """A word in which a launch that gave up leaves the address of its kernel's name."""

    def __init__(self) -> None:
        self.word = ctypes.c_int64()
        self.address = ctypes.addressof(self.word)

    def take(self) -> str | None:
        found, self.word.value = self.word.value, 0
        return ctypes.string_at(found).decode() if found else None


FAILED = _Failed()
SCHEDULER = Kernel("effc_simt_launch", scheduler_source(), alone=True, flags=flags())


class HostProgram(CpuProgram):
    """A program whose launches may give up: a trap, a failed assert, warps that wait for ever."""

    @cached_property
    def run(self) -> Any:
        native = super().run

        def run(*args: int) -> None:
            native(*args)
            if (name := FAILED.take()) is not None:
                raise EffcError(
                    f"kernel {name} did not come to its end on the CPU",
                    why="it trapped, failed an assert, or its threads wait for each other",
                    fix=f"effc race {name} says where",
                )

        return run


class PtxHostBackend(CpuBackend):
    """A GPU's kernels on CPU tensors: slow, and right where the GPU's are."""

    name, target, program = "ptx-host", GPU, HostProgram

    def compile(self, graph: Graph, options: Any = None) -> PlanExecutable:
        options = Options.of(options)
        if options.tune:
            raise OptionError(
                f"target {self.name!r} takes no tune=True",
                why="it executes a GPU's kernels on the CPU, where their times say nothing",
                fix="drop tune=True",
            )
        return super().compile(graph, options)

    def _plan(
        self, graph: Graph, options: Options, without: No | None, schedules: Schedules | None
    ) -> Plan:
        return super()._plan(graph, options, without, None)  # by the cost model alone

    def compiled(self, kernels: Mapping[str, Any]) -> list[AnyCompiled]:
        """A plan's kernels compiled for ARCH."""
        return compile_kernels(kernels.values(), ARCH)

    def prepare(self, plan: Plan) -> None:
        hosted = {c.kernel.name: host_kernel(c) for c in self.compiled(plan.kernels)}
        for step in plan.steps:
            if isinstance(step, KernelCall):
                step.kernel = hosted[step.kernel.name]
                step.numbers = (*step.numbers[:3], SCHEDULER, FAILED.address, *step.numbers[3:])

    def _cannot_build(self, options: Options) -> No | None:
        try:
            triton_version()
        except UnsupportedError as e:
            return no("{}", e.what)
        return super()._cannot_build(options)


@lru_cache(maxsize=512)
def host_kernel(compiled: AnyCompiled) -> HostKernel:
    """The kernel as a plan on the CPU calls it: numbers of a call are the grid, then its own."""
    kernel = load(compiled.assembly)[compiled.kernel.name]
    text = plan_function(
        kernel, threads=compiled.threads, shared=compiled.shared,
        pointers=len(compiled.kernel.pointers), numbers=len(compiled.kernel.numbers),
    )  # fmt: skip
    return HostKernel(kernel.name, text, alone=True, flags=flags(), shown=compiled.kernel.source)


__all__ = ["PtxHostBackend", "host_kernel"]
