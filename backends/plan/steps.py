"""What a plan is made of: steps, values, and things prepared when weights are bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from effc.codegen.cpp.kernel import Kernel
from effc.ir import Op
from effc.ir.symbols import Dim

from ..base import Launch
from .memory import Ref, Root

Make = Callable[[Any], Callable[[], None]]  # frame -> a step of a call


class AnyKernel(Protocol):
    """A kernel of any language: plans name it, reports show it, a target builds it."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


@dataclass(eq=False)
class KernelCall:
    """One kernel on pointers into roots, with sizes, strides and scalars as integers."""

    kernel: AnyKernel
    refs: tuple[Ref, ...]
    numbers: tuple[Dim | Kernel, ...]  # a kernel stands for its address
    launch: Launch

    @property
    def kernels(self) -> tuple[AnyKernel, ...]:
        return (self.kernel, *(n for n in self.numbers if isinstance(n, Kernel)))


@dataclass(eq=False)
class HostCall:
    """A torch routine on the values of a call; `reads` are their slots."""

    make: Make
    reads: tuple[int, ...]
    launch: Launch


@dataclass(eq=False)
class Held:
    """A value of the graph while the plan is built."""

    node: Op
    root: Root
    ref: Ref | None = None  # how kernels read it; None: not as a view of the root
    view_of: Held | None = None
    slot: int = -1  # of its torch tensor


@dataclass(frozen=True)
class Window:
    """A torch tensor over a part of the arena, made once for each frame."""

    slot: int
    ref: Ref


@dataclass(frozen=True)
class Packed:
    """Something made of a constant when weights are bound: a weight in a library's own order.

    source: the constant, which is not kept for that. what, key: equal ones of one constant are the
    same thing.
    """

    slot: int
    source: Op
    make: Callable[[Any], Any]
    what: str
    key: Any
