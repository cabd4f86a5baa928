"""group_norm, a row kernel over groups; and batch_norm, pointwise with a scale for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import loop_nest
from effc.codegen.cpp.program import F32, F64, Program, Value
from effc.codegen.cpp.region import Statements
from effc.codegen.cpp.scalar import literal, register
from effc.ir import channels_last, no, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import floordiv

from .builder import Builder
from .lowering import lowers
from .memory import Ref, expanded, reshaped
from .regions import Region, layout_order
from .rows import Space, call, normalised


def _has_channels(node: Any) -> Answer:
    if node.x.tensor.rank < 2:
        return no("{} without a channel dimension", node.name, at=node)
    return yes


@lowers("group_norm", check=_has_channels)
def _group_norm(b: Builder, node: Any) -> None:
    """x [N, G, C / G, *] is normalised over all but the first two dimensions."""
    n, c, *rest = node.x.shape
    inner = floordiv(c, node.groups)
    space = Space((n, node.groups, inner, *rest), tuple(range(2, 3 + len(rest))))
    (out,) = b.results(node)
    x = _split(b.ref(node.x), space)
    shown = _split(out, space)
    leaves: list[tuple[Any, bool]] = [("x", True)]
    refs = [x]
    for name in ("weight", "bias"):
        value = getattr(node, name)
        if value is not None:
            per_channel = reshaped(b.ref(value), (node.groups, inner, *(1,) * len(rest)))
            assert per_channel is not None
            refs.append(expanded(per_channel, space.shape))
            leaves.append((name, True))
    work = F64 if node.dtype.name == "f64" else F32

    def body(p: Program) -> Sequence[Value]:
        y = normalised(
            p, p.nodes["x"], work, node.eps, True, p.nodes.get("weight"), p.nodes.get("bias")
        )
        return [y]

    order = list(range(len(space.shape)))
    if node.x.tensor.layout == channels_last:
        order = [0, *order[3:], 1, 2]
    call(b, node, space, [shown], [out], leaves, refs, order, body, Region.of(node).comment(b))
    b.set(node, out)


def _split(x: Ref, space: Space) -> Ref:
    """[N, C, *] as [N, G, C / G, *]."""
    step = x.strides[1]
    strides = (x.strides[0], step * space.shape[2], step, *x.strides[2:])
    return x.with_(shape=space.shape, strides=strides)


@lowers("batch_norm", check=_has_channels)
def _batch_norm(b: Builder, node: Any) -> None:
    """x * (weight / sqrt(var + eps)) + (bias - mean * that), as torch computes it."""
    shape = node.shape
    (out,) = b.results(node)
    refs: dict[str, Ref] = {"x": b.ref(node.x)}
    for name in ("mean", "var", "weight", "bias"):
        value = getattr(node, name)
        if value is not None:
            column = reshaped(b.ref(value), (shape[1], *(1,) * (len(shape) - 2)))
            assert column is not None
            refs[name] = expanded(column, shape)
    work = F64 if node.dtype.name == "f64" else F32
    kind = register(work)

    def body(s: Statements) -> list[Any]:
        v = {name: s.values[name][0] for name in refs}
        per = s.values["mean"][2]
        scale = s.let(work, f"{kind}(1) / effc::sqrt({v['var']} + {literal(node.eps, work)})", per)
        if "weight" in v:
            scale = s.let(work, f"{scale[0]} * {v['weight']}", per)
        shift = s.let(work, f"{v.get('bias', literal(0, work))} - {v['mean']} * {scale[0]}", per)
        s.work += 8 if per else 2
        return [s.let(work, f"{v['x']} * {scale[0]} + {shift[0]}", True)]

    operands = tuple(Operand(r.dtype, r.strides) for r in (out, *refs.values()))
    nest = Nest(shape, operands).collapsed(layout_order(node.tensor))
    made = loop_nest(nest, list(refs), 1, body, kind="batch_norm",
                     comment=Region.of(node).comment(b))  # fmt: skip
    b.kernel(made.kernel, node, [out], list(refs.values()), made.numbers)
    b.set(node, out)
