"""Rows of a report over kernels: what compilers said, what fits, and a roofline.

Times here are estimates: the least that a device's peak and bandwidth allow for the FLOPs and bytes
of a node, which no kernel reaches. They are called so wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effc.ir import OptionError
from effc.ir.op import Cost

from ..triton.compile import Target, target
from .compile import AnyKernel, compile_kernels
from .devices import Device, device
from .occupancy import Occupancy, occupancy
from .resources import GROUPS, Resources, resources


@dataclass(frozen=True)
class Work:
    """A kernel and what it is for. node: the name of what it computes. cost: FLOPs and bytes of the
    node, where it is known. kind: element type of the products, as devices name their peaks."""

    kernel: AnyKernel
    node: str = ""
    cost: Cost | None = None
    kind: str = "f32"


@dataclass(frozen=True)
class Estimate:
    """seconds: a lower bound by the roofline, not a measurement."""

    seconds: float
    bound: str  # "products" or "memory"
    intensity: float  # FLOPs for a byte

    def __str__(self) -> str:
        return f"estimate: at least {_time(self.seconds)}, bound by {self.bound}"


@dataclass(frozen=True)
class Row:
    """occupancy, estimate: None where nothing is known of the device, or sizes vary."""

    work: Work
    target: Target
    device: str
    resources: Resources
    occupancy: Occupancy | None
    estimate: Estimate | None


def estimate(cost: Cost, kind: str, on: Device) -> Estimate | None:
    """The roofline's time for work on a device; None where the work depends on sizes that vary.

    Raises OptionError for a kind of products that the device has no peak of.
    """
    if not isinstance(cost.flops, int) or not isinstance(cost.bytes, int):
        return None
    if kind not in on.peak:
        raise OptionError(
            f"no peak of {on.name} for {kind}", fix=f"say one of {', '.join(on.peak)}"
        )
    parts = {"products": cost.flops / on.peak[kind], "memory": cost.bytes / on.bandwidth}
    bound = max(parts, key=lambda name: parts[name])
    return Estimate(parts[bound], bound, cost.flops / max(1, cost.bytes))


def report(kernels: Iterable[Work | AnyKernel], targets: Sequence[str]) -> list[Row]:
    """One row for every kernel on every target.

    targets: names of devices ("H100 SXM") or of targets ("cuda:sm_90"), for which the first device
    of the kind stands. Equal kernels are compiled once. Raises UnsupportedError where Triton or its
    tools are not installed.
    """
    works = [w if isinstance(w, Work) else Work(w) for w in kernels]
    unique = list(dict.fromkeys(w.kernel for w in works))
    rows = []
    for name in targets:
        to, on = _target(name)
        found = {c.kernel.name: resources(c) for c in compile_kernels(unique, to)}
        for w in works:
            r = found[w.kernel.name]
            fits = occupancy(r, on) if on is not None else None
            time = estimate(w.cost, w.kind, on) if on is not None and w.cost is not None else None
            rows.append(Row(w, to, on.name if on is not None else "", r, fits, time))
    return rows


def _target(name: str) -> tuple[Target, Device | None]:
    """What to compile for, and the device; a target that no device is known of has none."""
    try:
        on = device(name)
    except OptionError:
        if ":" not in name:
            raise
        return target(name), None
    return target(on.target), on


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns under each other; counts are of instructions in the text."""
    head = ["kernel", "node", "device", "registers", "spills", "shared", "blocks", "warps", "bound",
            *GROUPS, "all", "time (estimate)"]  # fmt: skip
    lines = [head, *(_cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in shown)


def _cells(row: Row) -> list[str]:
    r, fits = row.resources, row.occupancy
    held = [str(fits.blocks), f"{fits.share:.0%}", fits.bound] if fits is not None else ["?"] * 3
    time = row.estimate
    return [
        r.kernel, row.work.node, row.device or str(row.target), str(r.registers), str(r.spills),
        str(r.shared), *held, *(str(r.count(g)) for g in GROUPS), str(r.total),
        f">= {_time(time.seconds)}, {time.bound}" if time is not None else "?",
    ]  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


__all__ = ["Estimate", "Row", "Work", "estimate", "report", "table"]
