"""Graphs of products with compressed operands, of random numbers."""

from __future__ import annotations

import torch

from effc.ir import Graph, Input, Op, Tensor, Weight
from effc.ir.formats import GroupQuant, GroupSparse, quantize
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, f16, f32, i8

EIGHT = GroupQuant(None, f32)  # of activations: a scale a row


def encoded(name: str, numbers: torch.Tensor, t: Tensor) -> Op:
    """The nearest value of a type, as an `encoded` constant."""
    value = quantize(numbers, t)
    types = t.format.parts(t)
    parts = [Weight.holding(f"{name}:{n}", p, types[n]) for n, p in zip(types, value.parts)]
    return op.encoded(tuple(parts), of=t)


def matrix(name: str, codes: str, shape, group: int | None, zero: bool, scale=f16) -> Op:
    dtype = DTYPES[codes]
    t = Tensor(shape, dtype, format=GroupQuant(group, scale, dtype if zero else None))
    return encoded(name, torch.randn(shape) / shape[1] ** 0.5, t)


def sparse(name: str, codes: str, shape, group: int, share: float, index="bitmap", zero=True) -> Op:
    """Row 1 keeps nothing, row 2 everything, the others about a share of their groups."""
    mask = torch.rand(shape[0], shape[1] // group) < share
    mask[1], mask[2] = False, True
    kept = int(mask.sum())
    inner = matrix(f"{name}:values", codes, (kept, group), group, zero)
    form = GroupSparse(group, kept, index, inner.tensor.format)
    t = Tensor(shape, DTYPES[codes], format=form)
    types = list(form.parts(t).values())
    places = [
        Weight.holding(f"{name}:{i}", part, of)
        for i, (part, of) in enumerate(zip(form.encode_index(mask), types))
    ]
    return op.encoded((*places, inner), of=t)


def product(
    rows, w: Op, dtype: str = "f32", codes: str = "", form: GroupQuant = EIGHT, bias: bool = False
) -> Graph:
    """linear(x, decode(w)), of decode(quantize(x)) where codes are named."""
    of, size = DTYPES[dtype], w.shape[1]
    x = Input("x", Tensor((rows, size), of))
    b = Input("b", Tensor((w.shape[0],), of))
    left: Op = x
    if codes:
        left = op.decode(op.quantize(x, i8 if codes == "int8" else DTYPES[codes], form), of)
    y = op.linear(left, op.decode(w, of), b) if bias else op.linear(left, op.decode(w, of))
    return Graph.of((x, b) if bias else (x,), (y,))
