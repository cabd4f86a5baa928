"""A Triton kernel as text, named by what it computes.

Every kernel is a Python function of pointers and numbers (sizes and strides that only a call
knows); what the graph knows is a literal in its text. A call gives the grid first:

    numbers of a call = (grid x, grid y, grid z, *numbers of the kernel)

Two kernels with the same text but for comments have the same name and are compiled once.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from effc.ir.symbols import Dim, floordiv

from .numbers import Numbers
from .scalar import POINTER

TEMPLATES = Path(__file__).parent
ALIGNED = 16  # bytes: the widest access of one thread
HEAD = """import triton
import triton.language as tl

from effc.codegen.triton import functions as fn
"""


@dataclass(frozen=True)
class Pointer:
    """A pointer argument. aligned: its address is a multiple of 16 at every call."""

    name: str
    type: str  # Triton's name, "*fp32"
    aligned: bool = True


@dataclass(frozen=True)
class Schedule:
    """How a kernel is spread over a GPU: what is no part of its meaning.

    blocks: sizes of tiles by name, as the template calls them.
    """

    warps: int = 4
    stages: int = 2
    blocks: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{blocks} warps={self.warps} stages={self.stages}".strip()


@dataclass(frozen=True)
class TritonKernel:
    """body: the text of one @triton.jit function @NAME@. comment: what it was made for."""

    name: str
    body: str
    pointers: tuple[Pointer, ...]
    numbers: tuple[str, ...] = ()
    schedule: Schedule = Schedule()
    comment: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """The function's text without what is for people: what decides its object."""
        return self.body.replace("@NAME@", self.name).strip()

    @property
    def source(self) -> str:
        """A Python file that defines the kernel."""
        lines = [f"# {line}" for line in (*self.comment, str(self.schedule))]
        return "\n".join([HEAD, "", *lines, self.code, ""])

    @property
    def signature(self) -> dict[str, str]:
        """Argument -> type, as triton.compile takes it."""
        return {p.name: p.type for p in self.pointers} | dict.fromkeys(self.numbers, "i64")

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What triton.compile may take for granted of arguments."""
        aligned = [i for i, p in enumerate(self.pointers) if p.aligned]
        return {(i,): [["tt.divisibility", ALIGNED]] for i in aligned}


@dataclass(frozen=True)
class Made:
    """A kernel and the numbers that a call of it takes."""

    kernel: TritonKernel
    numbers: tuple[Dim, ...]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, autoescape=False,
    )  # fmt: skip


def kernel(
    kind: str, template: str, *, pointers: Sequence[Pointer], numbers: Numbers,
    schedule: Schedule, grid: Sequence[Dim], comment: Iterable[str] = (), **holes: Any,
) -> Made:  # fmt: skip
    """Fill `<template>.j2`, or the template's text; the name is the kind and a hash of text,
    types and schedule.

    The template sees `parameters`, the blocks of the schedule by name, and the holes.
    """
    names = tuple(numbers.names)
    parameters = ", ".join((*(p.name for p in pointers), *names))
    given = {**dict(schedule.blocks), **holes}
    environment = _environment()
    text = (
        environment.from_string(template) if "\n" in template
        else environment.get_template(f"{template}.j2")
    ).render(parameters=parameters, **given)  # fmt: skip
    body = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    marks = repr((body, tuple(pointers), names, schedule))
    digest = hashlib.blake2b(marks.encode(), digest_size=4).hexdigest()
    made = TritonKernel(f"{kind}_{digest}", body, tuple(pointers), names, schedule, tuple(comment))
    sizes = (*grid, 1, 1)[:3]
    return Made(made, (*sizes, *numbers.values))


def cdiv(a: Dim, b: int) -> Dim:
    """Blocks of b that cover a."""
    return floordiv(a + (b - 1), b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def indent(lines: Iterable[str], depth: int) -> str:
    """Lines of a template's hole, `depth` spaces in."""
    return textwrap.indent("\n".join(lines), " " * depth)


__all__ = [
    "POINTER", "Made", "Pointer", "Schedule", "TritonKernel", "cdiv", "indent", "kernel",
    "power_of_two",
]  # fmt: skip
