"""Memory in pages: rows of many sequences in one pool, and a table that says whose are where.

A sequence then takes no more pages than it has rows, and two that begin alike may share them
(PagedAttention, arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from typing import Any

import torch

from ..op import Cost, Op, Value, op
from ..types import Tensor, Type
from .common import check_position, may_equal


def _check_table(node: Op, pool: Tensor, table: Tensor) -> None:
    if pool.rank != 4:
        raise node.fail("a pool is [pages, heads, rows of a page, size]")
    if table.rank != 2 or table.dtype.name != "i64":
        raise node.fail("a table is i64[sequences, pages of each]")


def _checked(table: torch.Tensor, pages: int) -> torch.Tensor:
    if table.numel() and (int(table.min()) < 0 or int(table.max()) >= pages):
        raise IndexError(f"pages {int(table.min())}..{int(table.max())} of a pool of {pages}")
    return table


@op("gather_pages")
class GatherPages(Op):
    """The rows of every sequence in order: [batch, heads, pages of each * rows of a page, size].

    pool: [pages, heads, rows of a page, size]. table: i64[batch, pages of each].
    """

    pool: Value
    table: Value

    def infer(self) -> Type:
        pool, table = self.pool.tensor, self.table.tensor
        _check_table(self, pool, table)
        (batch, count), (_, heads, rows, size) = table.shape, pool.shape
        return Tensor((batch, heads, count * rows, size), pool.dtype)

    def reference(self, pool: Any, table: Any) -> Any:
        found = pool[_checked(table, len(pool))]  # [batch, pages, heads, rows, size]
        return found.transpose(1, 2).flatten(2, 3)

    def cost(self) -> Cost:
        return Cost(0, 2 * self.tensor.nbytes + self.table.tensor.nbytes)


@op("update_pages")
class UpdatePages(Op):
    """The pool with `new` [batch, heads, n, size] written over rows start .. start + n of each
    sequence. start: i64, one number; IndexError where new does not fit the pages of the table.
    """

    pool: Value
    new: Value
    table: Value
    start: Value

    def infer(self) -> Type:
        pool, new = self.pool.tensor, self.new.tensor
        _check_table(self, pool, self.table.tensor)
        check_position(self, "start", self.start)
        if new.dtype != pool.dtype:
            raise self.fail(f"{new.dtype} is written into {pool.dtype}")
        want = (self.table.shape[0], pool.shape[1], None, pool.shape[3])
        same = new.rank == 4 and all(
            w is None or may_equal(w, g) for w, g in zip(want, new.shape, strict=True)
        )
        if not same:
            raise self.fail("what is written is not [batch, heads, n, size]")
        return pool

    def reference(self, pool: Any, new: Any, table: Any, start: Any) -> Any:
        first, n, rows = int(start), new.shape[2], pool.shape[2]
        if not 0 <= first <= table.shape[1] * rows - n:
            room = table.shape[1] * rows
            raise IndexError(f"update_pages: positions {first}..{first + n} of {room}")
        at = torch.arange(first, first + n, device=pool.device)
        page = _checked(table, len(pool))[:, at // rows] if n else table[:, :0]
        result = pool.clone()
        result[page, :, at % rows] = new.transpose(1, 2)
        return result

    def cost(self) -> Cost:
        return Cost(0, 2 * self.new.tensor.nbytes)
