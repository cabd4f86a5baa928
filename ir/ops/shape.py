"""Ops that only move elements. `view` ones cost nothing where the consumer can read strides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..symbols import Dim, dim, floordiv, product
from ..types import Layout, Tensor, Type, row_major
from .common import (
    axis_of,
    check_fits,
    check_position,
    check_sizes,
    common_layout,
    may_equal,
    promote,
)


class View(Op):
    """Base of ops whose result may share memory with `x`."""

    view = True

    def cost(self) -> Cost:
        return Cost(0, 0)


@op("reshape")
class Reshape(View):
    """The same elements in logical order under another shape."""

    x: Value
    to: tuple[Dim, ...]

    def infer(self) -> Type:
        t = self.x.tensor
        check_sizes(self, self.to)
        before, after = t.numel, product(self.to)
        if isinstance(before, int) and isinstance(after, int) and before != after:
            raise self.fail(f"{before} elements do not fill shape {list(self.to)}")
        return Tensor(tuple(self.to), t.dtype, t.layout if self.to == t.shape else row_major)

    def reference(self, x: Any) -> Any:
        return x.reshape(self.to)


@op("permute")
class Permute(View):
    """Dimension i of the result is dimension dims[i] of x."""

    x: Value
    dims: tuple[int, ...]

    def infer(self) -> Type:
        t = self.x.tensor
        if sorted(self.dims) != list(range(t.rank)):
            raise self.fail(f"{self.dims} is not a permutation of {t.rank} dimensions")
        return Tensor(tuple(t.shape[d] for d in self.dims), t.dtype)

    def reference(self, x: Any) -> Any:
        return x.permute(self.dims)


@op("expand")
class Expand(View):
    """Broadcast to a larger shape: sizes of 1 repeat, new dimensions come first."""

    x: Value
    to: tuple[Dim, ...]

    def infer(self) -> Type:
        t = self.x.tensor
        check_sizes(self, self.to)
        if len(self.to) < t.rank:
            raise self.fail(f"cannot expand to fewer dimensions {list(self.to)}")
        for have, want in zip(reversed(t.shape), reversed(self.to), strict=False):
            if isinstance(have, int) and isinstance(want, int) and have not in (1, want):
                raise self.fail(f"size {have} does not expand to {want}")
        return Tensor(tuple(self.to), t.dtype)

    def reference(self, x: Any) -> Any:
        return x.expand(self.to)


@op("slice")
class Slice(View):
    """x[start : start + size * step : step] along one dimension."""

    x: Value
    dim: int
    start: Dim
    size: Dim
    step: int = 1

    def infer(self) -> Type:
        t = self.x.tensor
        axis = axis_of(self, self.dim, t.rank)
        if not t.rank or self.step < 1:
            raise self.fail(f"step {self.step} in a tensor with {t.rank} dimensions")
        check_sizes(self, (self.start, self.size))
        have = t.shape[axis]
        if isinstance(have, int) and isinstance(self.start, int) and isinstance(self.size, int):
            last = self.start + (self.size - 1) * self.step
            if self.size and last >= have:
                raise self.fail(f"elements {self.start}..{last} of dimension {axis} with {have}")
        layout = t.layout
        return Tensor((*t.shape[:axis], self.size, *t.shape[axis + 1 :]), t.dtype, layout)

    def reference(self, x: Any) -> Any:
        end = self.start + self.size * self.step
        index = [slice(None)] * x.dim()
        index[self.dim] = slice(self.start, end, self.step)
        return x[tuple(index)]


@op("to_layout")
class ToLayout(Op):
    """The same values, packed in memory in the order of `layout`."""

    x: Value
    layout: Layout

    def infer(self) -> Type:
        return self.x.tensor.with_(layout=self.layout)

    def reference(self, x: Any) -> Any:
        order = self.layout.order(x.dim())
        back = sorted(range(x.dim()), key=lambda i: order[i])
        return x.permute(order).contiguous().permute(back)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("copy")
class Copy(Op):
    """The same values in memory of their own (torch.clone)."""

    x: Value

    def infer(self) -> Type:
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x.clone()

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("cat")
class Cat(Op):
    """Operands one after another along one dimension."""

    xs: tuple[Value, ...]
    dim: int

    def infer(self) -> Type:
        if not self.xs:
            raise self.fail("nothing to concatenate")
        types = [x.tensor for x in self.xs]
        first = types[0]
        axis = axis_of(self, self.dim, first.rank)
        if not first.rank or any(t.rank != first.rank for t in types):
            raise self.fail("operands have no dimensions, or different numbers of them")
        for t in types:
            for i, (a, b) in enumerate(zip(t.shape, first.shape, strict=True)):
                if i != axis and not may_equal(a, b):
                    raise self.fail(f"sizes {b} and {a} of dimension {i} differ")
        total: Any = sum(t.shape[axis] for t in types)
        shape = (*first.shape[:axis], dim(total), *first.shape[axis + 1 :])
        layouts = {t.layout.name for t in types}
        layout = first.layout if len(layouts) == 1 else row_major
        return Tensor(shape, promote(*self.xs), layout)

    def reference(self, xs: Any) -> Any:
        return torch.cat(xs, self.dim)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("stack")
class Stack(Op):
    """Operands of one type as the rows of a new first dimension."""

    xs: tuple[Value, ...]

    def infer(self) -> Type:
        if not self.xs:
            raise self.fail("nothing to stack")
        first = self.xs[0].tensor
        for x in self.xs:
            same = x.dtype == first.dtype and x.tensor.rank == first.rank
            if not same or not all(map(may_equal, x.shape, first.shape)):
                raise self.fail(f"{x.type} and {first} are stacked")
            if x.type != Tensor(x.shape, x.dtype):
                raise self.fail(f"rows that are {x.type}")
        return Tensor((len(self.xs), *first.shape), first.dtype)

    def reference(self, xs: Any) -> Any:
        return torch.stack(tuple(xs))

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("update")
class Update(Op):
    """x with `new` written over part of one dimension, from position `start` on.

    start: i64, one number, known when the graph runs; IndexError where new does not fit there.
    XLA's dynamic_update_slice, without its clamping.
    """

    x: Value
    new: Value
    start: Value
    dim: int

    def infer(self) -> Type:
        t, new = self.x.tensor, self.new.tensor
        axis = axis_of(self, self.dim, t.rank)
        if not t.rank or new.rank != t.rank:
            raise self.fail(f"{new.rank} dimensions are written into {t.rank}")
        if new.dtype != t.dtype:
            raise self.fail(f"{new.dtype} is written into {t.dtype}")
        check_position(self, "start", self.start)
        for i, (have, given) in enumerate(zip(t.shape, new.shape, strict=True)):
            if i == axis:
                check_fits(self, given, have)
            elif not may_equal(have, given):
                raise self.fail(f"sizes {have} and {given} of dimension {i} differ")
        return t

    def reference(self, x: Any, new: Any, start: Any) -> Any:
        at, size = int(start), new.shape[self.dim]
        if not 0 <= at <= x.shape[self.dim] - size:
            raise IndexError(
                f"update: positions {at}..{at + size} of dimension {self.dim} with"
                f" {x.shape[self.dim]}"
            )
        result = x.clone()
        result.narrow(self.dim, at, size).copy_(new)
        return result

    def cost(self) -> Cost:
        return Cost(0, 2 * self.new.tensor.nbytes)


@op("pad")
class Pad(Op):
    """Constant padding; `before[i]` and `after[i]` elements around dimension i."""

    x: Value
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    value: float | int | bool = 0

    def infer(self) -> Type:
        t = self.x.tensor
        if not len(self.before) == len(self.after) == t.rank:
            raise self.fail(f"{len(self.before)} paddings for {t.rank} dimensions")
        sizes = zip(t.shape, self.before, self.after, strict=True)
        shape = tuple(dim(s + b + a) for s, b, a in sizes)
        if any(isinstance(s, int) and s < 0 for s in shape):
            raise self.fail("negative size after cropping")
        return Tensor(shape, t.dtype, common_layout(t.shape, t))

    def reference(self, x: Any) -> Any:
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return F.pad(x, [p for pair in pairs for p in pair], value=self.value)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("flip")
class Flip(Op):
    """Reversed order along some dimensions."""

    x: Value
    dims: tuple[int, ...]

    def infer(self) -> Type:
        axes = {axis_of(self, d, self.x.tensor.rank) for d in self.dims}
        if len(axes) != len(self.dims):
            raise self.fail(f"a dimension appears twice in {self.dims}")
        return self.x.tensor

    def reference(self, x: Any) -> Any:
        return x.flip(self.dims)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("pixel_shuffle")
class PixelShuffle(Op):
    """[*, C r^2, H, W] -> [*, C, H r, W r]."""

    x: Value
    factor: int

    def infer(self) -> Type:
        t = self.x.tensor
        r = self.factor
        if t.rank < 3 or (isinstance(t.shape[-3], int) and t.shape[-3] % (r * r)):
            raise self.fail(f"channels must be a multiple of {r * r}")
        *lead, c, h, w = t.shape
        return t.with_(shape=(*lead, floordiv(c, r * r), dim(h * r), dim(w * r)))

    def reference(self, x: Any) -> Any:
        return F.pixel_shuffle(x, self.factor)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())


@op("pixel_unshuffle")
class PixelUnshuffle(Op):
    """[*, C, H r, W r] -> [*, C r^2, H, W]."""

    x: Value
    factor: int

    def infer(self) -> Type:
        t = self.x.tensor
        r = self.factor
        if t.rank < 3 or any(isinstance(s, int) and s % r for s in t.shape[-2:]):
            raise self.fail(f"height and width must be multiples of {r}")
        *lead, c, h, w = t.shape
        return t.with_(shape=(*lead, dim(c * r * r), floordiv(h, r), floordiv(w, r)))

    def reference(self, x: Any) -> Any:
        return F.pixel_unshuffle(x, self.factor)

    def cost(self) -> Cost:
        return Cost(0, self.bytes_moved())
