"""group_norm, alone or with the pointwise ops that follow it: one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effc.codegen.cpp.group_norm import Norm, group_norm
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.region import Statements
from effc.ir import Op, Tensor, channels_last, no, row_major, yes
from effc.ir.rewrite import Answer

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.regions import Region, broadcast, check_body
from .lowering import lowers
from .movers import copy_into
from .pointwise import POINTERS, in_place, is_pointwise

NAME = "group_norm"


def concerns(node: Op) -> bool:
    return any(n.name == NAME for n in Region.of(node).nodes)


def check(node: Op, pointwise: Callable[[Op], Answer] = is_pointwise) -> Answer:
    """One group_norm of what the region reads, and pointwise ops over its shape.

    pointwise: whether the target has an expression for the op.
    """
    region = Region.of(node)
    norms = [n for n in region.nodes if n.name == NAME]
    if len(norms) > 1:
        return no("two of {} in one region", NAME, at=norms[1])
    (norm,) = norms
    if norm.x.tensor.rank < 2:
        return no("{} without a channel dimension", NAME, at=norm)
    if len(region.leaves) + len(region.outputs) + 2 > POINTERS:
        return no("{} operands and results, {} fit", len(region.leaves), POINTERS, at=node)
    inputs = {*region.leaves, *region.views()}
    for o in norm.operands:
        if o not in inputs:
            return no("{} before a {} runs in a kernel of its own", o.name, NAME, at=o)
    answer = check_body(region, lambda n: _fits(n, norm, pointwise))
    if not answer:
        return answer
    for o in region.outputs:
        if o.shape != norm.shape:
            return no("an output is not of the shape of the {}", NAME, at=o)
    return yes


def _fits(n: Op, norm: Op, pointwise: Callable[[Op], Answer]) -> Answer:
    if n is norm:
        return yes
    pairs = zip(reversed(n.shape), reversed(norm.shape), strict=False)
    if len(n.shape) > len(norm.shape) or not all(a in (1, s) for a, s in pairs):
        return no("{} is not of the shape of the {}", n.name, NAME, at=n)
    return pointwise(n)


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    norm: Any = next(n for n in region.nodes if n.name == NAME)
    together = _channels_together(norm)
    refs = region.refs(b)
    affine = [None if v is None else refs[v] for v in (norm.weight, norm.bias)]
    read = {o for n in region.computed() if n is not norm for o in n.operands}
    given = {leaf: broadcast(b, r, norm.shape) for leaf, r in refs.items() if leaf in read}
    leaves = {norm.x: _walked(b, node, norm, refs[norm.x], together)}
    leaves |= {leaf: ref for leaf, ref in given.items() if leaf is not norm.x}
    ins = [*leaves.values(), *(r for r in affine if r is not None)]
    outs = in_place(b, node, region, ins) or b.results(node)

    def body(s: Statements, normalised: Any) -> list[Any]:
        s.values[norm] = normalised
        for n in region.computed():
            if n is not norm:
                s.add(n)
        return [s.values[o] for o in region.outputs]

    operands = tuple(_operand(r) for r in (*outs, *leaves.values()))
    weight, bias = (None if r is None else _operand(r) for r in affine)
    made = group_norm(
        Norm(norm.groups, norm.eps, weight, bias, together), Nest(norm.shape, operands),
        list(leaves), len(outs), body, comment=region.comment(b),
    )  # fmt: skip
    b.kernel(made.kernel, node, outs, ins, made.numbers)
    if isinstance(node.type, tuple):
        b.set_results(node, outs)
    else:
        b.set(node, outs[0])


def _operand(ref: Ref) -> Operand:
    return Operand(ref.dtype, ref.strides)


def _channels_together(norm: Any) -> bool:
    """Channels-last, or no pixels beside each other."""
    return norm.x.tensor.layout == channels_last or all(n == 1 for n in norm.x.shape[2:])


def _walked(b: Builder, node: Op, norm: Any, x: Ref, together: bool) -> Ref:
    """x as the kernel walks it: pixels at even steps with channels together, or images in a row."""
    if together and x.shape[1] != 1 and x.strides[1] != 1:
        even = False
    else:
        first = 2 if together else 1
        way = Nest(x.shape[first:], (Operand(x.dtype, x.strides[first:]),)).collapsed()
        even = way.rank == 0 or (way.rank == 1 and (together or way.operands[0].strides[0] == 1))
    if even:
        return x
    t = Tensor(x.shape, x.dtype, channels_last if together else row_major)
    root = b.new_root("arena", node, t)
    copy_into(b, node, whole(root), x, note=f"packed as {t.layout.name}")
    return whole(root)


lowers(NAME, check=check)(lower)
