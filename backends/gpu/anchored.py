"""Products with what goes before and after them: one kernel.

Before: pointwise ops on the left factor that are cheap to compute again for every tile that reads
it; for a convolution a change of layout, which only says how its picture is read, or the pooling of
a small picture. After: pointwise ops of the result's shape, over leaves that broadcast and over
pictures that are enlarged to it; at the end perhaps a pixel shuffle or a change of layout, which
only say where elements are stored. Two linear layers of one value whose results are joined by
pointwise ops are two sums over one left factor. A 1x1 convolution of what a convolution becomes is
a second product in the same kernel, where tensor cores multiply what a tile holds in registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from effc.codegen.triton.products import Chain, Factor, Pooled, Products, Sample
from effc.codegen.triton.tile import Element, Tile
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import product

from ..cpu.anchored import sources_of
from ..cpu.images import interpolate_check
from ..cpu.pointwise import POINTERS
from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.moves import channels_split, pixels_split
from ..plan.regions import Region, broadcast, check_body
from . import convolution, products
from .images import sampling, window_of
from .lowering import lowers
from .pointwise import is_pointwise
from .products import Anchor

MAKERS = {
    "linear": products.linear, "matmul": products.matmul, "conv1d": convolution.implicit,
    "conv2d": convolution.implicit, "conv3d": convolution.implicit,
}  # fmt: skip
CHECKS = {name: convolution.check if name[:4] == "conv" else products.is_product for name in MAKERS}
STORES = ("pixel_shuffle", "to_layout")
PICTURES = ("to_layout", "max_pool2d", "avg_pool2d")


@dataclass(frozen=True)
class Parts:
    """A region's nodes by what they do. shuffle: of the stores at the end, None without one.

    picture: the node before a convolution. samples: pictures enlarged for what follows. inner: the
    same of the convolution whose result the anchor, a 1x1 one, takes in the same kernel.
    """

    anchors: tuple[Any, ...]
    before: tuple[Op, ...]
    rest: tuple[Op, ...]
    stores: tuple[Op, ...]
    result: Op  # the last node that is computed
    samples: tuple[Any, ...] = ()
    picture: Any = None
    inner: Parts | None = None

    @property
    def nodes(self) -> set[Any]:
        """All but those of the inner parts."""
        own = (*self.anchors, *self.before, *self.rest, *self.stores, *self.samples, self.picture)
        return {n for n in own if n is not None}

    @property
    def shuffle(self) -> Any:
        return next((n for n in self.stores if n.name == "pixel_shuffle"), None)

    @staticmethod
    def of(region: Region) -> Parts:
        computed = region.computed()
        anchors = tuple(n for n in computed if n.name in MAKERS)
        if len(anchors) == 2 and anchors[1].name == "conv2d":
            link = anchors[1]
            above = sources_of(link.x) | {link.x}
            if anchors[0] in above:
                inner = Parts.among([n for n in computed if n in above], anchors[:1], link.x)
                outer = [n for n in computed if n not in above]
                return replace(Parts.among(outer, (link,), region.outputs[0]), inner=inner)
        return Parts.among(computed, anchors, region.outputs[0])

    @staticmethod
    def among(computed: Sequence[Op], anchors: tuple[Any, ...], last: Op) -> Parts:
        stores: list[Op] = []
        while last.name in STORES and last in computed:
            stores.insert(0, last)
            last = last.operands[0]
        above = sources_of(left_of(anchors[0])) | {left_of(anchors[0])}
        before = tuple(n for n in computed if n in above and n not in anchors)
        picture = None
        if len(before) == 1 and before[0].name in PICTURES and anchors[0].name == "conv2d":
            (picture,), before = before, ()
        samples = tuple(n for n in computed if n.name == "interpolate" and n not in before)
        known = {*anchors, *before, *stores, *samples, picture}
        rest = tuple(n for n in computed if n not in known)
        return Parts(anchors, before, rest, tuple(stores), last, samples, picture)


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
    if parts.inner is None:
        return _check(region, parts)
    return _check(region, parts.inner) and _check(region, parts) and _chain(parts.inner, parts)


def _check(region: Region, parts: Parts) -> Answer:
    for anchor in parts.anchors:
        if not (answer := CHECKS[anchor.name](anchor)):
            return answer
    answer = check_body(region, lambda n: _fits(n, parts) if n in parts.nodes else yes)
    answer = answer and _pair(parts) and _before(region, parts) and _picture(region, parts)
    return answer and _samples(region, parts) and _stores(parts)


def _chain(first: Parts, second: Parts) -> Answer:
    """Two products in a row: a tile holds all columns of both."""
    (conv,), (link,) = first.anchors, second.anchors
    if conv.name != "conv2d" or conv.groups > 1 or first.stores:
        return no("a {} after a {} in one kernel", link.name, conv.name, at=link)
    if convolution.has_window(link) or any(s != 1 for s in link.stride) or link.groups > 1:
        return no("the second {} is not 1x1", link.name, at=link)
    if link.tensor.dtype.bits != 16:
        return no("{} elements of a tile are not multiplied again", link.dtype, at=link)
    if max(link.w.shape[:2]) > CHAINED:
        return no("{} to {} channels are more than a tile holds", *link.w.shape[1::-1], at=link)
    if second.shuffle is not None:
        return no("a pixel_shuffle after two products", at=second.shuffle)
    for n in (*second.rest, *second.samples):
        if any(o in first.nodes for o in n.operands):
            return no("what the {} reads is also read after it", link.name, at=n)
    return yes


CHAINED = 64  # columns: with more, tiles are so low that factors are read more often than with two


def _fits(n: Op, parts: Parts) -> Answer:
    anchor = parts.anchors[0]
    if n in parts.anchors or n in parts.stores or n in parts.samples or n is parts.picture:
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
    computed = (*parts.before, parts.picture, parts.inner and parts.inner.result)
    for a in parts.anchors:
        for i, o in enumerate(a.operands):
            if o not in inputs and (i or o not in computed):
                return no("only what a {} reads first is computed in its kernel", a.name, at=o)
    if parts.before and not cheap_again(anchor):
        return no("what is before the {} would be computed again by too many tiles", anchor.name,
                  at=parts.before[0])  # fmt: skip
    return yes


def _picture(region: Region, parts: Parts) -> Answer:
    """What is before a convolution is read in another way, and nowhere else."""
    picture = parts.picture
    if picture is None:
        return yes
    (anchor,) = parts.anchors
    inputs = {*region.leaves, *region.views()}
    if picture.operands[0] not in inputs:
        return no("{} before the {} is not of a value in memory", picture.name, anchor.name,
                  at=picture)  # fmt: skip
    if picture is parts.result or any(picture in n.operands for n in parts.rest):
        return no("{} is also read after the {}", picture.name, anchor.name, at=picture)
    if picture.name == "to_layout":
        return convolution.reads_any_layout(anchor)
    return convolution.may_pool(anchor, picture)


def _samples(region: Region, parts: Parts) -> Answer:
    """Pictures that are enlarged where what follows reads them."""
    anchor, inputs = parts.anchors[0], {*region.leaves, *region.views()}
    for n in parts.samples:
        if not (answer := interpolate_check(n)):
            return answer
        if anchor.name != "conv2d" or n.shape != anchor.shape:
            return no("{} is not of the shape of a conv2d", n.name, at=n)
        if n.x not in inputs:
            return no("{} enlarges what is computed in the region", n.name, at=n)
        if parts.shuffle is not None:
            return no("{} beside a pixel_shuffle", n.name, at=n)
        if n is parts.result:
            return no("nothing follows the {}", n.name, at=n)
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
    source = parts.inner or parts  # what is summed over the depth
    if source.anchors[0].name[:4] == "conv":
        outer = dict(zip(region.leaves, region.operands, strict=True))
        if source.picture is not None:
            refs[source.picture] = refs[source.picture.operands[0]]
        convolution.prepared(b, source.anchors[0], refs, outer)
    samples = {n: refs[n.x] for n in parts.samples}
    if convolution.is_depthwise(parts.anchors[0]):
        leaves = leaves_of(b, parts, refs)
        convolution.depthwise(
            b, node, parts.anchors[0], refs, out, leaves, samples, done, comment)  # fmt: skip
        b.set(node, out)
        return
    anchors = [MAKERS[a.name](b, a, refs) for a in source.anchors]
    first = last = anchors[0]
    leaves = leaves_of(b, parts, refs)
    chain, between = None, []
    if parts.inner is not None:
        last = MAKERS[parts.anchors[0].name](b, parts.anchors[0], refs)
        chain, between = _chained(b, parts.inner, first, last, refs)
    shown = out
    if parts.shuffle is not None:
        factor = parts.shuffle.factor
        first = last = convolution.taken_apart(first, factor)
        shown = pixels_split(out, factor)
        leaves = {leaf: channels_split(ref, factor) for leaf, ref in leaves.items()}
    read = left_refs(first, b, source, refs)
    walks = tuple((leaf, first.factor(ref)) for leaf, ref in read.items())
    work = Products(
        first.space, Factor(left_of(first.node), walks, source.before, _pooled(source)),
        tuple(a.right_walk for a in (first, *anchors[1:])),
        last.spread(shown), tuple((leaf, last.spread(ref)) for leaf, ref in leaves.items()),
        done, first.node.dtype, products.precision(b), first.window,
        tuple(Sample(n, last.spread(ref), sampling(n)) for n, ref in samples.items()),
        tuple(comment), chain,
    )  # fmt: skip
    factors = [*read.values(), *(a.right for a in anchors)]
    products.launch(b, node, work, out, factors, [*between, *leaves.values(), *samples.values()])
    b.set(node, out)


def _chained(
    b: Builder, inner: Parts, first: Anchor, last: Anchor, refs: Mapping[Op, Ref]
) -> tuple[Chain, list[Ref]]:  # fmt: skip
    """The product before the last one, and the memory that it reads after its sums."""
    leaves, samples = leaves_of(b, inner, refs), {n: refs[n.x] for n in inner.samples}
    chain = Chain(
        last.right_walk, last.node.w.shape[0],
        tuple((leaf, first.spread(ref)) for leaf, ref in leaves.items()),
        tuple(Sample(n, first.spread(ref), sampling(n)) for n, ref in samples.items()),
        partial(after, parts=inner),
    )  # fmt: skip
    return chain, [last.right, *leaves.values(), *samples.values()]


def leaves_of(b: Builder, parts: Parts, refs: Mapping[Op, Ref]) -> dict[Any, Ref]:
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


def left_refs(anchor: Anchor, b: Builder, parts: Parts, refs: Mapping[Op, Ref]) -> dict[Op, Ref]:
    """What the left factor is made of."""
    value = left_of(anchor.node)
    if not parts.before:
        return {value: refs[value]}
    read = {o for n in parts.before for o in n.operands}
    return {leaf: broadcast(b, r, value.shape) for leaf, r in refs.items() if leaf in read}


def _pooled(parts: Parts) -> Pooled | None:
    if parts.picture is None or parts.picture.name == "to_layout":
        return None
    return Pooled(window_of(parts.picture), parts.picture.x.shape[2:])


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

__all__ = ["after", "check", "concerns", "leaves_of", "left_of", "left_refs", "lower"]
