"""Products by bits: weights whose codes are stored as bit planes (codegen/cpp/effc_planes.h).

AND and popcount of p planes with q take p * q times the work of one bit with one; codes unpacked to
bytes take about the same whatever their bits. `pays` says where the first is less.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from effc.codegen.cpp.kernel import TEMPLATES, Kernel
from effc.codegen.cpp.products import F32
from effc.ir import no, yes
from effc.ir.formats import Encoded, code_range, decoded
from effc.ir.rewrite import Answer
from effc.ir.symbols import product
from effc.ir.types import DTYPES

from ..plan.builder import Builder
from . import codes
from .codes import UNIT, Coded, Core
from .features import CpuFeatures, detect
from .operands import Product, known, up

LINE = 256  # codes of a row whose planes lie together
U8, I32 = DTYPES["u8"], DTYPES["i32"]


@cache
def core(p: int, q: int) -> Kernel:
    """The core for codes of p bits in x and of q bits in w."""
    name = f"effc_linear_planes_{p}x{q}"
    text = (TEMPLATES / "core" / "linear_planes.cpp").read_text()
    return Kernel(
        name,
        f"#define EFFC_NAME {name}\n#define EFFC_P {p}\n#define EFFC_Q {q}\n{text}",
        alone=True,
    )


def pays(p: int, q: int) -> Answer:
    """Whether counting bits takes less time than multiplying codes that are unpacked to bytes."""
    cpu = detect()
    if not isinstance(cpu, CpuFeatures) or not cpu.has("avx512_vpopcntdq"):
        return no("bits are counted by a table here; bytes are multiplied as fast or faster")
    return yes if p * q <= PAIRS else no("{} x {} bits are multiplied faster as bytes", p, q)


# Pairs of planes. Without an instruction that counts the bits of a vector (Zen 3, 4096 x 4096, one
# row of x) 1 x 1 bits take 0.9 times as long as unpacked codes of 1 bit, 2 x 1 1.1, 4 x 1 1.2,
# 2 x 2 1.4, 3 x 3 1.5. With it a pair takes 3 instructions for 256 products, and bytes about 14
# (counted, not measured).
PAIRS = 4


def takes(layer: Coded) -> Answer:
    """Whether the weight is multiplied as codes at all: by planes, or unpacked (codes.py)."""
    return codes.takes_groups(layer)


def _by_planes(layer: Coded) -> Answer:
    f: Any = layer.of.format
    if not layer.integer:
        return no("x is floats")
    x: Any = layer.x.tensor
    if f.group is not None or x.format.group is not None or x.format.scale != F32:
        return no("a sum of bits has one scale a row, in f32 for x")
    return pays(x.dtype.bits, layer.of.dtype.bits)


def make(b: Builder, layer: Coded) -> Product:
    """The call by planes where that pays, else by codes unpacked."""
    if not _by_planes(layer):
        return codes.product_of_groups(b, layer)
    x: Any = layer.x.tensor
    f, g = x.format, layer.of
    results, depth = known(g.shape)
    parts = [b.part(layer.x, i) for i in range(2 + (f.zero is not None))]
    size = results * up(depth, LINE) // 8 * g.dtype.bits
    packed = [
        b.derived_ref(layer.w, "lines of planes", in_lines, size, dtype=U8),
        b.derived_ref(layer.w, "scales of rows", row_scales, results, dtype=F32),
        b.derived_ref(layer.w, "offsets of rows", row_offsets, results, dtype=I32),
        b.derived_ref(layer.w, "sums of codes", code_sums, results, dtype=I32),
    ]
    zeros = 0 if f.zero is None else 2 if f.zero == U8 else 1
    least = code_range(x.dtype)[0]
    numbers = (product(x.shape[:-1]), results, depth, up(depth, UNIT), least, zeros)
    note = f"{x.dtype.bits} x {g.dtype.bits} bit planes"
    return Product(
        core(x.dtype.bits, g.dtype.bits), (parts[0], parts[1], parts[-1], *packed), numbers, note
    )


codes.CORES["GroupQuant of BitPlanes"] = Core(takes, make)

# ------------------------------------------------------------------ packing


def _stored(value: Encoded) -> torch.Tensor:
    """Codes counted from the least, [rows, depth]."""
    t = value.type
    return decoded(t.format.parts(t)["codes"], value["codes"], torch.int16) - code_range(t.dtype)[0]  # type: ignore[attr-defined]


def in_lines(value: Encoded) -> torch.Tensor:
    """Planes as the core reads them: row, line, plane after plane; flat bytes."""
    held, bits = _stored(value), value.type.dtype.bits
    held = torch.nn.functional.pad(held, (0, -held.shape[1] % LINE))
    v = held.reshape(held.shape[0], -1, 1, LINE // 8, 8)
    planes = v >> torch.arange(bits, dtype=torch.int16).view(-1, 1, 1) & 1
    return (planes << torch.arange(8, dtype=torch.int16)).sum(-1).to(torch.uint8).flatten()


def codes_of(data: torch.Tensor, rows: int, depth: int, bits: int) -> torch.Tensor:
    """The codes of `in_lines`, counted from the least: its inverse."""
    planes = (
        data.reshape(rows, -1, bits, LINE // 8, 1).to(torch.int16)
        >> torch.arange(8, dtype=torch.int16)
        & 1
    )
    held = (planes << torch.arange(bits, dtype=torch.int16).view(-1, 1, 1)).sum(2)
    return held.reshape(rows, -1)[:, :depth].to(torch.uint8)


def row_scales(value: Encoded) -> torch.Tensor:
    return value["scale"].float().flatten()


def row_offsets(value: Encoded) -> torch.Tensor:
    """What is taken off stored codes."""
    least, results = code_range(value.type.dtype)[0], value.type.shape[0]
    if value.type.format.zero is None:  # type: ignore[attr-defined]
        return torch.full((results,), -least, dtype=torch.int32)  # type: ignore[arg-type]
    return value["zero"].to(torch.int32).flatten() - least


def code_sums(value: Encoded) -> torch.Tensor:
    return _stored(value).sum(1).to(torch.int32)


__all__ = [
    "code_sums",
    "codes_of",
    "core",
    "in_lines",
    "make",
    "pays",
    "row_offsets",
    "row_scales",
    "takes",
]
