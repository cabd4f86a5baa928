"""Timing several ways of the same work in turns.

A round calls every way once, in an order that changes from round to round, so that a slow spell of
the machine or a warm cache falls on all of them. Short calls are timed in bursts after one call
that is not counted: the way before has emptied the caches, and a pool's threads have to wake up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

BURST = 0.02  # seconds; shorter calls are repeated until a sample takes about as long
LONG = ((2.0, 3), (10.0, 5))  # from so many seconds a call on, only every n-th round is taken
WORTH = 1.6  # two threads that do less than this many times the work of one do not count as two

Call = Callable[[], object]


def clocked(call: Call, times: int = 1) -> float:
    """Seconds."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


@dataclass
class Series:
    """Samples of one way, in milliseconds: of `burst` runs each, taken every so many rounds."""

    burst: int = field(default=1, kw_only=True)
    every: int = field(default=1, kw_only=True)
    samples: list[float | None] = field(default_factory=list, kw_only=True)

    def settle(self) -> None:
        """Run once and choose the burst."""
        raise NotImplementedError

    def sample(self) -> float:
        """Milliseconds of one run."""
        raise NotImplementedError


@dataclass
class Way(Series):
    """One way of doing the work. `before` runs untimed ahead of every burst; `clock` gives the
    seconds of so many calls."""

    call: Call
    before: Call = lambda: None
    clock: Callable[..., float] = clocked

    def settle(self) -> None:
        """Choose the burst from how long a call takes, once it is warm."""
        self.before()
        took = self.clock(self.call)  # what it compiles, it compiled in the check before this
        if took < LONG[0][0]:
            took = min(self.clock(self.call) for _ in range(2))
        self.burst = max(1, round(BURST / max(took, 1e-7)))
        self.every = max([1, *(every for seconds, every in LONG if took > seconds)])

    def sample(self) -> float:
        """Milliseconds of one call."""
        self.before()
        if self.burst > 1:
            self.call()
        return self.clock(self.call, self.burst) / self.burst * 1e3


def interleave(
    ways: Mapping[str, Series],
    rounds: int,
    threads: int,
    tell: Callable[[int], None] = lambda _: None,
) -> list[float | None]:
    """Fill the samples of every way; returns what the threads were worth before each round.

    A way that sits a round out has None there. `tell` is called with the number of rounds done.
    """
    scaling: list[float | None] = []
    for way in ways.values():
        way.settle()
    order, shuffle = list(ways), random.Random(0).shuffle
    for n in range(rounds):
        scaling.append(worth(threads) if threads > 1 else None)
        shuffle(order)
        for name in order:
            way = ways[name]
            way.samples.append(way.sample() if n % way.every == 0 else None)
        tell(n + 1)
    return scaling


def worth(threads: int, size: int = 512) -> float:
    """How many times the work of one thread `threads` threads do at this moment.

    On shared machines two threads are at times worth one, for seconds to minutes.
    """
    a = torch.randn(size, size)
    before = torch.get_num_threads()

    def loop(n: int) -> float:
        torch.set_num_threads(n)
        torch.mm(a, a)
        return clocked(lambda: torch.mm(a, a), 3)

    try:
        return loop(1) / loop(threads)
    finally:
        torch.set_num_threads(before)
