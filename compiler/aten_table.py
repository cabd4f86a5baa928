"""Which ATen operator becomes which op of the IR. One entry an operator; arguments by schema name.

A converter may say `no(reason)`: then the operator stays whole as a generic `aten` node, runs
through ATen, and the reason is in the report.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from effc.importer import CONVERTERS, Call, converts
from effc.ir import DType, Op, no, row_major
from effc.ir.ops.index import Arange
from effc.ir.ops.shape import Copy, Expand, Permute, Reshape, ToLayout
from effc.ir.ops.shape import Slice as SliceOp
from effc.ir.rewrite import op
from effc.ir.symbols import dim, floordiv, product
from effc.ir.types import f32, i64

# ------------------------------------------------------------------ pointwise


def _plain(made: Any, *targets: str) -> None:
    """Operators whose arguments are the op's operands."""

    @converts(*targets)
    def convert(call: Call, **operands: Any) -> Any:
        return made(*operands.values())


for _name in (
    "neg", "abs", "sign", "floor", "ceil", "trunc", "relu", "bitwise_not", "square", "exp", "exp2",
    "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc",
    "sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "log_sigmoid", "isnan", "isinf",
    "logical_not", "round",
):  # fmt: skip
    _plain(getattr(op, _name), f"aten.{_name}.default")

_BINARY = {
    "mul": "mul", "remainder": "remainder", "fmod": "fmod", "pow": "pow", "atan2": "atan2",
    "maximum": "maximum", "minimum": "minimum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "logical_and": "logical_and", "logical_or": "logical_or",
    "logical_xor": "logical_xor", "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "__and__": "bitwise_and", "__or__": "bitwise_or",
    "__xor__": "bitwise_xor", "floor_divide": "div_floor", "true_divide": "div",
}  # fmt: skip
_OVERLOADS = ("default", "Tensor", "Scalar", "Scalar_Tensor", "Tensor_Tensor", "Tensor_Scalar")
for _name, _to in _BINARY.items():
    _plain(getattr(op, _to), *(f"aten.{_name}.{o}" for o in _OVERLOADS))


