"""Operators that move elements."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import Op, no
from effc.ir.ops.shape import Copy, Expand, Permute, Reshape
from effc.ir.ops.shape import Slice as SliceOp
from effc.ir.rewrite import op
from effc.ir.symbols import dim, product, symbolic


@converts(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.unsqueeze.default",
    "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.view_as.default",
    "aten.reshape_as.default",
)  # fmt: skip
def _reshape(call: Call, x: Op, **_: Any) -> Any:
    return Reshape(x, call.shape)


@converts("aten.permute.default")
def _permute(call: Call, x: Op, dims: tuple[int, ...]) -> Any:
    return Permute(x, tuple(d % len(dims) for d in dims))


@converts("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def _transpose(call: Call, x: Op, **dims: int) -> Any:
    order = list(range(x.tensor.rank))
    if order:
        a, b = (d % len(order) for d in dims.values())
        order[a], order[b] = order[b], order[a]
    return Permute(x, tuple(order))


@converts("aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def _t(call: Call, x: Op) -> Any:
    order = list(range(x.tensor.rank))
    swap = order[-2:] if ".mT." in call.target else order
    return Permute(x, (*order[: len(order) - len(swap)], *reversed(swap)))


@converts("aten.movedim.int")
def _movedim(call: Call, x: Op, source: int, destination: int) -> Any:
    rank = x.tensor.rank
    order = [d for d in range(rank) if d != source % rank]
    order.insert(destination % rank, source % rank)
    return Permute(x, tuple(order))


@converts("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def _expand(call: Call, x: Op, **_: Any) -> Any:
    return Expand(x, call.shape)


@converts("aten.repeat.default")
def _repeat(call: Call, x: Op, repeats: tuple[Any, ...]) -> Any:
    shape = (1,) * (len(repeats) - x.tensor.rank) + x.shape
    split = Reshape(x, tuple(s for size in shape for s in (1, size)))
    spread = Expand(split, tuple(s for r, size in zip(repeats, shape) for s in (r, size)))
    return Copy(Reshape(spread, call.shape))


@converts("aten.repeat_interleave.self_int")
def _repeat_interleave(call: Call, x: Op, repeats: Any, dim: int | None, **_: Any) -> Any:
    if dim is None:
        x, dim = Reshape(x, (product(x.shape),)), 0
    axis = dim % max(x.tensor.rank, 1)
    split = Reshape(x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
    return Copy(Reshape(spread(split, axis + 1, repeats), call.shape))


@converts("aten.meshgrid.default", "aten.meshgrid.indexing")
def _meshgrid(call: Call, tensors: tuple[Op, ...], indexing: str = "ij") -> Any:
    grids = []
    for i, (t, val) in enumerate(zip(tensors, call.val, strict=True)):
        axis = 1 - i if indexing == "xy" and i < 2 and len(tensors) > 1 else i
        shape = Call("", val).shape
        line = tuple(size if d == axis else 1 for d, size in enumerate(shape))
        grids.append(Expand(Reshape(t, line), shape))
    return tuple(grids)


@converts("aten.slice.Tensor")
def _slice(call: Call, x: Op, dim: int, start: Any, end: Any, step: int) -> Any:
    axis = dim % x.tensor.rank
    return _narrow(x, axis, start or 0, call.shape[axis], step)


def _narrow(x: Op, axis: int, start: Any, size: Any, step: int = 1) -> Any:
    have = x.shape[axis]
    if isinstance(start, int) and isinstance(have, int):
        start = min(start + have if start < 0 else start, have)
    elif isinstance(start, int):
        start = dim(start + have) if start < 0 else start
    elif not (symbolic(start) and start.is_nonnegative):
        return no("a slice from {}, whose sign is not known", start)
    if size == 0:
        start = 0
    if start == 0 and size == have and step == 1:
        return Reshape(x, x.shape)
    return SliceOp(x, dim=axis, start=start, size=size, step=step)


@converts("aten.narrow.default")
def _narrow_op(call: Call, x: Op, dim: int, start: Any, length: Any) -> Any:
    return _narrow(x, dim % x.tensor.rank, start, length)


@converts("aten.select.int")
def _select(call: Call, x: Op, dim: int, index: Any) -> Any:
    taken = _narrow(x, dim % x.tensor.rank, index, 1)
    return Reshape(taken, call.shape) if isinstance(taken, Op) else taken


@converts(
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.split.sizes",
    "aten.tensor_split.sections", "aten.tensor_split.indices",
)  # fmt: skip
def _split(call: Call, x: Op, dim: int, **_: Any) -> Any:
    axis = dim % x.tensor.rank
    start: Any = 0
    parts = []
    for val in call.val:
        size = Call("", val).shape[axis]
        parts.append(_narrow(x, axis, start, size))
        start = start + size
    return tuple(parts)


@converts("aten.unbind.int")
def _unbind(call: Call, x: Op, dim: int) -> Any:
    axis = dim % x.tensor.rank
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return tuple(Reshape(_narrow(x, axis, i, 1), shape) for i in range(len(call.val)))


@converts("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def _cat(call: Call, tensors: tuple[Op, ...], dim: int) -> Any:
    rank = len(call.shape)
    kept = [t for t in tensors if t.tensor.rank == rank or t.shape != (0,)]  # torch's legacy rule
    return op.cat(tuple(kept), dim % rank) if kept else no("only empty operands")


@converts("aten.stack.default")
def _stack(call: Call, tensors: tuple[Op, ...], dim: int) -> Any:
    axis = dim % len(call.shape)
    shape = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    return op.cat(tuple(Reshape(t, shape) for t in tensors), axis)


@converts("aten.diff.default")
def _diff(call: Call, x: Op, n: int, dim: int, prepend: Op | None, append: Op | None) -> Any:
    if n != 1 or x.dtype.kind == "bool":
        return no("a difference of order {} of {}", n, x.dtype)
    axis = dim % x.tensor.rank
    parts = tuple(p for p in (prepend, x, append) if p is not None)
    whole = op.cat(parts, axis) if len(parts) > 1 else x
    size = call.shape[axis]
    return op.sub(_narrow(whole, axis, 1, size), _narrow(whole, axis, 0, size))


@converts("aten.constant_pad_nd.default")
def _constant_pad(call: Call, x: Op, pad: tuple[Any, ...], value: Any) -> Any:
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (x.tensor.rank - len(pairs)) + pairs
    return op.pad(x, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), value)


@converts("aten.pad.default")
def _pad(call: Call, x: Op, pad: tuple[Any, ...], mode: str, value: Any) -> Any:
    if mode == "constant":
        return _constant_pad(call, x, pad, 0 if value is None else value)
    return _pad_from(x, pad, mode)


@converts(*(f"aten.reflection_pad{n}d.default" for n in (1, 2, 3)))
def _reflection_pad(call: Call, x: Op, padding: tuple[Any, ...]) -> Any:
    return _pad_from(x, padding, "reflect")


@converts(*(f"aten.replication_pad{n}d.default" for n in (1, 2, 3)))
def _replication_pad(call: Call, x: Op, padding: tuple[Any, ...]) -> Any:
    return _pad_from(x, padding, "replicate")


def _pad_from(x: Op, pad: tuple[Any, ...], mode: str) -> Any:
    """Padding with the tensor's own elements, one dimension after another."""
    if any(not isinstance(p, int) or p < 0 for p in pad):
        return no("padding mode {} by {}", mode, pad)
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.tensor.rank - 1 - i
        n = x.shape[axis]

        def part(start: Any, size: int, x: Op = x, axis: int = axis) -> Op:
            return SliceOp(x, dim=axis, start=dim(start), size=size)

        if mode == "reflect":
            ends = op.flip(part(1, before), (axis,)), op.flip(part(n - 1 - after, after), (axis,))
        elif mode == "circular":
            ends = part(n - before, before), part(0, after)
        else:
            ends = spread(part(0, 1), axis, before), spread(part(n - 1, 1), axis, after)
        if before or after:
            x = op.cat((*ends[:1] * bool(before), x, *ends[1:] * bool(after)), axis)
    return x


def spread(x: Op, axis: int, size: Any) -> Op:
    return Expand(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
