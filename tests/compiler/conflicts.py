"""What a race on shared memory is, said as simply as possible, to hold the detector against.

Accesses to a byte, one of them a write, conflict where nothing puts them in order: for two threads
a barrier of their block, or of their warp where both are in it; for one thread the program, except
that an asynchronous copy lasts until it is waited for.
"""

from __future__ import annotations

import numpy as np

READ, WRITE, ATOMIC, ASYNC, BARRIER, WARP_BARRIER, COMMIT, WAIT = range(8)
ALL, NEVER = 0xFFFFFFFF, 1 << 40


def conflicts(events: np.ndarray) -> set[tuple[int, int]]:
    """Places of conflicting accesses in a log of `Kernel.run`."""
    table = _spans(events)
    unit = int(table["size"].min(initial=16))
    count = table["size"] // unit
    rows = np.repeat(np.arange(len(table)), count)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    cell = (table["block"][rows].astype(np.int64) << 32) + table["address"][rows] // unit + within
    order = np.argsort(cell, kind="stable")
    rows, cell = rows[order], cell[order]
    found: set[tuple[int, int]] = set()
    known: set[bytes] = set()
    for group in np.split(rows, np.flatnonzero(np.diff(cell)) + 1):
        if (key := group.tobytes()) not in known:  # bytes of one word mostly see the same accesses
            known.add(key)
            found |= _pairs(table[group])
    return found


SPAN = np.dtype([(n, "i8") for n in ("kind", "pc", "block", "thread", "address", "size",
                                     "block0", "block1", "warp0", "warp1", "at0", "at1")])  # fmt: skip


def _spans(events: np.ndarray) -> np.ndarray:
    """Accesses with when they begin and end: in barriers of the block, of the warp, in the log."""
    table, used = np.zeros(len(events), SPAN), []
    blocks: dict[tuple[int, int], int] = {}  # (block, warp) -> barriers so far
    warps: dict[tuple[int, int], int] = {}
    groups: dict[tuple[int, int], int] = {}  # (block, thread) -> groups committed
    copies: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # row, thread, group
    for i, (kind, pc, block, thread, address, size) in enumerate(events.tolist()):
        me = (block, thread // 32)
        now = blocks.get(me, 0), warps.get(me, 0), i
        lanes = [thread + lane for lane in range(32) if size >> lane & 1] if kind >= COMMIT else []
        if kind == COMMIT:
            for t in lanes:
                groups[block, t] = groups.get((block, t), 0) + 1
        elif kind == WAIT:
            left = []
            for row, t, group in copies.get(me, ()):
                keep = address if address != ALL else -1
                if t in lanes and group + keep < groups.get((block, t), 0):
                    for name, value in zip(("block1", "warp1", "at1"), now):
                        table[name][row] = value
                else:
                    left.append((row, t, group))
            copies[me] = left
        elif kind in (BARRIER, WARP_BARRIER):
            blocks[me] = now[0] + (kind == BARRIER)
            warps[me] = now[1] + 1
        else:
            used.append(i)
            end = (NEVER,) * 3 if kind == ASYNC else now
            table[i] = (kind, pc, block, thread, address, size,
                        now[0], end[0], now[1], end[1], now[2], end[2])  # fmt: skip
            if kind == ASYNC:
                copies.setdefault(me, []).append((i, thread, groups.get((block, thread), 0)))
    return table[used]


def _pairs(t: np.ndarray) -> set[tuple[int, int]]:
    def apart(name: str) -> np.ndarray:
        begin, end = t[f"{name}0"], t[f"{name}1"]
        before = end[:, None] < begin[None, :]
        return before | before.T

    def same(value: np.ndarray) -> np.ndarray:
        return value[:, None] == value[None, :]

    ordered = np.where(same(t["thread"]), apart("at"),
                       np.where(same(t["thread"] // 32), apart("warp"), apart("block")))  # fmt: skip
    writes, atomic = t["kind"] != READ, t["kind"] == ATOMIC
    both = (writes[:, None] | writes[None, :]) & ~(atomic[:, None] & atomic[None, :])
    first, second = np.nonzero(np.triu(both & ~ordered, 1))
    return set(zip(t["pc"][first].tolist(), t["pc"][second].tolist()))
