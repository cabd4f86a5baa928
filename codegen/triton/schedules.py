"""Schedules of products: which there are for a problem, what each should take, and why.

    best = schedules(problem, SM_90)[0]
    best.schedule, best.seconds, best.why

The model is a roofline of a tile with latencies: products at the rate that tiles of the shape
reach, factors at the rate of the L2 cache and of memory, and the time until the first of them is
there. It orders schedules; a tuner may measure the first few. What a program may hold is bounded so
that no schedule given here spills registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product as pairs
from math import ceil

from effc.ir import UnsupportedError

from ..gpu.devices import Device as Sheet
from ..gpu.devices import device as sheet_of
from .kernel import Schedule, power_of_two


@dataclass(frozen=True)
class Device:
    """What the model takes of a GPU's sheet in codegen/gpu/devices.py. units: SMs or CUs. shared:
    bytes that a program may have. lanes: of a warp.

    peak: FLOP/s by kind of product that it has. bandwidth, l2: bytes/s of memory, of the L2 cache.
    """

    name: str
    units: int
    shared: int
    lanes: int
    peak: dict[str, float] = field(hash=False)
    bandwidth: float
    l2: float
    shared_of_all: int = 227 << 10  # bytes for every stage; `shared` need not hold the last one
    registers: int = 65536  # 32-bit ones of a unit
    latency: float = 7e-7  # seconds from a load to its arrival, under load
    launch: float = 4e-6  # seconds between the begins of two launches

    @staticmethod
    def of(sheet: Sheet) -> Device:
        """What the model takes of a device's data sheet."""
        backend, _, arch = sheet.target.partition(":")
        peak = {kind: sheet.peak[kind] for kind in ("f16", "bf16", "tf32", "f32", "f64")}
        if backend == "cuda":  # Triton makes a product of three for NVIDIA's tensor cores only
            peak["tf32x3"] = peak["tf32"] / 3
        limits = sheet.limits
        return Device(
            arch, sheet.units, limits.shared_block, limits.warp, peak, sheet.bandwidth,
            sheet.l2_bandwidth, registers=limits.registers,
        )  # fmt: skip


TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")
SM_80, SM_90, SM_100, GFX942 = (Device.of(sheet_of(name)) for name in TARGETS)
# What fits everywhere: a plan that is not made for one of them takes it.
ANY = replace(SM_80, name="any", shared=64 << 10)
DEVICES = {d.name: d for d in (ANY, SM_80, SM_90, SM_100, GFX942)}


@dataclass(frozen=True)
class Problem:
    """A product as far as its time depends on it; sizes that only a call knows are guessed.

    deep: sizes of depth without the taps of a window. sums: right factors over the same left one.
    prepared: the left factor is computed from what is loaded. reads: elements of the result's
    shape that what follows loads. samples: of small pictures, between whose pixels it reads.
    pooled: elements that each one of the left factor is pooled from. chained: columns of a second
    product, whose left factor is what the tiles of this one become.
    """

    batch: int
    rows: int
    columns: int
    deep: int
    taps: int = 1
    kind: str = "f32"
    sums: int = 1
    prepared: bool = False
    reads: int = 0
    may_split: bool = True
    samples: int = 0
    pooled: int = 1
    chained: int = 0

    @property
    def bytes(self) -> int:
        """Of an element of a factor."""
        return {"f16": 2, "bf16": 2, "f64": 8}.get(self.kind, 4)

    @property
    def vectors(self) -> bool:
        """Products run on vector units, not on tensor cores."""
        return self.kind == "f32"


@dataclass(frozen=True)
class Choice:
    """A schedule with what the model says of it. shared: bytes a program holds; registers: 32-bit
    ones a thread holds of the sums and of the factors' fragments."""

    schedule: Schedule
    seconds: float
    shared: int
    registers: int
    why: str

    def __str__(self) -> str:
        return f"{self.schedule}: {self.seconds * 1e6:.3g} us, {self.why}"


SIDES = (16, 32, 64, 128, 256)
DEPTHS = (16, 32, 64, 128)
SPLITS = (1, 2, 4, 8, 16)
GROUP = 8  # rows of tiles that run together
FEW = 4  # rows up to which products are added lane by lane, without tiles


@lru_cache(maxsize=1024)
def schedules(p: Problem, device: Device = ANY) -> tuple[Choice, ...]:
    """All that fit the device, pruned to those that may be best, best prediction first; after them
    the best again as persistent kernels. Raises UnsupportedError for products it does not have."""
    if p.kind not in device.peak:
        raise UnsupportedError(f"{device.name} has no {p.kind} products")
    found = [c for s in (*_tiles(p), *_lanes(p)) if (c := _choice(p, s, device)) is not None]
    found.sort(key=lambda c: (c.seconds * (1.02 if c.schedule.stages == 2 else 1), c.shared))
    kept = [c for c in found if c.seconds <= KEPT * found[0].seconds]
    looping = [persistent(c, device) for c in kept[:LOOPING] if _waves(p, c, device) > 1]
    return (*kept, *looping)


