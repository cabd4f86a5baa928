"""Products and look-ups that read compressed weights as they are stored: `decode` is never made.

`linear(x, decode(w))` with a constant w goes to a core that reads w's codes, packed anew when
weights are bound (effc_codes.h). Where x is `decode(quantize(...))`, its codes are multiplied as
integers. `CORES` says which format goes where. What no core takes is decoded once, when weights are
bound, and multiplied as any other weight; the launch says so, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from effc.codegen.cpp.kernel import Kernel
from effc.codegen.cpp.products import BF16, F16, F32, core
from effc.ir import DType, Op, Tensor, no, yes
from effc.ir.formats import Encoded, GroupQuant, code_range, decoded
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, product
from effc.ir.types import DTYPES, Dense

from ..plan.builder import Builder
from ..plan.memory import Ref
from .caches import readers, reads_cache
from .operands import BLOCK, Product, known, lined_up, tile, up

UNIT = 32  # codes of a row that are packed together (effc_codes.h)
KINDS = {F32: 0, F16: 1, BF16: 2}  # of floats, as kernels number them


@dataclass(frozen=True)
class Coded:
    """A linear layer whose weight is compressed, and perhaps its other operand.

    w: the constant of the format, [results, depth]. x: the value multiplied; its type is a format's
    where codes may be read, else it is floats.
    """

    node: Any
    w: Op
    x: Op

    @property
    def of(self) -> Tensor:
        return self.w.tensor

    @property
    def integer(self) -> bool:
        return not isinstance(self.x.tensor.format, Dense)


@dataclass(frozen=True)
class Core:
    """A way to compute a coded product: whether it does, and the call. Both see the plan's values:
    x is a `quantize` where its codes are read."""

    takes: Callable[[Coded], Answer]
    make: Callable[[Builder, Coded], Product]


# Format of the weight, and of its codes (`kind_of`) -> its core. Another module adds its formats
# when it is imported (backends/cpu/__init__.py): CORES["GroupSparse"] = Core(takes, make).
CORES: dict[str, Core] = {}


def kind_of(t: Tensor) -> str:
    """What the table is asked for: `GroupQuant`, `GroupSparse`; `GroupQuant of BitPlanes`, or
    `GroupQuant of int2b`, where codes are stored in a way of their own."""
    name, f = type(t.format).__name__, t.format
    if isinstance(f, GroupQuant) and not isinstance(f.codes, Dense):
        return f"{name} of {type(f.codes).__name__}"
    return f"{name} of {t.dtype}" if t.dtype.run != (1, 0) else name


def coded(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Coded | None:
    """The layer where its weight is a decoded constant; operands are its values in the plan."""
    if node.name != "linear":
        return None
    w, x = operands[node.w], operands[node.x]
    if w.name != "decode" or not b.is_constant(w):
        return None
    codes = x.x if x.name == "decode" else x
    return Coded(node, w.x, codes if quantised(codes) else x)


def takes(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Answer:
    """Whether a core reads the codes of the layer's weight: with those of x, or with floats."""
    layer = coded(b, node, operands)
    if layer is None:
        return no("no operand is a decoded constant", at=node)
    if not b.kernels:
        return no("no kernels are built", at=node)
    if node.dtype not in KINDS:
        return no("sums in {}", node.dtype, at=node)
    kind = kind_of(layer.of)
    if kind not in CORES:
        return no("no core reads {}", kind, at=node)
    return CORES[kind].takes(layer)


