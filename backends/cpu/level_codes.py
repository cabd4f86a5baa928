"""Products with weights of five levels, packed at 2.4 bits (codegen/cpp/effc_levels.h).

Everything but the packing of codes is that of other groups of codes (codes.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from effc.codegen.cpp.products import F32, core
from effc.ir import Op
from effc.ir.formats import Encoded, code_range, decoded
from effc.ir.symbols import product
from effc.ir.types import DTYPES

from ..plan.builder import Builder
from ..plan.memory import Ref
from . import codes
from .codes import KINDS, UNIT, Coded, Core
from .operands import BLOCK, Product, lined_up, tile, up

FIVE, LEVELS, FRACTION = 5, 5, 12  # units of a bundle, values of a code, bits of five of them
RUN = 4
U8 = DTYPES["u8"]


def make(b: Builder, layer: Coded) -> Product:
    """The call of the core by codes or by floats; w's codes lie in bundles."""
    weight, of = codes.weight_numbers(layer.w), _refs(b, layer.w)
    if not layer.integer:
        x, rows = lined_up(b, layer.x)
        numbers = (rows.sizes[0], *weight, rows.operands[0].strides[0], KINDS[x.dtype], BLOCK,
                   up(64, tile().panel))  # fmt: skip
        return Product(core("linear_levels_by_floats"), (x, *of), numbers, "five levels")
    t = layer.x.tensor
    f: Any = t.format
    parts = [b.part(layer.x, i) for i in range(2 + (f.zero is not None))]
    sums, shift = of[1], 128 if t.dtype == U8 else 0
    if f.zero is not None or shift:
        wide = tile().width
        count = up(layer.of.shape[0], wide)  # type: ignore[type-var]
        sums = b.derived_ref(
            layer.w, "sums of rows", partial(codes.row_sums, wide=wide), count, wide, F32
        )
    numbers = (
        product(t.shape[:-1]), *weight, up(t.shape[-1], UNIT), (f.group or 0) // UNIT,  # type: ignore[type-var]
        KINDS[f.scale], shift, int(f.zero is not None) + int(f.zero == U8), BLOCK,
    )  # fmt: skip
    read = (parts[0], parts[1], parts[-1], *of, sums)
    return Product(core("linear_levels"), read, numbers, f"five levels by {t.dtype} codes")


def _refs(b: Builder, w: Op) -> tuple[Ref, Ref, Ref]:
    """Bundles, scales and zeros of a constant."""
    t, wide = w.tensor, tile().width
    f: Any = t.format
    rows, depth = t.shape
    padded = up(rows, wide)  # type: ignore[type-var]
    size = padded * up(depth, FIVE * UNIT) * FRACTION // FIVE // 8  # type: ignore[type-var]
    held = b.derived_ref(w, "bundles", partial(in_bundles, wide=wide), size, wide, U8)
    each = padded * f.groups(t)
    scale = b.derived_ref(
        w, "scales in tiles", partial(codes.packed_scales, wide=wide), each, wide, f.scale
    )
    if f.zero is None:
        return held, scale, scale
    return (
        held,
        scale,
        b.derived_ref(w, "zeros in tiles", partial(codes.packed_zeros, wide=wide), each, wide, U8),
    )


codes.CORES["GroupQuant of int2b"] = Core(codes.takes_groups, make)

# ------------------------------------------------------------------ packing


def in_bundles(value: Encoded, wide: int) -> torch.Tensor:
    """Codes as the cores read them, flat bytes; rows and columns are filled up."""
    t = value.type
    held = decoded(t.format.parts(t)["codes"], value["codes"], torch.int16) - code_range(t.dtype)[0]
    v = held.numpy().astype(np.uint16)
    v = np.pad(v, ((0, -len(v) % wide), (0, -v.shape[1] % (FIVE * UNIT))))
    # [tiles, bundles, units, runs, lanes, codes of a run]
    v = v.reshape(len(v) // wide, wide, -1, FIVE, UNIT // RUN, RUN).transpose(0, 2, 3, 4, 1, 5)
    power = LEVELS ** np.arange(FIVE - 1, -1, -1)
    number = np.tensordot(power, v.astype(np.int64), ([0], [2]))
    fraction = -(-(number << FRACTION) // LEVELS**FIVE)
    # kinds: even and odd ones of a run, then of the next
    pairs = fraction.reshape(*fraction.shape[:2], UNIT // RUN // 2, 2, wide, 2, 2)
    kinds = pairs.transpose(0, 1, 2, 3, 6, 4, 5).reshape(*pairs.shape[:3], 4, wide * 2)
    last = kinds[..., 3, :]
    made = kinds[..., :3, :] << 4 | np.stack([last >> 8, last >> 4 & 15, last & 15], axis=-2)
    return torch.from_numpy(made.astype("<u2").reshape(-1).view(np.uint8))


def levels_of(data: torch.Tensor, rows: int, depth: int, wide: int) -> torch.Tensor:
    """The codes of `in_bundles`, counted from the least, [rows, depth]: its inverse."""
    tiles = -(-rows // wide)
    made = (
        data.numpy().view("<u2").reshape(tiles, -1, UNIT // RUN // 2, 3, wide * 2).astype(np.int64)
    )
    low = made & 15
    last = low[..., 0, :] << 8 | low[..., 1, :] << 4 | low[..., 2, :]
    kinds = np.concatenate([made >> 4, last[..., None, :]], axis=-2)
    pairs = kinds.reshape(*kinds.shape[:3], 2, 2, wide, 2).transpose(0, 1, 2, 3, 5, 6, 4)
    fraction = pairs.reshape(*kinds.shape[:2], UNIT // RUN, wide, RUN)
    digits = []
    for _ in range(FIVE):
        fraction = fraction * LEVELS
        digits.append(fraction >> FRACTION)
        fraction = fraction & ((1 << FRACTION) - 1)
    v = np.stack(digits, axis=2).transpose(0, 4, 1, 2, 3, 5)
    return torch.from_numpy(v.reshape(tiles * wide, -1)[:rows, :depth].astype(np.uint8))


__all__ = ["in_bundles", "levels_of", "make"]
