"""`linear` and `matmul` with a matrix, in half and bf16, with the pointwise ops that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.region import Statements
from effc.codegen.cuda.kernel import Schedule
from effc.codegen.cuda.product import SCHEDULES, Matrix, product, schedule_of
from effc.ir import Op, no, yes
from effc.ir.rewrite import Answer
from effc.ir.types import row_major

from ..cpu.pointwise import is_pointwise
from ..gpu import anchored, codes
from ..gpu.anchored import Parts, left_of
from ..gpu.lowering import Candidate, choose
from ..gpu.products import GUESS, device
from ..plan.builder import Builder
from ..plan.memory import Ref, permuted, whole
from ..plan.regions import Region, broadcast, check_body
from .lowering import call, prefer

DTYPES = ("f16", "bf16")
OPS = ("linear", "matmul")
_BIAS: Any = "bias"  # stands for the anchor's bias among leaves, which are nodes


def concerns(node: Op) -> bool:
    return any(n.name in OPS for n in Region.of(node).nodes)


def check(node: Op) -> Answer:
    if codes.concerns(node):
        return no("its weight is read as codes", at=node)
    answer = anchored.check(node)
    if not answer:
        return answer
    region = Region.of(node)
    parts = Parts.of(region)
    if len(parts.anchors) > 1 or parts.before or parts.stores:
        return no("only what follows one product is computed in its CUDA kernel", at=node)
    (anchor,) = parts.anchors
    if anchor.name not in OPS or anchor.tensor.dtype.name not in DTYPES:
        return no("{} of {} has no CUDA kernel", anchor.name, anchor.tensor.dtype, at=anchor)
    if anchor.name == "matmul" and (anchor.b.tensor.rank != 2 or anchor.a.tensor.rank < 2):
        return no("a batched matmul has no CUDA kernel", at=anchor)
    if parts.result.tensor.layout != row_major:
        return no("a result in another layout has no CUDA kernel", at=parts.result)
    return check_body(region, lambda n: yes if n is anchor else is_pointwise(n))


def lower(b: Builder, node: Op) -> None:
    region = Region.of(node)
    parts, refs = Parts.of(region), region.refs(b)
    anchor: Any = parts.anchors[0]
    shape = anchor.shape
    x, left = _rows_of(b, left_of(anchor), refs)
    w, right = _weight(b, anchor, refs)
    b.must_equal((x.shape[-1], w.shape[1]))
    read = {o for n in parts.rest for o in n.operands}
    leaves = {leaf: broadcast(b, r, shape) for leaf, r in refs.items() if leaf in read}
    bias = getattr(anchor, "bias", None)
    if bias is not None:
        strides = (0,) * (len(shape) - 1) + refs[bias].strides
        leaves[_BIAS] = refs[bias].with_(shape=shape, strides=strides)
    (out,) = b.results(node)

    def body(s: Statements, total: tuple[str, Any, bool]) -> Any:
        text = total[0] if bias is None else f"{total[0]} + {s.values[_BIAS][0]}"
        s.values[anchor] = s.let(anchor.dtype, text, True)
        for n in parts.rest:
            s.add(n)
        return s.values[parts.result]

    walked = (out, *leaves.values())
    nest = Nest(shape, tuple(Operand(r.dtype, r.strides) for r in walked))

    def by(schedule: Schedule) -> Callable[[Builder], None]:
        def launch(b: Builder) -> None:
            made = product(
                nest, w.shape[1], left, right, list(leaves), body, by=schedule,
                offsets=[r.offset for r in walked], comment=region.comment(b),
            )  # fmt: skip
            call(b, node, made, [out], [x, w, *leaves.values()])

        return launch

    choose(b, _candidates(schedule_of(nest, device(b).units), by), GUESS)
    b.set(node, out)


def _candidates(
    first: Schedule, by: Callable[[Schedule], Callable[[Builder], None]]
) -> list[Candidate]:
    """The schedule that is taken unmeasured, then the others, those like it first."""
    at = SCHEDULES.index(first)
    near = sorted(SCHEDULES, key=lambda s: abs(SCHEDULES.index(s) - at))
    return [Candidate("mma.sync", s, 1.0 + i / 10, by(s)) for i, s in enumerate(near)]


def _rows_of(b: Builder, value: Op, refs: dict[Op, Ref]) -> tuple[Ref, Matrix]:
    """The left factor with rows at equal steps, copied where it does not lie so."""
    x = refs[value]
    rows = _lead(x)
    if rows.rank > 1 or not _unit(x, -1):
        x = _packed(b, value, x)
        rows = _lead(x)
    return x, Matrix(x.dtype, rows.operands[0].strides[-1] if rows.rank else 0, x.offset)


def _lead(x: Ref) -> Nest:
    """Everything but the last dimension, in as few dimensions as its strides allow."""
    return Nest(x.shape[:-1], (Operand(x.dtype, x.strides[:-1]),)).collapsed()


def _weight(b: Builder, anchor: Any, refs: dict[Op, Ref]) -> tuple[Ref, Matrix]:
    """The right factor as [columns of the result, depth], lying by rows or by columns."""
    value = anchor.w if anchor.name == "linear" else anchor.b
    w = refs[value]
    if not (_unit(w, 0) or _unit(w, 1)):
        w = _packed(b, value, w)
    if anchor.name == "matmul":
        w = permuted(w, (1, 0))
    turned = not _unit(w, 1)
    return w, Matrix(w.dtype, w.strides[int(turned)], w.offset, turned)


def _unit(ref: Ref, axis: int) -> bool:
    return ref.strides[axis] == 1 or ref.shape[axis] == 1


def _packed(b: Builder, value: Op, ref: Ref) -> Ref:
    root = b.new_root("arena", value, value.tensor.with_(layout=row_major))
    b.target.copy_into(b, value, whole(root), ref, note="packed for a product")
    return whole(root)


for _name in OPS:
    prefer(_name, check, lower, lambda node: True)

__all__ = ["check", "concerns", "lower"]
