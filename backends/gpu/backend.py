"""What GPU targets share: plans made for a device, kernels of both languages, artefacts.

A target says which lowerings its plans are made of; kernels are Triton's and CUDA C++'s alike.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from effc.codegen.build import load_code
from effc.codegen.cuda import compile as cuda
from effc.codegen.cuda.kernel import CudaKernel
from effc.codegen.gpu.compile import AnyCompiled, compile_kernels, is_portable
from effc.codegen.gpu.devices import device_like
from effc.codegen.library import Library
from effc.codegen.openmp import torch_runtime
from effc.codegen.triton import compile as triton
from effc.codegen.triton.compile import Target, triton_version
from effc.codegen.triton.kernel import TritonKernel
from effc.codegen.triton.schedules import ANY, Device
from effc.ir import EffcError, Graph, No, Op, Rates, UnsupportedError, no, yes
from effc.ir.rewrite import Answer

from ..base import Backend, Object, Options
from ..cpu import PRECISION, SCHEDULES
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..plan.tuning import Schedules, tune
from .device import Gpu, find_gpu
from .lowering import GPU, GpuLowerings
from .program import LAUNCHER, GpuExecutable, GpuProgram, launcher
from .tuning import Bench, Database

DEVICES = "devices"  # among the facts of a plan's machine: what its schedules are made for
GRAPHS = "cuda_graphs"  # likewise: whether segments become CUDA graphs


class GpuBackend(Backend):
    """Kernels on the GPU that torch uses."""

    device = "cuda"
    lowerings: ClassVar[GpuLowerings] = GPU
    program: ClassVar[type[GpuProgram]] = GpuProgram
    graphs = True

    def supports(self, node: Op) -> Answer:
        return self.lowerings.claim(node)

    @property
    def rates(self) -> Rates:
        return self.lowerings.rates

    def gpu(self) -> Gpu | No:
        """What is here to run on."""
        return find_gpu()

    def compilers(self) -> dict[str, str]:
        """What compiles its kernels, with versions."""
        return {"triton": triton_version()}

    def compile(self, graph: Graph, options: Any = None) -> GpuExecutable:
        options = Options.of(options)
        gpu = self._gpu()
        without = self._cannot_build(options)
        native, database = launcher(), Database(gpu, self.compilers)
        schedules = Schedules(database.times, measuring=options.tune)
        plan = self._plan(graph, options, gpu.model, without, schedules)
        if options.tune and schedules.open:
            bench = Bench(gpu, native)
            try:
                tune(schedules.open.values(), database, bench.measure)
            finally:
                bench.close()
            schedules = Schedules(database.times)
            plan = self._plan(graph, options, gpu.model, without, schedules)
        compiled = compile_plan(plan, gpu.target)
        facts = self._facts({str(gpu.target): gpu.model}, compiled, options)
        facts[SCHEDULES] = {str(gpu.target): schedules.used}
        return self._loaded(plan, graph, options, compiled, compiled, native, gpu, facts)

    def cross_compile(
        self, graph: Graph, targets: Sequence[Target], options: Any = None
    ) -> GpuExecutable:
        """The plan for several kinds of device, none of which need be here; each with its kernels.

        It can be saved, not run; the plan that it shows is that of the first. Raises EffcError
        where a kernel does not compile.
        """
        options = Options.of(options)
        triton_version()
        models = {str(to): model_of(to) for to in targets}
        plans = [self._plan(graph, options, models[str(to)]) for to in targets]
        compiled = [c for plan, to in zip(plans, targets) for c in compile_plan(plan, to)]
        plan = plans[0] if plans else self._plan(graph, options, ANY)
        facts = self._facts(models, compiled, options)
        return GpuExecutable(plan, None, graph, options.kernels, facts, compiled, launcher())

    def machine(self) -> dict[str, Any]:
        gpu = self.gpu()
        if isinstance(gpu, No):
            return {}
        return self._facts({str(gpu.target): gpu.model}, (), Options())

    def runs(self, machine: Mapping[str, Any]) -> Answer:
        gpu, targets = self.gpu(), machine.get("targets") or ["no GPU"]
        built = " and ".join(map(str, targets))
        if isinstance(gpu, No):
            return no("it was built for {}, and here is no GPU: {}", built, gpu)
        if not _fitting(gpu, machine)[0]:
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
            Options.of(options), float32_matmul_precision=machine.get(PRECISION, "highest"),
            cuda_graphs=bool(machine.get(GRAPHS)),
        )  # fmt: skip
        without = None if options.kernels else no("kernels were switched off")
        built, what = _fitting(gpu, machine)
        target = triton.target(built)
        recorded = Schedules.recorded(_entry(machine, SCHEDULES, built))
        plan = self._plan(graph, options, _model(machine, built), without, recorded)
        given = {o.functions: o for o in objects if o.target == built}
        compiled = [_known(k, given.get((k.name,)), target) for k in _kernels(plan)]
        found = [o for o in objects if o.name == "launcher" and o.source == LAUNCHER.read_text()]
        if not found:
            raise EffcError("its launcher is not the one that this effc makes")
        native = load_code(found[0].code, "launcher")
        images = [_image(c, what) for c in compiled]
        if built != str(gpu.target):
            how = "runs as it is" if what == "code" else "is compiled anew by the driver"
            warnings.warn(
                f"effc: the code for {built} {how} on {gpu.name}, a {gpu.target}; its schedules "
                f"are for {built}: effc.load(path, rebuild=True) makes those for this device",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return self._loaded(plan, graph, options, compiled, images, native, gpu, machine)

    def _plan(
        self, graph: Graph, options: Options, model: Device, without: No | None = None,
        schedules: Schedules | None = None,
    ) -> Plan:  # fmt: skip
        return make_plan(graph, options, self.lowerings.on(model), without, schedules)

    def _gpu(self) -> Gpu:
        gpu = self.gpu()
        if isinstance(gpu, No):
            raise UnsupportedError(
                f"target {self.name!r} runs on a GPU", why=str(gpu),
                fix="target 'ptx-host' runs the same kernels on the CPU; "
                "`effc build --target cuda:sm_90` compiles them for a device elsewhere",
            )  # fmt: skip
        return gpu

    def _loaded(
        self, plan: Plan, graph: Graph, options: Options, compiled: Sequence[AnyCompiled],
        images: Sequence[AnyCompiled], native: Library, gpu: Gpu, facts: Mapping[str, Any],
    ) -> GpuExecutable:  # fmt: skip
        """images: what of each compiled kernel the driver is given."""
        if options.cuda_graphs and gpu.driver.graphs is None:
            raise UnsupportedError(
                f"cuda_graphs: the driver of {gpu.name} makes no graphs of our kernels",
                fix="drop cuda_graphs=True",
            )
        for c in images:
            if gpu.shared and c.shared > gpu.shared:
                raise EffcError(
                    f"kernel {c.kernel.name} needs {c.shared} bytes of shared memory",
                    why=f"a block of {gpu.name} has {gpu.shared}",
                    fix="compile it for this device with tune=True, which leaves such kernels out",
                )
        program = self.program(plan, options.threads, native, device=self.device)
        program.gpu, program.graphs = gpu, options.cuda_graphs
        with gpu.current():
            program.functions = {c.kernel.name: gpu.driver.load(c, gpu.index) for c in images}
        return GpuExecutable(plan, program, graph, options.kernels, facts, compiled, native)

    def _cannot_build(self, options: Options) -> No | None:
        if not options.kernels:
            return no("kernels are switched off")
        try:
            triton_version()
        except UnsupportedError as e:
            return no("{}", e.what)
        return None

    def _facts(
        self, models: Mapping[str, Device], compiled: Sequence[AnyCompiled], options: Options
    ) -> dict[str, Any]:
        """What decides whether code built here runs elsewhere, and which plan calls it.

        portable: targets whose binaries and PTX also run on devices after them.
        """
        bound = {str(c.target) for c in compiled if not is_portable(c)}
        return {
            "targets": [*models], "portable": [t for t in models if t not in bound],
            DEVICES: {t: asdict(m) for t, m in models.items()}, GRAPHS: options.cuda_graphs,
            PRECISION: options.precision, **_host(),
        }  # fmt: skip


def compile_plan(plan: Plan, to: Target) -> list[AnyCompiled]:
    """Every kernel of a plan, compiled for a device that need not be here."""
    return compile_kernels(_kernels(plan), to)


def model_of(to: Target) -> Device:
    """What schedules for a target are made for: the first device of the kind that is known."""
    return Device.of(device_like(str(to), "", 0, 0))


def _kernels(plan: Plan) -> list[Any]:
    return [k for k in plan.kernels.values() if isinstance(k, TritonKernel | CudaKernel)]


def _host() -> dict[str, Any]:
    """What of this machine decides whether a launcher built elsewhere runs here."""
    openmp = getattr(torch_runtime(), "name", "none")
    return {"host": f"{sys.platform} {platform.machine()}", "openmp": openmp}


# ------------------------------------------------------------------ what was built elsewhere


def _fitting(gpu: Gpu, machine: Mapping[str, Any]) -> tuple[str, str]:
    """Of the targets that something was built for the one to take here, and what of its objects:
    binaries before assembly, the newest first. Empty texts where none runs here."""
    portable = machine.get("portable") or ()
    fits = [(t, gpu.runs(t, t in portable)) for t in map(str, machine.get("targets") or ())]
    ranked = [
        (t == str(gpu.target), what == "code", _number(t), t, what) for t, what in fits if what
    ]
    *_, target, what = max(ranked, default=("", ""))
    return target, what


def _number(target: str) -> int:
    text = target.rpartition("sm_")[2]
    return int(text) if text.isdecimal() else 0


def _entry(machine: Mapping[str, Any], fact: str, target: str) -> Any:
    found = machine.get(fact)
    return found.get(target) if isinstance(found, Mapping) else None


def _model(machine: Mapping[str, Any], target: str) -> Device:
    """The device that the plan was made for; what fits all of them where none is named."""
    told = _entry(machine, DEVICES, target)
    if told is None:
        return ANY
    try:
        return Device(**told)
    except TypeError as e:
        raise EffcError("it does not say which GPU it was built for", why=str(e)) from e


def _known(kernel: Any, o: Object | None, target: Target) -> AnyCompiled:
    """A kernel of the plan with what was compiled of it."""
    if o is None or kernel.code not in o.source:
        raise EffcError(f"its kernel {kernel.name} is not the one that this effc makes")
    told: dict[str, Any] = {**o.launch}
    made = cuda.Compiled if isinstance(kernel, CudaKernel) else triton.Compiled
    return made(kernel, target, o.assembly, o.code, **told)


def _image(c: AnyCompiled, what: str) -> AnyCompiled:
    """What the driver is given: the binary, or PTX, a text that ends with a zero."""
    return c if what == "code" else replace(c, binary=c.assembly.encode() + b"\0")


__all__ = ["GpuBackend", "compile_plan", "model_of"]
