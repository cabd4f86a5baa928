"""Ops that only move elements, by the target's own `copy_into` and `fill`: they serve every target.

What other movers share between targets is here too: which they take, and the memory they walk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effc.ir import Op, channels_last, no, row_major, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, dim, floordiv
from effc.ir.types import Layout

from .builder import Builder
from .host import library
from .memory import Ref, flipped, sliced, whole
from .regions import broadcast


def packed_ref(b: Builder, node: Op, x: Ref, layout: Layout) -> Ref:
    """x, copied so that its elements lie in the order of a layout."""
    root = b.new_root("arena", node, node.tensor.with_(shape=x.shape, layout=layout))
    b.target.copy_into(b, node, whole(root), x, note=f"packed as {layout.name}")
    return whole(root)


def order_of(ref: Ref) -> list[int]:
    """Dimensions by how far apart their elements lie, farthest first, as far as that is known."""
    order = list(range(len(ref.shape)))
    if all(isinstance(s, int) for s in ref.strides):
        return sorted(order, key=lambda i: (-abs(ref.strides[i]), i))  # type: ignore[arg-type]
    inner = [i for i in order if ref.strides[i] == 1 and ref.shape[i] != 1]
    if len(inner) == 1:
        order.remove(inner[0])
        order.append(inner[0])
    return order


def _copy(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    b.target.copy_into(b, node, out, b.ref(node.x))
    b.set(node, out)


def _to_layout(b: Builder, node: Any) -> None:
    held = b.held(node.x)
    formats = {(4, channels_last): torch.channels_last, (5, channels_last): torch.channels_last_3d}
    wanted = formats.get((node.tensor.rank, node.layout), torch.contiguous_format)
    simple = node.layout == row_major or (node.tensor.rank, node.layout) in formats
    if held.root.kind == "input" and held.ref is not None and held.ref.whole and simple:
        _input_to_layout(b, node, wanted)
        return
    _copy(b, node)


def _input_to_layout(b: Builder, node: Any, wanted: torch.memory_format) -> None:
    """The caller's tensor often lies that way already: then nothing moves."""
    slots = b.reads(node.x)
    root = b.new_root("dynamic", node, node.tensor, owned=False, pins={b.held(node.x).root})

    def build(frame: Any) -> Callable[[], torch.Tensor]:
        v, (x,) = frame.values, slots
        return lambda: v[x].contiguous(memory_format=wanted)

    library(b, node, "torch.contiguous", build, slots, root, kind="copy",
            note="nothing moves where the input lies so already")  # fmt: skip
    b.set(node, root)


