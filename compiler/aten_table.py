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
from effc.ir.ops.shape import Copy, Expand, Permute, Reshape, ToLayout
from effc.ir.ops.shape import Slice as SliceOp
from effc.ir.rewrite import op
from effc.ir.symbols import dim, floordiv
from effc.ir.types import f32

# ------------------------------------------------------------------ pointwise

_UNARY = ["neg", "abs", "sign", "floor", "ceil", "trunc", "relu", "bitwise_not", "square", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "log_sigmoid", "isnan", "isinf", "logical_not", "round"]
for _name in _UNARY:

    @converts(f"aten.{_name}.default")
    def _(call: Call, x: Op, _made: Any = getattr(op, _name)) -> Any:
        return _made(x)


_BINARY = {
    "mul": "mul", "remainder": "remainder", "fmod": "fmod", "pow": "pow", "atan2": "atan2",
    "maximum": "maximum", "minimum": "minimum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "logical_and": "logical_and", "logical_or": "logical_or",
    "logical_xor": "logical_xor", "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "__and__": "bitwise_and", "__or__": "bitwise_or",
    "__xor__": "bitwise_xor", "floor_divide": "div_floor", "true_divide": "div",
}  # fmt: skip
for _name, _to in _BINARY.items():

    @converts(*(f"aten.{_name}.{o}" for o in (
        "default", "Tensor", "Scalar", "Scalar_Tensor", "Tensor_Tensor", "Tensor_Scalar"
    )))  # fmt: skip
    def _(call: Call, _made: Any = getattr(op, _to), **operands: Any) -> Any:
        return _made(*operands.values())


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
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.type_as.default",
    "aten.float.default", "aten.double.default", "aten.half.default", "aten.bfloat16.default",
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


@converts("aten.constant_pad_nd.default")
def _constant_pad(call: Call, x: Op, pad: tuple[Any, ...], value: Any) -> Any:
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (x.tensor.rank - len(pairs)) + pairs
    return op.pad(x, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), value)


@converts("aten.pad.default")
def _pad(call: Call, x: Op, pad: tuple[Any, ...], mode: str, value: Any) -> Any:
    if mode != "constant":
        return no("padding mode {}", mode)
    return _constant_pad(call, x, pad, 0 if value is None else value)


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


@converts("aten.mm.default", "aten.bmm.default", "aten.matmul.default", "aten.mv.default", "aten.dot.default")
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


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def _conv(
    call: Call, x: Op, weight: Op, bias: Op | None, stride: Any, padding: Any, dilation: Any, groups: int
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
    call: Call, x: Op, weight: Op, bias: Op | None, stride: Any, padding: str, dilation: Any, groups: int
) -> Any:
    spatial = weight.tensor.rank - 2
    if padding == "valid":
        return _conv(call, x, weight, bias, stride, (0,), dilation, groups)
    total = [d * (k - 1) for d, k in zip(_tuple(dilation, spatial), weight.shape[2:])]
    if any(t % 2 for t in total):
        return no('padding "same" of an even kernel is not symmetric')
    return _conv(call, x, weight, bias, stride, tuple(t // 2 for t in total), dilation, groups)


def _tuple(value: Any, n: int) -> tuple[Any, ...]:
    value = value if isinstance(value, tuple) else (tuple(value) if isinstance(value, list) else (value,))
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


# ------------------------------------------------------------------ norms and reductions


@converts("aten.layer_norm.default")
def _layer_norm(
    call: Call, x: Op, normalized_shape: Any, weight: Op | None, bias: Op | None, eps: float, **_: Any
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


@converts("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def _softmax(call: Call, x: Op, dim: int, dtype: Any = None, half_to_float: bool = False) -> Any:
    made = op.log_softmax if "log" in call.target else op.softmax
    x = x if dtype is None or DType.of(dtype) == x.dtype else op.cast(x, DType.of(dtype))
    if half_to_float:
        x = op.cast(x, f32)
    return made(x, dim % max(x.tensor.rank, 1))


def _reduce(name: str, *targets: str) -> None:
    @converts(*(f"aten.{t}" for t in targets))
    def convert(call: Call, x: Op, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
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
    if all(isinstance(h, int) and isinstance(s, int) and s and h % s == 0 for h, s in zip(have, size)):
        kernel = tuple(floordiv(h, s) for h, s in zip(have, size))
        return op.avg_pool2d(x, kernel, kernel)
    return no("adaptive pooling from {} to {}: windows differ in size", have, size)


# ------------------------------------------------------------------ look-ups and makers


@converts("aten.embedding.default")
def _embedding(call: Call, weight: Op, indices: Op, **_: Any) -> Any:
    return op.embedding(weight, indices)


@converts("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(call: Call, start: Any = 0, step: Any = 1, **_: Any) -> Any:
    return _made(call) or op.arange(call.shape[0], call.dtype, start, step)


@converts(
    "aten.full.default", "aten.full_like.default", "aten.new_full.default", "aten.scalar_tensor.default"
)
def _full(call: Call, fill_value: Any = None, s: Any = None, **_: Any) -> Any:
    value = s if fill_value is None else fill_value
    return _made(call) or op.full(call.shape, value, call.dtype)


@converts(*(f"aten.{n}.default" for n in ("zeros", "zeros_like", "new_zeros")))
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
    "special_expm1": "expm1", "special_log1p": "log1p", "special_erf": "erf", "special_erfc": "erfc",
    "special_softmax": "softmax", "special_log_softmax": "log_softmax",
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
