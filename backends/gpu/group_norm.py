"""group_norm, alone or with the pointwise ops that follow it: rows of a group's elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.cpp.program import F32, F64, Value
from effc.codegen.triton.rows import RowProgram
from effc.ir import Op
from effc.ir.rewrite import Answer
from effc.ir.symbols import floordiv

from ..cpu import group_norm
from ..cpu.group_norm import NAME, concerns
from ..cpu.pointwise import in_place
from ..cpu.rows import Space
from ..plan.builder import Builder
from ..plan.memory import Ref, expanded, reshaped
from ..plan.regions import Region, broadcast, layout_order
from . import rows
from .lowering import lowers
from .pointwise import is_pointwise


def check(node: Op) -> Answer:
    return group_norm.check(node, is_pointwise)


def lower(b: Builder, node: Op) -> None:
    """[N, C, *] is walked as [N, groups, C / groups, *]; a row is all but the first two."""
    region = Region.of(node)
    norm: Any = next(n for n in region.nodes if n.name == NAME)
    refs = region.refs(b)
    read = {o for n in region.computed() if n is not norm for o in n.operands} | {norm.x}
    leaves: dict[Any, Ref] = {
        leaf: _split(broadcast(b, r, norm.shape), norm.groups)
        for leaf, r in refs.items() if leaf in read
    }  # fmt: skip
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            column = reshaped(refs[value], (norm.shape[1], *(1,) * (len(norm.shape) - 2)))
            assert column is not None
            leaves[name] = _split(expanded(column, norm.shape), norm.groups)
    ins = list(leaves.values())
    outs = in_place(b, node, region, ins) or b.results(node)

    def body(p: RowProgram) -> Sequence[Value]:
        x, work = p.nodes[norm.x], F64 if norm.dtype.name == "f64" else F32
        weight, bias = (p.nodes.get(name) for name in ("weight", "bias"))
        p.nodes[norm] = rows.normalised(p, x, work, norm.eps, True, weight, bias)
        for n in region.computed():
            if n is not norm:
                p.pointwise(n)
        return [p.nodes[o] for o in region.outputs]

    shown = [_split(out, norm.groups) for out in outs]
    space = Space(shown[0].shape, tuple(range(2, len(norm.shape) + 1)))
    order = layout_order(norm.x.tensor)
    given = [(leaf, leaf is norm.x or any(s != 0 for s in ref.strides[2:]))
             for leaf, ref in leaves.items()]  # fmt: skip
    rows.call(b, node, space, shown, outs, given, ins,
              [0, 1, *(2 if d == 1 else d + 1 for d in order if d != 0)], body,
              region.comment(b), few=True)  # fmt: skip
    if isinstance(node.type, tuple):
        b.set_results(node, outs)
    else:
        b.set(node, outs[0])


def _split(x: Ref, groups: int) -> Ref:
    """[N, C, *] as [N, groups, C / groups, *]."""
    n, c, *rest = x.shape
    image, channel, *steps = x.strides
    width = floordiv(c, groups)
    strides = (image, channel * width, channel, *steps)
    return x.with_(shape=(n, groups, width, *rest), strides=strides)


lowers(NAME, check=check)(lower)

__all__ = ["check", "concerns", "lower"]
