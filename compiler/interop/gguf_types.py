"""Blocks of GGUF's quantised types as codes, scales and zeros.

A block's numbers are scale * code, or scale * code + low. Package `gguf` is asked for all three, so
that nothing of how it packs bits is written again: with scales of 1 (and low of 0) it dequantises a
block to its codes, with codes of 1 to its scales, with codes of 0 to its lows. What is told here is
where the fields of a block lie. (ggml-quants.h)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from effc.ir import InputError, Tensor
from effc.ir.formats import Encoded, GroupQuant
from effc.ir.types import DTYPES, DType, f16, f32

Fields = Mapping[tuple[int, int], tuple[int, ...]]
"""(first byte, end) -> bytes to put there, again and again until it is full."""

ONE, NONE = (0x00, 0x3C), (0,)  # float16


@dataclass(frozen=True)
class Blocks:
    """codes: their element type. group: elements with a scale. unit, ones, zeros: what to write
    into a block so that scales are 1 and low is 0; codes are 1 and low is 0; codes are 0.

    product: a scale is the product of two numbers of the file. zeros: None: there is no low.
    """

    codes: str
    group: int
    unit: Fields
    ones: Fields
    zeros: Fields = field(default_factory=dict)
    product: bool = False


K_UNIT = (1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1)  # eight scales of 1 and minima of 0, 6 bits each
BLOCKS: dict[str, Blocks] = {
    "Q4_0": Blocks("int4", 32, {(0, 2): ONE}, {(2, 18): (0x99,)}),
    "Q4_1": Blocks(
        "uint4", 32, {(0, 2): ONE, (2, 4): NONE}, {(2, 4): NONE, (4, 20): (0x11,)},
        {(4, 20): NONE},
    ),
    "Q5_0": Blocks("int5", 32, {(0, 2): ONE}, {(2, 6): (0xFF,), (6, 22): (0x11,)}),
    "Q5_1": Blocks(
        "uint5", 32, {(0, 2): ONE, (2, 4): NONE}, {(2, 8): NONE, (8, 24): (0x11,)},
        {(4, 24): NONE},
    ),
    "Q8_0": Blocks("i8", 32, {(0, 2): ONE}, {(2, 34): (1,)}),
    "Q2_K": Blocks(
        "uint2", 16, {(0, 16): (1,), (80, 82): ONE, (82, 84): NONE},
        {(16, 80): (0x55,), (82, 84): NONE}, {(16, 80): NONE}, product=True,
    ),
    "Q3_K": Blocks(
        "int3", 16, {(96, 104): (0x11,), (104, 108): (0xAA,), (108, 110): ONE},
        {(0, 32): (0xFF,), (32, 96): (0x55,)}, product=True,
    ),
    "Q4_K": Blocks(
        "uint4", 32, {(0, 2): ONE, (2, 4): NONE, (4, 16): K_UNIT},
        {(2, 4): NONE, (16, 144): (0x11,)}, {(16, 144): NONE}, product=True,
    ),
    "Q5_K": Blocks(
        "uint5", 32, {(0, 2): ONE, (2, 4): NONE, (4, 16): K_UNIT},
        {(2, 4): NONE, (16, 48): NONE, (48, 176): (0x11,)}, {(16, 176): NONE}, product=True,
    ),
    "Q6_K": Blocks(
        "int6", 16, {(192, 208): (1,), (208, 210): ONE},
        {(0, 128): (0x11,), (128, 192): (0xAA,)}, product=True,
    ),
    "TQ1_0": Blocks("int2", 256, {(52, 54): ONE}, {(0, 48): (0xFF,), (48, 52): (0xFD,)}),
    "TQ2_0": Blocks("int2", 256, {(64, 66): ONE}, {(0, 64): (0xAA,)}),
}  # fmt: skip

TABLE = "its levels come from a table and are not evenly spaced"
PLAIN = ("F64", "F32", "F16", "BF16")


def unmapped(kind: str) -> str | None:
    """Why tensors of a type cannot be had in ours; None where they can."""
    if kind in BLOCKS or kind in PLAIN:
        return None
    return TABLE if kind[:2] in ("IQ", "MX", "NV") else f"there is no way to read {kind} here"


def encoded(data: np.ndarray, kind: str, parts: DType = f32) -> Encoded:
    """Rows of blocks, u8[..., bytes], as a value [..., elements].

    parts: what holds zeros, and scales that are products. Raises InputError where that is too
    narrow for one.
    """
    b = BLOCKS[kind]
    codes_type, scale_type = DTYPES[b.codes], parts if b.product else f16
    codes, scale = _probed(data, kind, b.unit), _probed(data, kind, b.ones)[..., :: b.group]
    values = {"codes": codes, "scale": scale.to(scale_type.torch)}
    if b.zeros:
        low = _probed(data, kind, b.zeros)[..., :: b.group]
        values |= _without_low(codes, values["scale"], low, b.group)
        values["zero"] = values["zero"].to(parts.torch)
    for name in ("scale", "zero"):
        if name in values and not values[name].isfinite().all():
            raise InputError(
                f"a {name} of {kind} is beyond {parts}", fix='read it with parts="f32"'
            )
    values["codes"] = values["codes"].to(codes_type.torch)
    format = GroupQuant(b.group, scale_type, parts if b.zeros else None)
    return Encoded(Tensor(tuple(codes.shape), codes_type, format=format), tuple(values.values()))


def _without_low(
    codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, group: int
) -> dict[str, torch.Tensor]:
    """scale * code + low as scale * (code - zero)."""
    flat = (scale == 0) & (low != 0)  # all numbers are low = low * (0 - -1)
    step = torch.where(flat, low.to(scale.dtype), scale)
    zero = torch.where(flat, -1.0, -low / torch.where(step == 0, 1, step).float())
    codes = torch.where(flat.repeat_interleave(group, -1), 0, codes)
    return {"codes": codes, "scale": step, "zero": zero}


def _probed(data: np.ndarray, kind: str, fields: Fields) -> torch.Tensor:
    """What gguf dequantises the blocks to, with some of their fields overwritten."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    of = GGMLQuantizationType[kind]
    blocks = data.reshape(-1, GGML_QUANT_SIZES[of][1]).copy()
    for (first, end), values in fields.items():
        blocks[:, first:end] = np.resize(np.array(values, np.uint8), end - first)
    return torch.from_numpy(dequantize(blocks.reshape(data.shape), of))
