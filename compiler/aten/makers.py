"""Look-ups, and tensors made from nothing."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import DType, Op, no
from effc.ir.ops.index import Arange
from effc.ir.ops.shape import Permute, Reshape
from effc.ir.rewrite import op
from effc.ir.symbols import product
from effc.ir.types import i64


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
    if len(at) == 1:
        return row  # the look-up itself refuses what is outside
    for i, size in zip(at, sizes):
        if not (isinstance(i, Reshape) and i.x.name == "arange"):
            # outside in one coordinate may be inside the whole table: no row at all, as torch says
            outside = op.logical_or(op.lt(i, 0), op.ge(i, size))
            row = op.where(outside, -1, row)
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
