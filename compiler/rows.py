"""Where a sequence's keys and values lie: in memory of its own, or in pages of a pool.

Pages are shared by sequences that begin alike, and copied when one of them writes into a page that
others read (PagedAttention, arXiv 2309.06180, section 4.3).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["Arena", "Pages", "Pool"]

# What is kept between calls must be writable in all of them: no tensors of inference mode.
_outlives = torch.inference_mode(False)


class Arena:
    """Memory of a sequence's own, with room for `capacity` tokens in each row of a batch.

    What lies behind the tokens of the sequence is never read, so it may be anything.
    make(batch, capacity): new memory. axes: the dimension of tokens in each state.
    """

    def __init__(
        self, make: Callable[[int, int], list[Tensor]], axes: Sequence[int], batch: int,
        capacity: int,
    ) -> None:  # fmt: skip
        self._make, self._axes, self.batch, self.capacity = make, axes, batch, capacity
        self.states = make(batch, capacity)

    @property
    def inputs(self) -> list[Tensor]:
        """What a graph reads after `past`."""
        return self.states

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.states)

    def running(self) -> AbstractContextManager[None]:
        """Around a call, which reads and writes the states."""
        return nullcontext()

    def took(self, new: list[Tensor]) -> None:
        """The values of the states after a call."""
        self.states = new

    def grow(self, capacity: int, length: int) -> None:
        """Room for more tokens; those there are, `length`, are kept."""
        old, self.capacity = self.states, capacity
        self.states = self._make(self.batch, capacity)
        for new, t, axis in zip(self.states, old, self._axes):
            new.narrow(axis, 0, length).copy_(t.narrow(axis, 0, length))

    def write(self, start: int, end: int) -> None:
        """Tokens start .. end are written next."""

    def keep(self, length: int) -> None:
        """Later tokens are forgotten."""

    def select(self, rows: Tensor, length: int) -> Arena:
        """A copy of some rows of the batch, in the order given and as often as given."""
        made = Arena(self._make, self._axes, len(rows), self.capacity)
        for new, t, axis in zip(made.states, self.states, self._axes):
            seen = t.narrow(axis, 0, length).index_select(0, rows)
            new.narrow(axis, 0, length).copy_(seen)
        return made


class Pool:
    """Pages for all sequences of a decoder: states [pages, heads, rows of a page, size].

    make(pages): new memory. It grows when all pages are in use, which waits for calls that run.
    """

    @_outlives
    def __init__(self, make: Callable[[int], list[Tensor]], page: int, pages: int = 64) -> None:
        self._make, self.page = make, page
        self.states = make(pages)
        self._free, self._uses = list(range(pages))[::-1], [0] * pages
        self._changing = threading.Condition()
        self._calls = 0

    @property
    def pages(self) -> int:
        return len(self._uses)

    @property
    def used(self) -> int:
        """Pages that some sequence has."""
        return len(self._uses) - len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.states)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._changing:
            self._calls += 1
        try:
            yield
        finally:
            with self._changing:
                self._calls -= 1
                self._changing.notify_all()

    def take(self) -> int:
        """A page that nobody has."""
        with self._changing:
            if not self._free:
                self._grow()
            page = self._free.pop()
            self._uses[page] = 1
            return page

    def own(self, page: int, copied: bool) -> int:
        """A page of one's own in place of one that one has, with its contents or without."""
        with self._changing:
            if self._uses[page] == 1:
                return page
        made = self.take()
        with self._changing:
            if copied:
                for t in self.states:
                    t[made].copy_(t[page])
            self._drop(page)
        return made

    def share(self, pages: Sequence[int]) -> None:
        with self._changing:
            for page in pages:
                self._uses[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        with self._changing:
            for page in pages:
                self._drop(page)

    def _drop(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self._free.append(page)

    @_outlives
    def _grow(self) -> None:
        self._changing.wait_for(lambda: not self._calls)
        old, count = self.states, self.pages
        self.states = self._make(2 * count)
        for new, t in zip(self.states, old):
            new[:count].copy_(t)
        self._free += range(2 * count - 1, count - 1, -1)
        self._uses += [0] * count


class Pages:
    """A sequence's share of a pool: for each row of the batch the pages that hold its tokens."""

    def __init__(self, pool: Pool, batch: int, capacity: int) -> None:
        self.pool, self.batch = pool, batch
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        weakref.finalize(self, _release, pool, self._rows)
        self._allocate(-(-capacity // pool.page))

    def _allocate(self, count: int) -> None:
        """A table for so many pages a row. What it names where a row has none is never read."""
        self.capacity = count * self.pool.page
        self.table = torch.zeros(self.batch, count, dtype=torch.int64)
        for row, pages in zip(self.table, self._rows):
            row[: len(pages)] = torch.tensor(pages, dtype=torch.int64)

    @property
    def inputs(self) -> list[Tensor]:
        """What a graph reads after `past`: the table, then the pool."""
        return [self.table, *self.pool.states]

    @property
    def nbytes(self) -> int:
        """Of the pages that it has; those it shares are counted too."""
        return sum(map(len, self._rows)) * self.pool.nbytes // self.pool.pages

    def running(self) -> AbstractContextManager[None]:
        return self.pool.running()

    def took(self, new: list[Tensor]) -> None:
        for t, value in zip(self.pool.states, new):
            if value.data_ptr() != t.data_ptr():  # a target that writes nothing in place
                t.copy_(value)

    def grow(self, capacity: int, length: int) -> None:
        self._allocate(-(-capacity // self.pool.page))

    def write(self, start: int, end: int) -> None:
        page = self.pool.page
        for row, pages in zip(self.table, self._rows):
            for i in range(start // page, -(-end // page)):
                if i < len(pages):
                    pages[i] = self.pool.own(pages[i], copied=i * page < start)
                else:
                    pages.append(self.pool.take())
                row[i] = pages[i]

    def keep(self, length: int) -> None:
        for pages in self._rows:
            at = -(-length // self.pool.page)
            gone = pages[at:]
            del pages[at:]
            self.pool.drop(gone)

    def select(self, rows: Tensor, length: int) -> Pages:
        made = Pages(self.pool, len(rows), self.capacity)
        for pages, i in zip(made._rows, rows.tolist()):
            self.pool.share(self._rows[i])
            pages += self._rows[i]
        made._allocate(self.table.shape[1])
        return made


def _release(pool: Pool, rows: list[list[int]]) -> None:
    for pages in rows:
        pool.drop(pages)
