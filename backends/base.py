"""What a backend is: facts about a target, `supports(node)`, and `compile(graph) -> Executable`.

    backend = find_backend("cpu")
    executable = backend.compile(graph)          # plan and kernels; no weight is read
    bound = executable.bind({"fc.weight": w})    # constants evaluated, packed, reordered: once
    (y,) = bound([x])                            # any thread, any number of times

A backend never rewrites what the graph means. What it has no kernel for runs through ATen inside
the plan, with a typed reason in `fallbacks`. Packages outside effc register a backend through the
entry-point group `effc.backends`; each entry names a Backend class.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch

from effc.ir import EffcError, Graph, InputError, Op, OptionError, Rates, Weight, nearest
from effc.ir.graph import same_bits, unpacked
from effc.ir.rewrite import Answer, No, yes

GROUP = "effc.backends"
PRECISIONS = ("highest", "high", "medium")  # of torch.set_float32_matmul_precision
_OURS = {
    "cpu": "effc.backends.cpu:CpuBackend",
    "cuda": "effc.backends.cuda:CudaBackend",
    "cuda-host": "effc.backends.cuda:CudaHostBackend",
    "null": "effc.backends.null:NullBackend",
    "ptx-host": "effc.backends.ptx_host:PtxHostBackend",
    "reference": "effc.backends.reference:ReferenceBackend",
    "triton": "effc.backends.triton:TritonBackend",
}

# ------------------------------------------------------------------ options


@dataclass(frozen=True)
class Options:
    """What compile() may be told. Unknown names are refused with the nearest known one.

    threads: at most this many threads a launch; None follows torch.get_num_threads() at each call.
    captured: the graph as captured, before any pass, with as many outputs. Two outputs, or an
        output and an input, may share memory only where they do so in it. None: the graph itself.
    kernels: False runs every node through torch, to tell a wrong kernel from a wrong graph.
    float32_matmul_precision: as torch.set_float32_matmul_precision takes it; None: what is set
        there. It permits, and demands nothing: a target without such instructions stays exact.
    tune: measure schedules of kernels of which nothing is known yet, and keep the times for later
        compilations. False: times that are kept decide, and a cost model where there are none.
    cuda_graphs: launch what is between two torch routines as one CUDA graph, from the second call
        with the same sizes on.
    """

    threads: int | None = None
    captured: Graph | None = None
    kernels: bool = True
    float32_matmul_precision: str | None = None
    tune: bool = False
    cuda_graphs: bool = False

    @property
    def precision(self) -> str:
        return self.float32_matmul_precision or torch.get_float32_matmul_precision()

    @classmethod
    def of(cls, value: Any = None) -> Options:
        """From a mapping, or from any object: its attributes that are named as ours."""
        if value is None or isinstance(value, Options):
            return value or cls()
        known = {f.name for f in fields(cls)}
        if not isinstance(value, Mapping):
            return replace(cls(), **{k: getattr(value, k) for k in known if hasattr(value, k)})
        for name in value:
            if name not in known:
                raise OptionError(f"no backend option {name!r}", fix=nearest(name, known))
        return replace(cls(), **value)


# ------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """One step of a plan. Prints as one line; the lines together are the plan's text.

    kind: "kernel" ours; "library" a torch or oneDNN routine chosen on purpose; "copy" moves
    elements; "view" costs nothing; "aten" is a fallback, and `reason` says why.
    """

    kind: str
    call: str  # kernel name, torch function
    node: Op
    result: str = ""  # names of the values written and read, as in the graph's text
    operands: tuple[str, ...] = ()
    segment: int | None = None  # launches of one segment run in one native call
    reason: No | None = None
    note: str = ""

    def __str__(self) -> str:
        place = f"s{self.segment}" if self.segment is not None else ""
        line = f"{self.kind:<8}{place:<4}{self.result} = {self.call}({', '.join(self.operands)})"
        remarks = [str(self.reason)] if self.reason is not None else []
        remarks += [r for r in (self.note, self.node.where) if r]
        return f"{line}  # {'; '.join(remarks)}" if remarks else line


# ------------------------------------------------------------------ results of compiling


FILES = {"": ("cpp", "so"), "cuda": ("py", "cubin", "ptx"), "hip": ("py", "hsaco", "amdgcn")}
CUDA_SOURCE = "cu"  # in the place of "py"


@dataclass(frozen=True)
class Object:
    """Native code that an executable calls, with its source: what an artefact keeps of it.

    functions: names of the kernels in it; none for what every plan needs. target: "" for code of
    the CPU, else the GPU it is for, as "cuda:sm_90"; then `assembly` is its PTX or AMD's, and
    `launch` says what a launch needs, in whole numbers.
    """

    name: str
    source: str
    code: bytes = field(repr=False)
    functions: tuple[str, ...] = ()
    target: str = ""
    assembly: str = field(default="", repr=False)
    launch: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def files(self) -> dict[str, bytes]:
        """What to write, by file name."""
        parts = (self.source.encode(), self.code, self.assembly.encode())
        source, *others = FILES[self.target.partition(":")[0]]
        suffixes = (CUDA_SOURCE if "__global__" in self.source else source, *others)
        return {f"{self.name}.{suffix}": part for suffix, part in zip(suffixes, parts)}

    @property
    def row(self) -> list[Any]:
        """The rest, as JSON data."""
        more = [self.target, dict(self.launch)] if self.target else []
        return [self.name, list(self.functions), *more]

    @staticmethod
    def read(row: Sequence[Any], files: Mapping[str, bytes]) -> Object:
        """What `row` and `files` gave. Raises KeyError, TypeError or ValueError for other data."""
        whole: list[Any] = [*row, *("", {})[len(row) - 2 :]]
        name, functions, target, launch = whole
        source, *others = FILES[str(target).partition(":")[0]]
        source = CUDA_SOURCE if f"{name}.{CUDA_SOURCE}" in files else source
        parts = [files[f"{name}.{suffix}"] for suffix in (source, *others)]
        assembly = parts[2].decode() if len(parts) > 2 else ""
        numbers = {str(k): int(v) for k, v in launch.items()}
        return Object(
            str(name), parts[0].decode(), parts[1], tuple(map(str, functions)), str(target),
            assembly, numbers,
        )  # fmt: skip


class Constants:
    """What executables with one set of weights have in common: values made of weights alone.

    Given to `Executable.bind`, so that what several of them join or pack is made and kept once.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._values: dict[Any, Any] = {}

    def number(self, row: Any) -> int:
        """Equal rows (`effc.ir.graph.row`) have equal numbers."""
        return self._numbers.setdefault(row, len(self._numbers))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]


