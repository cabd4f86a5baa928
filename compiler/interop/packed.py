"""Matrices that GPTQ, AWQ and compressed-tensors pack into words of 32 bits, as our types.

All of them hold scale * (code - zero). Where every zero is the middle of the codes' range, the
value has signed codes and no zero; what it decodes to is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.ir import InputError
from effc.ir import Tensor as TensorType
from effc.ir.codes import unpack
from effc.ir.formats import Encoded, GroupQuant
from effc.ir.types import DTYPES, DType

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, lowest first


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group: int | None, v2: bool
) -> Encoded:
    """qweight: i32[K * bits / 32, N], qzeros: i32[K / group, N * bits / 32]; both are streams of
    codes from the lowest bit on, down a column and along a row. scales: [K / group, N]. v2: zeros
    are as they are; version 1 stores them less 1. (AutoGPTQ, qlinear_cuda_old.py; GPTQModel)
    """
    rows, columns = scales.shape[1], qweight.shape[0] * WORD // bits
    codes = spread(qweight.T, bits, (rows, columns))
    zeros = spread(qzeros, bits, tuple(scales.shape)).T.to(torch.int16) + (0 if v2 else 1)
    return _value(codes, scales.T, zeros, bits, group)


def columns_in_order(g_idx: Tensor, group: int | None) -> bool:
    """Whether column k belongs to group k // group, as in our types."""
    size = len(g_idx) if group is None else group
    return torch.equal(g_idx.long(), torch.arange(len(g_idx)) // size)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int | None) -> Encoded:
    """qweight: i32[K, N / 8], qzeros: i32[K / group, N / 8], eight columns of 4 bits in a word, in
    AWQ_ORDER. scales: [K / group, N]. (AutoAWQ, version "gemm")"""
    places = torch.tensor(AWQ_ORDER).argsort()

    def nibbles(words: Tensor) -> Tensor:
        shape = (words.shape[0], words.shape[1], len(places))
        return spread(words, 4, shape)[..., places].flatten(1).T

    return _value(nibbles(qweight), scales.T, nibbles(qzeros).to(torch.int16), 4, group)


def from_compressed(
    packed: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int], bits: int,
    group: int | None,
) -> Encoded:  # fmt: skip
    """packed: i32[N, words of a row], signed codes + 2^(bits - 1), or i8[N, K], as they are.
    scale: [N, groups] or one number. zero: like scale in i8, or packed along N into i32.
    (compressed-tensors, "pack-quantized" and "int-quantized")
    """
    rows, columns = shape
    codes = packed
    if packed.dtype == torch.int32:
        codes = _words(packed, bits)[:, :columns] - (1 << bits - 1)
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    scale = scale.expand(rows, -1).contiguous()
    if zero is not None and zero.dtype == torch.int32:
        zero = _words(zero.T, bits)[:, :rows].T - (1 << bits - 1)
    if zero is not None:
        zero = zero.reshape(-1, 1) if zero.dim() < 2 else zero
        zero = zero.to(torch.int16).expand(rows, -1)
        return _value(codes.to(torch.int16), scale, zero, bits, group, signed=True)
    return _held(codes, scale, None, signed_type(bits), group)


def spread(words: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Words of 32 bits as the stream of codes that they are, u8[shape]."""
    stream = words.contiguous().view(torch.uint8).reshape(-1)
    return stream.reshape(shape) if bits == 8 else unpack(stream, DTYPES[f"uint{bits}"], shape)


def _words(words: Tensor, bits: int) -> Tensor:
    """Rows of whole words as rows of codes."""
    return spread(words, bits, (words.shape[0], words.shape[1] * WORD // bits)).to(torch.int16)


def signed_type(bits: int) -> DType:
    return DTYPES["i8" if bits == 8 else f"int{bits}"]


def _value(
    codes: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int | None, signed: bool = False
) -> Encoded:
    """signed: codes and zeros lie around 0, not from 0 on."""
    middle = 0 if signed else 1 << bits - 1
    if bool((zeros == middle).all()):
        return _held(codes.to(torch.int16) - middle, scale, None, signed_type(bits), group)
    if signed:
        return _held(codes, scale, zeros, signed_type(bits), group)
    of = DTYPES["u8" if bits == 8 else f"uint{bits}"]
    return _held(codes, scale, zeros, of, group)


def _held(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, of: DType, group: int | None
) -> Encoded:
    zero = None
    if zeros is not None:  # version 1 of GPTQ may hold a zero one above the largest code
        fits = of.range is None or int(zeros.max()) <= of.range[1]
        zero = of if fits else DTYPES["u8"]
    if group is not None and group >= codes.shape[1]:
        group = None
    t = TensorType(tuple(codes.shape), of, format=GroupQuant(group, DType.of(scale.dtype), zero))
    wanted = t.format.parts(t)["scale"].shape
    if tuple(scale.shape) != wanted or (zeros is not None and tuple(zeros.shape) != wanted):
        raise InputError(f"scales are {list(scale.shape)}, of groups of {group} {list(wanted)}")
    parts = [codes.to(of.torch).contiguous(), scale.contiguous()]
    if zeros is not None and zero is not None:
        parts.append(zeros.to(zero.torch).contiguous())
    return Encoded(t, tuple(parts))
