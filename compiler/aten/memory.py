"""Copies, casts, and writes into a part of a tensor."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import Op, no, row_major
from effc.ir.ops.shape import Copy, Expand, Reshape, ToLayout
from effc.ir.ops.shape import Slice as SliceOp
from effc.ir.rewrite import op


@converts("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default")
def _alias(call: Call, x: Op) -> Any:
    return Reshape(x, x.shape)


@converts("aten.clone.default")
def _clone(call: Call, x: Op, memory_format: Any) -> Any:
    return Copy(x)


@converts("aten.lift_fresh_copy.default")
def _lift(call: Call, x: Op) -> Any:
    return Copy(x)


@converts("aten.contiguous.default")
def _contiguous(call: Call, x: Op, memory_format: Any) -> Any:
    return Reshape(x, x.shape) if call.is_alias else ToLayout(x, row_major)


@converts("aten.dropout.default")
def _dropout(call: Call, x: Op, p: float, train: bool) -> Any:
    return no("dropout in training draws random numbers") if train and p else Reshape(x, x.shape)


@converts("aten._to_copy.default")
def _to_copy(call: Call, x: Op, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if call.val.device.type != "cpu":
        return no("a copy to device {}", call.val.device)
    return Copy(x) if call.dtype == x.dtype else op.cast(x, call.dtype)


@converts(
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other",
    "aten.type_as.default", "aten.float.default", "aten.double.default", "aten.half.default",
    "aten.bfloat16.default",
)  # fmt: skip
def _to(call: Call, x: Op, copy: bool = False, **_: Any) -> Any:
    if call.val.device.type != "cpu":
        return no("a copy to device {}", call.val.device)
    if call.dtype != x.dtype:
        return op.cast(x, call.dtype)
    return Copy(x) if copy else Reshape(x, x.shape)


@converts("aten.copy.default")
def _copy(call: Call, x: Op, src: Op, **_: Any) -> Any:
    src = src if src.dtype == x.dtype else op.cast(src, x.dtype)
    return Copy(src if src.shape == x.shape else Expand(src, x.shape))


@converts("aten.fill.Scalar", "aten.fill.Tensor")
def _fill(call: Call, x: Op, value: Any) -> Any:
    if isinstance(value, Op):
        return _copy(call, x, value)
    return op.full(x.shape, value, x.dtype)


@converts("aten.slice_scatter.default")
def _slice_scatter(call: Call, x: Op, src: Op, dim: int, start: Any, end: Any, step: int) -> Any:
    axis = dim % x.tensor.rank
    n, size, start = x.shape[axis], src.shape[axis], start or 0
    if not all(isinstance(v, int) for v in (n, size, start)):
        return no("a write to a slice of unknown size")
    start = max(start + n, 0) if start < 0 else min(start, n)
    if step == 1 or size <= 1:
        return _between(x, src, axis, start, size)
    if n != size * step or start >= step:
        return no("a write to every {}th of {} elements", step, n)
    shape = (*x.shape[:axis], size, 1, *x.shape[axis + 1 :])
    columns = _columns(x, axis, step, shape)
    columns[start] = Reshape(src, shape)
    return Reshape(op.cat(tuple(columns), axis + 1), x.shape)


@converts("aten.select_scatter.default")
def _select_scatter(call: Call, x: Op, src: Op, dim: int, index: Any) -> Any:
    axis = dim % x.tensor.rank
    if not (isinstance(index, int) and isinstance(x.shape[axis], int)):
        return no("a write to an unknown place")
    one = Reshape(src, (*x.shape[:axis], 1, *x.shape[axis + 1 :]))
    return _between(x, one, axis, index % x.shape[axis], 1)


def _between(x: Op, src: Op, axis: int, start: int, size: int) -> Any:
    """x with `size` elements along the axis replaced."""
    end = start + size
    parts = (
        *([SliceOp(x, dim=axis, start=0, size=start)] if start else []),
        *([src] if size else []),
        *(
            [SliceOp(x, dim=axis, start=end, size=x.shape[axis] - end)]
            if end < x.shape[axis]
            else []
        ),
    )
    return op.cat(parts, axis)


def _columns(x: Op, axis: int, step: int, shape: tuple[Any, ...]) -> list[Op]:
    """Elements i, i + step, ... for each i; what an earlier write put there is taken directly."""
    split = x.x if isinstance(x, Reshape) else None
    if split is not None and split.name == "cat" and all(c.shape == shape for c in split.xs):
        if split.dim == axis + 1 and len(split.xs) == step:
            return list(split.xs)
    pairs = Reshape(x, (*shape[: axis + 1], step, *shape[axis + 2 :]))
    return [SliceOp(pairs, dim=axis + 1, start=i, size=1) for i in range(step)]


@converts("aten.flip.default")
def _flip(call: Call, x: Op, dims: tuple[int, ...]) -> Any:
    return op.flip(x, tuple(sorted(d % max(x.tensor.rank, 1) for d in dims)))


@converts("aten.pixel_shuffle.default")
def _pixel_shuffle(call: Call, x: Op, upscale_factor: int) -> Any:
    return op.pixel_shuffle(x, upscale_factor)


@converts("aten.pixel_unshuffle.default")
def _pixel_unshuffle(call: Call, x: Op, downscale_factor: int) -> Any:
    return op.pixel_unshuffle(x, downscale_factor)
