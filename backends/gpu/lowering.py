"""The lowerings of GPU targets: which kernels compute which op, and which schedule they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

from effc.codegen.triton.kernel import ALIGNED, Made, Schedule
from effc.codegen.triton.schedules import ANY, Choice, Device
from effc.ir import Op, Rates

from ..plan.builder import Builder
from ..plan.lowering import Lowerings
from ..plan.memory import Ref
from ..plan.sizes import Sizes
from ..plan.steps import KernelCall
from ..plan.tuning import Schedules


class GpuLowerings(Lowerings):
    """device: what schedules are made for."""

    device: Device = ANY

    def on(self, device: Device) -> GpuLowerings:
        """The same for one kind of device."""
        made = GpuLowerings(self.name, self.alignment, base=self)
        made.device = device
        return made

    @property
    def rates(self) -> Rates:
        d = self.device
        return Rates(d.peak["f32"] / d.bandwidth, d.launch * d.bandwidth)


GPU = GpuLowerings("gpu", ALIGNED)
lowers, claim = GPU.lowers, GPU.claim


def offsets(refs: Sequence[Ref]) -> list[Any]:
    """Where each operand begins in its memory, in elements: decides how its pointer is aligned."""
    return [r.offset for r in refs]


def call(
    b: Builder, node: Op, made: Made, outs: Sequence[Ref], ins: Sequence[Ref], kind: str = "kernel",
    note: str = "",
) -> None:  # fmt: skip
    """Launch a kernel; its pointers are outs, then ins, its numbers begin with the grid."""
    b.kernel(made.kernel, node, outs, ins, made.numbers, kind=kind, note=note)


# ------------------------------------------------------------------ one of several ways


@dataclass(frozen=True)
class Candidate:
    """One way to compute some nodes: `launch` adds its steps to a builder.

    name: of the method; detail: what else is chosen, which prints as text. cost: predicted, in any
    unit that the candidates of a choice share. why: what the cost model says of it.
    """

    name: str
    detail: Any
    cost: float
    launch: Callable[[Builder], None] = field(compare=False)
    why: str = ""

    varies = False  # sizes that only a call knows are guessed, to predict times and to measure them

    @property
    def text(self) -> str:
        return f"{self.name} {self.detail}".rstrip()


def ranked(
    choices: Iterable[Choice], launch: Callable[[Schedule], Callable[[Builder], None]],
    name: Callable[[Choice], str],
) -> list[Candidate]:  # fmt: skip
    """A candidate for each schedule, in the order of the cost model that gave them."""
    found: list[Candidate] = []
    for c in choices:
        cost = max(c.seconds, found[-1].cost if found else 0.0)
        found.append(Candidate(name(c), c.schedule, cost, launch(c.schedule), c.why))
    return found


@dataclass(frozen=True)
class Problem:
    """What several candidates compute.

    text: the methods, and the first one's kernels, whose names cover all of their text, with what
    they are launched with. builder: on which any of them can be launched to see what it launches.
    guess: the extent of symbols, where `known` does not say another.
    """

    text: str
    builder: Builder = field(compare=False)
    guess: int
    known: Mapping[Any, int] = field(default_factory=dict)


def choose(
    b: Builder, candidates: Sequence[Candidate], guess: int, known: Mapping[Any, int] = {},
    nested: bool = False,
) -> None:  # fmt: skip
    """Launch by the best candidate: the fastest that was measured, else the first.

    nested: candidates choose again inside. `launch` must not ask the builder for a ref that nobody
    has asked for before: what is tried and not taken leaves nothing behind.
    """
    first, at = candidates[0], len(b.steps)
    if b.schedules is None or len(candidates) == 1:
        first.launch(b)
        note(b, at, first.why)
        return
    before = forked(b)
    first.launch(b)
    named = b
    if nested:  # by what is not measured, so that the name stays when what is inside is
        named = forked(before)
        named.schedules = None
        first.launch(named)
    methods = " or ".join(dict.fromkeys(c.name for c in candidates))
    problem = Problem(f"{methods}: {_text(named.steps[at:])}", before, guess, known)
    best, said = b.schedules.pick(problem, candidates)
    if problem.text not in b.schedules.used:
        said = first.why
    if best is not first:
        again = forked(before)
        for f in fields(b):
            setattr(b, f.name, getattr(again, f.name))
        best.launch(b)
    note(b, at, said)


def forked(b: Builder) -> Builder:
    """A builder that goes on from here by itself."""
    made = copy(b)
    for f in fields(b):
        if isinstance(value := getattr(b, f.name), list | dict | set):
            setattr(made, f.name, copy(value))
    return made


def note(b: Builder, at: int, text: str) -> None:
    """Say of the launches from a step on why they are as they are: before what they say."""
    for step in b.steps[at:]:
        if isinstance(step, KernelCall) and step.launch.kind == "kernel" and text:
            said = "; ".join(t for t in (text, step.launch.note) if t)
            step.launch = replace(step.launch, note=said)
            return


def _text(steps: Sequence[Any]) -> str:
    calls = (s for s in steps if isinstance(s, KernelCall))
    return "; ".join(f"{c.kernel.name}({', '.join(map(str, c.numbers))})" for c in calls)


def launches(problem: Problem, candidate: Candidate) -> tuple[list[KernelCall], Sizes]:
    """What a candidate launches, with the sizes it is about."""
    b = forked(problem.builder)
    b.steps, b.sizes = [], Sizes()
    if b.schedules is not None:  # what is chosen inside is chosen by what is known by now
        b.schedules = Schedules(b.schedules.times)
    candidate.launch(b)
    return [s for s in b.steps if isinstance(s, KernelCall)], b.sizes


__all__ = [
    "GPU", "Candidate", "GpuLowerings", "Problem", "call", "choose", "claim", "forked", "launches",
    "lowers", "note", "offsets", "ranked",
]  # fmt: skip
