"""Reductions, softmax and norms, alone or with pointwise ops around them: row kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.program import F32, F64, Program, Value
from effc.codegen.cpp.rows import row_kernel
from effc.codegen.cpp.scalar import literal, register
from effc.ir import Op, no, yes
from effc.ir.ops.reduce import Reduction
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim

from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.regions import Region, broadcast, check_body, layout_order
from .lowering import lowers
from .pointwise import is_pointwise, past_caches

REDUCTIONS = ("sum", "mean", "prod", "amax", "amin", "any", "all")
ROW_OPS = (*REDUCTIONS, "softmax", "log_softmax", "layer_norm", "rms_norm")


# ------------------------------------------------------------------ the iteration space


@dataclass(frozen=True)
class Space:
    """Shape that is iterated, and the dimensions that make one row of it."""

    shape: tuple[Dim, ...]
    reduced: tuple[int, ...]

    @property
    def row_shape(self) -> tuple[Dim, ...]:
        """Of a value that has one element a row, reduced dimensions kept."""
        return tuple(1 if i in self.reduced else s for i, s in enumerate(self.shape))

    def is_full(self, shape: tuple[Dim, ...]) -> bool:
        """Whether a value of the shape has an element for each place in a row."""
        lead = len(self.shape) - len(shape)
        if all(self.shape[a] == 1 for a in self.reduced):
            return True
        return any(a >= lead and shape[a - lead] != 1 for a in self.reduced)


def space_of(node: Any) -> Space:
    """The iteration space of an op along rows."""
    shape = node.x.shape
    if isinstance(node, Reduction):
        return Space(shape, node.dims)
    if node.name in ("softmax", "log_softmax"):
        return Space(shape, (node.dim % len(shape),))
    return Space(shape, tuple(range(len(shape) - node.dims, len(shape))))


def is_row_op(node: Any) -> Answer:
    """Whether the op along rows has a kernel, seen by itself."""
    if node.name not in ROW_OPS:
        return no("{} is not an op along rows", node.name, at=node)
    if not node.x.shape:
        return no("{} of a tensor without dimensions", node.name, at=node)
    space = space_of(node)
    if not space.reduced:
        return no("{} over no dimension", node.name, at=node)
    if node.name in ("amax", "amin") and any(space.shape[a] == 0 for a in space.reduced):
        return no("{} of no elements", node.name, at=node)
    return yes


# ------------------------------------------------------------------ regions


def concerns(node: Op) -> bool:
    return any(n.name in ROW_OPS for n in Region.of(node).nodes)


def check(node: Op, pointwise: Callable[[Op], Answer] = is_pointwise) -> Answer:
    """pointwise: whether the target has an expression for the op."""
    region = Region.of(node)
    answer = check_body(region, lambda n: is_row_op(n) if n.name in ROW_OPS else pointwise(n))
    if not answer:
        return answer
    along = [n for n in region.nodes if n.name in ROW_OPS]
    space = space_of(along[0])
    for n in along[1:]:
        if space_of(n) != space:
            return no("{} goes along other rows than {}", n.name, along[0].name, at=n)
    rank = len(space.shape)
    for n in region.computed():
        fits = len(n.shape) <= rank and all(
            a in (1, s) for a, s in zip(reversed(n.shape), reversed(space.shape), strict=False)
        )
        if not fits and not _drops_dims(n):
            return no("{} is not of the shape that rows are taken of", n.name, at=n)
        if _drops_dims(n) and any(n in m.operands for m in region.nodes):
            return no("{} without keepdim is used inside the region", n.name, at=n)
    for o in region.outputs:
        if o.shape not in (space.shape, space.row_shape) and not _drops_dims(o):
            return no("an output has neither the shape of the rows nor one value a row", at=o)
    return yes


def _drops_dims(node: Any) -> bool:
    return isinstance(node, Reduction) and not node.keepdim


Emit = Callable[[Any, Any], Any]  # (program, node): adds the statements of one node


def lower_region(b: Builder, node: Op, emit: Emit, call: Callable[..., None]) -> None:
    """What targets share: memory of the region seen along its rows, for one `call`."""
    region = Region.of(node)
    space = space_of(next(n for n in region.nodes if n.name in ROW_OPS))
    refs = region.refs(b)
    leaves = {leaf: broadcast(b, ref, space.shape) for leaf, ref in refs.items()}
    outs = b.results(node)
    shown = [_over(out, o, space) for out, o in zip(outs, region.outputs, strict=True)]

    def body(p: Any) -> Sequence[Any]:
        for n in region.computed():
            emit(p, n)
        return [p.nodes[o] for o in region.outputs]

    call(b, node, space, shown, outs,
         [(leaf, space.is_full(refs[leaf].shape)) for leaf in leaves], list(leaves.values()),
         layout_order(_main(region).tensor), body, region.comment(b))  # fmt: skip
    if isinstance(node.type, tuple):
        b.set_results(node, outs)
    else:
        b.set(node, outs[0])


def lower(b: Builder, node: Op) -> None:
    lower_region(b, node, emit, call)


def _main(region: Region) -> Op:
    return next(n for n in region.nodes if n.name in ROW_OPS).operands[0]


def _over(out: Ref, node: Op, space: Space) -> Ref:
    """An output walked along the space: still in reduced dimensions where it has one a row."""
    strides = list(out.strides)
    if len(strides) < len(space.shape):
        for axis in space.reduced:
            strides.insert(axis, 0)
    elif out.shape != space.shape:
        strides = [0 if i in space.reduced else s for i, s in enumerate(strides)]
    return out.with_(shape=space.shape, strides=tuple(strides))


def call(
    b: Builder, node: Op, space: Space, shown: Sequence[Ref], outs: Sequence[Ref],
    leaves: Sequence[tuple[Any, bool]], refs: Sequence[Ref], order: Sequence[int],
    body: Callable[[Program], Sequence[Value]], comment: list[str],
) -> None:  # fmt: skip
    """Make the row kernel over `space` and call it."""
    operands = tuple(Operand(r.dtype, r.strides) for r in (*shown, *refs))
    made = row_kernel(Nest(space.shape, operands), leaves, len(outs), space.reduced, order, body,
                      comment=comment, far=past_caches())  # fmt: skip
    b.kernel(made.kernel, node, outs, refs, made.numbers)


# ------------------------------------------------------------------ what each op does to a row


def emitter(
    reduced: Callable[..., Value], softmax: Callable[..., Value], normalised: Callable[..., Value]
) -> Callable[[Any, Any], Value]:
    """What makes a node's statements; its value is p.nodes[node].

    A language says the three: reduced(p, node, x), softmax(p, x, work, log), and normalised.
    """

    def emit(p: Any, node: Any) -> Value:
        if node.pointwise:
            return p.pointwise(node)
        x = p.nodes[node.x]
        work = F64 if x.dtype.name == "f64" else F32
        if node.name in REDUCTIONS:
            made = reduced(p, node, x)
        elif node.name in ("softmax", "log_softmax"):
            made = softmax(p, p.cast(x, work), work, log=node.name == "log_softmax")
        else:
            bias = getattr(node, "bias", None)
            made = normalised(
                p, x, work, node.eps, node.name == "layer_norm",
                p.nodes[node.weight] if node.weight is not None else None,
                p.nodes[bias] if bias is not None else None,
            )  # fmt: skip
        p.nodes[node] = p.cast(made, node.dtype)
        return p.nodes[node]

    return emit


def _reduced(p: Program, node: Any, x: Value) -> Value:
    if node.name != "mean":
        return p.reduce(node.name, x, node.dtype)
    total = p.reduce("sum", x, F64)
    return p.let(node.dtype, f"effc::cast<{register(node.dtype)}>({{0}} / elements)", total)


def _softmax(p: Program, x: Value, work: Any, log: bool) -> Value:
    top = p.reduce("amax", x, work)
    below = p.let(work, "{1} - {0}", x, top)
    power = p.let(work, "effc::detail::exp_minus({0})", below, work=12)
    total = p.reduce("sum", power, work)
    if log:
        return p.let(work, "-{0} - {1}", below, p.let(work, "effc::log({0})", total))
    return p.let(work, "{0} * {1}", power, p.let(work, f"{register(work)}(1) / {{0}}", total))


def normalised(
    p: Program, x: Value, work: Any, eps: float, centred: bool, weight: Value | None,
    bias: Value | None,
) -> Value:  # fmt: skip
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias; without a mean: rms."""
    if centred:
        mean = p.let(work, f"effc::cast<{register(work)}>({{0}} / elements)",
                     p.reduce("sum", x, F64))  # fmt: skip
        x = p.let(work, "{0} - {1}", x, mean)
    squares = p.reduce("sum", p.let(work, "{0} * {0}", x), F64)
    scale = p.let(
        work, f"{register(work)}(1) / effc::sqrt(effc::cast<{register(work)}>({{0}} / elements)"
        f" + {literal(eps, work)})", squares,
    )  # fmt: skip
    y = p.let(work, "{0} * {1}", x, scale)
    if weight is not None:
        y = p.let(work, "{0} * {1}", y, p.cast(weight, work))
    return y if bias is None else p.let(work, "{0} + {1}", y, p.cast(bias, work))


emit = emitter(_reduced, _softmax, normalised)

for _name in ROW_OPS:
    lowers(_name, check=check)(lower)
