"""Pointwise nodes and regions: one loop nest each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from effc.codegen.cpp import scalar
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import NEVER, pointwise
from effc.codegen.scalar import Language
from effc.ir import Op, no
from effc.ir.ops.pointwise import Pointwise
from effc.ir.rewrite import Answer

from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.regions import Region, broadcast, check_body, layout_order, same_shapes
from .features import CpuFeatures, detect
from .lowering import lowers

POINTERS = 60  # the runner's table of addresses has 64 places


def is_pointwise(node: Op, language: Language = scalar.CPP) -> Answer:
    """Whether the node can be computed element by element in kernels of a language."""
    if not isinstance(node, Pointwise):
        return no("{} is not pointwise", node.name, at=node)
    return language.check(node)


def check(node: Op, language: Language = scalar.CPP) -> Answer:
    region = Region.of(node)
    if len(region.leaves) + len(region.outputs) > POINTERS:
        return no("{} operands and results, {} fit", len(region.leaves), POINTERS, at=node)
    allowed = partial(is_pointwise, language=language)
    return check_body(region, allowed) and same_shapes(region)


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    shape = region.outputs[0].shape
    refs = region.refs(b)
    leaves = {leaf: broadcast(b, ref, shape) for leaf, ref in refs.items()}
    taken = in_place(b, node, region, list(leaves.values()))
    outs = taken or b.results(node)
    operands = [Operand(r.dtype, r.strides) for r in (*outs, *leaves.values())]
    nest = Nest(shape, tuple(operands)).collapsed(layout_order(region.outputs[0].tensor))
    made = pointwise(nest, list(leaves), region.computed(), region.outputs,
                     comment=region.comment(b), far=NEVER if taken else past_caches())  # fmt: skip
    b.kernel(made.kernel, node, outs, list(leaves.values()), made.numbers)
    if isinstance(node.type, tuple):
        b.set_results(node, outs)
    else:
        b.set(node, outs[0])


def past_caches() -> int:
    """Bytes of a result from which on it is written past the caches: half of the last one. Whoever
    reads so large a result finds its beginning gone, as operands took part of the cache too."""
    cpu = detect()
    return (cpu.l3 if isinstance(cpu, CpuFeatures) else 8 << 20) // 2


def in_place(b: Builder, node: Op, region: Region, refs: list[Ref]) -> list[Ref] | None:
    """The memory of an operand that nobody needs any more, where the result fits exactly."""
    if isinstance(node.type, tuple):
        return None
    t = node.tensor
    for operand in region.operands:
        ref = b.held(operand).ref
        if ref is None or not b.free_after(operand, node) or not ref.whole:
            continue
        if (ref.shape, ref.strides) != (t.shape, t.strides) or ref.dtype != t.dtype:
            continue
        if any(r.root is ref.root and r.strides != ref.strides for r in refs):
            continue  # also read in another order: it would be overwritten too early
        if ref.root.kind == "arena" and node in b.escaping:
            continue
        return [ref]
    return None


def kernel(op: str, expression: Callable[..., str]) -> None:
    """Say how a pointwise op of another package is computed.

    expression(node, dtype, *operands) -> a C++ expression of one element; operands are C++
    expressions in the node's compute type, and effc.h has the runtime's functions. The op then
    joins fused regions as ours do.
    """
    scalar.EXPRESSIONS[op] = expression
    lowers(op, check=check)(lower)


for _name in scalar.EXPRESSIONS:
    lowers(_name, check=check)(lower)