def find(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    """The call that multiplies by codes, or None where the weight is decoded."""
    layer = coded(b, node, operands)
    answer = takes(b, node, operands)
    if layer is None or (found := CORES.get(kind_of(layer.of))) is None:
        return None
    if answer:
        return found.make(b, layer)
    floats = Coded(node, layer.w, operands[node.x])
    if not layer.integer or not b.kernels or node.dtype not in KINDS or not found.takes(floats):
        return None
    made = found.make(b, floats)
    return replace(made, note=f"{made.note}; x in floats: {answer}")


def remark(b: Builder, node: Any, operands: Mapping[Op, Op]) -> str:
    """What to say of a layer that reads dense numbers in the place of codes."""
    layer = coded(b, node, operands)
    return "" if layer is None else f"dense copy of {layer.of}: {takes(b, node, operands)}"


# ------------------------------------------------------------------ who reads a quantised value


def reads_codes(b: Builder, user: Any, value: Op) -> bool:
    """Whether all that `user` does with a decoded value is to read its codes."""
    found = readers(user, value)
    return found is not None and all(_reads(b, n, value, found[1]) for n in found[0])


def _reads(b: Builder, node: Any, value: Op, outer: Mapping[Op, Op]) -> bool:
    if node.name == "attention":
        return reads_cache(b, node, value, outer)
    if node.name != "linear" or outer.get(node.x) is not value or outer.get(node.w) is value:
        return False
    return bool(takes(b, node, outer))


# ------------------------------------------------------------------ groups of codes with a scale


def takes_groups(layer: Coded) -> Answer:
    f: Any = layer.of.format
    answer = takes_format(layer.of)
    if not answer or not layer.integer:
        return answer
    x: Any = layer.x.tensor
    length = min(g for g in (layer.of.shape[-1], f.group, x.format.group) if g is not None)
    return x_takes(x) and fits(x.dtype, layer.of.dtype, length, f.zero)


def takes_format(t: Tensor) -> Answer:
    """Whether cores read the codes of such a constant."""
    f: Any = t.format
    if f.group is not None and f.group % UNIT:
        return no("groups of {} are no multiple of {}", f.group, UNIT)
    if not all(isinstance(n, int) for n in t.shape):
        return no("the sizes of {} are not known", t)
    return _zeros(f, t.dtype) if f.scale in KINDS else no("scales of {}", f.scale)


def _zeros(f: GroupQuant, codes: DType) -> Answer:
    """Zeros lie a byte each, counted from the least code."""
    if f.zero is None:
        return yes
    if f.zero.kind != "int" or f.zero.bits > 8:
        return no("zeros of {}", f.zero)
    least = code_range(codes)[0]
    low, high = code_range(f.zero)
    return yes if least <= low and high - least < 256 else no("zeros of {} for {}", f.zero, codes)


def quantised(node: Any) -> Answer:
    """Whether the node is a `quantize` that a kernel here computes."""
    if node.name != "quantize":
        return no("{} makes no codes", node.name, at=node)
    if node.x.dtype not in KINDS:
        return no("{} is not quantised here", node.x.dtype, at=node)
    return x_takes(node.tensor)


def x_takes(t: Tensor) -> Answer:
    """Whether the codes of a quantised value are read as they are."""
    f: Any = t.format
    if t.dtype.kind != "int" or t.dtype.bits > 8 or t.dtype.run != (1, 0):
        return no("codes of {}", t.dtype)
    if not isinstance(f, GroupQuant) or not isinstance(f.codes, Dense) or f.scale not in KINDS:
        return no("{} is quantised in a way of its own", f)
    if not isinstance(t.shape[-1], int):
        return no("the size of a row of {} is not known", t)
    if f.group is not None and f.group % UNIT:
        return no("groups of {} are no multiple of {}", f.group, UNIT)
    if f.zero is not None and f.zero != holder(t.dtype):
        return no("zeros of {} for {}", f.zero, t.dtype)
    if f.group is not None and (f.zero is not None or t.dtype == DTYPES["u8"]):
        return no("{} with zeros, or of all 8 bits, for groups of {}", t.dtype, f.group)
    return yes


def fits(x: DType, w: DType, length: int, zero: DType | None = None) -> Answer:
    """Whether the sum of so many products of codes is a number of 32 bits, and the zero's share.

    As cores have them: codes of w counted from the least, those of x signed.
    """
    low = code_range(w)[0]
    highest = max(code_range(t)[1] for t in (w, zero) if t is not None)
    largest = 128 if x.bits == 8 else max(map(abs, code_range(x)))
    limit = (2**31 - 1) // (2 * (highest - low) * largest)
    if length <= limit:
        return yes
    return no("{} products of {} and {} in a sum may leave 32 bits; at most {} fit",
              length, x, w, limit)  # fmt: skip


def holder(dtype: DType) -> DType:
    """The element type of a byte that holds a code."""
    return DTYPES["i8" if code_range(dtype)[0] < 0 else "u8"]


def product_of_groups(b: Builder, layer: Coded) -> Product:
    bits, said = layer.of.dtype.bits, f"{layer.of.nbytes} bytes of {layer.of.dtype}"
    of = weight_refs(b, layer.w)
    if not layer.integer:
        return by_floats(b, layer, core("linear_of_codes_by_floats", bits), of, said)
    note = f"{said} by {layer.x.tensor.dtype}"
    return by_codes(b, layer, core("linear_of_codes", bits), of, note)


def by_floats(b: Builder, layer: Coded, made: Kernel, of: Sequence[Ref], note: str) -> Product:
    """The call of a core that multiplies floats; of: the weight's codes, scales and zeros."""
    x, rows = lined_up(b, layer.x)
    numbers = (rows.sizes[0], *weight_numbers(layer.w), rows.operands[0].strides[0],
               KINDS[x.dtype], BLOCK, up(64, tile().panel))  # fmt: skip
    return Product(made, (x, *of), numbers, note)


def by_codes(b: Builder, layer: Coded, made: Kernel, of: Sequence[Ref], note: str) -> Product:
    """The call of a core that multiplies the codes of x."""
    t = layer.x.tensor
    f: Any = t.format
    parts = [b.part(layer.x, i) for i in range(2 + (f.zero is not None))]
    sums, shift = of[1], 128 if t.dtype == DTYPES["u8"] else 0
    if f.zero is not None or shift:
        wide = tile().width
        count = up(known(layer.of.shape)[0], wide)
        sums = b.derived_ref(
            layer.w, "sums of rows", partial(row_sums, wide=wide), count, wide, F32
        )
    numbers = (
        product(t.shape[:-1]), *weight_numbers(layer.w), up(known(t.shape[-1:])[0], UNIT),
        (f.group or 0) // UNIT, KINDS[f.scale], shift,
        int(f.zero is not None) + int(f.zero == DTYPES["u8"]), BLOCK,
    )  # fmt: skip
    return Product(made, (parts[0], parts[1], parts[-1], *of, sums), numbers, note)


def weight_numbers(w: Op) -> tuple[Dim, ...]:
    """What cores are told of a constant: rows and columns; units of a group, or 0 for a whole row;
    the type of scales; what zeros are where there are none, and whether there are."""
    f = _format(w)
    least = -code_range(w.tensor.dtype)[0]
    group = (f.group or 0) // UNIT
    return (*w.tensor.shape, group, KINDS[f.scale], least, int(f.zero is not None))


def table_takes(b: Builder, node: Any) -> bool:
    """Whether rows of the table are decoded one by one, as they are looked up."""
    table = node.table
    if table.name != "decode" or not b.is_constant(table) or not b.kernels:
        return False
    return kind_of(table.x.tensor) == "GroupQuant" and bool(takes_format(table.x.tensor))


CORES["GroupQuant"] = Core(takes_groups, product_of_groups)


def weight_refs(b: Builder, w: Op) -> tuple[Ref, Ref, Ref]:
    """Codes, scales and zeros of a constant as cores read them, packed when weights are bound."""
    t, wide = w.tensor, tile().width
    rows, depth = known(t.shape)
    size = up(rows, wide) * up(depth, UNIT) * t.dtype.bits // 8
    codes = b.derived_ref(
        w, "codes in tiles", partial(packed_codes, wide=wide), size, wide, DTYPES["u8"]
    )
    return codes, *scale_refs(b, w)


def scale_refs(b: Builder, w: Op) -> tuple[Ref, Ref]:
    """Scales and zeros of a constant, in tiles; scales twice where there are no zeros."""
    t, f, wide = w.tensor, _format(w), tile().width
    count = up(known(t.shape)[0], wide) * f.groups(t)
    scale = b.derived_ref(
        w, "scales in tiles", partial(packed_scales, wide=wide), count, wide, f.scale
    )
    if f.zero is None:
        return scale, scale
    return scale, b.derived_ref(
        w, "zeros in tiles", partial(packed_zeros, wide=wide), count, wide, DTYPES["u8"]
    )


def _format(w: Op) -> GroupQuant:
    f = w.tensor.format
    assert isinstance(f, GroupQuant)
    return f


def in_tiles(t: torch.Tensor, wide: int) -> torch.Tensor:
    """[rows, columns] -> [tiles, columns, wide], rows filled up with zeros."""
    t = torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % wide))
    return t.unflatten(0, (t.shape[0] // wide, wide)).transpose(1, 2).contiguous()


def packed_codes(value: Encoded, wide: int) -> torch.Tensor:
    """Units of codes, flat bytes; see effc_codes.h."""
    t = value.type
    codes = (
        decoded(t.format.parts(t)["codes"], value["codes"], torch.int16) - code_range(t.dtype)[0]
    )
    bits = t.dtype.bits
    codes = torch.nn.functional.pad(
        codes.to(torch.uint8), (0, -codes.shape[1] % UNIT, 0, -codes.shape[0] % wide)
    )
    units = codes.shape[1] // UNIT
    # [tiles, units, vectors, lanes, codes of a lane]
    v = codes.reshape(codes.shape[0] // wide, wide, units, UNIT // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return v.flatten().contiguous()
    parts, at = [], 0
    for part in (4, 2, 1):
        if bits & part:
            together = 8 // part
            some = (v >> at & ((1 << part) - 1)).unflatten(2, (v.shape[2] // together, together))
            joined = torch.zeros_like(some[:, :, :, 0])
            for i in range(together):
                joined |= some[:, :, :, i] << i * part
            parts.append(joined)
            at += part
    return torch.cat(parts, 2).flatten()


def packed_scales(value: Encoded, wide: int) -> torch.Tensor:
    """[rows, groups] -> a tile's scales, group after group; flat."""
    return in_tiles(value["scale"], wide).flatten()


def packed_zeros(value: Encoded, wide: int) -> torch.Tensor:
    """The same of zeros, counted from the least code."""
    least = code_range(value.type.dtype)[0]
    return in_tiles((value["zero"].to(torch.int16) - least).to(torch.uint8), wide).flatten()


def row_sums(value: Encoded, wide: int) -> torch.Tensor:
    """The sum of the numbers of each row."""
    sums = value.decode(torch.float64).sum(1).float()
    return torch.nn.functional.pad(sums, (0, -sums.shape[0] % wide))


__all__ = [
    "CORES",
    "KINDS",
    "UNIT",
    "Coded",
    "Core",
    "find",
    "holder",
    "kind_of",
    "quantised",
    "reads_codes",
    "remark",
    "table_takes",
    "takes",
    "weight_numbers",
    "weight_refs",
    "x_takes",
]  # fmt: skip
