"""Products with weights of which only some groups are kept (codegen/cpp/effc_sparse.h).

The kept groups of all rows are one list in chunks of 256 codes, with their scales, zeros and places
in a row beside them, whatever index the format stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from effc.codegen.cpp.kernel import TEMPLATES, Kernel
from effc.codegen.cpp.products import BF16, F16, F32
from effc.codegen.cpp.scalar import storage
from effc.ir import DType, Tensor, no, yes
from effc.ir.formats import Encoded, GroupQuant, GroupSparse, code_range, decoded
from effc.ir.rewrite import Answer
from effc.ir.symbols import product
from effc.ir.types import DTYPES, Dense

from ..plan.builder import Builder
from . import codes
from .codes import Coded, Core
from .operands import Product, known, lined_up, up

CHUNK, VECTOR, TOGETHER, UNIT = 256, 32, 8, 8  # as in effc_sparse.h
PLACE = 16  # bits
WIDEST = UNIT << PLACE  # elements of a row whose groups have places of 16 bits
I8, U8, I32 = (DTYPES[name] for name in ("i8", "u8", "i32"))


@dataclass(frozen=True)
class Chunks:
    """How the kept groups of a matrix lie: what effc_sparse.h is told of them.

    bits: of a code; stored codes are counted from `least`. zero: bits of a stored zero, or 0 where
    all groups share -least. wide: code - zero may not be multiplied as a byte.
    """

    group: int
    bits: int
    least: int
    zero: int
    wide: bool
    scale: DType

    @property
    def groups(self) -> int:
        """Of a chunk."""
        return CHUNK // self.group

    @property
    def nbytes(self) -> int:
        """Of a chunk."""
        return VECTOR * self.bits + self.groups * (self.scale.bits + self.zero + PLACE) // 8

    def count(self, kept: int) -> int:
        """Chunks of so many groups, one at least."""
        return max(1, -(-kept // self.groups))


def chunks(t: Tensor) -> Chunks:
    """The packing of a type that `takes` says yes to."""
    f: Any = t.format
    least, largest = code_range(t.dtype)
    bits = (largest - least).bit_length()
    shared, zero = -least, 0
    low, high = shared, shared
    if f.of.zero is not None:
        low, high = (n - least for n in code_range(f.of.zero))
        zero = 4 if high < 16 else 8
    reach = max(high, (1 << bits) - 1 - low)
    return Chunks(f.group, bits, least, zero, reach > 63, f.of.scale)


@cache
def core(packing: Chunks, x: DType) -> Kernel:
    """The core for such chunks and elements of x: i8 where it is codes."""
    text = (TEMPLATES / "core" / "linear_sparse.cpp").read_text()
    p = packing
    name = f"effc_linear_sparse_{x}_u{p.bits}x{p.group}_{p.scale}_zero{p.zero}{'_wide' * p.wide}"
    facts = {
        "NAME": name, "GROUP": p.group, "BITS": p.bits, "ZERO": p.zero, "WIDE_CODES": int(p.wide),
        "SCALE": _spelled(p.scale), "X": _spelled(x),
    }  # fmt: skip
    defines = "".join(f"#define EFFC_{key} {value}\n" for key, value in facts.items())
    return Kernel(name, f"{defines}{text}", alone=True)


def _spelled(dtype: DType) -> str:
    """The type of C++; its header is included afterwards."""
    return storage(dtype)


# ------------------------------------------------------------------ whether, and the call


def takes(layer: Coded) -> Answer:
    """Whether the core reads the weight's codes, and those of x where it has some."""
    t = layer.of
    f: Any = t.format
    if not isinstance(f.of, GroupQuant) or not isinstance(f.of.codes, Dense):
        return no("what is kept of {} is no codes", t)
    if f.of.group is not None and f.of.group < f.group:
        return no("groups of {} have several scales", f.group)
    if f.group not in (8, 16, 32):
        return no("groups of {}; 8, 16 and 32 are read", f.group)
    if not all(isinstance(n, int) for n in t.shape) or t.shape[-1] > WIDEST:  # type: ignore[operator]
        return no("rows of {} elements; {} at most", t.shape[-1], WIDEST)
    if t.dtype.run != (1, 0) or f.of.scale not in (F32, F16, BF16):
        return no("{} with scales of {}", t.dtype, f.of.scale)
    if f.of.zero is not None:
        low, high = code_range(f.of.zero) if f.of.zero.kind == "int" else (0, 1 << 16)
        least = code_range(t.dtype)[0]
        if low < least or high - least > 255:
            return no("zeros of {} for {}", f.of.zero, t.dtype)
    return _takes_codes(layer.x.tensor) if layer.integer else yes


