"""What a value is inside a plan: memory, and the way a kernel walks it; and who may share memory.

A `Root` is one allocation. A `Ref` shows a root as a shaped, strided value: view ops only make
another Ref. Strides are in elements and may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from effc.ir import DType, Op, row_major
from effc.ir.symbols import Dim, dim, product

ALIGN = 64  # bytes; a cache line, and the widest vector


@dataclass(eq=False)
class Root:
    """One allocation.

    kind: "input" | "const" (known at bind) | "packed" (made of a constant at bind) |
    "dynamic" (a torch tensor made by a library routine or a fallback) | "arena" (ours, lives
    inside a call) | "output" (ours, handed to the caller).
    strides: what kernels rely on; an input or dynamic tensor that has others is packed first.
    """

    kind: str
    node: Op | None
    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    slot: int = -1  # of its tensor among the values of a call; -1 where it needs none
    number: int = -1  # of its address in the table that native calls read
    read_by_kernels: bool = False
    owned: bool = True  # nobody else holds this memory: a later kernel may overwrite it
    pinned: bool = False  # a fallback may have given a result that shows it
    first: int = 0  # steps between which the contents matter
    last: int = 0
    pins: set[Root] = field(default_factory=set)  # roots whose memory this one may show

    @property
    def elements(self) -> Dim:
        return product(self.shape)

    @property
    def nbytes(self) -> Dim:
        return dim(self.elements * (self.dtype.bits // 8))

    def use(self, step: int) -> None:
        """Keep the contents up to this step."""
        self.last = max(self.last, step)
        for other in self.pins:
            other.use(step)


@dataclass(frozen=True)
class Ref:
    """A strided view of a root, as kernels read it."""

    root: Root
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    offset: Dim = 0

    @property
    def dtype(self) -> DType:
        return self.root.dtype

    @property
    def whole(self) -> bool:
        """It shows all of the root, as it lies."""
        return (self.shape, self.strides, self.offset) == (self.root.shape, self.root.strides, 0)

    def with_(self, **changes: Any) -> Ref:
        return replace(self, **changes)


def whole(root: Root) -> Ref:
    return Ref(root, root.shape, root.strides)


# ------------------------------------------------------------------ view ops on Refs


def permuted(x: Ref, dims: Sequence[int]) -> Ref:
    shape, strides = (tuple(v[d] for d in dims) for v in (x.shape, x.strides))
    return x.with_(shape=shape, strides=strides)


def expanded(x: Ref, to: tuple[Dim, ...]) -> Ref:
    lead = len(to) - len(x.shape)
    strides: list[Dim] = [0] * lead
    for have, want, step in zip(x.shape, to[lead:], x.strides, strict=True):
        strides.append(0 if have == 1 and want != 1 else step)
    return x.with_(shape=to, strides=tuple(strides))


def sliced(x: Ref, axis: int, start: Dim, size: Dim, step: int = 1) -> Ref:
    shape, strides = list(x.shape), list(x.strides)
    offset = _plain(x.offset + start * strides[axis])
    shape[axis], strides[axis] = size, _plain(strides[axis] * step)
    return x.with_(shape=tuple(shape), strides=tuple(strides), offset=offset)


def flipped(x: Ref, axes: Sequence[int]) -> Ref:
    strides, offset = list(x.strides), x.offset
    for axis in axes:
        offset = _plain(offset + (x.shape[axis] - 1) * strides[axis])
        strides[axis] = _plain(-strides[axis])
    return x.with_(strides=tuple(strides), offset=offset)


def reshaped(x: Ref, to: tuple[Dim, ...]) -> Ref | None:
    """The same elements under another shape, or None where that needs a copy."""
    if all(map(_same, x.strides, row_major.strides(x.shape))):
        strides: tuple[Dim, ...] | None = row_major.strides(to)
    else:
        strides = view_strides(x.shape, x.strides, to)
    return None if strides is None else x.with_(shape=to, strides=strides)


def view_strides(
    shape: tuple[Dim, ...], strides: tuple[Dim, ...], to: tuple[Dim, ...]
) -> tuple[Dim, ...] | None:
    """torch's rule: old dimensions merge where they are contiguous, and split freely."""
    if any(s == 0 for s in to):
        return row_major.strides(to)
    old = [(s, t) for s, t in zip(shape, strides, strict=True) if s != 1]
    result: list[Dim] = []
    at = 0
    sizes = [s for s in to if s != 1]
    i = 0
    while i < len(sizes):
        if at == len(old):
            return None
        have, step = old[at]
        at += 1
        want, group = sizes[i], [sizes[i]]
        i += 1
        while not _same(have, want):
            ratio = _compare(have, want)
            if ratio is None:
                return None
            if ratio > 0:  # the old dimension holds more: it splits
                if i == len(sizes):
                    return None
                group.append(sizes[i])
                want = _plain(want * sizes[i])
                i += 1
            else:  # it holds less: it must merge with the next one
                if at == len(old):
                    return None
                size, inner = old[at]
                at += 1
                if not _same(step, _plain(inner * size)):
                    return None
                have, step = _plain(have * size), inner
        inner_step = step
        made: list[Dim] = []
        for size in reversed(group):
            made.append(inner_step)
            inner_step = _plain(inner_step * size)
        result += reversed(made)
    if at != len(old):
        return None
    return _with_ones(to, result)


def _with_ones(to: tuple[Dim, ...], strides: list[Dim]) -> tuple[Dim, ...]:
    """Strides for sizes of 1 too; any value is right there."""
    result: list[Dim] = []
    following: Dim = 1
    left = list(strides)
    for size in reversed(to):
        if size != 1:
            following = left.pop()
            result.append(following)
            following = _plain(following * size)
        else:
            result.append(following)
    return tuple(reversed(result))


def _plain(value: Dim) -> Dim:
    if isinstance(value, int):
        return value
    import sympy

    return dim(sympy.expand(value))


def _same(a: Dim, b: Dim) -> bool:
    return a == b or (not (isinstance(a, int) and isinstance(b, int)) and _plain(a - b) == 0)


def _compare(a: Dim, b: Dim) -> int | None:
    """1 where a is a multiple of b, -1 where b is one of a, for sizes; None where unknown."""
    if isinstance(a, int) and isinstance(b, int):
        return 1 if a > b else -1
    import sympy

    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if ratio.is_integer:
        return 1
    return -1 if (1 / ratio).is_integer else None


def packed(t: torch.Tensor, strides: tuple[int, ...], alignment: int = 1) -> torch.Tensor:
    """t with these strides, at an address that is a multiple of `alignment` bytes.

    It is t itself where that is so, or where strides differ only in dimensions of one element.
    """
    if not t.is_neg() and not t.data_ptr() % alignment and all(
        n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)
    ):  # fmt: skip
        return t
    made = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
    return made.copy_(t.detach())


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