@converts("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
def _add(call: Call, x: Any, other: Any, alpha: Any = 1) -> Any:
    made = op.add if ".add." in call.target else op.sub
    return made(x, _scaled(other, alpha))


@converts("aten.rsub.Tensor", "aten.rsub.Scalar")
def _rsub(call: Call, x: Any, other: Any, alpha: Any = 1) -> Any:
    return op.sub(other, _scaled(x, alpha))


def _scaled(value: Any, factor: Any) -> Any:
    if factor == 1:
        return value
    return op.mul(value, factor) if isinstance(value, Op) else value * factor


@converts("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode")
def _div(call: Call, x: Any, other: Any, rounding_mode: str | None = None) -> Any:
    made = {None: op.div, "floor": op.div_floor, "trunc": op.div_trunc}[rounding_mode]
    return made(x, other)


@converts("aten.round.decimals")
def _round_decimals(call: Call, x: Op, decimals: int) -> Any:
    return op.round(x) if decimals == 0 else no("round to {} decimals", decimals)


@converts("aten.special_expit.default")
def _expit(call: Call, x: Op) -> Any:
    return op.sigmoid(x)


@converts("aten.gelu.default")
def _gelu(call: Call, x: Op, approximate: str) -> Any:
    return op.gelu(x, approximate=approximate)


@converts("aten.leaky_relu.default")
def _leaky_relu(call: Call, x: Op, negative_slope: float) -> Any:
    return op.leaky_relu(x, float(negative_slope))


@converts("aten.elu.default")
def _elu(call: Call, x: Op, alpha: float, scale: float, input_scale: float) -> Any:
    return op.elu(x, float(alpha), float(scale), float(input_scale))


@converts("aten.celu.default")
def _celu(call: Call, x: Op, alpha: float) -> Any:
    return op.elu(x, float(alpha), 1.0, 1.0 / float(alpha))


@converts("aten.softplus.default")
def _softplus(call: Call, x: Op, beta: float, threshold: float) -> Any:
    return op.softplus(x, float(beta), float(threshold))


@converts("aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.clip.Tensor")
def _clamp(call: Call, x: Op, min: Any, max: Any) -> Any:
    return op.clamp(x, min, max)


@converts("aten.clamp_min.default", "aten.clamp_min.Tensor")
def _clamp_min(call: Call, x: Op, min: Any) -> Any:
    return op.clamp(x, min, None)


@converts("aten.clamp_max.default", "aten.clamp_max.Tensor")
def _clamp_max(call: Call, x: Op, max: Any) -> Any:
    return op.clamp(x, None, max)


@converts("aten.hardtanh.default")
def _hardtanh(call: Call, x: Op, min_val: Any, max_val: Any) -> Any:
    return op.clamp(x, min_val, max_val)


@converts("aten.relu6.default")
def _relu6(call: Call, x: Op) -> Any:
    return op.clamp(x, 0, 6)


@converts("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(call: Call, condition: Op, x: Any, other: Any) -> Any:
    return op.where(condition, x, other)


@converts("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(call: Call, x: Op, mask: Op, value: Any) -> Any:
    if isinstance(value, Op) and value.dtype != x.dtype:
        value = op.cast(value, x.dtype)
    elif not isinstance(value, Op) and x.dtype.kind == "int":
        value = int(value)
    return op.where(mask, value, x)


@converts("aten.lerp.Scalar", "aten.lerp.Tensor")
def _lerp(call: Call, x: Op, end: Op, weight: Any) -> Any:
    return op.lerp(x, end, weight)


@converts("aten.addcmul.default")
def _addcmul(call: Call, x: Op, tensor1: Op, tensor2: Op, value: Any) -> Any:
    return op.add(x, op.mul(_scaled(tensor1, value), tensor2))


@converts("aten.addcdiv.default")
def _addcdiv(call: Call, x: Op, tensor1: Op, tensor2: Op, value: Any) -> Any:
    return op.add(x, op.div(_scaled(tensor1, value), tensor2))


# ------------------------------------------------------------------ copies and casts


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


# ------------------------------------------------------------------ shapes


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
    return Copy(Reshape(_spread(split, axis + 1, repeats), call.shape))


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
    elif not (isinstance(start, sympy.Basic) and start.is_nonnegative):
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
            ends = _spread(part(0, 1), axis, before), _spread(part(n - 1, 1), axis, after)
        if before or after:
            x = op.cat((*ends[:1] * bool(before), x, *ends[1:] * bool(after)), axis)
    return x


def _spread(x: Op, axis: int, size: Any) -> Op:
    return Expand(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))


# ------------------------------------------------------------------ what writes into a part become


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


# ------------------------------------------------------------------ products


@converts("aten.linear.default")
def _linear(call: Call, x: Op, weight: Op, bias: Op | None) -> Any:
    if weight.tensor.rank != 2:
        return no("a weight with {} dimensions", weight.tensor.rank)
    return op.linear(x, weight, bias)


@converts(
    "aten.mm.default",
    "aten.bmm.default",
    "aten.matmul.default",
    "aten.mv.default",
    "aten.dot.default",
)
def _matmul(call: Call, **operands: Op) -> Any:
    return op.matmul(*operands.values())


@converts("aten.addmm.default")
def _addmm(call: Call, x: Op, mat1: Op, mat2: Op, beta: Any, alpha: Any) -> Any:
    if (beta, alpha) == (1, 1) and x.tensor.rank == 1 and x.shape[0] == mat2.shape[1]:
        return op.linear(mat1, Permute(mat2, (1, 0)), x)
    return _sum_product(x, mat1, mat2, beta, alpha)


@converts("aten.baddbmm.default")
def _baddbmm(call: Call, x: Op, batch1: Op, batch2: Op, beta: Any, alpha: Any) -> Any:
    return _sum_product(x, batch1, batch2, beta, alpha)


def _sum_product(x: Op, a: Op, b: Op, beta: Any, alpha: Any) -> Any:
    product = _scaled(op.matmul(a, b), alpha)
    return product if beta == 0 else op.add(_scaled(x, beta), product)


@converts("aten.outer.default", "aten.ger.default")
def _outer(call: Call, x: Op, vec2: Op) -> Any:
    n, m = call.shape
    return op.mul(Reshape(x, (n, 1)), Reshape(vec2, (1, m)))


@converts("aten.einsum.default")
def _einsum(call: Call, equation: str, tensors: tuple[Op, ...], path: Any = None) -> Any:
    """One or two operands, no letter twice in one: a permutation, or a matrix product."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    distinct = all(len(set(t)) == len(t) and t.isalpha() for t in terms)
    if not arrow or len(terms) > 2 or not distinct:
        return no("einsum {}", equation)
    sizes = {
        c: s for t, x in zip(terms, tensors, strict=True) for c, s in zip(t, x.shape) if s != 1
    }
    if any(x.shape[i] != sizes.get(c, 1) for t, x in zip(terms, tensors) for i, c in enumerate(t)):
        return no("einsum {} with broadcast sizes", equation)
    both = set(terms[0]) & set(terms[-1])
    summed: list[Op] = []
    for term, x in zip(terms, tensors):
        alone = tuple(
            i for i, c in enumerate(term) if c not in out and (len(terms) == 1 or c not in both)
        )
        summed.append(op.sum(x, alone) if alone else x)
    letters = ["".join(c for c in t if c in out or (len(terms) == 2 and c in both)) for t in terms]
    if len(terms) == 1:
        return Permute(summed[0], tuple(letters[0].index(c) for c in out))

    def grouped(x: Op, term: str, *groups: str) -> Op:
        x = Permute(x, tuple(term.index(c) for g in groups for c in g))
        each = [sizes.get(c, 1) for c in groups[0]]
        return Reshape(
            x, (*each, *(product(tuple(sizes.get(c, 1) for c in g)) for g in groups[1:]))
        )

    batch = "".join(c for c in out if c in both)
    inner = "".join(c for c in letters[0] if c in both and c not in out)
    rows = "".join(c for c in letters[0] if c not in both)
    columns = "".join(c for c in letters[1] if c not in both)
    y = op.matmul(
        grouped(summed[0], letters[0], batch, rows, inner),
        grouped(summed[1], letters[1], batch, inner, columns),
    )
    made = batch + rows + columns
    y = Reshape(y, tuple(sizes.get(c, 1) for c in made))
    return Permute(y, tuple(made.index(c) for c in out))


@converts("aten.conv_transpose2d.input")
def _conv_transpose(
    call: Call, x: Op, weight: Op, bias: Op | None, stride: Any, padding: Any, output_padding: Any,
    groups: int, dilation: Any,
) -> Any:  # fmt: skip
    """Windows side by side, as where a size doubles: a 1x1 convolution, then a pixel shuffle."""
    into, out, *kernel = weight.shape
    moved = (*_tuple(padding, 2), *_tuple(output_padding, 2), groups - 1)
    apart = tuple(kernel) == _tuple(stride, 2) and kernel[0] == kernel[1]
    if not apart or any(moved) or _tuple(dilation, 2) != (1, 1) or x.tensor.rank != 4:
        return no("transposed convolution with a {} kernel and stride {}", tuple(kernel), stride)
    taps = kernel[0] * kernel[1]
    w = Reshape(Permute(weight, (1, 2, 3, 0)), (out * taps, into, 1, 1))
    if bias is not None:
        bias = Reshape(_spread(Reshape(bias, (out, 1)), 1, taps), (out * taps,))
    return op.pixel_shuffle(op.conv2d(x, w, bias), kernel[0])


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def _conv(
    call: Call,
    x: Op,
    weight: Op,
    bias: Op | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    spatial = weight.tensor.rank - 2
    made = {1: op.conv1d, 2: op.conv2d, 3: op.conv3d}[spatial]
    batched = x.tensor.rank == spatial + 2
    x = x if batched else Reshape(x, (1, *x.shape))
    sizes = (_tuple(v, spatial) for v in (stride, padding, dilation))
    y = made(x, weight, bias, *sizes, groups)
    return y if batched else Reshape(y, y.shape[1:])


@converts("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def _conv_padding(
    call: Call,
    x: Op,
    weight: Op,
    bias: Op | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Any:
    spatial = weight.tensor.rank - 2
    if padding == "valid":
        return _conv(call, x, weight, bias, stride, (0,), dilation, groups)
    total = [d * (k - 1) for d, k in zip(_tuple(dilation, spatial), weight.shape[2:])]
    if any(t % 2 for t in total):
        return no('padding "same" of an even kernel is not symmetric')
    return _conv(call, x, weight, bias, stride, tuple(t // 2 for t in total), dilation, groups)


def _tuple(value: Any, n: int) -> tuple[Any, ...]:
    value = (
        value
        if isinstance(value, tuple)
        else (tuple(value) if isinstance(value, list) else (value,))
    )
    return value * n if len(value) == 1 else value


@converts("aten.scaled_dot_product_attention.default")
def _attention(
    call: Call, query: Op, key: Op, value: Op, attn_mask: Op | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Any:  # fmt: skip
    if dropout_p:
        return no("dropout {} inside attention", dropout_p)
    scale = None if scale is None else float(scale)
    return op.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)


@converts("aten._transformer_encoder_layer_fwd.default")
def _encoder_layer(
    call: Call, src: Op, embed_dim: int, num_heads: int, qkv_weight: Op, qkv_bias: Op,
    proj_weight: Op, proj_bias: Op, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Op, norm_bias_1: Op, norm_weight_2: Op, norm_bias_2: Op, ffn_weight_1: Op,
    ffn_bias_1: Op, ffn_weight_2: Op, ffn_bias_2: Op, mask: Op | None, mask_type: int | None,
) -> Any:  # fmt: skip
    """The one call that torch.nn.TransformerEncoderLayer makes in inference."""
    if mask is not None or src.tensor.rank != 3:
        return no("an encoder layer with {}", "a mask" if mask is not None else "packed sequences")
    batch, length, width = src.shape

    def attended(x: Op) -> Op:
        qkv = op.linear(x, qkv_weight, qkv_bias)
        parts = Reshape(qkv, (batch, length, 3, num_heads, floordiv(width, num_heads)))
        parts = Permute(parts, (2, 0, 3, 1, 4))
        q, k, v = (
            Reshape(SliceOp(parts, dim=0, start=i, size=1), parts.shape[1:]) for i in range(3)
        )
        y = Permute(op.attention(q, k, v), (0, 2, 1, 3))
        return op.linear(Reshape(y, src.shape), proj_weight, proj_bias)

    def fed(x: Op) -> Op:
        h = op.linear(x, ffn_weight_1, ffn_bias_1)
        return op.linear(op.gelu(h) if use_gelu else op.relu(h), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Op) -> Op:
        return op.layer_norm(x, norm_weight_1, norm_bias_1, 1, float(eps))

    def norm_2(x: Op) -> Op:
        return op.layer_norm(x, norm_weight_2, norm_bias_2, 1, float(eps))

    if norm_first:
        x = op.add(src, attended(norm_1(src)))
        return op.add(x, fed(norm_2(x)))
    x = norm_1(op.add(src, attended(src)))
    return norm_2(op.add(x, fed(x)))


# ------------------------------------------------------------------ norms and reductions


@converts("aten.layer_norm.default")
def _layer_norm(
    call: Call,
    x: Op,
    normalized_shape: Any,
    weight: Op | None,
    bias: Op | None,
    eps: float,
    **_: Any,
) -> Any:
    return op.layer_norm(x, weight, bias, len(normalized_shape), float(eps))


@converts("aten.rms_norm.default")
def _rms_norm(call: Call, x: Op, normalized_shape: Any, weight: Op | None, eps: Any) -> Any:
    if eps is None:
        eps = torch.finfo(x.dtype.torch).eps
    return op.rms_norm(x, weight, len(normalized_shape), float(eps))


@converts("aten.group_norm.default")
def _group_norm(
    call: Call, x: Op, num_groups: int, weight: Op | None, bias: Op | None, eps: float, **_: Any
) -> Any:
    return op.group_norm(x, num_groups, weight, bias, float(eps))


@converts("aten.batch_norm.default")
def _batch_norm(
    call: Call, x: Op, weight: Op | None, bias: Op | None, running_mean: Op | None,
    running_var: Op | None, training: bool, eps: float, **_: Any,
) -> Any:  # fmt: skip
    if training or running_mean is None or running_var is None:
        return no("batch norm over the batch's own statistics")
    return op.batch_norm(x, running_mean, running_var, weight, bias, float(eps))


@converts("aten._native_batch_norm_legit_no_training.default")
def _batch_norm_inference(
    call: Call, x: Op, weight: Op | None, bias: Op | None, running_mean: Op, running_var: Op,
    eps: float, **_: Any,
) -> Any:  # fmt: skip
    y = op.batch_norm(x, running_mean, running_var, weight, bias, float(eps))
    saved = (Call("", val) for val in call.val[1:])  # statistics for training, empty here
    return (y, *(op.full(s.shape, 0.0, s.dtype) for s in saved))


@converts(
    "aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default"
)
def _softmax(call: Call, x: Op, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    made = op.log_softmax if "log" in call.target else op.softmax
    x = x if dtype is None or DType.of(dtype) == x.dtype else op.cast(x, DType.of(dtype))
    if half_to_float:
        x = op.cast(x, f32)
    return made(x, dim % max(x.tensor.rank, 1))


def _reduce(name: str, *targets: str) -> None:
    @converts(*(f"aten.{t}" for t in targets))
    def convert(
        call: Call, x: Op, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Any:
        rank = x.tensor.rank
        if dtype is not None and DType.of(dtype) != x.dtype:
            x = op.cast(x, DType.of(dtype))
        given = (dim,) if isinstance(dim, int) else tuple(dim or ())
        dims = sorted({d % max(rank, 1) for d in given}) or range(rank)
        if not rank:
            return no("a reduction of a 0-d tensor")
        return getattr(op, name)(x, tuple(dims), bool(keepdim))


_reduce("sum", "sum.default", "sum.dim_IntList")
_reduce("mean", "mean.default", "mean.dim")
_reduce("prod", "prod.default", "prod.dim_int")
_reduce("amax", "amax.default", "max.default")
_reduce("amin", "amin.default", "min.default")
_reduce("any", "any.default", "any.dim", "any.dims")
_reduce("all", "all.default", "all.dim", "all.dims")


@converts("aten.linalg_vector_norm.default")
def _vector_norm(call: Call, x: Op, ord: Any, dim: Any, keepdim: bool, dtype: Any) -> Any:
    if call.dtype != x.dtype or x.dtype.name not in ("f32", "f64") or not x.tensor.rank:
        return no("a norm of {} in {}", x.dtype, call.dtype)  # eager does not round in between
    given = (dim,) if isinstance(dim, int) else tuple(dim or range(x.tensor.rank))
    dims = tuple(sorted({d % x.tensor.rank for d in given}))
    if ord == 2:
        return op.sqrt(op.sum(op.square(x), dims, bool(keepdim)))
    if ord == 1:
        return op.sum(op.abs(x), dims, bool(keepdim))
    if ord == float("inf"):
        return op.amax(op.abs(x), dims, bool(keepdim))
    return no("a norm of order {}", ord)


# ------------------------------------------------------------------ images


@converts("aten.upsample_nearest2d.vec", "aten._upsample_nearest_exact2d.vec")
def _nearest(call: Call, x: Op, output_size: Any, scale_factors: Any) -> Any:
    mode = "nearest-exact" if "exact" in call.target else "nearest"
    return op.interpolate(x, call.shape[-2:], mode, False, _scales(scale_factors))


@converts("aten.upsample_bilinear2d.vec", "aten.upsample_bicubic2d.vec")
def _bilinear(call: Call, x: Op, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
    mode = "bicubic" if "bicubic" in call.target else "bilinear"
    return op.interpolate(x, call.shape[-2:], mode, align_corners, _scales(scale_factors))


def _scales(factors: Any) -> tuple[Any, Any]:
    return (None, None) if factors is None else (float(factors[0]), float(factors[1]))


@converts("aten.max_pool2d.default")
def _max_pool(
    call: Call, x: Op, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    kernel = _tuple(kernel_size, 2)
    stride = _tuple(stride, 2) if stride else kernel
    return op.max_pool2d(x, kernel, stride, _tuple(padding, 2), _tuple(dilation, 2), ceil_mode)


@converts("aten.avg_pool2d.default")
def _avg_pool(
    call: Call, x: Op, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Any:  # fmt: skip
    kernel = _tuple(kernel_size, 2)
    stride = _tuple(stride, 2) if stride else kernel
    pad = _tuple(padding, 2)
    return op.avg_pool2d(x, kernel, stride, pad, ceil_mode, count_include_pad, divisor_override)


@converts("aten.adaptive_avg_pool2d.default")
def _adaptive_avg_pool(call: Call, x: Op, output_size: Any) -> Any:
    rank, size = x.tensor.rank, _tuple(output_size, 2)
    if size == (1, 1):
        return op.mean(x, (rank - 2, rank - 1), True)
    have = x.shape[-2:]
    if all(
        isinstance(h, int) and isinstance(s, int) and s and h % s == 0 for h, s in zip(have, size)
    ):
        kernel = tuple(floordiv(h, s) for h, s in zip(have, size))
        return op.avg_pool2d(x, kernel, kernel)
    return no("adaptive pooling from {} to {}: windows differ in size", have, size)


# ------------------------------------------------------------------ look-ups and makers


@converts("aten.embedding.default")
def _embedding(call: Call, weight: Op, indices: Op, **_: Any) -> Any:
    return op.embedding(weight, indices)


@converts("aten.gather.default")
def _gather(call: Call, x: Op, dim: int, index: Op, sparse_grad: bool = False) -> Any:
    rank = x.tensor.rank
    if not rank:
        return no("gather of a 0-d tensor")
    axis = dim % rank
    at = [index if d == axis else _count(index.shape, d) for d in range(rank)]
    table = Reshape(x, (product(x.shape), 1))
    return Reshape(op.embedding(table, _row_of(at, x.shape)), call.shape)


@converts("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(call: Call, x: Op, indices: tuple[Op | None, ...]) -> Any:
    """Rows of the indexed dimensions taken together; they come first if they were not together."""
    dims = [d for d, i in enumerate(indices) if i is not None]
    at = [i for i in indices if i is not None]
    if any(i.dtype.name not in ("i64", "i32") for i in at):
        return no("an index of {}", ", ".join(str(i.dtype) for i in at))
    rest = [d for d in range(x.tensor.rank) if d not in dims]
    axes = [_whole_range(i, x.shape[d]) for i, d in zip(at, dims)]
    if not rest and None not in axes and len(set(axes)) == len(axes):
        # x[arange(n)[:, None], arange(m)]: nothing is looked up
        order = sorted((axis, d) for axis, d in zip(axes, dims) if axis is not None)
        return Reshape(Permute(x, tuple(d for _, d in order)), call.shape)
    sizes, others = ([x.shape[d] for d in group] for group in (dims, rest))
    table = Reshape(Permute(x, (*dims, *rest)), (product(tuple(sizes)), product(tuple(others))))
    row = _row_of([_from_start(i, n) for i, n in zip(at, sizes)], sizes)
    y = Reshape(op.embedding(table, row), (*row.shape, *others))
    first, k = dims[0], row.tensor.rank
    if dims == list(range(first, first + len(dims))):
        y = Permute(y, (*range(k, k + first), *range(k), *range(k + first, y.tensor.rank)))
    return y


def _count(shape: tuple[Any, ...], axis: int) -> Op:
    """0, 1, 2 ... along one dimension of the shape, size 1 in the others."""
    line = op.arange(shape[axis], i64)
    return Reshape(line, tuple(s if d == axis else 1 for d, s in enumerate(shape)))


def _row_of(at: list[Op], sizes: Any) -> Op:
    """The position in row-major order of the elements at these coordinates."""
    row = at[0]
    for i, size in zip(at[1:], list(sizes)[1:]):
        row = op.add(op.mul(row, size), i)
    return row


def _from_start(index: Op, size: Any) -> Op:
    """An index where negative ones no longer count from the end."""
    source = _source(index)
    if isinstance(source, Arange) and source.start == 0 and source.step == 1:
        return index
    return op.where(op.lt(index, 0), op.add(index, size), index)


def _whole_range(index: Op, size: Any) -> int | None:
    """The dimension along which an index counts through a whole range, if that is all it does."""
    source = _source(index)
    axes = [d for d, s in enumerate(index.shape) if s != 1]
    if not isinstance(source, Arange) or (source.start, source.step, source.size) != (0, 1, size):
        return None
    return axes[0] if len(axes) == 1 else None


def _source(index: Op) -> Op:
    while isinstance(index, Reshape) or (index.name == "add" and index.b == 0):
        index = index.x if isinstance(index, Reshape) else index.a
    return index


@converts("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(call: Call, start: Any = 0, step: Any = 1, **_: Any) -> Any:
    return _made(call) or op.arange(call.shape[0], call.dtype, start, step)


@converts(
    "aten.full.default",
    "aten.full_like.default",
    "aten.new_full.default",
    "aten.scalar_tensor.default",
)
def _full(call: Call, fill_value: Any = None, s: Any = None, **_: Any) -> Any:
    value = s if fill_value is None else fill_value
    return _made(call) or op.full(call.shape, value, call.dtype)


# What is in new memory is not defined, so zeros will do.
@converts(
    *(f"aten.{n}.default" for n in ("zeros", "zeros_like", "new_zeros", "empty_like", "new_empty")),
    "aten.empty.memory_format",
)  # fmt: skip
def _zeros(call: Call, **_: Any) -> Any:
    return _made(call) or op.full(call.shape, _zero(call.dtype), call.dtype)


@converts(*(f"aten.{n}.default" for n in ("ones", "ones_like", "new_ones")))
def _ones(call: Call, **_: Any) -> Any:
    return _made(call) or op.full(call.shape, type(_zero(call.dtype))(1), call.dtype)


def _zero(dtype: DType) -> Any:
    return {"float": 0.0, "bool": False}.get(dtype.kind, 0)


def _made(call: Call) -> Any:
    if call.val.device.type != "cpu":
        return no("a tensor made on device {}", call.val.device)
    return None


# ------------------------------------------------------------------ second names of the same thing

_SAME = {
    "divide": "div", "subtract": "sub", "multiply": "mul", "absolute": "abs", "negative": "neg",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "fix": "trunc", "arccos": "acos", "arcsin": "asin", "arctan": "atan", "arccosh": "acosh",
    "arcsinh": "asinh", "arctanh": "atanh", "arctan2": "atan2", "special_exp2": "exp2",
    "special_expm1": "expm1", "special_log1p": "log1p", "special_erf": "erf",
    "special_erfc": "erfc", "special_softmax": "softmax", "special_log_softmax": "log_softmax",
}  # fmt: skip


def _second_names() -> None:
    for second, first in _SAME.items():
        for target in [t for t in CONVERTERS if t.split(".")[1] == first]:
            converter = CONVERTERS[target]
            CONVERTERS.setdefault(
                target.replace(f".{first}.", f".{second}."),
                lambda call, _of=(converter, first, second), **arguments: _of[0](
                    replace(call, target=call.target.replace(f".{_of[2]}.", f".{_of[1]}.")),
                    **arguments,
                ),
            )


_second_names()
