"""A plan on a GPU: its kernels loaded, its calls queued on torch's current stream.

Plans, memory and calls are those of the cpu backend, with memory from torch's allocator on the
device and a launcher in place of the runner. Nothing waits for what is queued.

With `cuda_graphs` a segment (the launches between two torch routines) is one CUDA graph from the
second call with the same sizes on: the first one loads, and sizes that come once need none. No
address has to stay: memory inside a call is the frame's own, and where inputs and results of a call
lie elsewhere than at the last one, the kernels that touch them are told so before the launch, which
what is running already does not see. So results stay the caller's, and nothing is copied.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from effc.codegen.build import Unit, build_many
from effc.codegen.gpu.compile import AnyCompiled
from effc.codegen.library import Library
from effc.codegen.triton import compile as triton
from effc.ir import EffcError, Graph, InputError

from ..base import Bound, Constants, Object
from ..plan.executable import BoundPlan, PlanExecutable
from ..plan.plan import Plan, Program
from ..plan.steps import AnyKernel
from .device import Gpu
from .driver import NO_CONTEXT, Function

LAUNCHER = Path(__file__).with_name("launcher.cpp")
FEWEST = 3  # launches of a segment from which on a graph pays: it takes as long to launch as two

Run = Callable[[int, int, int, int], None]  # words, how many calls, table of addresses, stream


def launcher() -> Library:
    """Built for any CPU of this kind: what is saved with it is loaded on other machines."""
    (library,) = build_many([Unit(LAUNCHER.read_text(), "launcher")])
    return library


def launching(native: Library, gpu: Gpu) -> Run:
    """What launches a segment, call by call."""
    function = native.function(
        "effc_launch", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_void_p, restype=ctypes.c_int64,
    )  # fmt: skip
    address, driver = gpu.driver.launch, gpu.driver

    def launch(words: int, calls: int, addresses: int, stream: int) -> None:
        status = function(words, calls, addresses, address, stream)
        if status == NO_CONTEXT and "enter" in driver.names:
            driver.enter(gpu.index)  # a thread in which torch has not yet used the device
            status = function(words, calls, addresses, address, stream)
        if status:
            raise EffcError(f"a launch fails: {driver.error(status)}")

    return launch


class GpuProgram(Program):
    """A plan whose kernels are loaded on a device. graphs: whether segments become CUDA graphs."""

    functions: dict[str, Function]
    gpu: Gpu
    graphs = False

    @cached_property
    def run(self) -> Run:
        assert self.runner is not None
        return launching(self.runner, self.gpu)

    def native(self) -> Run:
        return Recording(self) if self.graphs else self.run

    def address(self, kernel: AnyKernel) -> int:
        return ctypes.addressof(self.functions[kernel.name])

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def resource(self) -> int:
        """The stream that launches are queued on."""
        return self.gpu.stream()

    def current(self) -> AbstractContextManager[Any]:
        """In which torch makes tensors on our device."""
        return self.gpu.current()

    def capturing(self) -> bool:
        """Whether somebody records what is queued now: a graph cannot be launched into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def error_word(self) -> torch.Tensor:
        # Memory that both sides see, so that looking at it waits for nothing. A wrong index is
        # then reported by a later call, as CUDA's own asserts are.
        return torch.zeros(1, dtype=torch.int64, device="cpu").pin_memory()


