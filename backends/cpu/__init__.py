"""The cpu backend: our C++ kernels, oneDNN and MKL where they are best, ATen for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from effc.codegen import cpp
from effc.codegen.build import BuildError, Unit, build_many, load_code
from effc.codegen.compile import header_digest
from effc.codegen.cpp.kernel import Kernel, unit
from effc.codegen.library import Library
from effc.codegen.openmp import torch_runtime
from effc.codegen.toolchain import MissingToolchain, Toolchain, find_toolchain
from effc.ir import EffcError, Graph, No, Op, Rates, no, yes
from effc.ir.rewrite import Answer

from ..base import Backend, Object, Options
from ..plan.executable import PlanExecutable
from ..plan.lowering import Lowerings
from ..plan.plan import Part, Plan, Program
from ..plan.planner import make_plan
from ..plan.tuning import Schedules
from . import (  # noqa: F401  (they fill the tables)
    embedding,
    fused,
    images,
    level_codes,
    movers,
    norms,
    plane_codes,
    quantize,
    sparse_codes,
)
from .features import CpuFeatures, UnsupportedCpu, detect, lacking, planning_for
from .lowering import CPU
from .tuning import Database, tune

__all__ = ["CpuBackend", "CpuProgram"]

RUNNER = Path(cpp.__file__).parent / "runner.cpp"
PRECISION = "float32_matmul_precision"  # among the facts of a plan's machine: it decides the plan
SCHEDULES = "schedules"  # likewise: the measured times that decided
PER_UNIT = 12  # kernels a translation unit: enough to share the header, few enough for all cores


@dataclass(eq=False)
class CpuProgram(Program):
    """cpu: that it was planned for; None: this one, whatever it is."""

    cpu: CpuFeatures | None = None

    def packing(self) -> AbstractContextManager[None]:
        return planning_for(self.cpu)


class CpuBackend(Backend):
    """x86-64 and anything else with a C++ compiler and an OpenMP runtime."""

    name = "cpu"
    target: ClassVar[Lowerings] = CPU  # what its plans are made of
    program: ClassVar[type[CpuProgram]] = CpuProgram

    def supports(self, node: Op) -> Answer:
        return self.target.claim(node)

    @property
    def rates(self) -> Rates:
        return self.target.rates

    def prepare(self, plan: Plan) -> None:
        """Change the plan's kernels into what a C++ compiler builds."""

    def _plan(
        self, graph: Graph, options: Options, without: No | None, schedules: Schedules | None
    ) -> Plan:
        plan = make_plan(graph, options, self.target, without, schedules)
        self.prepare(plan)
        return plan

    def compile(self, graph: Graph, options: Any = None) -> PlanExecutable:
        options = Options.of(options)
        without = self._cannot_build(options)
        database = Database(options.threads or torch.get_num_threads())
        schedules = Schedules(database.times)
        plan = self._plan(graph, options, without, schedules)
        try:
            if options.tune and schedules.open:
                tune(schedules.open.values(), database, build_units)
                schedules = Schedules(database.times)
                plan = self._plan(graph, options, without, schedules)
            program = build(plan, options, self.program)
        except BuildError as e:
            warnings.warn(f"effc: {e}", RuntimeWarning, stacklevel=2)
            without = no("kernels do not build: {}", e.what)
            plan = self._plan(graph, options, without, schedules)
            program = build(plan, options, self.program)
        made_for = {**self.machine(), PRECISION: options.precision, SCHEDULES: schedules.used}
        return PlanExecutable(plan, program, graph, without is None, made_for)

    def machine(self) -> dict[str, Any]:
        cpu, openmp = detect(), torch_runtime()
        known = {"openmp": getattr(openmp, "name", ""), "header": header_digest()}
        if not isinstance(cpu, CpuFeatures):
            return known
        facts = {f.name: getattr(cpu, f.name) for f in fields(cpu) if f.name != "notes"}
        return {"capability": cpu.capability(), "features": facts, **known}

    def runs(self, machine: Mapping[str, Any]) -> Answer:
        here, mine = detect(), self.machine()
        if isinstance(here, UnsupportedCpu) or "capability" not in machine:
            return no("{}", here if isinstance(here, UnsupportedCpu) else "no CPU is named")
        if missing := lacking(machine["capability"], here):
            return no("it was built for a CPU with {}, which this one lacks", ", ".join(missing))
        if machine.get("openmp") != mine["openmp"]:
            return no("it was built for {}, torch here brings {}",
                      machine.get("openmp") or "no OpenMP", mine["openmp"] or "none")  # fmt: skip
        if machine.get("header") != mine["header"]:
            return no("its kernels were built by another version of effc")
        return yes

    def load(
        self, graph: Graph, objects: Sequence[Object], machine: Mapping[str, Any],
        options: Any = None,
    ) -> PlanExecutable:  # fmt: skip
        options = replace(
            Options.of(options), float32_matmul_precision=machine.get(PRECISION, "highest")
        )
        without = None if options.kernels else no("kernels were switched off")
        with planning_for(cpu := _features(machine)):
            recorded = Schedules.recorded(machine.get(SCHEDULES))
            plan = self._plan(graph, options, without, recorded)
            program = attach(plan, options, objects, self.program)
        program.cpu = cpu
        return PlanExecutable(plan, program, graph, options.kernels, machine)

    def plan(self, graph: Graph, options: Any = None) -> PlanExecutable:
        """Plan and kernel text, nothing built: what the null backend shows."""
        return PlanExecutable(
            self._plan(graph, Options.of(options), None, Schedules()), None, graph
        )

    def _cannot_build(self, options: Options) -> No | None:
        if not options.kernels:
            return no("kernels are switched off")
        found = find_toolchain()
        return no("no C++ compiler: {}", found) if isinstance(found, MissingToolchain) else None


