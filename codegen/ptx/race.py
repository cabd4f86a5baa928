"""Looks for what a GPU shows only sometimes: missing barriers, weak waits, accesses out of place.

One launch runs under every schedule of {threads up, down, shuffled} x {cp.async eager, lazy}, with
shared memory poisoned before each block. Two detectors work at once:

- Every access is checked. Each byte of shared memory, and each element of the arguments, remembers
  who wrote and who read it last, and a clock for every warp says what a barrier has put in order
  (vector clocks, as in FastTrack: Flanagan and Freund, PLDI 2009). Two accesses by two threads, one
  of them a write, with no barrier between are a race, whatever the schedule made of them. A byte
  that a cp.async has not been waited for must not be touched, by another cp.async neither. Copies
  of the arguments stand apart, so that what runs past the end of one does not come upon another.
- Results of all schedules are compared.

It sees what the launch does, not what other inputs would do. Of the readers of a byte, two are
remembered. Atomics never race with each other; between blocks, kernels with fences or acquire and
release are trusted. Lanes of one warp are in order only after bar.warp.sync or a block's barrier;
writes of the same value do not count as a race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .faults import Fault, Finding
from .kernel import Dim, Kernel, Schedule
from .syntax import Instruction

SHOWN = 5  # of differing elements
APART = 1 << 16  # bytes on each side of an array


@dataclass(frozen=True)
class Difference:
    """An array whose contents depend on the schedule. elements: flat indices of some."""

    argument: int
    count: int
    elements: tuple[int, ...]
    values: tuple[tuple[float, float], ...]
    first: Schedule
    second: Schedule

    def __str__(self) -> str:
        shown = ", ".join(
            f"[{i}]: {a!r} and {b!r}" for i, (a, b) in zip(self.elements, self.values)
        )
        more = f" and {self.count - len(self.elements)} more" if self.count > SHOWN else ""
        return (
            f"argument {self.argument} depends on the schedule ({self.first}; {self.second}): "
            f"{shown}{more}"
        )


@dataclass(frozen=True)
class Report:
    """What `race` found. findings: mistakes, each once, with the schedules that showed it."""

    kernel: str
    schedules: tuple[Schedule, ...]
    findings: tuple[Finding, ...] = ()
    seen_under: tuple[tuple[Schedule, ...], ...] = ()
    differences: tuple[Difference, ...] = ()
    results: tuple[Any, ...] = field(default=(), repr=False)  # arguments after the first schedule

    @property
    def clean(self) -> bool:
        return not self.findings and not self.differences

    def __bool__(self) -> bool:
        """True where something is wrong."""
        return not self.clean

    def __str__(self) -> str:
        if self.clean:
            return f"kernel {self.kernel}: nothing found under {len(self.schedules)} schedules"
        lines = [f"kernel {self.kernel}: {len(self.findings)} findings, "
                 f"{len(self.differences)} differences"]  # fmt: skip
        for finding, seen in zip(self.findings, self.seen_under):
            lines.append(f"  {finding}")
            times = f"{finding.count} times, " if finding.count > 1 else ""
            every = len(seen) == len(self.schedules)
            lines.append(f"    {times}under {'every schedule' if every else _list(seen)}")
        lines += [f"  {d}" for d in self.differences]
        return "\n".join(lines)

    def raise_if_found(self) -> None:
        """Raises Fault with the first finding, where there is one."""
        if self.findings:
            raise Fault.of(self.kernel, self.findings)
        if self.differences:
            raise Fault(f"kernel {self.kernel}: {self.differences[0]}")


def schedules(seed: int = 0, without: Instruction | None = None) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(order, lazy, seed, without)
        for lazy in (False, True)
        for order in ("up", "down", "shuffled")
    )


def race(
    kernel: Kernel,
    grid: Dim,
    args: Sequence[Any],
    *,
    block: Dim | None = None,
    shared: int | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    seed: int = 0,
    without: Instruction | None = None,
) -> Report:
    """Run one launch under every schedule, on copies of `args`, and say what is wrong with it.

    rtol, atol: how far results of two schedules may be apart; bit for bit where both are 0. Give a
    tolerance for floating-point atomics, whose order is free. Raises InputError for arguments that
    do not fit.

    without: one of `kernel.barriers`, left out: is it needed?
    """
    tried = schedules(seed, without)
    found: dict[tuple[Any, ...], tuple[Finding, list[Schedule]]] = {}
    results: list[tuple[Schedule, list[np.ndarray | None]]] = []
    first: tuple[Any, ...] = ()
    for schedule in tried:
        copies = _copies(args)
        seen, ended = kernel.run(
            grid, copies, block=block, shared=shared, check=True, schedule=schedule
        )
        for finding in seen:
            key = (finding.kind, finding.instruction, finding.other)
            found.setdefault(key, (finding, []))[1].append(schedule)
        if ended:
            results.append((schedule, [_bits(a) for a in copies]))
            first = first or tuple(copies)
    differences = _compare(args, results, rtol, atol)
    return Report(
        kernel.name,
        tried,
        tuple(f for f, _ in found.values()),
        tuple(tuple(s) for _, s in found.values()),
        tuple(differences),
        first,
    )


def _list(seen: Sequence[Schedule]) -> str:
    return "; ".join(map(str, seen))


def _copies(args: Sequence[Any]) -> list[Any]:
    """Fresh memory for each run. Arguments that share storage go on sharing it."""
    storages: dict[int, torch.Tensor] = {}
    copies: list[Any] = []
    for a in args:
        if isinstance(a, torch.Tensor):
            old = a.untyped_storage()
            if old.data_ptr() not in storages:
                held = torch.empty(0, dtype=torch.uint8).set_(old)
                storages[old.data_ptr()] = _apart(held) if held.numel() else held
            new = storages[old.data_ptr()].untyped_storage()
            empty = torch.empty(0, dtype=a.dtype)
            copies.append(empty.set_(new, a.storage_offset(), a.size(), a.stride()))
        elif isinstance(a, np.ndarray) and a.size:
            flat = torch.from_numpy(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
            copies.append(np.frombuffer(_apart(flat).numpy().data, a.dtype).reshape(a.shape))
        else:
            copies.append(a)
    return copies


def _apart(data: torch.Tensor) -> torch.Tensor:
    """A copy of some bytes, a storage of its own, with room around it that belongs to no array: a
    kernel that runs past its end does not come upon another."""
    room = torch.full((data.numel() + 2 * APART,), 0xFF, dtype=torch.uint8)
    inside = room[APART : APART + data.numel()].copy_(data)
    return torch.frombuffer(inside.numpy().data, dtype=torch.uint8)


def _bits(a: Any) -> np.ndarray | None:
    """What an array holds, as a flat array; numpy has no bfloat16."""
    if isinstance(a, torch.Tensor):
        flat = a.detach().contiguous().flatten()
        return (
            flat.float() if flat.dtype.is_floating_point and flat.element_size() < 4 else flat
        ).numpy()
    return a.reshape(-1) if isinstance(a, np.ndarray) else None


def _compare(
    args: Sequence[Any],
    results: Sequence[tuple[Schedule, Sequence[np.ndarray | None]]],
    rtol: float,
    atol: float,
) -> list[Difference]:
    found = []
    for i in range(len(args)):
        for schedule, arrays in results[1:]:
            a, b = results[0][1][i], arrays[i]
            if a is None or b is None:
                continue
            wrong = np.flatnonzero(~_equal(a, b, rtol, atol))
            if wrong.size:
                shown = tuple(int(k) for k in wrong[:SHOWN])
                values = tuple((a[k].item(), b[k].item()) for k in shown)
                found.append(Difference(i, int(wrong.size), shown, values, results[0][0], schedule))
                break
    return found


def _equal(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """NaN equals NaN: poison that reaches a result under every schedule is told elsewhere."""
    if (rtol or atol) and a.dtype.kind == "f":
        return np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    return (a == b) | ((a != a) & (b != b))