def _takes_codes(x: Tensor) -> Answer:
    f: Any = x.format
    answer = codes.x_takes(x)
    if not answer:
        return answer
    if f.group is not None or f.zero is not None or f.scale != F32 or codes.holder(x.dtype) != I8:
        return no("{} of {}; signed codes with one f32 scale a row are read", x.dtype, f)
    return yes


def make(b: Builder, layer: Coded) -> Product:
    """The call of the core: few rows share the codes as they are unpacked, 32 at most."""
    t, packing = layer.of, chunks(layer.of)
    f: Any = t.format
    results, depth = known(t.shape)
    kept = packing.count(f.kept) * packing.nbytes
    packed = [
        b.derived_ref(layer.w, "chunks", in_chunks, kept, dtype=U8),
        b.derived_ref(layer.w, "rows", row_starts, results + 1, dtype=I32),
    ]
    note = f"{t.dtype} codes, groups of {f.group}"
    if not layer.integer:
        x, rows = lined_up(b, layer.x)
        numbers = (rows.sizes[0], results, depth, rows.operands[0].strides[0], 0, -packing.least)
        return Product(core(packing, x.dtype), (x, *packed), numbers, note)
    x, scale = b.part(layer.x, 0), b.part(layer.x, 1)
    less = b.derived_ref(layer.w, "sums of rows", shifted_by, results, dtype=F32)
    count = product(layer.x.tensor.shape[:-1])
    numbers = (count, results, depth, up(depth, codes.UNIT), 0, -packing.least)
    return Product(
        core(packing, I8), (x, scale, less, *packed), numbers, f"{note}, by {layer.x.dtype} codes"
    )


codes.CORES["GroupSparse"] = Core(takes, make)

# ------------------------------------------------------------------ packing