class Bound(ABC):
    """An executable with its weights. Callable from several threads at once."""

    @abstractmethod
    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Tensors and numbers in the order of the graph's inputs -> the graph's outputs.

        Raises InputError when a count, type or size does not fit.
        """


class Executable(ABC):
    """A compiled graph without weights: one executable serves several sets of them.

    Outputs of a call are tensors of their own: no later call writes to them, and they share memory
    with nothing, except

    - an output that is a view op of an input (or the input itself) is a real torch view of it;
    - outputs that are view ops of one value are views of one fresh tensor;

    both only where `Options.captured` has the same sharing, which is what eager torch does.
    """

    graph: Graph
    launches: tuple[Launch, ...] = ()
    kernels: Mapping[str, str] = {}  # name -> source text
    memory: int | None = 0  # arena bytes a call needs; None where sizes are known only at a call
    native: bool = True  # False: planned without kernels, because none could be built
    machine: Mapping[str, Any] = {}  # Backend.machine() where it was built

    @abstractmethod
    def bind(
        self, weights: Mapping[str, torch.Tensor] | None = None, shared: Constants | None = None
    ) -> Bound:
        """Evaluate `graph.constants` and pack them. Weights not given come from the graph.

        shared: of executables that are bound to the same weights.
        """

    @property
    def objects(self) -> tuple[Object, ...]:
        """All native code that a call needs. Raises EffcError where it is no longer there."""
        return ()

    @property
    def fallbacks(self) -> tuple[tuple[Op, No], ...]:
        """Every node that runs through ATen because no kernel takes it, with the reason."""
        return tuple((e.node, e.reason) for e in self.launches if e.reason is not None)

    @property
    def text(self) -> str:
        """The plan, one launch a line."""
        return "".join(f"{launch}\n" for launch in self.launches)


def weight_values(
    graph: Graph, weights: Mapping[str, torch.Tensor] | None
) -> dict[Weight, torch.Tensor]:
    """The tensor behind every weight of the graph; InputError when one is missing or misfits."""
    found: dict[Weight, torch.Tensor] = {}
    for node in graph.weights:
        value = (weights or {}).get(node.key, node.data)
        if value is None:
            raise InputError(f"no values for weight {node.key!r}", fix="pass them to bind()")
        if (tuple(value.shape), value.dtype) != node.of.stored:
            got = f"{value.dtype}{list(value.shape)}"
            raise InputError(f"weight {node.key!r} must be {node.of}, got {got}")
        found[node] = unpacked(value.detach(), node.of)
    check_shared(found, weights or {})
    return found


def check_shared(nodes: Iterable[Weight], weights: Mapping[str, torch.Tensor]) -> None:
    """InputError where weights that became one, being equal, have values of their own by now."""
    for node in nodes:
        value = weights.get(node.key, node.data)
        for name in node.also:
            other = weights.get(name)
            if other is not None and value is not None and not same_bits(value, other):
                raise InputError(
                    f"weights {node.key!r} and {name!r} are not equal any more",
                    why="they were when the model was compiled, and dedup-params made them one",
                    fix="compile the model again, or change both",
                )  # fmt: skip


# ------------------------------------------------------------------ backends


class Backend(ABC):
    """A target. Facts about it are class attributes; one instance serves the whole process."""

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"  # where inputs and outputs live
    graphs: ClassVar[bool] = False  # whether it knows the option cuda_graphs

    @property
    def rates(self) -> Rates:
        """What the target's time goes by, for passes that weigh work against memory traffic."""
        return Rates()

    @abstractmethod
    def supports(self, node: Op) -> Answer:
        """yes, or no(reason, at=node): would a kernel or a library routine of ours take it?"""

    @abstractmethod
    def compile(self, graph: Graph, options: Any = None) -> Executable:
        """Plan and build everything that needs no weights."""

    def machine(self) -> dict[str, Any]:
        """What of this machine decides whether code built here runs elsewhere; JSON data."""
        return {}

    def runs(self, machine: Mapping[str, Any]) -> Answer:
        """yes, or no(reason): does code that was built on `machine` run here?"""
        return yes

    def load(
        self,
        graph: Graph,
        objects: Sequence[Object],
        machine: Mapping[str, Any],
        options: Any = None,
    ) -> Executable:
        """`compile` with code that was built on `machine` before, so that no compiler is needed.

        Raises EffcError where that code is not what the plan calls, or cannot be loaded.
        """
        if objects:
            raise EffcError(f"backend {self.name!r} takes no native code")
        return self.compile(graph, options)


