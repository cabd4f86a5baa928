"""The cpu backend: our C++ kernels, oneDNN and MKL where they are best, ATen for the rest."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from effc.codegen import cpp
from effc.codegen.build import BuildError, Unit, build_many
from effc.codegen.cpp.kernel import unit
from effc.codegen.toolchain import MissingToolchain, Toolchain, find_toolchain
from effc.ir import Graph, No, Op, no
from effc.ir.rewrite import Answer

from ..base import Backend, Options
from .executable import CpuExecutable
from .features import CpuFeatures, detect
from .lowering import claim
from .plan import Plan, Program
from .planner import make_plan

__all__ = ["CpuBackend"]

RUNNER = Path(cpp.__file__).parent / "runner.cpp"
PER_UNIT = 12  # kernels a translation unit: enough to share the header, few enough for all cores


class CpuBackend(Backend):
    """x86-64 and anything else with a C++ compiler and an OpenMP runtime."""

    name = "cpu"

    def supports(self, node: Op) -> Answer:
        return claim(node)

    def compile(self, graph: Graph, options: Any = None) -> CpuExecutable:
        options = Options.of(options)
        without = self._cannot_build(options)
        plan = make_plan(graph, options, without)
        try:
            program = build(plan, options)
        except BuildError as e:
            warnings.warn(f"effc: {e}", RuntimeWarning, stacklevel=2)
            plan = make_plan(graph, options, no("kernels do not build: {}", e.what))
            program = build(plan, options)
        return CpuExecutable(plan, program, graph)

    def plan(self, graph: Graph, options: Any = None) -> CpuExecutable:
        """Plan and kernel text, nothing built: what the null backend shows."""
        return CpuExecutable(make_plan(graph, Options.of(options)), None, graph)

    def _cannot_build(self, options: Options) -> No | None:
        if not options.kernels:
            return no("kernels are switched off")
        found = find_toolchain()
        return no("no C++ compiler: {}", found) if isinstance(found, MissingToolchain) else None


def build(plan: Plan, options: Options) -> Program:
    """Compile and load the plan's kernels; a plan without any needs no compiler."""
    plan.numbered  # noqa: B018  numbers the roots
    program = Program(plan, options.threads)
    if not plan.kernels:
        return program
    ordered = sorted(plan.kernels.values(), key=lambda k: k.name)
    groups = [ordered[i : i + PER_UNIT] for i in range(0, len(ordered), PER_UNIT)]
    units = [Unit(RUNNER.read_text(), "runner")]
    units += [Unit(unit(group), group[0].name) for group in groups]
    toolchain, cpu = find_toolchain(), detect()
    known = toolchain if isinstance(toolchain, Toolchain) else None
    flags = cpu.flags(known) if isinstance(cpu, CpuFeatures) else ()
    program.runner, *libraries = build_many(units, flags=flags, toolchain=toolchain)
    for group, library in zip(groups, libraries, strict=True):
        program.owner.update((k.name, library) for k in group)
    return program
