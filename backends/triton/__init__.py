"""The triton target: a GPU's plan on a GPU. NVIDIA's and AMD's devices, those that torch uses.

Plans, memory and calls are those of the cpu backend, with memory from torch's allocator on the
device and a launcher in place of the runner. Work is queued on torch's current stream, and nothing
waits for it.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from effc.codegen.build import Unit, build_many, load_code
from effc.codegen.library import Library
from effc.codegen.openmp import torch_runtime
from effc.codegen.triton.compile import Compiled, Target, compile_kernels, triton_version
from effc.codegen.triton.kernel import TritonKernel
from effc.ir import EffcError, Graph, No, Op, UnsupportedError, no, yes
from effc.ir.rewrite import Answer

from ..base import Backend, Bound, Object, Options
from ..cpu import PRECISION
from ..gpu import GPU
from ..gpu.driver import Driver, Function, device_target, find_driver
from ..plan.executable import BoundPlan, PlanExecutable
from ..plan.plan import Plan, Program
from ..plan.planner import make_plan
from ..plan.steps import AnyKernel

LAUNCHER = Path(__file__).parent.parent / "gpu" / "launcher.cpp"


class GpuProgram(Program):
    """A plan whose kernels are loaded on a device."""

    functions: dict[str, Function]
    gpu: Driver
    index: int

    @cached_property
    def run(self) -> Any:
        assert self.runner is not None
        native = self.runner.function(
            "effc_launch", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_void_p, restype=ctypes.c_int64,
        )  # fmt: skip
        launch, driver = self.gpu.launch, self.gpu

        def run(words: int, calls: int, addresses: int, stream: int) -> None:
            if status := native(words, calls, addresses, launch, stream):
                raise EffcError(f"a launch fails: {driver.error(status)}")

        return run

    def address(self, kernel: AnyKernel) -> int:
        return ctypes.addressof(self.functions[kernel.name])

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def resource(self) -> int:
        """The stream that launches are queued on."""
        return torch.cuda.current_stream(self.index).cuda_stream

    def error_word(self) -> torch.Tensor:
        # Memory that both sides see, so that looking at it waits for nothing. A wrong index is
        # then reported by a later call, as CUDA's own asserts are.
        return torch.zeros(1, dtype=torch.int64, device="cpu").pin_memory()


@dataclass(frozen=True)
class Gpu:
    """The device that torch uses, and its driver."""

    driver: Driver
    index: int
    name: str
    target: Target


class TritonBackend(Backend):
    """Triton kernels on the GPU that torch uses."""

    name, device = "triton", "cuda"
    program: ClassVar[type[GpuProgram]] = GpuProgram

    def supports(self, node: Op) -> Answer:
        return GPU.claim(node)

    def gpu(self) -> Gpu | No:
        """What is here to run on."""
        driver = find_driver()
        if isinstance(driver, No):
            return driver
        index = torch.cuda.current_device()
        return Gpu(driver, index, torch.cuda.get_device_name(index), device_target(index))

    def compile(self, graph: Graph, options: Any = None) -> GpuExecutable:
        options = Options.of(options)
        gpu = self._gpu()
        plan = make_plan(graph, options, GPU, self._cannot_build(options))
        compiled = compile_plan(plan, gpu.target)
        facts = _facts([gpu.target], options)
        return self._loaded(plan, graph, options, compiled, launcher(), gpu, facts)

    def cross_compile(
        self, graph: Graph, targets: Sequence[Target], options: Any = None
    ) -> GpuExecutable:
        """The plan with its kernels for several kinds of device, none of which need be here.

        It can be saved, not run. Raises EffcError where a kernel does not compile.
        """
        options = Options.of(options)
        triton_version()
        plan = make_plan(graph, options, GPU)
        compiled = [c for to in targets for c in compile_plan(plan, to)]
        facts = _facts(targets, options)
        return GpuExecutable(plan, None, graph, options.kernels, facts, compiled, launcher())

    def machine(self) -> dict[str, Any]:
        gpu = self.gpu()
        return {} if isinstance(gpu, No) else _facts([gpu.target], Options())

    def runs(self, machine: Mapping[str, Any]) -> Answer:
        gpu, targets = self.gpu(), machine.get("targets") or ["no GPU"]
        built = " and ".join(map(str, targets))
        if isinstance(gpu, No):
            return no("it was built for {}, and here is no GPU: {}", built, gpu)
        if str(gpu.target) not in targets:
            return no("it was built for {}, and {} is a {}", built, gpu.name, gpu.target)
        for fact, here in _host().items():
            if machine.get(fact) != here:
                return no("its launcher was built for {}, and this is {}", machine.get(fact), here)
        return yes

    def load(
        self, graph: Graph, objects: Sequence[Object], machine: Mapping[str, Any],
        options: Any = None,
    ) -> GpuExecutable:  # fmt: skip
        gpu = self._gpu()
        options = replace(
            Options.of(options), float32_matmul_precision=machine.get(PRECISION, "highest")
        )
        without = None if options.kernels else no("kernels were switched off")
        plan = make_plan(graph, options, GPU, without)
        given = {o.functions: o for o in objects if o.target == str(gpu.target)}
        compiled = []
        for kernel in _kernels(plan):
            o = given.get((kernel.name,))
            if o is None or kernel.code not in o.source:
                raise EffcError(f"its kernel {kernel.name} is not the one that this effc makes")
            compiled.append(Compiled(kernel, gpu.target, o.assembly, o.code, **o.launch))
        found = [o for o in objects if o.name == "launcher" and o.source == LAUNCHER.read_text()]
        if not found:
            raise EffcError("its launcher is not the one that this effc makes")
        native = load_code(found[0].code, "launcher")
        return self._loaded(plan, graph, options, compiled, native, gpu, machine)

    def _gpu(self) -> Gpu:
        gpu = self.gpu()
        if isinstance(gpu, No):
            raise UnsupportedError(
                "target 'triton' runs on a GPU", why=str(gpu),
                fix="target 'ptx-host' runs the same kernels on the CPU; "
                "`effc build --target cuda:sm_90` compiles them for a device elsewhere",
            )  # fmt: skip
        return gpu

    def _loaded(
        self, plan: Plan, graph: Graph, options: Options, compiled: Sequence[Compiled],
        native: Library, gpu: Gpu, facts: Mapping[str, Any],
    ) -> GpuExecutable:  # fmt: skip
        program = self.program(plan, options.threads, native, device=self.device)
        program.gpu, program.index = gpu.driver, gpu.index
        program.functions = {c.kernel.name: gpu.driver.load(c, gpu.index) for c in compiled}
        return GpuExecutable(plan, program, graph, options.kernels, facts, compiled, native)

    def _cannot_build(self, options: Options) -> No | None:
        if not options.kernels:
            return no("kernels are switched off")
        try:
            triton_version()
        except UnsupportedError as e:
            return no("{}", e.what)
        return None


def _host() -> dict[str, Any]:
    """What of this machine decides whether a launcher built elsewhere runs here."""
    openmp = getattr(torch_runtime(), "name", "none")
    return {"host": f"{sys.platform} {platform.machine()}", "openmp": openmp}


def _facts(targets: Sequence[Target], options: Options) -> dict[str, Any]:
    return {"targets": [*map(str, targets)], PRECISION: options.precision, **_host()}


def launcher() -> Library:
    """Built for any CPU of this kind: what is saved with it is loaded on other machines."""
    (library,) = build_many([Unit(LAUNCHER.read_text(), "launcher")])
    return library


def _kernels(plan: Plan) -> list[TritonKernel]:
    return [k for k in plan.kernels.values() if isinstance(k, TritonKernel)]


def compile_plan(plan: Plan, to: Target) -> list[Compiled]:
    """Every kernel of a plan, compiled for a device that need not be here."""
    return compile_kernels(_kernels(plan), to)


class GpuExecutable(PlanExecutable):
    """A plan compiled for devices; without a program it is for devices elsewhere."""

    def __init__(
        self, plan: Plan, program: Program | None, graph: Graph, native: bool,
        machine: Mapping[str, Any], compiled: Sequence[Compiled] = (),
        launcher: Library | None = None,
    ) -> None:  # fmt: skip
        super().__init__(plan, program, graph, native, machine)
        self.compiled, self.launcher = tuple(compiled), launcher

    @property
    def objects(self) -> tuple[Object, ...]:
        if self.launcher is None:
            return ()
        ours = Object("launcher", LAUNCHER.read_text(), self.launcher.read())
        return (ours, *map(_object, self.compiled))

    def bind(self, weights: Mapping[str, torch.Tensor] | None = None) -> Bound:
        if self.program is None:
            built = ", ".join(self.machine["targets"])
            raise EffcError(
                f"this plan was compiled for {built}, not for this machine",
                fix="save it and load it there",
            )
        return GpuBound(self.program, weights)


def _object(c: Compiled) -> Object:
    name = f"{str(c.target).replace(':', '_')}.{c.kernel.name}"
    launch = {"shared": c.shared, "warps": c.warps, "scratch": c.scratch}
    functions = (c.kernel.name,)
    return Object(name, c.kernel.source, c.binary, functions, str(c.target), c.assembly, launch)


class GpuBound(Bound):
    """A plan with its weights. Frames of one stream never serve another, which may overtake it."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor] | None) -> None:
        with torch.device(program.device):
            self._first = BoundPlan(program, weights)
        self._by_stream: dict[int, BoundPlan] = {program.resource(): self._first}
        self._program = program

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        stream = self._program.resource()
        bound = self._by_stream.get(stream)
        if bound is None:
            bound = self._by_stream.setdefault(stream, self._first.again())
        return bound(inputs)


__all__ = ["GpuExecutable", "GpuProgram", "TritonBackend", "compile_plan"]