class Recording:
    """Runs the segments of one frame, which it must not outlive: each as a graph once it is one."""

    def __init__(self, program: GpuProgram) -> None:
        native = program.runner
        assert native is not None
        self.program, self.api = program, program.gpu.driver.graphs
        pointer, status = ctypes.c_void_p, ctypes.c_int64
        self.record = native.function(
            "effc_graph_record", pointer, ctypes.c_int64, pointer, pointer, pointer, restype=status
        )
        self.replay = native.function("effc_graph_run", pointer, pointer, pointer, restype=status)
        self.made: dict[int, ctypes.c_void_p | None] = {}  # by where a segment's words lie
        free = native.function("effc_graph_free", pointer)
        end = weakref.finalize(self, _free, self.made, free)
        end.atexit = False  # type: ignore[missing-attribute]  # where the driver may be gone

    def __call__(self, words: int, calls: int, addresses: int, stream: int) -> None:
        first = words not in self.made
        graph = self.made.setdefault(words, None)
        if first or calls < FEWEST or self.program.capturing():
            self.program.run(words, calls, addresses, stream)
            return
        if graph is None:
            graph = self.made[words] = ctypes.c_void_p()
            # A context was current for the launches of the first call; another thread may lack it.
            self._check(self.record, words, calls, addresses, self.api, ctypes.byref(graph))
        self._check(self.replay, graph, addresses, stream)

    def _check(self, function: Any, *args: Any) -> None:
        status, driver = function(*args), self.program.gpu.driver
        if status == NO_CONTEXT:
            driver.enter(self.program.gpu.index)
            status = function(*args)
        if status:
            raise EffcError(f"a CUDA graph fails: {driver.error(status)}")


def _free(made: dict[int, Any], free: Callable[[Any], None]) -> None:
    for graph in made.values():
        if graph:
            free(graph)


class GpuExecutable(PlanExecutable):
    """A plan compiled for devices; without a program it is for devices elsewhere."""

    def __init__(
        self, plan: Plan, program: Program | None, graph: Graph, native: bool,
        machine: Mapping[str, Any], compiled: Sequence[AnyCompiled] = (),
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

    def bind(
        self, weights: Mapping[str, torch.Tensor] | None = None, shared: Constants | None = None
    ) -> Bound:
        if self.program is None:
            built = ", ".join(self.machine["targets"])
            raise EffcError(
                f"this plan was compiled for {built}, not for this machine",
                fix="save it and load it there",
            )
        return GpuBound(self.program, weights, shared)


def _object(c: AnyCompiled) -> Object:
    name = f"{str(c.target).replace(':', '_')}.{c.kernel.name}"
    if isinstance(c, triton.Compiled):
        launch = {"shared": c.shared, "warps": c.warps, "scratch": c.scratch}
    else:
        launch = {"registers": c.registers, "spills": c.spills}
    functions = (c.kernel.name,)
    return Object(name, c.kernel.source, c.binary, functions, str(c.target), c.assembly, launch)


class GpuBound(Bound):
    """A plan with its weights. Frames of one stream never serve another, which may overtake it."""

    def __init__(
        self, program: Any, weights: Mapping[str, torch.Tensor] | None,
        shared: Constants | None = None,
    ) -> None:  # fmt: skip
        self._program, self._index = program, program.gpu.index
        given = dict(weights or {})
        own = {w.key: w.data for w in program.plan.graph.weights if w.data is not None}
        moved = {k: t.to(program.device) for k, t in (own | given).items() if not self._here(t)}
        if moved:  # kernels read weights where they lie; these are not those that others share
            weights, shared = given | moved, None
        with program.current(), torch.device(program.device):
            self._first = BoundPlan(program, weights, shared)
            self._by_stream: dict[int, BoundPlan] = {program.resource(): self._first}

    def _here(self, t: torch.Tensor) -> bool:
        return t.device.type == self._program.device and t.get_device() in (-1, self._index)

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        program = self._program
        for x, node in zip(inputs, program.plan.graph.inputs):
            if isinstance(x, torch.Tensor) and x.is_cuda and x.get_device() != self._index:
                raise InputError(
                    f"input {node.key} is on {x.device}, the plan runs on cuda:{self._index}",
                    fix="move it, or compile the model anew under torch.cuda.device(...)",
                )
        with program.current():
            stream = program.resource()
            bound = self._by_stream.get(stream)
            if bound is None:
                bound = self._by_stream.setdefault(stream, self._first.again())
            return bound(inputs)


__all__ = [
    "LAUNCHER", "GpuBound", "GpuExecutable", "GpuProgram", "Recording", "launcher", "launching",
]  # fmt: skip
