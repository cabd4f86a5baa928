"""What several families need: element type promotion, broadcasting, layout propagation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..errors import OpError
from ..op import Op
from ..symbols import Dim, symbolic
from ..types import DType, Layout, Tensor, row_major

_NUMBERS = {bool: torch.bool, int: torch.int64, complex: torch.complex64}


@cache
def _promote(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    try:
        return torch.promote_types(a, b)
    except RuntimeError as e:  # sub-byte, 8-bit float and wide unsigned types
        raise OpError(f"torch has no common type for {a} and {b}") from e


def promote(*operands: Any) -> DType:
    """torch.result_type: tensors beat 0-d tensors beat numbers, within a kind of number."""
    levels: list[torch.dtype | None] = [None, None, None]
    for operand in operands:
        level, dtype = _level(operand)
        seen = levels[level]
        levels[level] = dtype if seen is None else _promote(seen, dtype)
    result: torch.dtype | None = None
    for dtype in levels:
        result = _combine(result, dtype)
    assert result is not None
    return DType.of(result)


def _level(operand: Any) -> tuple[int, torch.dtype]:
    if isinstance(operand, Op):
        t = operand.tensor
        if t.dtype.torch is None or t.dtype.is_code:
            raise OpError(f"torch has no arithmetic for {t.dtype}", where=operand.where)
        return (0 if t.shape else 1), t.dtype.torch
    if symbolic(operand):
        return 2, torch.int64 if operand.is_integer else torch.get_default_dtype()
    return 2, _NUMBERS.get(type(operand), torch.get_default_dtype())


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return higher or lower
    if higher.is_complex:
        return higher
    if higher.is_floating_point:
        return _complex(higher) if lower.is_complex else higher
    if higher is torch.bool or lower.is_floating_point or lower.is_complex:
        return _promote(higher, lower)
    return higher


def _complex(dtype: torch.dtype) -> torch.dtype:
    return _promote(dtype, torch.complex32)


def as_float(dtype: DType) -> DType:
    """What exp, sqrt, true division ... give: integers become the default float type."""
    return dtype if dtype.kind in ("float", "complex") else DType.of(torch.get_default_dtype())


def tensors(*operands: Any) -> list[Tensor]:
    return [o.tensor for o in operands if isinstance(o, Op)]


def broadcast(node: Op, *shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """numpy broadcasting. Two sizes that are not known to differ are taken to be equal."""
    rank = max(map(len, shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        sizes = [s[axis] for s in shapes if len(s) >= -axis]
        wide = [s for s in sizes if s != 1]
        known = [s for s in wide if isinstance(s, int)]
        if any(k != known[0] for k in known):
            listed = " and ".join(str(list(s)) for s in shapes)
            raise node.fail(f"shapes {listed} do not broadcast in dimension {axis}")
        result.append(known[0] if known else wide[0] if wide else 1)
    return tuple(result)


def may_equal(a: Dim, b: Dim) -> bool:
    """Not known to differ."""
    return not (isinstance(a, int) and isinstance(b, int)) or a == b


def check_shape(node: Op, name: str, *shape: Dim) -> None:
    """An operand, where it is given, must have the shape, as far as sizes are known."""
    operand = getattr(node, name)
    if operand is None:
        return
    have = operand.shape
    if len(have) != len(shape) or not all(map(may_equal, have, shape)):
        raise node.fail(f"{name} has shape {list(have)}, not {list(shape)}")


def check_sizes(node: Op, sizes: tuple[Dim, ...]) -> None:
    """Sizes given as attributes must not be negative, as far as they are known."""
    if any(isinstance(s, int) and s < 0 for s in sizes):
        raise node.fail(f"negative size in {list(sizes)}")


def check_position(node: Op, name: str, value: Op) -> None:
    """An operand that says where to start: one i64 number."""
    if value.shape or value.dtype.name != "i64":
        raise node.fail(f"{name} is {value.type}, not i64[()]")


def check_fits(node: Op, new: Dim, have: Dim) -> None:
    """New positions must not be more than there are, as far as they are known."""
    if isinstance(new, int) and isinstance(have, int) and new > have:
        raise node.fail(f"{new} new positions of {have}")


def common_layout(shape: tuple[Dim, ...], *types: Tensor) -> Layout:
    """The layout of the operands that have the full shape, where they agree; else row-major."""
    layouts = {t.layout.name: t.layout for t in types if t.rank == len(shape) and t.shape == shape}
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    return row_major


def axis_of(node: Op, axis: int, rank: int) -> int:
    """Non-negative axis; 0-d tensors accept 0 and -1 as torch does."""
    wrapped = axis + max(rank, 1) if axis < 0 else axis
    if not 0 <= wrapped < max(rank, 1):
        raise node.fail(f"dimension {axis} of a tensor with {rank} dimensions")
    return wrapped
