"""Products with what goes before and after them: one kernel.

Before: pointwise ops on the left factor that are cheap to compute again for every tile that reads
it. After: pointwise ops of the result's shape, over leaves that broadcast; at the end perhaps a
pixel shuffle or a change of layout, which only say where elements are stored. Two linear layers of
one value whose results are joined by pointwise ops are two sums over one left factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from effc.codegen.triton.products import Factor, Products
from effc.codegen.triton.tile import Element, Tile
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import product

from ..cpu.anchored import sources_of
from ..cpu.pointwise import POINTERS
from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.moves import channels_split, pixels_split
from ..plan.regions import Region, broadcast, check_body
from . import convolution, products
from .lowering import lowers
from .pointwise import is_pointwise
from .products import Anchor

MAKERS = {
    "linear": products.linear, "matmul": products.matmul, "conv1d": convolution.implicit,
    "conv2d": convolution.implicit, "conv3d": convolution.implicit,
}  # fmt: skip
CHECKS = {name: convolution.check if name[:4] == "conv" else products.is_product for name in MAKERS}
STORES = ("pixel_shuffle", "to_layout")


@dataclass(frozen=True)
class Parts:
    """A region's nodes by what they do. shuffle: of the stores at the end, None without one."""

    anchors: tuple[Any, ...]
    before: tuple[Op, ...]
    rest: tuple[Op, ...]
    stores: tuple[Op, ...]
    result: Op  # the last node that is computed

    @property
    def shuffle(self) -> Any:
        return next((n for n in self.stores if n.name == "pixel_shuffle"), None)

    @staticmethod
    def of(region: Region) -> Parts:
        computed = region.computed()
        anchors = tuple(n for n in computed if n.name in MAKERS)
        stores: list[Op] = []
        last = region.outputs[0]
        while last.name in STORES and last in computed:
            stores.insert(0, last)
            last = last.operands[0]
        above = sources_of(left_of(anchors[0])) | {left_of(anchors[0])}
        before = tuple(n for n in computed if n in above and n not in anchors)
        known = {*anchors, *before, *stores}
        rest = tuple(n for n in computed if n not in known)
        return Parts(anchors, before, rest, tuple(stores), last)


def left_of(anchor: Any) -> Op:
    return anchor.a if anchor.name == "matmul" else anchor.x


# ------------------------------------------------------------------ what is taken


def concerns(node: Op) -> bool:
    return any(n.name in MAKERS for n in Region.of(node).nodes)


def check(node: Op) -> Answer:
    region = Region.of(node)
    if len(region.outputs) != 1:
        return no("{} results; a product gives one", len(region.outputs), at=node)
    if len(region.leaves) + 1 > POINTERS:
        return no("{} operands and results, {} fit", len(region.leaves) + 1, POINTERS, at=node)
    parts = Parts.of(region)
    for anchor in parts.anchors:
        if not (answer := CHECKS[anchor.name](anchor)):
            return answer
    answer = check_body(region, lambda n: _fits(n, parts))
    return answer and _pair(parts) and _before(region, parts) and _stores(parts)


def _fits(n: Op, parts: Parts) -> Answer:
    anchor = parts.anchors[0]
    if n in parts.anchors or n in parts.stores:
        return yes
    if n in parts.before:
        return is_pointwise(n)
    if n.shape != anchor.shape and any(a in sources_of(n) for a in parts.anchors):
        return no("{} is not of the shape of the {}", n.name, anchor.name, at=n)
    return is_pointwise(n)


def _pair(parts: Parts) -> Answer:
    """Several products in one kernel share the left factor, its rows and their own columns."""
    first, *others = parts.anchors
    for other in others:
        alike = other.name == first.name == "linear" and other.type == first.type
        if len(parts.anchors) > 2 or not alike or other.x is not first.x:
            return no("{} and {} are two products", first.name, other.name, at=other)
    return yes


def _before(region: Region, parts: Parts) -> Answer:
    """Nodes before a product are computed for every tile that reads them, and nowhere else."""
    anchor = parts.anchors[0]
    left = left_of(anchor)
    for n in parts.before:
        if n.shape != left.shape:
            return no("{} before a {} is not of its operand's shape", n.name, anchor.name, at=n)
        if any(n in other.operands for other in parts.rest) or n is parts.result:
            return no("{} is also read after the {}", n.name, anchor.name, at=n)
        if anchor.name not in ("linear", "matmul"):
            return no("{} would be computed for every tap of the {}", n.name, anchor.name, at=n)
    inputs = {*region.leaves, *region.views()}
    for a in parts.anchors:
        for i, o in enumerate(a.operands):
            if o not in inputs and (i or o not in parts.before):
                return no("only what a {} reads first is computed in its kernel", a.name, at=o)
    if parts.before and not cheap_again(anchor):
        return no("what is before the {} would be computed again by too many tiles", anchor.name,
                  at=parts.before[0])  # fmt: skip
    return yes