KEPT = 2.0  # times the best prediction
LOOPING = 4  # of the best schedules are there with programs that loop over tiles as well


def _tiles(p: Problem) -> Iterator[dict[str, int]]:
    tall = [s for s in SIDES if s <= max(16, power_of_two(p.rows))]
    broad = [s for s in SIDES if s <= max(16, power_of_two(p.columns))]
    if p.chained:
        broad = broad[-1:]
    flats = (0, 1) if p.taps > 1 and p.deep <= 16 else (0,)
    # Elements to be pooled come through registers: in shared memory each would have a place.
    ahead = (2, 3, 4) if p.pooled == 1 else (1,)
    for flat in flats:
        whole = p.deep * p.taps if flat else p.deep
        least = 32 if p.bytes == 2 else 16
        deep = [d for d in DEPTHS if least <= d <= max(least, power_of_two(whole))]
        for rows, columns, depth in pairs(tall, broad, deep):
            for warps, stages, splits in pairs((1, 2, 4, 8), ahead, SPLITS):
                yield {
                    "rows": rows, "columns": columns, "depth": depth, "flat": flat, "dot": 1,
                    "warps": warps, "stages": stages, "splits": splits, "programs": 0,
                }  # fmt: skip


def _lanes(p: Problem) -> Iterator[dict[str, int]]:
    if p.rows > FEW or p.taps > 1 or p.pooled > 1 or p.kind == "f64":
        return
    rows = power_of_two(p.rows)
    for columns, depth, warps, splits in pairs((1, 2, 4, 8, 16), (128, 256, 512), (2, 4), SPLITS):
        yield {"rows": rows, "columns": columns, "depth": depth, "flat": 0, "dot": 0,
               "warps": warps, "stages": 2, "splits": splits, "programs": 0}  # fmt: skip


def _choice(p: Problem, s: dict[str, int], d: Device) -> Choice | None:
    """The schedule with its prediction; None where it does not fit."""
    held = _held(p, s, d)
    if held is None:
        return None
    shared, registers = held
    seconds, why = _seconds(p, s, d, shared, registers)
    down, across = ceil(p.rows / s["rows"]), ceil(p.columns / s["columns"])
    group = GROUP if down > 1 and across > 1 else 1
    names = ("rows", "columns", "depth", "splits", "dot", "flat", "programs")
    blocks = tuple((n, s[n]) for n in names) + (("group", group),)
    return Choice(Schedule(s["warps"], s["stages"], blocks), seconds, shared, registers, why)


SUMS = 64  # registers of a thread that sums may take: more spill with an epilogue beside them
# Fragments of both factors may be held for all of the depth of a step.
DEEPEST = {"f32": 16, "f64": 32, "tf32x3": 32, "tf32": 64}
POOLED = 4  # elements that a thread pools at once: each has all of its window's on the way to it
LIVE = 128  # and with what an epilogue holds of the result's shape


def _held(p: Problem, s: dict[str, int], d: Device) -> tuple[int, int] | None:
    """(bytes of shared memory, registers of a thread), or None where either is too much."""
    rows, columns, depth = s["rows"], s["columns"], s["depth"]
    threads = s["warps"] * d.lanes
    if not s["dot"]:
        sums = rows * columns * depth * p.sums / threads
        loaded = (rows + columns * p.sums) * depth / threads
        if sums > 32 or columns * depth < 8 * threads:
            return None
        return 1024, int(sums + loaded) + 32
    least = 32 if p.pooled > 1 else 256 if s["warps"] == 1 else 512
    broad = max(columns, p.chained and _side(p.chained))
    if not least <= rows * broad // s["warps"] <= 4096:
        return None
    if s["splits"] > 1 and (not p.may_split or _programs(p, s) >= 2 * d.units):
        return None
    sums = rows * columns * p.sums * (2 if p.kind == "f64" else 1) // threads
    if p.chained:
        sums += rows * _side(p.chained) // threads
    staged = (rows + columns * p.sums) * depth * p.bytes
    if staged * s["stages"] > d.shared_of_all or staged * (s["stages"] - 1) > d.shared:
        return None
    if depth > (
        16 if p.vectors else 32 if p.kind in ("f64", "tf32x3") else 64 if p.bytes > 2 else 128
    ):
        return None  # fragments of both factors for all of the depth may be held at once
    if p.pooled > 1 and rows * depth > POOLED * threads:
        return None
    if rows >= 64 and not p.vectors and s["warps"] < 4:
        return None  # the widest instructions are those of four warps
    limit = 32 if p.prepared or p.vectors or p.kind == "tf32x3" else SUMS
    if sums > limit or sums * (1 + min(p.reads, 3)) > LIVE:
        return None
    if p.vectors and sums > 16 and s["warps"] == 2:
        return None  # ptxas gives two warps 96 registers for the sake of occupancy, and spills
    fragments = (rows + columns * p.sums) * min(depth, 16) * p.bytes // 4 // d.lanes // 2
    samples = 2 * sums * min(p.samples, 1)
    return staged * (s["stages"] - 1), sums + samples + min(64, fragments) + 40


