"""Convolutions as the kernels of codegen/triton walk them.

As an implicit GEMM: pixels are rows, taps and channels the depth, groups a batch. A window of one
tap without padding is a plain product. Depthwise ones have a kernel of their own. A constant weight
is laid out once with its channels together; a picture whose channels lie apart is copied first
where a window reads each of its pixels several times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from effc.codegen.triton import convolution as kernels
from effc.codegen.triton.products import Factor, Products, Sample, Space, Walk, Window
from effc.codegen.triton.tile import Element, Tile
from effc.ir import Op, no, row_major, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, floordiv, product

from ..plan.builder import Builder
from ..plan.memory import Ref, sliced, whole
from .images import sampling, window_of
from .lowering import call
from .products import Anchor, guess, is_product

DEEP = 16  # channels from which on a picture with channels apart is copied


def check(node: Any) -> Answer:
    if not (answer := is_product(node)):
        return answer
    if not all(isinstance(n, int) for n in node.w.shape):
        return no("a {} whose weight has sizes that vary", node.name, at=node)
    return yes


def taps_of(node: Any) -> int:
    return int(product(node.w.shape[2:]))


def is_depthwise(node: Any) -> bool:
    return (
        node.name[:4] == "conv" and node.groups > 1 and node.w.shape[1] == 1
        and taps_of(node) <= kernels.TAPS
    )  # fmt: skip


def has_window(node: Any) -> bool:
    """Whether taps may lie outside of the picture, or there are several."""
    return taps_of(node) != 1 or any(p != 0 for p in node.padding)


# ------------------------------------------------------------------ pictures


def reads_any_layout(node: Any) -> Answer:
    """Whether a picture may lie in any order of its dimensions without being copied first."""
    if has_window(node) and guess(node.x.shape[1]) >= DEEP * node.groups:
        return no("a {} of {} channels reads them together", node.name, node.x.shape[1], at=node)
    return yes


def may_pool(node: Any, pool: Any) -> Answer:
    """Whether pooling again for each tap of a convolution takes less time than a launch.

    Known for pictures of known sizes that fit a GPU's first caches many times over.
    """
    window = window_of(pool)
    if pool.x.tensor.layout == row_major and not (answer := reads_any_layout(node)):
        return answer
    if node.groups > 1:
        return no("{} before a grouped {}", pool.name, node.name, at=pool)
    if not window.maximum and not all(
        window.within(d, pool.shape[2 + d], pool.x.shape[2 + d]) for d in range(2)
    ):
        return no("windows of {} lie beside the picture", pool.name, at=pool)
    images, results, *pixels = node.shape
    reads = product((images, *pixels, node.x.shape[1], taps_of(node), *window.kernel))
    if not isinstance(reads, int) or reads > FEW_READS or guess(results) > FEW_RESULTS:
        return no("{} elements would be read to pool again for every tap", reads, at=pool)
    return yes


# 4 us, as long as a launch takes, are enough to read so many elements of 4 bytes from the first
# caches of 100 units, 128 bytes a cycle each; all results are of one tile, so that it pools once.
FEW_READS, FEW_RESULTS = 12 << 20, 64

# ------------------------------------------------------------------ operands


def prepared(b: Builder, node: Any, refs: dict[Op, Ref], outer: Mapping[Op, Op]) -> None:
    """Put refs that are good to read in the place of those of the weight and the picture."""
    constant = node.w in outer and b.is_constant(outer[node.w])
    if constant and taps_of(node) > 1 and refs[node.w].strides[1] != 1 and node.w.shape[1] > 1:
        refs[node.w] = _channels_together(b, node, outer[node.w])
    x = refs[node.x]
    if has_window(node) and x.strides[1] != 1 and guess(x.shape[1]) >= DEEP * node.groups:
        refs[node.x] = _picture(b, node, x)


def _channels_together(b: Builder, node: Any, constant: Op) -> Ref:
    packed = b.derived_ref(constant, "channels together", channels_together, product(node.w.shape))
    return packed.with_(shape=node.w.shape, strides=_last(node.w.shape))


def channels_together(w: torch.Tensor) -> torch.Tensor:
    """[results, channels, *taps] -> [results, *taps, channels], flat."""
    return w.movedim(1, -1).flatten()


def _last(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Strides of memory in which the second dimension is the innermost one."""
    _, channels, *others = shape
    strides: list[Dim] = []
    step: Dim = channels
    for size in reversed(others):
        strides.insert(0, step)
        step = step * size
    return (step, 1, *strides)