FEW_ROWS, FEW_COLUMNS = 64, 512


def cheap_again(anchor: Any) -> bool:
    """Few rows, where memory bounds the product; or few tiles that read each row."""
    columns = anchor.shape[-1]
    rows = product(anchor.shape[:-1])
    return (isinstance(rows, int) and rows <= FEW_ROWS) or (
        isinstance(columns, int) and columns <= FEW_COLUMNS
    )


def _stores(parts: Parts) -> Answer:
    anchor, shuffle = parts.anchors[0], parts.shuffle
    if [n.name for n in parts.stores] not in ([], *([n] for n in STORES), list(STORES)):
        return no("only one pixel_shuffle and one to_layout end a region", at=parts.stores[0])
    if shuffle is not None and (anchor.name != "conv2d" or anchor.groups != 1):
        return no("a pixel_shuffle after a {}", anchor.name, at=shuffle)
    return yes


# ------------------------------------------------------------------ lowering

_BIAS = "bias"  # with its anchor: stands for the bias among leaves, which are nodes


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    parts = Parts.of(region)
    refs = region.refs(b)
    (out,) = b.results(node)
    if product(node.shape) == 0:  # sizes of 0 make steps of 0, and there is nothing to add
        b.target.fill(b, node, out, 0.0)
        b.set(node, out)
        return
    done, comment = partial(after, parts=parts), region.comment(b)
    if parts.anchors[0].name[:4] == "conv":
        outer = dict(zip(region.leaves, region.operands, strict=True))
        convolution.prepared(b, parts.anchors[0], refs, outer)
    if convolution.is_depthwise(parts.anchors[0]):
        leaves = _leaves(b, parts, refs)
        convolution.depthwise(b, node, parts.anchors[0], refs, out, leaves, done, comment)
        b.set(node, out)
        return
    anchors = [MAKERS[a.name](b, a, refs) for a in parts.anchors]
    first = anchors[0]
    leaves = _leaves(b, parts, refs)
    shown = out
    if parts.shuffle is not None:
        factor = parts.shuffle.factor
        first = convolution.taken_apart(first, factor)
        shown = pixels_split(out, factor)
        leaves = {leaf: channels_split(ref, factor) for leaf, ref in leaves.items()}
    read = _left(first, b, parts, refs)
    walks = tuple((leaf, first.factor(ref)) for leaf, ref in read.items())
    work = Products(
        first.space, Factor(left_of(first.node), walks, parts.before),
        tuple(a.right_walk for a in (first, *anchors[1:])),
        first.spread(shown), tuple((leaf, first.spread(ref)) for leaf, ref in leaves.items()),
        done, first.node.dtype, products.precision(b), first.window, tuple(comment),
    )  # fmt: skip
    factors = [*read.values(), *(a.right for a in anchors)]
    products.launch(b, node, work, out, factors, list(leaves.values()))
    b.set(node, out)


def _leaves(b: Builder, parts: Parts, refs: Mapping[Op, Ref]) -> dict[Any, Ref]:
    """What is read after the sums, along the result's shape; each anchor's bias among it."""
    t = parts.anchors[0].tensor
    read = {o for n in parts.rest for o in n.operands}
    found: dict[Any, Ref] = {
        leaf: broadcast(b, r, t.shape) for leaf, r in refs.items() if leaf in read
    }
    for anchor in parts.anchors:
        if getattr(anchor, "bias", None) is not None:
            bias = refs[anchor.bias]
            channel = 1 if anchor.name[:4] == "conv" else t.rank - 1
            strides = tuple(bias.strides[0] if a == channel else 0 for a in range(t.rank))
            found[_BIAS, anchor] = bias.with_(shape=t.shape, strides=strides)
    return found


def _left(anchor: Anchor, b: Builder, parts: Parts, refs: Mapping[Op, Ref]) -> dict[Op, Ref]:
    """What the left factor is made of."""
    value = left_of(anchor.node)
    if not parts.before:
        return {value: refs[value]}
    read = {o for n in parts.before for o in n.operands}
    return {leaf: broadcast(b, r, value.shape) for leaf, r in refs.items() if leaf in read}


def after(t: Tile, sums: list[Element], parts: Parts) -> Element:
    """The pointwise nodes on the sums; 16-bit elements are sums in float32 here."""
    for anchor, (name, kept) in zip(parts.anchors, sums, strict=True):
        if (_BIAS, anchor) in t.values:
            name, _ = t.let(kept, f"{name} + {t.values[_BIAS, anchor][0]}")
        t.values[anchor] = name, anchor.dtype
    for node in parts.rest:
        t.add(node)
    return t.values[parts.result]


for _name in MAKERS:
    lowers(_name, check=check)(lower)

__all__ = ["check", "concerns", "lower"]
