"""Where values of a call lie in the arena: those that do not live together share memory.

Known sizes are packed as tightly as a greedy search can. Symbolic sizes are not compared: values
share a place where their size is the same expression, or else the first place that is free, and a
place is as large as its largest value once sizes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .memory import Root, aligned
from .sizes import has_symbols


@dataclass(frozen=True)
class Arena:
    """offsets(number) -> a byte offset for each root, and the bytes of all."""

    roots: tuple[Root, ...]
    offsets: Callable[[Callable[[object], int]], tuple[list[int], int]]

    @property
    def nbytes(self) -> int | None:
        """None where sizes are known only at a call."""
        if has_symbols([r.nbytes for r in self.roots]):
            return None
        return self.offsets(int)[1]  # type: ignore[arg-type]  # sizes are numbers already


def layout(roots: Sequence[Root]) -> Arena:
    """An arena for the roots that our kernels write inside a call."""
    ours = tuple(r for r in roots if r.kind == "arena")
    lives = [(r.first, r.last) for r in ours]
    if not has_symbols([r.nbytes for r in ours]):
        fixed = assign([aligned(int(r.nbytes)) for r in ours], lives)
        return Arena(ours, lambda number: fixed)
    places = share(ours)
    count = max(places, default=-1) + 1

    def offsets(number: Callable[[object], int]) -> tuple[list[int], int]:
        sizes = [0] * count
        for root, place in zip(ours, places):
            sizes[place] = max(sizes[place], aligned(number(root.nbytes)))
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        return [starts[place] for place in places], starts[-1]

    return Arena(ours, offsets)


def share(roots: Sequence[Root]) -> list[int]:
    """A place for each root, so that no two that live together have the same one."""
    order = sorted(range(len(roots)), key=lambda i: roots[i].first)
    places = [0] * len(roots)
    busy: list[tuple[int, object]] = []  # place -> last step, and the size it was made for
    for i in order:
        root = roots[i]
        free = [p for p, (last, _) in enumerate(busy) if last < root.first]
        fitting = [p for p in free if busy[p][1] == root.nbytes]
        if fitting or free:
            places[i] = (fitting or free)[0]
            busy[places[i]] = (root.last, busy[places[i]][1])
        else:
            places[i] = len(busy)
            busy.append((root.last, root.nbytes))
    return places


def assign(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets for buffers that live between steps (first, last), and the bytes of all.

    Largest first, each at the lowest place that is free for all its life.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], lives[i][0]))
    offsets = [0] * len(sizes)
    placed: list[int] = []
    total = 0
    for i in order:
        first, last = lives[i]
        busy = sorted(
            (offsets[j], offsets[j] + sizes[j])
            for j in placed
            if lives[j][0] <= last and first <= lives[j][1]
        )
        at = 0
        for begin, end in busy:
            if at + sizes[i] <= begin:
                break
            at = max(at, end)
        offsets[i] = at
        placed.append(i)
        total = max(total, at + sizes[i])
    return offsets, total
