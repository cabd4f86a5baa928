"""batch_norm: pointwise with a scale for each channel."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import loop_nest
from effc.codegen.cpp.program import F32, F64
from effc.codegen.cpp.region import Statements
from effc.codegen.cpp.scalar import literal, register
from effc.ir import no, yes
from effc.ir.rewrite import Answer

from ..plan.builder import Builder
from ..plan.memory import Ref, expanded, reshaped
from ..plan.regions import Region, layout_order
from .lowering import lowers


def has_channels(node: Any) -> Answer:
    if node.x.tensor.rank < 2:
        return no("{} without a channel dimension", node.name, at=node)
    return yes


def batch_norm_refs(b: Builder, node: Any) -> dict[str, Ref]:
    """The operands by name, walked along the shape of x."""
    shape = node.shape
    refs: dict[str, Ref] = {"x": b.ref(node.x)}
    for name in ("mean", "var", "weight", "bias"):
        value = getattr(node, name)
        if value is not None:
            column = reshaped(b.ref(value), (shape[1], *(1,) * (len(shape) - 2)))
            assert column is not None
            refs[name] = expanded(column, shape)
    return refs


@lowers("batch_norm", check=has_channels)
def _batch_norm(b: Builder, node: Any) -> None:
    """x * (weight / sqrt(var + eps)) + (bias - mean * that), as torch computes it."""
    (out,) = b.results(node)
    refs = batch_norm_refs(b, node)
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
    nest = Nest(node.shape, operands).collapsed(layout_order(node.tensor))
    made = loop_nest(nest, list(refs), 1, body, kind="batch_norm",
                     comment=Region.of(node).comment(b))  # fmt: skip
    b.kernel(made.kernel, node, [out], list(refs.values()), made.numbers)
    b.set(node, out)
