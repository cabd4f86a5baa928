"""Schedules of attention: which there are for a problem, what each should take, and why.

The model is that of schedules.py: what two products and the softmax between them take on one unit,
how fast keys and values arrive, and the latency until the first of them do. What a program holds is
bounded so that no schedule given here spills registers; tests/backends/test_gpu_attention.py
compiles them for every target.
"""

from __future__ import annotations

from itertools import product as combinations
from math import ceil

import sympy

from effc.ir.symbols import Dim, free_symbols

from .attention import Attention
from .kernel import Schedule, power_of_two
from .schedules import ANY, KEPT, Choice, Device

ROWS, KEYS = (16, 32, 64, 128), (16, 32, 64, 128)
WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3)
SPLITS = (1, 2, 4, 8, 16, 32, 64)
SUMS, HELD = 64, 96  # registers of a thread: sums, and sums with scores; more of them spilled
THREEFOLD = 40  # both, where a factor is held as two
VECTORS = 32, 48  # the same of float32 products on vector units, whose factors take more
# (on vector units, results, rows, keys, warps): ptxas spills a few registers of these, though no
# more than half of them are in use.
SPILLED = {
    "sm_90": {(True, 128, 64, 16, 8), (False, 256, 64, 128, 8)},
    "sm_100": {
        (False, 64, 128, 32, 4), (False, 64, 64, 32, 4), (False, 64, 16, 64, 2),
        (True, 128, 64, 16, 8),
    },
}  # fmt: skip
SPILLED["any"] = SPILLED["sm_90"] | SPILLED["sm_100"]
JOINED = 8192  # elements that a program which joins parts holds
PIECE = {"f32": 16, "tf32x3": 32}  # of depth, by kind; others take all of it at once
VECTOR_KEYS = 32  # the depth of the second product
GUESS = 1024  # keys or queries, where only a call knows how many


def schedules(a: Attention, device: Device = ANY) -> list[Choice]:
    """All that fit the device, pruned to those that may be best, best prediction first."""
    found = []
    # These take factors from registers, for all of a product's depth at once.
    piece = min(a.deep, PIECE.get(kind_of(a), a.deep))
    for rows, keys, warps, stages in combinations(ROWS, KEYS, WARPS, STAGES):
        held = _held(a, rows, keys, warps, stages, device)
        if held is None:
            continue
        for splits in _splits(a, rows, keys, device):
            blocks = ("rows", rows), ("keys", keys), ("piece", piece), ("splits", splits)
            seconds, why = _seconds(a, rows, keys, warps, stages, splits, held, device)
            found.append(Choice(Schedule(warps, stages, blocks), seconds, *held, why))
    found.sort(key=lambda c: (c.seconds, c.shared, str(c.schedule)))
    return [c for c in found if c.seconds <= KEPT * found[0].seconds]


def kind_of(a: Attention) -> str:
    """The kind of products, as devices name their peaks."""
    if a.dtype.name != "f32":
        return a.dtype.name
    return {"highest": "f32", "high": "tf32x3", "medium": "tf32"}[a.precision]


