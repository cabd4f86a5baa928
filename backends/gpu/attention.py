"""Attention with the pointwise ops that follow it: one launch, or two where keys are split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy

from effc.codegen.cpp.loops import Operand
from effc.codegen.triton.attention import Attention, attention
from effc.codegen.triton.attention_schedules import GUESS, schedules
from effc.codegen.triton.kernel import Schedule
from effc.codegen.triton.schedules import Choice, Device
from effc.codegen.triton.tile import Element, Tile
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim, floordiv
from effc.ir.types import Tensor, f32

from ..cpu.pointwise import POINTERS
from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.regions import Region, broadcast, check_body
from .lowering import call, choose, lowers, ranked
from .pointwise import is_pointwise
from .products import FEW_ROWS, PAYS, device, extents, guarded, guess, precision

DTYPES = ("f32", "f16", "bf16")
MOST = 256  # of a head's size: the sums of a program stay in registers


def concerns(node: Op) -> bool:
    return any(n.name == "attention" for n in Region.of(node).nodes)


def check(node: Op) -> Answer:
    """One attention, and pointwise ops of its shape after it."""
    region = Region.of(node)
    anchor, *others = (n for n in region.nodes if n.name == "attention")
    if others:
        return no("two attentions in one region", at=others[0])
    if len(region.outputs) != 1:
        return no("{} results; an attention gives one", len(region.outputs), at=node)
    if len(region.leaves) + 5 > POINTERS:
        return no("{} operands, {} fit", len(region.leaves), POINTERS - 5, at=node)
    read = {*region.leaves, *region.views()}
    for o in anchor.operands:
        if o not in read:
            return no("{} before an attention runs in a kernel of its own", o.name, at=o)
    return is_taken(anchor) and check_body(region, lambda n: _fits(n, anchor))


def is_taken(node: Any) -> Answer:
    """Whether a kernel here computes the attention."""
    t, depth = node.tensor, node.q.tensor.shape[-1]
    if t.dtype.name not in DTYPES:
        return no("attention of {} has no kernel", t.dtype, at=node)
    if t.rank > 4:
        return no(
            "{} dimensions before the queries; batch and heads are taken", t.rank - 2, at=node
        )
    for name, size in (("q and k", depth), ("v", t.shape[-1])):
        if not isinstance(size, int):
            return no("the head size of {} is known only at a call", name, at=node)
        if size > MOST:
            return no("a head size of {} is above {}", size, MOST, at=node)
    if node.gqa and t.rank > 2:
        heads, kept = t.shape[-3], node.k.tensor.shape[-3]
        if not (isinstance(heads, int) and isinstance(kept, int)):
            return no("the numbers of heads are known only at a call", at=node)
    return yes


def _fits(n: Op, anchor: Op) -> Answer:
    if n is anchor:
        return yes
    if n.shape != anchor.shape:
        return no("{} is not of the shape of the attention", n.name, at=n)
    return is_pointwise(n)


@lowers("attention", check=check)
def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    refs = region.refs(b)
    anchor: Any = next(n for n in region.nodes if n.name == "attention")
    (result,) = region.outputs
    rest = [n for n in region.computed() if n is not anchor]
    a, reads = problem(b, anchor, refs)
    root = b.own(node, result.tensor, heads_inside(anchor.shape))
    read = {o for n in rest for o in n.operands}
    leaves = {x: _four(broadcast(b, r, anchor.shape)) for x, r in refs.items() if x in read}
    out = _four(whole(root))

    def finish(tile: Tile, average: str) -> Element:
        tile.values[anchor] = average, anchor.dtype
        for n in rest:
            tile.add(n)
        return tile.values[result]

    places = {"y": out, **reads, **{f"x{i}p": r for i, r in enumerate(leaves.values())}}

    def by(r: _Range, schedule: Schedule) -> Callable[[Builder], None]:
        def launch(b: Builder) -> None:
            made = attention(
                a, schedule, Operand(out.dtype, out.strides),
                [(leaf, Operand(r.dtype, r.strides)) for leaf, r in leaves.items()], finish,
                offsets={name: r.offset for name, r in places.items()}, comment=region.comment(b),
            )  # fmt: skip
            first, *then = (guarded(m, r.guard) for m in made)
            said = f"for at most {r.problem.queries} queries" if r.extents else ""
            if not then:
                call(b, node, first, [out], [*reads.values(), *leaves.values()], note=said)
                return
            sums, stats = r.problem.parts(dict(schedule.blocks)["splits"])
            parts = [whole(b.new_root("arena", node, Tensor(s, f32))) for s in (sums, stats, stats)]
            call(b, node, first, parts, list(reads.values()), note=said)
            call(b, node, then[0], [out], [*parts, *leaves.values()], note="joins the parts")

        return launch

    for r in _ranges(a, device(b)):
        found = schedules(r.problem, device(b))
        choose(b, ranked(found, partial(by, r), _method), GUESS, r.extents)
    b.set(node, root)


@dataclass(frozen=True)
class _Range:
    """Some numbers of queries; guard and extents as those of products."""

    problem: Attention
    guard: Dim = 1
    extents: Mapping[Any, int] = field(default_factory=dict)


def _ranges(a: Attention, device: Device) -> list[_Range]:
    """All numbers of queries, apart where only a call knows whether there are few."""
    most = max(1, FEW_ROWS // a.sharing) if isinstance(a.sharing, int) else 1
    if isinstance(a.queries, int) or guess(a.queries, 1) > most:
        return [_Range(a)]
    few = replace(a, queries=most)
    if schedules(a, device)[0].seconds <= PAYS * schedules(few, device)[0].seconds:
        return [_Range(a)]
    many = sympy.Min(1, floordiv(a.queries, most + 1))
    return [_Range(few, 1 - many, extents(a.queries, most)), _Range(a, many)]


def _method(choice: Choice) -> str:
    return "parts of keys" if dict(choice.schedule.blocks)["splits"] > 1 else "all keys"


def problem(
    b: Builder, node: Any, refs: Mapping[Op, Ref]
) -> tuple[Attention, dict[str, Ref]]:  # fmt: skip
    """The attention as kernels see it, and what they read by name."""
    *lead, queries, results = node.tensor.shape
    keys, depth = node.k.tensor.shape[-2:]
    b.must_equal((node.q.shape[-1], depth), (node.v.shape[-2], keys))
    heads: Dim = lead[-1] if lead else 1
    sharing = 1
    if node.gqa and lead and node.k.tensor.shape[-3]:
        sharing = heads // node.k.tensor.shape[-3]
    shared = (*lead[:-1], heads // sharing) if lead else ()
    shapes = {
        "q": (*lead, queries, depth), "k": (*shared, keys, depth), "v": (*shared, keys, results),
        "mask": (*lead, queries, keys),
    }  # fmt: skip
    values = {name: getattr(node, name) for name in shapes if getattr(node, name) is not None}
    reads = {n: _four(broadcast(b, refs[value], shapes[n])) for n, value in values.items()}
    walked = {name: Operand(r.dtype, r.strides) for name, r in reads.items()}
    scale = node.scale if node.scale is not None else depth**-0.5 if depth else 0.0
    batch, kept = reads["k"].shape[:2]
    if node.past is not None:
        reads |= {"past": refs[node.past], "error": whole(b.error_word())}
    found = Attention(
        batch, kept, queries, keys, depth, results, walked["q"], walked["k"], walked["v"],
        walked.get("mask"), sharing, scale, node.causal, precision(b), past=node.past is not None,
    )  # fmt: skip
    return found, reads


def _four(ref: Ref) -> Ref:
    """As [batch, heads, rows, size]."""
    more = 4 - len(ref.shape)
    return ref.with_(shape=(1,) * more + ref.shape, strides=(0,) * more + ref.strides)


def heads_inside(shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """Strides of [batch, rows, heads, size] for [batch, heads, rows, size], as torch gives them:
    what reads the result mostly joins heads and size."""
    if len(shape) != 4:
        return None
    _, heads, rows, size = shape
    return (rows * heads * size, size, heads * size, 1)


__all__ = ["check", "concerns", "is_taken", "lower", "problem"]