def _features(machine: Mapping[str, Any]) -> CpuFeatures:
    try:
        known: dict[str, Any] = {**machine["features"]}
        known["extensions"] = tuple(known["extensions"])
        return CpuFeatures(**known)
    except (KeyError, TypeError, ValueError) as e:
        raise EffcError("it does not say which CPU it was built for", why=repr(e)) from e


def build(plan: Plan, options: Options, kind: type[CpuProgram] = CpuProgram) -> CpuProgram:
    """Compile and load the plan's kernels; a plan without any needs no compiler."""
    cpu = detect()
    known = cpu if isinstance(cpu, CpuFeatures) else None
    program = kind(plan, options.threads, cpu=known)
    if not plan.kernels:
        return program
    ordered = sorted(_native(plan), key=lambda k: k.name)
    small = [k for k in ordered if not k.alone]
    groups = [[k] for k in ordered if k.alone]
    groups += [small[i : i + PER_UNIT] for i in range(0, len(small), PER_UNIT)]
    units = [Unit(RUNNER.read_text(), "runner")]
    units += [Unit(unit(group), group[0].name, group[0].flags) for group in groups]
    for group, made, library in zip([[], *groups], units, build_units(units), strict=True):
        program.add(Part(made.name, made.source, library, tuple(k.name for k in group)))
    return program


def build_units(units: Sequence[Unit]) -> list[Library]:
    """Compile and load units with all that this CPU and the compiler here can do."""
    cpu, toolchain = detect(), find_toolchain()
    known = toolchain if isinstance(toolchain, Toolchain) else None
    flags = cpu.flags(known) if isinstance(cpu, CpuFeatures) else ()
    return build_many(units, flags=flags, toolchain=toolchain)


def _native(plan: Plan) -> list[Kernel]:
    """The plan's kernels as C++: after `prepare`, all of them."""
    return [k for k in plan.kernels.values() if isinstance(k, Kernel)]


def attach(
    plan: Plan, options: Options, objects: Sequence[Object], kind: type[CpuProgram] = CpuProgram
) -> CpuProgram:
    """The plan with kernels that were built before. Raises EffcError where one is not there.

    A kernel counts as there if its text is in the source of the object that has its name: what
    calls it was made for that very text.
    """
    program = kind(plan, options.threads)
    found = {name: o for o in objects for name in o.functions}
    for kernel in _native(plan):
        if kernel.name not in found or kernel.code not in found[kernel.name].source:
            raise EffcError(f"its kernel {kernel.name} is not the one that this effc makes")
    runner = RUNNER.read_text()
    if plan.kernels and not any(o.source == runner for o in objects if not o.functions):
        raise EffcError("its runner is not the one that this effc makes")
    for o in objects:
        library = load_code(o.code, o.name)
        for name in o.functions:
            library.function(name)
        program.add(Part(o.name, o.source, library, o.functions))
    return program
