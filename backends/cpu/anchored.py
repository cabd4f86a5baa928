"""Regions around one library routine: the routine, then one kernel in place on its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import pointwise
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer

from ..plan.builder import Builder
from ..plan.memory import Root, whole
from ..plan.moves import channels_split, order_of, pixels_split
from ..plan.regions import Region, broadcast, check_body, layout_order
from . import library, products
from .library import ANCHORS, Inside
from .operands import Product
from .pointwise import is_pointwise


def concerns(node: Op) -> bool:
    return any(n.name in ANCHORS for n in Region.of(node).nodes)


def check(node: Op) -> Answer:
    """One routine, pointwise ops of its shape after it, and perhaps a pixel shuffle at the end."""
    region = Region.of(node)
    anchors = [n for n in region.nodes if n.name in ANCHORS]
    if len(anchors) > 1:
        return no("{} and {} are two library routines", anchors[0].name, anchors[1].name,
                  at=anchors[1])  # fmt: skip
    (anchor,) = anchors
    answer = library.check(anchor)
    if not answer:
        return answer
    inputs = {*region.leaves, *region.views()}
    for o in anchor.operands:
        if o not in inputs:
            return no("{} before a {} runs in a kernel of its own", o.name, anchor.name, at=o)
    if len(region.outputs) != 1:
        return no("{} results; a {} gives one", len(region.outputs), anchor.name, at=node)
    shuffle = _shuffle(region)
    answer = check_body(region, lambda n: _fits(n, anchor, shuffle))
    if answer and anchor is region.outputs[0]:
        return no("nothing follows the {}", anchor.name, at=anchor)
    return answer


def _fits(n: Op, anchor: Op, shuffle: Op | None) -> Answer:
    if n is anchor or n is shuffle:
        return yes
    if n.shape != anchor.shape and anchor in sources_of(n):
        return no("{} is not of the shape of the {}", n.name, anchor.name, at=n)
    return is_pointwise(n)


def sources_of(node: Op) -> set[Op]:
    """All that a node is computed from."""
    found: set[Op] = set()
    stack = [node]
    while stack:
        for o in stack.pop().operands:
            if o not in found:
                found.add(o)
                stack.append(o)
    return found


def _shuffle(region: Region) -> Any:
    last = region.outputs[0]
    return last if last.name == "pixel_shuffle" and last.operands[0] in region.nodes else None


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    anchor = next(n for n in region.nodes if n.name in ANCHORS)
    shuffle = _shuffle(region)
    outer = dict(zip(region.leaves, region.operands, strict=True))
    rest = [n for n in region.computed() if n is not anchor and n is not shuffle]
    product = products.find(b, anchor, outer)
    if product is not None:
        _on_sums(b, node, region, anchor, product, outer, rest, shuffle)
        return
    inside = _inside(b, region, anchor, outer, rest)
    root = library.anchor(b, anchor, outer, node, inside)
    if inside:
        rest.remove(inside.node)
    done = inside.node if inside else anchor
    if not rest and shuffle is None:
        b.set(node, root)
        return
    _epilogue(b, node, region, root, done, rest, shuffle)


def _on_sums(
    b: Builder, node: Op, region: Region, anchor: Any, product: Product, outer: Mapping[Op, Op],
    rest: list[Op], shuffle: Any,
) -> None:  # fmt: skip
    """Our own product, what follows computed on its sums; a pixel shuffle in a kernel after it."""
    leaves = region.refs(b, [o for n in rest for o in n.operands])
    result = region.outputs[0] if shuffle is None else shuffle.x
    comment = region.comment(b)
    out = products.lower(b, node, anchor, product, outer, leaves, rest, result, comment)
    if shuffle is None:
        b.set(node, out)
    else:
        _epilogue(b, node, region, out.root, result, [], shuffle)


def _inside(b: Builder, region: Region, anchor: Op, outer: Any, rest: list[Op]) -> Inside | None:
    """The one op that the routine computes itself, if all that follows reads only its result."""
    readers = [n for n in region.nodes if anchor in n.operands]
    if len(readers) != 1 or anchor in region.outputs or readers[0] not in rest:
        return None
    return library.inside_of(readers[0], anchor, outer) if library.takes_inside(
        b, anchor, outer
    ) else None  # fmt: skip


def _epilogue(
    b: Builder, node: Op, region: Region, root: Root, done: Op, rest: list[Op], shuffle: Any
) -> None:
    shape = done.shape
    read = [o for n in rest for o in n.operands]
    result = region.outputs[0] if shuffle is None else shuffle.x
    refs = {leaf: broadcast(b, ref, shape) for leaf, ref in region.refs(b, read).items()}
    root.read_by_kernels = True
    refs[done] = whole(root)
    if shuffle is None and node.tensor.dtype == root.dtype:
        out = shown = refs[done]
    else:
        (out,) = b.results(node)
        shown = out
    if shuffle is not None:
        shown = pixels_split(out, shuffle.factor)
        refs = {leaf: channels_split(ref, shuffle.factor) for leaf, ref in refs.items()}
    operands = tuple(Operand(r.dtype, r.strides) for r in (shown, *refs.values()))
    order = order_of(shown) if shuffle else layout_order(done.tensor)
    nest = Nest(shown.shape, operands).collapsed(order)
    made = pointwise(nest, list(refs), rest, [result], comment=region.comment(b))
    b.kernel(made.kernel, node, [out], list(refs.values()), made.numbers)
    b.set(node, out)