def _programs(p: Problem, s: dict[str, int]) -> int:
    """Of one part of the depth."""
    return p.batch * ceil(p.rows / s["rows"]) * ceil(p.columns / s["columns"])


def _seconds(
    p: Problem, s: dict[str, int], d: Device, shared: int, registers: int
) -> tuple[float, str]:
    rows, columns, depth = s["rows"], s["columns"], s["depth"]
    whole = p.deep * p.taps
    steps = ceil(whole / depth) if s["flat"] or p.taps == 1 else p.taps * ceil(p.deep / depth)
    steps = ceil(steps / s["splits"])
    programs = _programs(p, s) * s["splits"]
    threads = s["warps"] * d.lanes
    fit = max(1, min(d.registers // max(1, threads * registers), 2048 // threads,
                     d.shared_of_all // max(1, shared), 16))  # fmt: skip
    turns = ceil(programs / d.units)  # programs that one unit computes
    waves = ceil(programs / (d.units * fit))
    together = min(fit, turns)

    work = 2 * rows * columns * depth * p.sums * steps
    if s["dot"]:
        rate = d.peak[p.kind] / d.units * _share(p, s, together)
    else:
        rate = d.peak["f32"] / d.units / 2
    if p.chained:
        work += 2 * rows * columns * _side(p.chained)
    compute = turns * work / rate
    moved = (rows + columns * p.sums) * depth * p.bytes * steps
    moved += columns * p.chained * p.bytes
    near = turns * moved * d.units / d.l2
    once = p.batch * (p.rows + p.columns * p.sums) * whole / p.taps * p.bytes
    stored = p.batch * p.rows * (p.chained or p.columns) * p.bytes
    far = (once + stored * (1 + p.reads)) / d.bandwidth
    far *= max(1.0, 0.8 * d.units / min(programs, d.units))  # few programs do not fill the lines
    # A step waits for loads begun `stages - 1` steps before; programs side by side share the wait.
    step = d.latency / max(1, s["stages"] - 1)
    wait = waves * (2 * d.latency + steps * max(0.0, step - compute / turns / steps))
    parts = {"products": compute, "the L2 cache": near, "memory": far}
    bound = max(parts, key=lambda name: parts[name])
    most = max(*parts.values(), wait)
    # What is not the bound takes some of its time all the same.
    seconds = most + REST * (sum(parts.values()) - parts[bound]) + waves * d.latency + d.launch
    if wait > parts[bound]:
        bound = "latency"
    if p.pooled > 1:  # nothing else goes on meanwhile
        seconds += turns * rows * depth * p.bytes * steps * p.pooled / FIRST_CACHE
    if p.prepared:
        seconds += compute * 0.5 * 128 / columns
    if s["splits"] > 1:
        sums = 4 * p.batch * p.rows * p.columns * p.sums * s["splits"]
        seconds += d.launch + 2 * sums / d.bandwidth + d.latency
    tiles = f"{programs} programs of {rows}x{columns}" if s["dot"] else f"{programs} programs"
    return seconds, f"{tiles}, {fit} a unit, bound by {bound}"


def _side(size: int) -> int:
    """The side of a tile that holds all."""
    return max(16, power_of_two(size))


REST = 0.15
FIRST_CACHE = 1.8e11  # bytes/s of a unit: 128 a cycle


def _share(p: Problem, s: dict[str, int], together: int) -> float:
    """The part of a unit's peak that tiles of the shape reach: the smaller a tile, the more often
    are factors read for it, and few warps do not fill the pipelines."""
    rows, columns = s["rows"], s["columns"] * p.sums
    if p.vectors:  # each thread reads its rows and columns of the factors for every product
        rows, columns = (n / (s["warps"] * 32) ** 0.5 for n in (rows, columns))
    side = rows * columns / (rows + columns)
    reach = side / (side + (1 if p.vectors else 16))
    filled = min(1.0, s["warps"] * together / 8)
    deep = s["depth"] / (s["depth"] + (2 if p.vectors else 16))
    return 0.9 * reach * (0.4 + 0.6 * filled) * deep


def _waves(p: Problem, c: Choice, d: Device) -> float:
    """How often programs are begun on every unit."""
    blocks = dict(c.schedule.blocks)
    return _programs(p, blocks) / d.units if blocks["dot"] and blocks["splits"] == 1 else 0


def persistent(choice: Choice, device: Device = ANY) -> Choice:
    """The schedule with programs that loop over tiles, two a unit. Whether that pays depends on
    what the model does not know: it is there to be measured, and never the first."""
    blocks = dict(choice.schedule.blocks) | {"programs": 2 * device.units}
    schedule = replace(choice.schedule, blocks=tuple(blocks.items()))
    why = f"{choice.why}, {2 * device.units} programs loop over the tiles"
    return replace(choice, schedule=schedule, why=why)


def describe(choices: Sequence[Choice], count: int = 3) -> list[str]:
    """The first choices as text."""
    return [str(c) for c in choices[:count]]


__all__ = [
    "ANY", "DEVICES", "GFX942", "SM_80", "SM_90", "SM_100", "Choice", "Device", "Problem",
    "describe", "persistent", "schedules",
]  # fmt: skip
