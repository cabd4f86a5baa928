"""Products with weights of five levels, packed at 2.4 bits (codegen/cpp/effc_levels.h).

Everything but the packing of codes is that of other groups of codes (codes.py).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from effc.codegen.cpp.products import core
from effc.ir.formats import Encoded, code_range, decoded
from effc.ir.types import DTYPES

from ..plan.builder import Builder
from . import codes
from .codes import UNIT, Coded, Core
from .operands import Product, known, tile, up

FIVE, LEVELS, FRACTION = 5, 5, 12  # units of a bundle, values of a code, bits of five of them
RUN = 4
U8 = DTYPES["u8"]


def make(b: Builder, layer: Coded) -> Product:
    """The call of the core by codes or by floats; w's codes lie in bundles."""
    wide = tile().width
    rows, depth = known(layer.of.shape)
    size = up(rows, wide) * up(depth, FIVE * UNIT) * FRACTION // FIVE // 8
    held = b.derived_ref(layer.w, "bundles", partial(in_bundles, wide=wide), size, wide, U8)
    of = held, *codes.scale_refs(b, layer.w)
    if not layer.integer:
        return codes.by_floats(b, layer, core("linear_levels_by_floats"), of, "five levels")
    note = f"five levels by {layer.x.tensor.dtype} codes"
    return codes.by_codes(b, layer, core("linear_levels"), of, note)


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