def _flip(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    rank = len(node.shape)
    b.target.copy_into(
        b, node, out, flipped(b.ref(node.x), [d % rank for d in node.dims]), kind="kernel"
    )
    b.set(node, out)


def _cat(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    axis, start = node.dim % len(node.shape), 0
    for x in node.xs:
        size = x.shape[axis]
        rest = [(s, t) for i, (s, t) in enumerate(zip(x.shape, node.shape)) if i != axis]
        b.must_equal(*rest)
        if size != 0:
            b.target.copy_into(b, node, sliced(out, axis, start, size), b.ref(x), kind="kernel")
        start = dim(start + size)
    b.set(node, out)


def updated(b: Builder, node: Any) -> tuple[Ref, Ref, Ref, tuple[Dim, Dim]]:
    """What an `update` walks: (result, where `new` lies in it from position 0 on, new, (the last
    position that fits, elements from one position to the next)).

    The result is in x's own memory, or in a copy where x is read later.
    """
    out, axis = b.ref(node.x), node.dim % node.tensor.rank
    if not (out.whole and b.overwrites(node.x, node)):
        x, (out,) = out, b.results(node)
        b.target.copy_into(b, node, out, x, note="the old value is read later")
    new = b.ref(node.new)
    place = sliced(out, axis, 0, new.shape[axis])
    b.must_equal(*zip(place.shape, new.shape, strict=True))
    return out, place, new, (dim(out.shape[axis] - new.shape[axis]), out.strides[axis])


# ------------------------------------------------------------------ padding and shuffles


def _pad(b: Builder, node: Any) -> None:
    """The border slab by slab, then the inside; negative padding crops."""
    (out,) = b.results(node)
    x, inside = b.ref(node.x), out
    for axis in range(len(node.shape)):
        before, after = node.before[axis], node.after[axis]
        size = node.x.shape[axis]
        if isinstance(before, int) and before < 0:
            x, size, before = sliced(x, axis, -before, dim(size + before)), dim(size + before), 0
        if isinstance(after, int) and after < 0:
            x, size, after = sliced(x, axis, 0, dim(size + after)), dim(size + after), 0
        for start, width in ((0, before), (dim(before + size), after)):
            if width != 0:
                b.target.fill(b, node, sliced(inside, axis, start, width), node.value)
        inside = sliced(inside, axis, before, size)
    b.target.copy_into(b, node, inside, x, kind="kernel")
    b.set(node, out)


def channels_split(x: Ref, r: int) -> Ref:
    """[*, C r r, H, W] walked as [*, C, H, r, W, r], the order of the shuffled memory."""
    *lead, c, h, w = x.shape
    *steps, sc, sh, sw = x.strides
    shape = (*lead, floordiv(c, r * r), h, r, w, r)
    return x.with_(shape=shape, strides=(*steps, sc * r * r, sh, sc * r, sw, sc))


def pixels_split(x: Ref, r: int) -> Ref:
    """[*, C, H r, W r] walked as [*, C, H, r, W, r]."""
    *lead, c, h, w = x.shape
    *steps, sc, sh, sw = x.strides
    shape = (*lead, c, floordiv(h, r), r, floordiv(w, r), r)
    return x.with_(shape=shape, strides=(*steps, sc, sh * r, sh, sw * r, sw))


def _pixel_shuffle(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    x, r = b.ref(node.x), node.factor
    to, source = (pixels_split, channels_split)
    if node.name == "pixel_unshuffle":
        to, source = source, to
    b.target.copy_into(b, node, to(out, r), source(x, r), kind="kernel")
    b.set(node, out)


MOVES: dict[str, Callable[[Builder, Any], None]] = {
    "copy": _copy, "to_layout": _to_layout, "flip": _flip, "cat": _cat, "pad": _pad,
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_shuffle,
}  # fmt: skip

# ------------------------------------------------------------------ made tensors


def real_value(node: Any) -> Answer:
    values = (node.value,) if node.name == "full" else (node.start, node.step)
    if any(isinstance(v, complex) for v in values):
        return no("a complex value", at=node)
    return yes


def full(b: Builder, node: Any) -> None:
    (out,) = b.results(node)
    b.target.fill(b, node, out, node.value)
    b.set(node, out)


# ------------------------------------------------------------------ rotary embedding


def rope_check(node: Any) -> Answer:
    last = node.x.shape[-1] if node.x.shape else 1
    if not isinstance(last, int) or node.shape[-1] != last:
        return no("rope over a last dimension of unknown or broadcast size", at=node)
    if not all(o.dtype.is_float for o in node.operands):
        return no("rope of integers", at=node)
    return yes


def rope_pairs(b: Builder, node: Any) -> tuple[Ref, tuple[Ref, Ref], dict[str, Ref]]:
    """(result, its two halves, those of the operands by name: x1, x2, c1, c2, s1, s2)."""
    (out,) = b.results(node)
    shape, axis = node.shape, len(node.shape) - 1
    half = shape[-1] // 2

    def pair(ref: Ref) -> tuple[Ref, Ref]:
        if node.interleaved:
            return sliced(ref, axis, 0, half, 2), sliced(ref, axis, 1, half, 2)
        return sliced(ref, axis, 0, half), sliced(ref, axis, half, half)

    given = {"x": node.x, "c": node.cos, "s": node.sin}
    refs: dict[str, Ref] = {}
    for name, value in given.items():
        refs[f"{name}1"], refs[f"{name}2"] = pair(broadcast(b, b.ref(value), shape))
    return out, pair(out), refs


__all__ = [
    "MOVES", "channels_split", "full", "order_of", "packed_ref", "pixels_split", "real_value",
    "rope_check", "rope_pairs", "updated",
]  # fmt: skip