def _held(
    a: Attention, rows: int, keys: int, warps: int, stages: int, d: Device
) -> tuple[int, int] | None:
    """(bytes of shared memory, registers of a thread), or None where either is too much."""
    if rows > max(16, power_of_two(_size(a.rows))) or keys > max(16, power_of_two(_size(a.keys))):
        return None
    if rows < 8 * warps and not (rows == 16 and warps <= 4):
        return None
    lanes, bytes_ = warps * 32, a.dtype.bits // 8
    sums, scores, queries = rows * a.wide // lanes, rows * keys // lanes, rows * a.deep // lanes
    vectors = kind_of(a) in ("f32", "tf32x3")
    wide_loads = stages == 1 and bytes_ == 4  # which wait in registers, and nowhere else
    most, held = VECTORS if vectors or wide_loads else (SUMS, HELD)
    if kind_of(a) == "tf32x3":
        held = THREEFOLD
    if vectors and keys > (VECTOR_KEYS // 2 if wide_loads else VECTOR_KEYS):
        return None
    if (vectors, a.wide, rows, keys, warps) in SPILLED.get(d.name, ()):
        return None
    if sums > most or sums + scores > held or keys * max(a.deep, a.wide) // lanes > 128:
        return None
    queries_held, tile = rows * a.deep * bytes_, keys * (a.deep + a.wide) * bytes_
    shared = queries_held + stages * tile
    if shared > d.shared or (stages == 1 and queries_held + 2 * tile <= d.shared):
        return None
    return shared, 48 + sums + scores * 3 // 2 + queries * bytes_ // 4


def _splits(a: Attention, rows: int, keys: int, d: Device) -> list[int]:
    """Worth trying where programs do not fill the device; a split has a tile of keys at least."""
    if not isinstance(a.rows, int):
        return [1]  # parts of many rows would take much memory
    programs = _groups(a) * ceil(_size(a.rows) / rows)
    tiles = ceil(_size(a.keys) / keys)
    return [
        s for s in SPLITS
        if s == 1 or (s <= tiles and programs < d.units and programs * s <= 4 * d.units
                      and s * a.wide <= JOINED)
    ]  # fmt: skip


def _seconds(
    a: Attention, rows: int, keys: int, warps: int, stages: int, splits: int,
    held: tuple[int, int], d: Device,
) -> tuple[float, str]:  # fmt: skip
    shared, registers = held
    size, bytes_ = a.deep + a.wide, a.dtype.bits // 8
    groups, all_rows, all_keys = _groups(a), _size(a.rows), _size(a.keys)
    blocks = ceil(all_rows / rows)
    programs = groups * blocks * splits
    fit = max(1, min(d.registers // (warps * d.lanes * registers), d.shared // max(1, shared), 16,
                     2048 // (warps * d.lanes)))  # fmt: skip
    turns, waves = ceil(programs / d.units), ceil(programs / (d.units * fit))
    together = min(fit, turns)

    seen = _seen(a) if a.diagonal and not a.past else 1.0
    tiles = ceil(ceil(all_keys / keys) * min(1.0, seen + rows / max(1, all_keys)) / splits)
    products = 2 * rows * keys * size
    per_warp = rows / warps
    filled = min(1.0, warps * together / 8)
    reach = 0.9 * per_warp / (per_warp + 12) * keys / (keys + 24) * (0.4 + 0.6 * filled)
    if d.name in WARP_GROUPS and (rows < 64 or warps < 4):
        reach *= 0.5
    weights = WEIGHT * rows * keys / (d.peak["f32"] / d.units) / filled
    # Programs beside it multiply while one computes its weights.
    step = products / (d.peak[kind_of(a)] / d.units * reach)
    step += weights if together == 1 else weights / 2
    compute = turns * tiles * step
    near = turns * tiles * keys * size * bytes_ * d.units / d.l2
    once = groups * (all_keys + 2 * all_rows) * size * bytes_
    far = once / d.bandwidth * max(1.0, 0.8 * d.units / min(programs, d.units))
    alone = step + (max(0.0, d.latency - (stages - 1) * step) if stages > 1 else 2 * d.latency)
    wait = waves * tiles * max(0.0, alone - together * step)
    parts = {"products": compute, "the L2 cache": near, "memory": far, "latency": wait}
    bound = max(parts, key=lambda name: parts[name])
    seconds = parts[bound] + CONTEND * (sum(parts.values()) - parts[bound])
    seconds += 2 * waves * d.latency + d.launch
    why = f"{programs} programs of {rows}x{keys}, {fit} a unit, bound by {bound}"
    if splits > 1:
        sums = 4 * groups * all_rows * a.wide * splits
        seconds += d.launch + 2 * sums / d.bandwidth + d.latency
        why += f"; {splits} parts of the keys"
    return seconds, why


CONTEND = 0.3  # of what does not bound, the part that is not hidden behind it
WARP_GROUPS = ("sm_90", "sm_100")  # four warps and 64 rows multiply at the full rate
WEIGHT = 32  # FLOPs in the time that the softmax takes for a score: its exponential is most of it


def _seen(a: Attention) -> float:
    """The part of all keys that a causal query sees, on average."""
    queries, keys = _size(a.queries), _size(a.keys)
    below = min(queries, keys)
    return (below * (below + 1) / 2 + (queries - below) * keys) / max(1, queries * keys)


def _groups(a: Attention) -> int:
    return max(1, _size(a.batch, 1)) * max(1, _size(a.heads, 1))


def _size(size: Dim, guess: int = GUESS) -> int:
    """A size; where only a call knows it, that of so large symbols."""
    if isinstance(size, int):
        return max(1, size)
    return max(1, int(sympy.sympify(size).subs(dict.fromkeys(free_symbols(size), guess))))


__all__ = ["kind_of", "schedules"]
