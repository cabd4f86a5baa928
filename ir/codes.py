"""Codes, the integers of less than 8 bits, packed into bytes and back.

Codes follow each other without gaps, in the order of the elements, from the lowest bit of the first
byte on; signed ones in two's complement. `int2b` has five levels: three of them, as digits of a
number to the base 5, take 7 bits (5^3 = 125), which is 2.33 bits an element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .errors import InputError
from .types import DType

AT_ONCE = 8  # codes of b bits take b whole bytes
DIGITS, BASE = 3, 5


def pack(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The codes as bytes. Raises InputError where one is none of the type's."""
    flat = values.detach().cpu().reshape(-1)
    if dtype.range is None:
        raise InputError(f"{dtype} is no type of codes", fix="int1 ... uint7 and int2b are")
    least, largest = dtype.range
    if flat.numel() and (int(flat.min()) < least or int(flat.max()) > largest):
        worst = int(flat.min()) if int(flat.min()) < least else int(flat.max())
        raise InputError(f"{worst} is no {dtype}: those go from {least} to {largest}")
    numbers = flat.to(torch.int16).numpy()
    bits = dtype.bits
    if dtype.run != (1, 0):
        numbers, bits = _joined(numbers - least), dtype.run[1]
    return torch.from_numpy(_squeezed(numbers, bits)[: -(-dtype.bits_of(flat.numel()) // 8)])  # type: ignore[misc]


def unpack(data: torch.Tensor, dtype: DType, shape: Sequence[int]) -> torch.Tensor:
    """The codes of `pack`, a byte each. data: their bytes, at least."""
    assert dtype.range is not None and dtype.torch is not None
    count, least = math.prod(shape), dtype.range[0]
    raw = data.detach().cpu().numpy()
    if dtype.run != (1, 0):
        groups = -(-count // DIGITS)
        numbers = _parted(_spread(raw, dtype.run[1], groups))[:count].astype(np.int8) + least
    else:
        numbers = _spread(raw, dtype.bits, count)
        if least < 0:
            unused = 8 - dtype.bits  # shifted out and back in, the sign fills them
            numbers = (numbers << unused).view(np.int8) >> unused
    made = torch.from_numpy(np.ascontiguousarray(numbers)).reshape(tuple(shape))
    return made.to(dtype.torch).to(data.device)


def _squeezed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """The lowest bits of every number, one after the other: eight of them in `bits` bytes."""
    rows = -(-len(numbers) // AT_ONCE)
    padded = np.zeros((rows, AT_ONCE), np.uint64)
    padded.reshape(-1)[: len(numbers)] = numbers.astype(np.int64) & ((1 << bits) - 1)
    shifts = np.arange(AT_ONCE, dtype=np.uint64) * np.uint64(bits)
    words = np.bitwise_or.reduce(padded << shifts, axis=1)
    return words.astype("<u8").view(np.uint8).reshape(rows, 8)[:, :bits].reshape(-1).copy()


def _spread(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` numbers of so many bits each, a byte each."""
    rows = -(-count // AT_ONCE)
    padded = np.zeros((rows, 8), np.uint8)
    whole = np.zeros(rows * bits, np.uint8)
    whole[: len(data)] = data[: len(whole)]
    padded[:, :bits] = whole.reshape(rows, bits)
    words = padded.view("<u8")
    shifts = np.arange(AT_ONCE, dtype=np.uint64) * np.uint64(bits)
    numbers = (words >> shifts) & np.uint64((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(-1)[:count]


def _joined(digits: np.ndarray) -> np.ndarray:
    """Every three digits as one number, the first the lowest."""
    padded = np.zeros(-(-len(digits) // DIGITS) * DIGITS, np.int16)
    padded[: len(digits)] = digits
    return padded.reshape(-1, DIGITS) @ np.array([BASE**i for i in range(DIGITS)], np.int16)


def _parted(numbers: np.ndarray) -> np.ndarray:
    powers = np.array([BASE**i for i in range(DIGITS)], np.uint8)
    return (numbers[:, None] // powers % BASE).reshape(-1)


__all__ = ["pack", "unpack"]