def _picture(b: Builder, node: Any, x: Ref) -> Ref:
    t = node.x.tensor
    root = b.new_root("arena", node.x, t, _last(t.shape))
    b.target.copy_into(b, node, whole(root), x, note="channels put together for a convolution")
    return whole(root)


# ------------------------------------------------------------------ implicit GEMM


def implicit(b: Builder, node: Any, refs: Mapping[Op, Ref]) -> Anchor:
    w, groups = refs[node.w], node.groups
    results, channels, *taps = node.w.shape
    images, _, *pixels = node.shape
    b.must_equal((node.x.shape[1], channels * groups))
    window = None
    depth: tuple[Dim, ...] = (channels,)
    steps: tuple[Dim, ...] = (w.strides[1],)
    if has_window(node):
        window = Window(tuple(node.x.shape[2:]), node.stride, node.padding, node.dilation)
        depth, steps = (*taps, channels), (*w.strides[2:], w.strides[1])
    each = results // groups
    split = ("batch",) if groups > 1 else ()
    batch = (groups,) if groups > 1 else ()
    walk = Walk(w.dtype, (w.strides[0] * each,) * len(batch), (), (w.strides[0],), steps, w.offset)
    space = Space(batch, (images, *pixels), (each,), depth)
    rows = ("rows",) * len(pixels)
    return Anchor(
        node, space, ("rows", *split, "columns", *rows), ("rows", *split, "depth", *rows), w, walk,
        window, groups, partial(_seen, node, window),
    )  # fmt: skip


def _seen(node: Any, window: Window | None, x: Ref) -> Ref:
    """The pixels that a window of one tap reads."""
    if window is None:
        for axis, step in enumerate(node.stride, 2):
            x = sliced(x, axis, 0, node.shape[axis], step)
    return x


def taken_apart(anchor: Anchor, r: int) -> Anchor:
    """The result's channels as [channels, r, r], which a pixel shuffle puts between the pixels."""
    (columns,) = anchor.space.columns
    (step,) = anchor.right_walk.columns
    space = replace(anchor.space, columns=(floordiv(columns, r * r), r, r))
    walk = replace(anchor.right_walk, columns=(step * r * r, step * r, step))
    place = ("rows", "columns", "rows", "columns", "rows", "columns")
    return replace(anchor, space=space, right_walk=walk, place=place)


# ------------------------------------------------------------------ depthwise


def depthwise(
    b: Builder, node: Op, anchor: Any, refs: Mapping[Op, Ref], out: Ref, leaves: Mapping[Any, Ref],
    samples: Mapping[Any, Ref], after: Callable[[Tile, list[Element]], Element],
    comment: Sequence[str],
) -> None:  # fmt: skip
    """One launch: pixels x channels, tap after tap."""
    x, w = refs[anchor.x], refs[anchor.w]
    results, _, *taps = anchor.w.shape
    images, _, *pixels = anchor.shape
    b.must_equal((anchor.x.shape[1], anchor.groups))
    place = ("rows", "columns", *["rows"] * len(pixels))

    def spread(ref: Ref) -> Walk:
        return Anchor(anchor, space, place, (), w, weight).spread(ref)

    space = Space((), (images, *pixels), (results,), (*taps, 1))
    weight = Walk(w.dtype, (), (), w.strides[:1], (*w.strides[2:], 0), w.offset)
    picture = Walk(x.dtype, (), (x.strides[0], *x.strides[2:]), (), x.strides[1:2], x.offset)
    window = Window(tuple(anchor.x.shape[2:]), anchor.stride, anchor.padding, anchor.dilation)
    work = Products(
        space, Factor(anchor.x, ((anchor.x, picture),)), (weight,), spread(out),
        tuple((leaf, spread(ref)) for leaf, ref in leaves.items()), after, anchor.dtype,
        "highest", window,
        tuple(Sample(n, spread(ref), sampling(n)) for n, ref in samples.items()), tuple(comment),
    )  # fmt: skip
    rows = guess(product((images, *pixels)))
    schedule = kernels.blocks(rows, results, out.strides[1] == 1)
    made = kernels.depthwise(work, schedule, results // anchor.groups)
    call(b, node, made, [out], [x, w, *leaves.values(), *samples.values()])


__all__ = [
    "check", "depthwise", "implicit", "is_depthwise", "may_pool", "prepared", "reads_any_layout",
    "taken_apart",
]  # fmt: skip
