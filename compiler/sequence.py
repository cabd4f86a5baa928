"""What a decoder has seen so far: the caches of a batch of sequences, and how they are changed."""

from __future__ import annotations

from collections.abc import Sequence as Items
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effc.incremental import Variant
from effc.ir import InputError

if TYPE_CHECKING:
    from effc.decoding import Decoder

__all__ = ["Sequence"]

FIRST = 64  # positions that a growing cache begins with

# What is kept between calls must be writable in all of them: no tensors of inference mode.
_outlives = torch.inference_mode(False)


class Sequence:
    """Tokens that a decoder has seen, as the model's keys and values of them.

        s = decoder.sequence()
        logits = s.append([prompt])          # [1, vocabulary], after the last token
        logits = s.append([[42]])            # one step of decoding
        other = s.fork()                     # goes its own way from here
        s.rollback(1)                        # as before the last token

    One thread at a time may use a sequence; several sequences of one decoder run side by side.
    Rows of a batch have one length; shorter ones are padded on the left, as `mask` tells.
    """

    @_outlives
    def __init__(self, decoder: Decoder, batch: int, capacity: int | None) -> None:
        if batch < 1 or (capacity is not None and capacity < 1):
            raise InputError(f"a sequence of batch {batch} and capacity {capacity}", fix="use 1 up")
        self.decoder = decoder
        self.batch, self.length, self.fixed = batch, 0, capacity
        self.mask: Tensor | None = None  # int64 [batch, capacity]: 0 where a token is padding
        self._past = torch.zeros((), dtype=torch.int64, device=decoder.graph.device)
        self._rows = decoder.rows(batch, capacity or _least(FIRST, decoder.longest))

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<{self.batch} x {self.length} tokens of {self.decoder.name}, room {self.capacity}>"

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._rows.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the caches: at their capacity, or of the pages in use."""
        return self._rows.nbytes

    # -------------------------------------------------------------- new tokens

    def append(
        self, ids: Tensor | Items[Items[int]], *, every: bool = False,
        mask: Tensor | None = None, positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits after the new tokens ids [batch, n], as [batch, vocabulary]: those of the last.

        every: of all new tokens, [batch, n, vocabulary]. mask: [batch, n], 0 where an id is padding
        that no other token may see. positions: [batch, n], where they are not the model's own count
        of the tokens that are not masked.

        Raises InputError for another batch or type, and where a fixed capacity or the model's own
        limit is reached; the sequence is then as it was.
        """
        ids = self._checked(ids, "ids")
        n = ids.shape[1]
        mask = None if mask is None else self._checked(mask, "mask", n)
        positions = None if positions is None else self._checked(positions, "positions", n)
        padded = not (mask is None and positions is None and self.mask is None)
        variant = Variant(n == 1, self.batch == 1, padded, every and n > 1)
        logits = self.call(variant, ids, mask, positions)
        return logits if every else logits[:, -1]

    def call(
        self, variant: Variant, ids: Tensor, mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One call of a graph: ids [batch, n] -> logits [batch, n or only the last, vocabulary]."""
        compiled = self.decoder.compiled(variant)
        bound = compiled.bound()
        start = perf_counter()
        end = self.length + ids.shape[1]
        self._room(end)
        self._rows.write(self.length, end)
        given = {"ids": ids, **(self._padding(end, mask, positions) if variant.padded else {})}
        with self._rows.running():
            call = [*(given[name] for name in compiled.given), self._past, *self._rows.inputs]
            logits, *states = bound(call)
            self._rows.took(states)
        self._moved(end)
        compiled.count(ids.numel(), perf_counter() - start)
        return logits

    def _padding(
        self, end: int, mask: Tensor | None, positions: Tensor | None
    ) -> dict[str, Tensor]:
        """Which of all tokens are padding, and the positions of the new ones."""
        if self.mask is None:
            self.mask = self._ones()
        new = self.mask[:, self.length : end]
        new.fill_(1) if mask is None else new.copy_(mask)
        if positions is None:
            seen = self.mask[:, :end].cumsum(-1)[:, self.length :]
            positions = (seen - 1).clamp_(min=0)
        return {"mask": self.mask, "positions": positions.contiguous()}

    def _checked(self, value: Any, what: str, n: int | None = None) -> Tensor:
        t = value if isinstance(value, Tensor) else torch.tensor(value)
        if t.dim() != 2 or t.shape[0] != self.batch or t.shape[1] != (n or t.shape[1] or 1):
            want = f"[{self.batch}, {n or 'n'}]"
            raise InputError(f"{what} must be {want}, got {list(t.shape)}")
        if t.dtype.is_floating_point or t.dtype.is_complex:
            raise InputError(f"{what} must be whole numbers, got {t.dtype}")
        return t.to(self._past.device, torch.int64)

    # -------------------------------------------------------------- what was seen

    def fork(self) -> Sequence:
        """A copy that goes its own way; it takes as much memory, or in pages only what differs."""
        return self.select(range(self.batch))

    @_outlives
    def select(self, rows: Tensor | Items[int]) -> Sequence:
        """A copy of some rows, in the order given and as often as given."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._past = self._past.clone()
        made.reorder(rows)
        return made

    @_outlives
    def reorder(self, rows: Tensor | Items[int]) -> None:
        """Keep these rows, in this order, some perhaps twice: the beams that live on."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._past.device)
        if index.dim() != 1 or not len(index):
            raise InputError(f"rows must be a list of numbers, got {list(index.shape)}")
        if index.min() < 0 or index.max() >= self.batch:
            raise InputError(f"rows {index.tolist()} of a batch of {self.batch}")
        self._rows, self.batch = self._rows.select(index, self.length), len(index)
        self.mask = None if self.mask is None else self.mask[index]

    def rollback(self, n: int) -> None:
        """Forget the last n tokens."""
        if not 0 <= n <= self.length:
            raise InputError(f"cannot forget {n} of {self.length} tokens")
        self._moved(self.length - n)
        self._rows.keep(self.length)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.mask = None
        self._moved(0)
        self._rows.keep(0)

    def _moved(self, length: int) -> None:
        self.length = length
        self._past.fill_(length)

    # -------------------------------------------------------------- memory

    @_outlives
    def _ones(self) -> Tensor:
        shape = self.batch, self.capacity
        return torch.ones(shape, dtype=torch.int64, device=self._past.device)

    def _room(self, needed: int) -> None:
        """Room for `needed` tokens."""
        longest = self.decoder.longest
        if longest is not None and needed > longest:
            raise InputError(f"{self.decoder.name} takes {longest} tokens, not {needed}")
        if self.fixed is not None and needed > self.fixed:
            raise InputError(
                f"{needed} tokens do not fit a sequence with room for {self.fixed}",
                fix="decoder.sequence(capacity=...) with more, or without it, to let it grow",
            )
        if needed > self.capacity:
            self._grow(needed, longest)

    @_outlives
    def _grow(self, needed: int, longest: int | None) -> None:
        """Twice as much room as before, or more; contents are kept."""
        mask = self.mask
        more = max(2 * self.capacity, 1 << (needed - 1).bit_length())
        self._rows.grow(_least(more, longest), self.length)
        if mask is not None:
            self.mask = self._ones()
            self.mask[:, : self.length] = mask[:, : self.length]


def _least(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)
