"""batch_norm: pointwise with a scale for each channel."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.program import F32, F64
from effc.codegen.triton.pointwise import loop_nest
from effc.codegen.triton.tile import Tile

from ..cpu.norms import batch_norm_refs, has_channels
from ..plan.builder import Builder
from ..plan.regions import Region, layout_order
from .lowering import call, lowers, offsets


@lowers("batch_norm", check=has_channels)
def _batch_norm(b: Builder, node: Any) -> None:
    """x * (weight / sqrt(var + eps)) + (bias - mean * that), as torch computes it."""
    (out,) = b.results(node)
    refs = batch_norm_refs(b, node)
    work = F64 if node.dtype.name == "f64" else F32

    def body(t: Tile, axes: Any) -> list[Any]:
        v = {name: t.values[name][0] for name in refs}
        scale, _ = t.let(work, f"fn.reciprocal(fn.sqrt({v['var']} + {node.eps!r}))")
        if "weight" in v:
            scale, _ = t.let(work, f"{scale} * {v['weight']}")
        shift, _ = t.let(work, f"{v.get('bias', '0.0')} - {v['mean']} * {scale}")
        return [t.let(work, f"{v['x']} * {scale} + {shift}")]

    ins = list(refs.values())
    nest = Nest(node.shape, tuple(Operand(r.dtype, r.strides) for r in (out, *ins)))
    made = loop_nest(
        nest.collapsed(layout_order(node.tensor)), list(refs), 1, body, kind="batch_norm",
        offsets=offsets([out, *ins]), comment=Region.of(node).comment(b),
    )  # fmt: skip
    call(b, node, made, [out], ins)
    b.set(node, out)
