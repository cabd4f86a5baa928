"""Formats of compressed values: what parts they are stored in, and what the parts stand for.

    w: uint4[576, 1536] @ GroupQuant(group=32, scale=f16, zero=uint4)

is a matrix of numbers scale * (code - zero), with a scale and a zero for every 32 codes of a row.
A format's `parts` are tensors, which may have formats of their own; `encoded` (ops/quantize.py)
makes a value of them, and `decode` turns it into dense numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError, OpError
from .symbols import Dim, floordiv
from .types import DTYPES, Dense, DType, Format, Tensor, dense, f16, i16, i32, u8

WORD = 32  # bits of a word of a plane
INDEXES = ("bitmap", "gap", "u16")


@dataclass(frozen=True)
class Encoded:
    """A value of a format at run time: its type, and the values of its parts, in order."""

    type: Tensor
    parts: tuple[Any, ...]

    def __getitem__(self, name: str | int) -> Any:
        """A part, by its name or place."""
        if isinstance(name, int):
            return self.parts[name]
        return dict(zip(self.type.format.parts(self.type), self.parts, strict=True))[name]

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers it stands for."""
        return decoded(self.type, self, dtype)


def decoded(t: Tensor, value: Any, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a value of type t, as numbers of a torch type."""
    if isinstance(t.format, Dense):
        return value.to(dtype)
    return t.format.decode(t, value.parts, dtype)


def bits_per_element(t: Tensor) -> float | None:
    """Of a value, scales and indices included; None where its size is not known."""
    if not isinstance(t.numel, int) or not isinstance(t.nbytes, int) or not t.numel:
        return None
    return 8 * t.nbytes / t.numel


# ------------------------------------------------------------------ groups with a scale


@dataclass(frozen=True)
class GroupQuant(Format):
    """scale * (code - zero), with one scale and zero for `group` elements of a row.

    group: None: the whole row. zero: None: there is none; else its element type. codes: the format
    of the codes themselves. A last group may be shorter. Arithmetic is that of float32.
    """

    group: int | None
    scale: DType = f16
    zero: DType | None = None
    codes: Format = dense

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group of {self.group}")
        if not self.scale.is_float:
            raise ValueError(f"scales of {self.scale}")

    def groups(self, t: Tensor) -> Dim:
        """How many a row has."""
        if self.group is None:
            return 1
        return floordiv(t.shape[-1] + self.group - 1, self.group)

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        if not tensor.rank or tensor.dtype.kind != "int":
            raise OpError(f"{tensor.dtype}[{tensor.rank} dimensions] cannot be {self}")
        each = (*tensor.shape[:-1], self.groups(tensor))
        found = {"codes": tensor.with_(format=self.codes), "scale": Tensor(each, self.scale)}
        if self.zero is not None:
            found["zero"] = Tensor(each, self.zero)
        return found

    def decode(self, tensor: Tensor, parts: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
        codes = decoded(self.parts(tensor)["codes"], parts[0], torch.float32)
        scale, *zero = (self.spread(p.float(), codes.shape[-1]) for p in parts[1:])
        return ((codes - zero[0] if zero else codes) * scale).to(dtype)

    def spread(self, each: torch.Tensor, size: int) -> torch.Tensor:
        """A value a group as one an element of rows of `size`."""
        if self.group is None:
            return each
        return each.repeat_interleave(self.group, -1)[..., :size]

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Elements by group, [..., groups, group]; a short last group is filled up with zeros."""
        group = x.shape[-1] if self.group is None else self.group
        if not group:
            return x.unsqueeze(-2)
        short = -x.shape[-1] % group
        if short:
            x = torch.nn.functional.pad(x, (0, short))
        return x.unflatten(-1, (x.shape[-1] // group, group))


def quantize(
    x: torch.Tensor, t: Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> Encoded:
    """x to the nearest values of a GroupQuant type t, in float32.

    low, high: per group, the range that codes span; smallest and largest element where not given,
    and 0 always inside. Without a zero the range is symmetric. Scales are rounded to their type
    first, codes by what then is a scale: round(x / scale), halves to even, + zero.
    """
    f = t.format
    assert isinstance(f, GroupQuant)
    least, largest = code_range(t.dtype)
    by_group = f.grouped(x.float())
    if low is None or high is None:
        low = by_group.amin(-1) if by_group.shape[-1] else by_group.new_zeros(by_group.shape[:-1])
        high = by_group.amax(-1) if by_group.shape[-1] else low
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    if f.zero is None:
        step = torch.maximum(high, -low) / max(largest, 1)
    else:
        step = (high - low) / (largest - least)
    scale = step.to(f.scale.torch).clamp_min(least_scale(f.scale))
    inverse = 1 / scale.float()
    codes = torch.round(by_group * inverse.unsqueeze(-1))
    parts = [scale]
    if f.zero is not None:
        zero = torch.round(-low * inverse) + least
        codes = codes + zero.unsqueeze(-1)
        parts.append(zero.to(f.zero.torch))
    held = codes.clamp(least, largest).flatten(-2)[..., : x.shape[-1]].to(t.dtype.torch)
    return Encoded(t, (encode(held, f.parts(t)["codes"]), *parts))


def code_range(dtype: DType) -> tuple[int, int]:
    """Least and largest value of an integer type."""
    if dtype.range is not None:
        return dtype.range
    info = torch.iinfo(dtype.torch)  # type: ignore[arg-type]
    return info.min, info.max


def least_scale(dtype: DType) -> float:
    """The least scale: its inverse must be a number."""
    return 2.0**-24 if dtype == f16 else 1e-30


# ------------------------------------------------------------------ planes of bits


@dataclass(frozen=True)
class BitPlanes(Format):
    """Bit i of every code in plane i: 32 codes of a row in a word, the first in its lowest bit.

    Rows are filled up with zeros. Signed codes are in two's complement. (ABQ-LLM, section 3.1,
    which has the first code in the highest bit.)
    """

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        if not tensor.rank or tensor.dtype.kind != "int" or tensor.dtype.bits > 8:
            raise OpError(f"{tensor.dtype}[{tensor.rank} dimensions] has no bit planes")
        words = floordiv(tensor.shape[-1] + WORD - 1, WORD)
        return {"planes": Tensor((tensor.dtype.bits, *tensor.shape[:-1], words), i32)}

    def encode(self, tensor: Tensor, codes: torch.Tensor) -> tuple[torch.Tensor]:
        bits, size = tensor.dtype.bits, codes.shape[-1]
        padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -size % WORD))
        words = padded.unflatten(-1, (padded.shape[-1] // WORD, WORD))
        at = torch.arange(WORD, device=codes.device)
        planes = [(((words >> i) & 1) << at).sum(-1) for i in range(bits)]
        return (torch.stack(planes).to(torch.int32),)

    def decode(self, tensor: Tensor, parts: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
        (planes,) = parts
        at = torch.arange(WORD, device=planes.device)
        bit = (planes.unsqueeze(-1) >> at & 1).flatten(-2)[..., : tensor.shape[-1]]
        weight = [1 << i for i in range(tensor.dtype.bits)]
        if code_range(tensor.dtype)[0] < 0:
            weight[-1] = -weight[-1]
        factors = torch.tensor(weight, device=planes.device).view(-1, *[1] * (bit.dim() - 1))
        return (bit * factors).sum(0).to(dtype)


# ------------------------------------------------------------------ groups left out


@dataclass(frozen=True)
class GroupSparse(Format):
    """Only `kept` groups of `group` elements of a row are stored, in order; the others are zeros.

    index: how a group's place is kept: "bitmap", a bit for every group; "u16", its number in the
    row, or "gap", how many before it are left out since the last one kept, both with where each row
    starts. of: the format of what is kept, [kept, group]. (GQSA, section 3.1)
    """

    group: int
    kept: int
    index: str = "bitmap"
    of: Format = dense

    def __post_init__(self) -> None:
        if self.group < 1 or self.kept < 0:
            raise ValueError(f"{self.kept} groups of {self.group}")
        if self.index not in INDEXES:
            raise ValueError(f"index {self.index!r} is none of {', '.join(INDEXES)}")

    def groups(self, t: Tensor) -> int:
        """How many a row has, kept or not. Raises OpError where rows are not whole groups."""
        size = t.shape[-1] if t.rank == 2 else None
        if not isinstance(size, int) or size % self.group:
            raise OpError(f"{t.dtype}{list(t.shape)} is no matrix of groups of {self.group}")
        return size // self.group

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        rows, groups = tensor.shape[0], self.groups(tensor)
        values = Tensor((self.kept, self.group), tensor.dtype, format=self.of)
        if self.index == "bitmap":
            return {"mask": Tensor((rows, groups), DTYPES["uint1"]), "values": values}
        start = Tensor((rows + 1,), i32)
        name, of = ("gap", u8) if self.index == "gap" else ("column", i16)
        return {"start": start, name: Tensor((self.kept,), of), "values": values}

    def encode_index(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts that say which groups are kept, of a mask [rows, groups].

        Raises InputError where the index cannot say it.
        """
        mask = mask.bool()
        if self.index == "bitmap":
            return (mask.to(torch.uint8),)
        start = torch.zeros(len(mask) + 1, dtype=torch.int32)
        start[1:] = mask.sum(1).cumsum(0)
        row, column = mask.nonzero(as_tuple=True)
        if self.index == "u16":
            if mask.shape[1] > 1 << 16:
                raise InputError(f"{mask.shape[1]} groups a row", fix="index 'bitmap' takes them")
            return start, column.to(torch.int32).to(torch.int16)
        before = torch.full_like(column, -1)
        before[1:] = torch.where(row[1:] == row[:-1], column[:-1], before[1:])
        gap = column - before - 1
        if gap.numel() and int(gap.max()) > 255:
            why = f"{int(gap.max())} groups in a row are left out; a gap is a byte"
            raise InputError("the index 'gap' cannot say it", why=why, fix="use 'bitmap' or 'u16'")
        return start, gap.to(torch.uint8)

    def mask(self, tensor: Tensor, parts: tuple[Any, ...]) -> torch.Tensor:
        """Which groups are kept, bool[rows, groups]."""
        if self.index == "bitmap":
            return parts[0].bool()
        start, place = parts[0].long(), parts[1]
        rows, groups = int(start.numel()) - 1, self.groups(tensor)
        row = torch.repeat_interleave(torch.arange(rows), start[1:] - start[:-1])
        if self.index == "u16":
            column = place.long() & 0xFFFF
        else:
            ends = (place.long() + 1).cumsum(0)
            first = torch.cat([ends.new_zeros(1), ends])[start[:-1]]
            column = ends - first[row] - 1
        found = torch.zeros(rows, groups, dtype=torch.bool)
        found[row, column] = True
        return found

    def decode(self, tensor: Tensor, parts: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
        mask, rows = self.mask(tensor, parts), tensor.shape[0]
        made = torch.zeros(rows, self.groups(tensor), self.group, dtype=dtype)
        made[mask] = decoded(self.parts(tensor)["values"], parts[-1], dtype)
        return made.flatten(1)


# ------------------------------------------------------------------ encoding, from dense values


def encode(values: torch.Tensor, t: Tensor) -> Any:
    """Codes as a value of type t, whose format must be able to hold any codes."""
    if isinstance(t.format, Dense):
        return values
    if isinstance(t.format, BitPlanes):
        return Encoded(t, t.format.encode(t, values))
    raise InputError(f"codes cannot be stored as {t.format}")


__all__ = [
    "BitPlanes", "Encoded", "GroupQuant", "GroupSparse", "bits_per_element", "code_range",
    "decoded", "encode", "least_scale", "quantize",
]  # fmt: skip
