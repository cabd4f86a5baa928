"""Norms, softmax and reductions."""

from __future__ import annotations

from typing import Any

import torch

from effc.importer import Call, converts
from effc.ir import DType, Op, no
from effc.ir.rewrite import op
from effc.ir.types import f32


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