@dataclass
class _Registry:
    classes: dict[str, type[Backend]] = field(default_factory=dict)
    made: dict[str, Backend] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_registry = _Registry()


def register_backend(cls: type[Backend]) -> type[Backend]:
    """Make a Backend class known by its name (usable as a decorator)."""
    taken = _registry.classes.get(cls.name)
    if taken and taken.__qualname__ != cls.__qualname__:
        raise OptionError(f"backend {cls.name!r} is already registered by {taken.__module__}")
    _registry.classes[cls.name] = cls
    _registry.made.pop(cls.name, None)
    return cls


@cache
def _plugins() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def backend_names() -> tuple[str, ...]:
    """Every backend that find_backend knows."""
    return tuple(sorted({*_OURS, *_registry.classes, *_plugins()}))


def find_backend(name: str) -> Backend:
    """The backend of that name; OptionError names the nearest known one."""
    with _registry.lock:
        if name not in _registry.made:
            _registry.made[name] = _load(name)()
        return _registry.made[name]


def _load(name: str) -> type[Backend]:
    if name in _registry.classes:
        return _registry.classes[name]
    if name in _OURS:
        module, _, attribute = _OURS[name].partition(":")
        return getattr(import_module(module), attribute)
    if name not in _plugins():
        raise OptionError(f"unknown backend {name!r}", fix=nearest(name, backend_names()))
    entry = _plugins()[name]
    try:
        return entry.load()
    except ImportError as e:
        dist = entry.dist.name if entry.dist else entry.name
        raise EffcError(
            f"backend {name!r} ({entry.value}) cannot be imported",
            why=str(e), fix=f"repair or uninstall {dist}",
        ) from e  # fmt: skip
