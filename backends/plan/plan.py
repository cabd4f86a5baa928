"""A plan: the steps of a graph over memory, before any size or weight is known."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CodeType
from typing import Any

import torch

from effc.codegen.build import Library
from effc.ir import Graph, Op
from effc.ir.symbols import Dim

from ..base import Launch
from .arena import Arena, layout
from .memory import Root
from .sizes import Sizes
from .steps import AnyKernel, HostCall, KernelCall, Packed, Window
from .words import Words

BIG = 1 << 16  # bytes from which a torch tensor is let go after its last use, not after the call


@dataclass(eq=False)
class Plan:
    graph: Graph
    steps: list[KernelCall | HostCall]
    roots: list[Root]
    windows: list[Window]
    constants: dict[Op, Root]  # evaluated when weights are bound
    packed: list[Packed]
    inputs: list[Root | int]
    outputs: list[int]  # slots
    shared: list[int]  # outputs that a fallback may have given memory of something else
    slots: int
    shown_in: dict[int, Root]
    sizes: Sizes
    equal: list[tuple[Dim, Dim]]  # sizes that broadcasting takes to be equal
    alignment: int = 1  # of addresses that kernels get, in bytes
    # Roots that kernels touch; their place here is their place in the table of addresses.
    numbered: list[Root] = field(init=False)

    def __post_init__(self) -> None:
        calls = (s for s in self.steps if isinstance(s, KernelCall))
        self.numbered = list(dict.fromkeys(ref.root for call in calls for ref in call.refs))
        for number, root in enumerate(self.numbered):
            root.number = number

    @cached_property
    def arena(self) -> Arena:
        return layout(self.roots)

    @cached_property
    def output_roots(self) -> list[Root]:
        return [r for r in self.numbered if r.kind == "output"]

    @property
    def kernels(self) -> dict[str, AnyKernel]:
        """Distinct kernels by name, in order of first use."""
        calls = (s for s in self.steps if isinstance(s, KernelCall))
        return {k.name: k for call in calls for k in call.kernels}

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        rows, segment = [], -1
        for _, group in self.segments():
            if isinstance(group, HostCall):
                rows.append(group.launch)
                continue
            segment += 1
            rows += [replace(call.launch, segment=segment) for call in group]
        return tuple(rows)

    def segments(self) -> Iterator[tuple[int, HostCall | list[KernelCall]]]:
        """Position and step; consecutive kernels together, because they are one native call."""
        run: list[KernelCall] = []
        for i, step in enumerate(self.steps):
            if isinstance(step, KernelCall):
                run.append(step)
                continue
            if run:
                yield i - len(run), run
                run = []
            yield i, step
        if run:
            yield len(self.steps) - len(run), run

    @cached_property
    def drops(self) -> dict[int, list[int]]:
        """Step -> slots of big torch tensors that nothing reads after it."""
        found: dict[int, list[int]] = {}
        for slot, root in self.shown_in.items():
            big = not isinstance(root.nbytes, int) or root.nbytes >= BIG
            if root.kind == "dynamic" and big and slot not in self.outputs:
                found.setdefault(root.last, []).append(slot)
        return found

    def gone_after(self, at: int, group: HostCall | list[KernelCall]) -> list[int]:
        """Slots to let go after the step, or the consecutive kernels, at this position."""
        count = len(group) if isinstance(group, list) else 1
        return [slot for i in range(at, at + count) for slot in self.drops.get(i, ())]


@dataclass(frozen=True)
class Part:
    """A translation unit and what was built of it; functions: the kernels that the plan calls."""

    name: str
    source: str
    library: Library
    functions: tuple[str, ...] = ()


@dataclass(eq=False)
class Program:
    """A plan with its kernels built and loaded."""

    plan: Plan
    threads: int | None
    runner: Library | None = None
    owner: dict[str, Library] = field(default_factory=dict)  # kernel name -> its library
    device: str = "cpu"  # type of the torch device on which it runs
    parts: list[Part] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Take the kernels of a library, or the runner where it has none."""
        self.parts.append(part)
        self.owner.update((name, part.library) for name in part.functions)
        if not part.functions:
            self.runner = part.library

    def packing(self) -> AbstractContextManager[None]:
        """Where weights are packed and frames are made, as the kernels expect them."""
        return nullcontext()

    @cached_property
    def run(self) -> Any:
        assert self.runner is not None
        return self.runner.function(
            "effc_run", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
        )

    def native(self) -> Any:
        """What runs the segments of one frame."""
        return self.run

    # What a frame needs of the place where the plan runs. (torch.empty_strided checks more.)
    empty = staticmethod(
        getattr(torch._C._dynamo.guards, "_empty_strided_cpu", torch.empty_strided)
    )

    def resource(self) -> int:
        """What native calls get last: how many threads. Asked at each call, as it may change."""
        return torch.get_num_threads() if self.threads is None else self.threads

    def error_word(self) -> torch.Tensor:
        """Memory in which kernels say that an index was out of range."""
        return torch.zeros(1, dtype=torch.int64)

    @cached_property
    def words(self) -> dict[int, Words]:
        """Position -> the calls of the segment that begins there."""
        return {
            at: Words(group, self.address, self.plan.sizes)
            for at, group in self.plan.segments()
            if isinstance(group, list)
        }

    @cached_property
    def driver(self) -> CodeType:
        from .driver import compile_driver

        return compile_driver(self.plan, self.device)

    def address(self, kernel: AnyKernel) -> int:
        function = getattr(self.owner[kernel.name].cdll, kernel.name)
        return ctypes.cast(function, ctypes.c_void_p).value or 0
