"""A CUDA C++ kernel as text, named by what it computes; the twin of codegen/triton/kernel.py.

Every kernel is a module of its own (a translation unit that includes effc_cuda.h) with one function

    extern "C" __global__ void NAME(pointers..., int64_t numbers...)

over sizes and strides that only a call knows; what the graph knows is a literal in its text. The
numbers of a call begin with the grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy

from effc.codegen.cpp.kernel import tidy
from effc.codegen.triton import numbers as triton
from effc.codegen.triton.kernel import ALIGNED, Pointer, Schedule, cdiv, power_of_two
from effc.ir import DType
from effc.ir.symbols import Dim

from ..cpp.scalar import storage
from ..templates import render

TEMPLATES = Path(__file__).parent
WARP = 32  # threads
DEFAULT = Schedule()


class Numbers(triton.Numbers):
    """The number arguments of a kernel (int64_t), in order of first use."""

    def scalar(self, value: sympy.Expr) -> str:
        name = self.text(value)
        return name if value.is_integer else f"effc::bit_cast<double>({name})"


@dataclass(frozen=True)
class CudaKernel:
    """body: the text of the module, its function called @NAME@. shared: bytes of dynamic shared
    memory of a block. comment: what it was made for."""

    name: str
    body: str
    pointers: tuple[Pointer, ...]
    numbers: tuple[str, ...] = ()
    schedule: Schedule = DEFAULT
    shared: int = 0
    comment: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Of one block."""
        return self.schedule.warps * WARP

    @property
    def code(self) -> str:
        """The text without what is for people: what decides its object."""
        return self.body.replace("@NAME@", self.name).strip() + "\n"

    @property
    def source(self) -> str:
        lines = [f"// {line}" for line in (*self.comment, str(self.schedule))]
        return "\n".join([*lines, self.code])


@dataclass(frozen=True)
class Made:
    """A kernel and the numbers that a call of it takes: the grid, then the kernel's own."""

    kernel: CudaKernel
    numbers: tuple[Dim, ...]


def kernel(
    kind: str, template: str, *, pointers: Sequence[Pointer], numbers: Numbers,
    schedule: Schedule, grid: Sequence[Dim], shared: int = 0, comment: Iterable[str] = (),
    **holes: Any,
) -> Made:  # fmt: skip
    """Fill `<template>.j2`; the name is the kind and a hash of text, alignment and schedule.

    The template sees `parameters`, `threads`, the blocks of the schedule by name, and the holes.
    """
    names = tuple(numbers.names)
    parameters = ", ".join((*(f"{p.type} {p.name}" for p in pointers),
                            *(f"int64_t {n}" for n in names)))  # fmt: skip
    given = {"parameters": parameters, "threads": schedule.warps * WARP, **dict(schedule.blocks)}
    body = tidy(render(TEMPLATES, f"{template}.j2", {**given, **holes}))
    digest = hashlib.blake2b(repr((body, schedule, shared)).encode(), digest_size=4).hexdigest()
    made = CudaKernel(f"{kind}_{digest}", body, tuple(pointers), names, schedule, shared,
                      tuple(comment))  # fmt: skip
    return Made(made, (*(*grid, 1, 1)[:3], *numbers.values))


def pointer(name: str, dtype: DType, offset: Dim = 0, written: bool = False) -> Pointer:
    """An argument that points `offset` elements into memory that is aligned."""
    aligned = isinstance(offset, int) and offset * dtype.bits // 8 % ALIGNED == 0
    qualified = f"{'' if written else 'const '}{storage(dtype)}* __restrict__"
    return Pointer(name, qualified, aligned)


__all__ = [
    "WARP", "CudaKernel", "Made", "Numbers", "Pointer", "Schedule", "cdiv", "kernel", "pointer",
    "power_of_two",
]  # fmt: skip