def group_at(group: int) -> np.ndarray:
    """The group of a block that each byte of its vectors belongs to, [vectors, 32]."""
    j, i = np.mgrid[: group // 4, :VECTOR]
    if group == 32:
        return j
    return j + i // 16 * 4 if group == 16 else i // 16 * 4 + 2 * j + i % 16 // 8


def _order(group: int) -> np.ndarray:
    """Where in a block, [8 groups, group] in order, each byte of its vectors is taken from."""
    at = group_at(group).reshape(-1)
    return np.argsort(np.argsort(at, kind="stable"), kind="stable")


def in_chunks(value: Encoded) -> torch.Tensor:
    """The kept groups as the core reads them, flat bytes; the last chunk is filled up."""
    f, packing = value.type.format, chunks(value.type)
    assert isinstance(f, GroupSparse) and isinstance(f.of, GroupQuant)
    kept = value["values"]
    whole = packing.count(f.kept) * packing.groups
    held = decoded(f.of.parts(kept.type)["codes"], kept["codes"], torch.int16) - packing.least
    held = _filled(held.numpy().astype(np.uint8), whole)
    blocks = held.reshape(-1, TOGETHER * f.group)[:, _order(f.group)]
    parts = [_fields(blocks.reshape(-1, CHUNK // VECTOR, VECTOR), packing.bits)]
    scale = kept["scale"].reshape(-1).contiguous().view(torch.uint8).numpy()
    parts.append(
        _filled(scale.reshape(f.kept, packing.scale.bits // 8), whole).reshape(len(parts[0]), -1)
    )
    if packing.zero:
        zero = (kept["zero"].reshape(-1).to(torch.int16) - packing.least).numpy().astype(np.uint8)
        zero = _filled(zero, whole).reshape(-1, packing.groups)
        parts.append(zero if packing.zero == 8 else _halves(zero))
    place = _mask(value).nonzero()[:, 1].numpy() * (f.group // UNIT)
    place = _filled(place.astype("<u2"), whole).reshape(len(parts[0]), packing.groups)
    parts.append(place.view(np.uint8))
    return torch.from_numpy(np.concatenate(parts, axis=1).reshape(-1))


def _filled(x: np.ndarray, size: int) -> np.ndarray:
    made = np.zeros((size, *x.shape[1:]), x.dtype)
    made[: len(x)] = x
    return made


def _fields(v: np.ndarray, bits: int) -> np.ndarray:
    """Vectors of codes [chunks, 8, 32] with their bits in parts of 8, 4, 2 and 1; flat chunks."""
    parts, at = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            some = (v >> at & ((1 << width) - 1)).reshape(len(v), 8 // width, width, VECTOR)
            shifts = np.arange(8 // width, dtype=np.uint8)[:, None, None] * width
            parts.append(np.bitwise_or.reduce(some << shifts, axis=1))
            at += width
    return np.concatenate(parts, axis=1).reshape(len(v), -1)


def _halves(zero: np.ndarray) -> np.ndarray:
    """Zeros [chunks, groups] in halves of bytes: a block in lower ones, the next in upper ones."""
    blocks = zero.reshape(len(zero), -1, TOGETHER)
    if blocks.shape[1] == 1:  # two neighbours in a byte
        return (blocks[:, 0, ::2] | blocks[:, 0, 1::2] << 4).astype(np.uint8)
    return (blocks[:, ::2] | blocks[:, 1::2] << 4).reshape(len(zero), -1).astype(np.uint8)


def row_starts(value: Encoded) -> torch.Tensor:
    """Where each row begins in the list of groups, and where the last one ends."""
    counts = _mask(value).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def _mask(value: Encoded) -> torch.Tensor:
    f = value.type.format
    assert isinstance(f, GroupSparse)
    return f.mask(value.type, value.parts)


def shifted_by(value: Encoded) -> torch.Tensor:
    """What 128 added to every code of x adds to each row's sum."""
    return 128 * value.decode(torch.float64).sum(1).float()


def unpacked(
    data: torch.Tensor, t: Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The inverse of `in_chunks`: codes [kept, group], scales, zeros, groups' numbers in a row."""
    f: Any = t.format
    packing = chunks(t)
    rows = data.numpy().reshape(packing.count(f.kept), packing.nbytes)
    v, first, at = np.zeros((len(rows), CHUNK // VECTOR, VECTOR), np.uint8), 0, 0
    for width in (8, 4, 2, 1):
        if packing.bits & width:
            part = rows[:, first : first + VECTOR * width].reshape(-1, 1, width, VECTOR)
            shifts = np.arange(8 // width, dtype=np.uint8)[:, None, None] * width
            v |= (part >> shifts & ((1 << width) - 1)).reshape(v.shape) << at
            first, at = first + VECTOR * width, at + width
    blocks = np.empty((len(rows) * packing.groups // TOGETHER, TOGETHER * f.group), np.uint8)
    blocks[:, _order(f.group)] = v.reshape(blocks.shape)
    held = blocks.reshape(-1, f.group)[: f.kept].astype(np.int16) + packing.least
    size = packing.groups * packing.scale.bits // 8
    scale = torch.from_numpy(rows[:, first : first + size].copy()).view(packing.scale.torch)  # type: ignore[arg-type]
    zero = None
    if packing.zero:
        raw = rows[:, first + size : -2 * packing.groups]
        if packing.zero == 4:
            pairs = raw.reshape(len(raw), -1, TOGETHER if packing.groups > TOGETHER else 1)
            raw = np.stack([pairs & 15, pairs >> 4], axis=2)
        zero = torch.from_numpy(raw.reshape(-1)[: f.kept].astype(np.int16)) + packing.least
    place = rows[:, -2 * packing.groups :].copy().view("<u2").reshape(-1)[: f.kept]
    column = torch.from_numpy(place.astype(np.int64) // (f.group // UNIT))
    return torch.from_numpy(held), scale.reshape(-1)[: f.kept], zero, column


__all__ = [
    "Chunks",
    "chunks",
    "core",
    "in_chunks",
    "make",
    "row_starts",
    "takes",
    "unpacked",
]
