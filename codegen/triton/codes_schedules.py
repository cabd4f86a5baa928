"""Schedules of products whose right factor is stored in codes, in the order of a model.

The bytes of the codes at the memory's rate, the numbers that they become at the rate of the lanes
that unpack them, products at the tensor cores' rate, and how evenly programs fill a GPU. Blocks are
bounded so that no schedule given here spills registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product as pairs
from math import ceil

from .codes import UNIT
from .kernel import Schedule, power_of_two
from .schedules import Choice, Device

FEW = 4  # rows up to which lanes multiply what they unpack
UNPACK = 5  # operations that make a number of a code
GROUP = 8  # rows of tiles that run together


@dataclass(frozen=True)
class Problem:
    """kind: "f16", "bf16", "f32", "tf32" ... or "i8", where both factors are codes.

    bits: of a code. by_unit: whether the codes of a unit share a scale. run: codes that share a
    scale, where each step of the sums must stay among them; 0: it need not.
    """

    rows: int
    columns: int
    deep: int
    kind: str
    bits: int
    sums: int = 1
    by_unit: bool = True
    run: int = 0
    reads: int = 0
    may_split: bool = True


@lru_cache(maxsize=256)
def schedules(p: Problem, device: Device) -> tuple[Choice, ...]:
    """From the one predicted to be the fastest on."""
    found = [_choice(p, s, device) for s in (*_lanes(p), *_tiles(p))]
    ordered = sorted((c for c in found if c is not None), key=lambda c: c.seconds)
    return tuple(c for c in ordered if c.seconds <= KEPT * ordered[0].seconds)


KEPT = 2.0  # times the best prediction


def _lanes(p: Problem) -> Iterator[dict[str, int]]:
    if p.rows > FEW:
        return
    rows, each = power_of_two(p.rows), 1 if not p.by_unit else UNIT
    for columns, warps, splits in pairs((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)):
        for units in (1, 2):  # of a thread, along the depth; a program's are side by side
            depth = 32 * warps * UNIT * units
            held = columns * units * UNIT // each
            if held * rows * p.sums <= 16 and depth <= max(256, power_of_two(p.deep)):
                yield {"rows": rows, "columns": columns, "depth": depth, "dot": 0, "warps": warps,
                       "stages": 2, "splits": splits}  # fmt: skip


def _tiles(p: Problem) -> Iterator[dict[str, int]]:
    tall = [s for s in (16, 32, 64, 128) if s <= max(16, power_of_two(p.rows))]
    broad = [s for s in (16, 32, 64, 128) if s <= max(16, power_of_two(p.columns))]
    vectors = p.kind in ("f32", "tf32x3")
    for rows, columns, depth in pairs(tall, broad, (16,) if vectors else (32, 64, 128)):
        for warps, splits in pairs((2, 4, 8), (1, 2, 4)):
            threads = warps * 32
            if p.run and p.run % depth:
                continue
            if rows * columns * p.sums > (16 if vectors else 32) * threads:
                continue
            if rows * columns < (2 if vectors else 4) * threads:
                continue
            if columns * depth * p.sums > 32 * threads or columns * depth < 8 * threads:
                continue
            yield {"rows": rows, "columns": columns, "depth": depth, "dot": 1, "warps": warps,
                   "stages": 3, "splits": splits}  # fmt: skip


def _choice(p: Problem, s: dict[str, int], d: Device) -> Choice | None:
    rows, columns, depth = s["rows"], s["columns"], s["depth"]
    down, across = ceil(p.rows / rows), ceil(p.columns / columns)
    tiles, steps = down * across, ceil(p.deep / depth / s["splits"])
    if s["splits"] > 1 and (not p.may_split or tiles >= 2 * d.units or steps < 2):
        return None
    threads = s["warps"] * d.lanes
    wide = 1 if p.kind == "i8" else 4 if p.kind in ("f32", "tf32", "tf32x3") else 2
    shared = (rows * depth * wide + columns * depth * p.sums * (wide + p.bits / 8)) * s["stages"]
    if s["dot"] and shared > d.shared:
        return None
    programs = tiles * s["splits"]
    fit = max(1, min(1024 // threads, int(d.shared_of_all // max(1, shared)) if s["dot"] else 8))
    turns = ceil(programs / d.units)
    codes = columns * depth * p.sums * steps
    vector = d.peak["f32"] / 2 / d.units  # operations a second of a unit
    if s["dot"]:
        rate = (2 * d.peak["f16"] if p.kind == "i8" else d.peak[p.kind]) / d.units
        side = rows * columns / (rows + columns)
        work = 2 * rows * codes / (rate * 0.9 * side / (side + 16)) + UNPACK * codes / vector
    else:
        work = (UNPACK - 1 + rows) * codes / vector
    filled = min(1.0, s["warps"] * min(fit, turns) / 8)
    compute = turns * work / (0.4 + 0.6 * filled)
    far = (p.columns * p.deep * p.sums * p.bits / 8 + down * p.rows * p.deep * wide) / d.bandwidth
    far *= max(1.0, d.units / min(programs, d.units))
    wait = ceil(programs / (d.units * fit)) * d.latency * (2 + steps / s["stages"])
    parts = {"unpacking and products": compute, "memory": far, "latency": wait}
    bound = max(parts, key=lambda name: parts[name])
    seconds = parts[bound] + 0.15 * (sum(parts.values()) - parts[bound]) + d.launch
    if s["splits"] > 1:
        seconds += d.launch + 8 * p.rows * p.columns * p.sums * s["splits"] / d.bandwidth
    group = GROUP if down > 1 and across > 1 else 1
    names = ("rows", "columns", "depth", "splits", "dot")
    blocks = (*((n, s[n]) for n in names), ("flat", 0), ("programs", 0), ("group", group))
    why = f"{programs} programs of {rows}x{columns}, bound by {bound}"
    return Choice(Schedule(s["warps"], s["stages"], blocks), seconds, int(shared), 0, why)


__all__ = ["FEW", "Problem", "schedules"]
