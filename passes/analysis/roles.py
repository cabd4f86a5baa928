"""What dimensions over the positions of a sequence mean to a program that sees only new positions.

A graph captured for a whole sequence has dimensions of size T, the sequence. In a program that is
given n new positions after `past` earlier ones, such a dimension has a role: it runs over the new
positions, shifted by d (the number d: positions past + d .. past + d + n - 1), or over `ALL` of
them. A demand is the role of every dimension of a value, None for those that are no positions.

`operand_demands` says which demands on its operands an op needs to meet a demand on its result, or
why it cannot. Demands flow from results to inputs: the same value may be needed in several roles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from effc.ir import Dim, No, Op, Tensor, no
from effc.ir.symbols import dim, product, symbolic

if TYPE_CHECKING:
    import sympy

ALL: Final = "all"
Role: TypeAlias = "int | str | None"
Demand: TypeAlias = "tuple[Role, ...]"
Needs: TypeAlias = "list[Demand] | No"


@dataclass(frozen=True)
class Positions:
    """The dimensions of a graph that depend on T, the size of the sequence."""

    size: sympy.Symbol

    def over(self, size: Dim) -> bool:
        return symbolic(size) and self.size in size.free_symbols

    def in_shape(self, node: Op) -> tuple[bool, ...]:
        return tuple(map(self.over, node.shape)) if isinstance(node.type, Tensor) else ()

    def offset(self, size: Dim) -> int | None:
        """k where the size is T + k."""
        rest = dim(size - self.size) if symbolic(size) else None
        return rest if isinstance(rest, int) else None

    def multiple(self, size: Dim) -> bool:
        """Whether the size is m * T: so many rows for each position."""
        return symbolic(size) and not self.over(dim(size / self.size))

    def touched(self, node: Op) -> bool:
        """Whether T is in the node's type, attributes or operands."""
        values = (node, *node.operands)
        return self.size in frozenset().union(*(v.all_symbols for v in values))

    def demand(self, node: Op, role: Role = 0) -> Demand:
        """The role for every dimension over positions."""
        return tuple(role if over else None for over in self.in_shape(node))

    def aligned(self, demand: Demand, operand: Op) -> Demand | No:
        """The demand on an operand that broadcasts to the result."""
        found: list[Role] = []
        shape = operand.shape
        for axis, over in enumerate(self.in_shape(operand), -len(shape)):
            role = demand[axis] if over else None
            if over and role is None:
                return no("{} positions meet another size", shape[axis], at=operand)
            found.append(role)
        return tuple(found)


def operand_demands(p: Positions, node: Op, demand: Demand) -> Needs:
    """Demands on node.operands, in order; a refusal that says how the op mixes positions."""
    if not p.touched(node):
        return [p.demand(o) for o in node.operands]
    if node.pointwise and node.name not in RULES:
        return _pointwise(p, node, demand)
    rule = RULES.get(node.name)
    if rule is None:
        return no("effc does not know what {} does to positions", title(node), at=node)
    if p.size in node.symbols and node.name not in SHAPED:
        return no("{} computes with the number of positions", node.name, at=node)
    return rule(p, node, demand)


def title(node: Any) -> str:
    return node.target if node.name == "aten" else node.name


# ------------------------------------------------------------------ elementwise and row ops


def _each(p: Positions, node: Op, demands: Iterable[Demand | No]) -> Needs:
    found: list[Demand] = []
    for d in demands:
        if isinstance(d, No):
            return d
        found.append(d)
    return found


def _pointwise(p: Positions, node: Op, demand: Demand) -> Needs:
    if p.size in node.symbols:
        return no("{} computes with the number of positions", node.name, at=node)
    return _each(p, node, (p.aligned(demand, o) for o in node.operands))


def _rope(p: Positions, node: Any, demand: Demand) -> Needs:
    if p.over(node.shape[-1]):
        return no("rope rotates along positions", at=node)
    return _pointwise(p, node, demand)


def _mixing(axes: Callable[[Any], Iterable[int]]) -> Callable[[Positions, Any, Demand], Needs]:
    """Of an op that mixes some dimensions of its first operand and maps the others."""

    def rule(p: Positions, node: Any, demand: Demand) -> Needs:
        x = node.operands[0]
        rank = len(x.shape)
        mixed = {axis % rank for axis in axes(node)} if rank else set()
        for axis in sorted(mixed):
            if p.over(x.shape[axis]):
                return no("{} mixes positions along dimension {}", node.name, axis, at=node)
        roles = list(demand)
        if len(roles) < rank:  # a reduction that drops its dimensions
            for axis in sorted(mixed):
                roles.insert(axis, None)
        first = tuple(None if axis in mixed else role for axis, role in enumerate(roles))
        others = node.operands[1:]
        for o in others:
            if any(p.in_shape(o)):
                return no("{} has an operand of {} positions", node.name, p.size, at=o)
        return [first, *(p.demand(o) for o in others)]

    return rule


def _all_but(count: int) -> Callable[[Any], Iterable[int]]:
    return lambda node: range(count, len(node.operands[0].shape))


def _reduced(node: Any) -> Iterable[int]:
    return node.dims or range(len(node.x.shape))


# ------------------------------------------------------------------ products


def _matmul(p: Positions, node: Any, demand: Demand) -> Needs:
    a, b = node.a, node.b
    if min(len(a.shape), len(b.shape)) < 2:
        return no("matmul of a vector over positions", at=node)
    if p.over(a.shape[-1]) or p.over(b.shape[-2]):
        return no("matmul sums over positions, and is no attention that raise-ops knows", at=node)
    return _each(
        p,
        node,
        (p.aligned((*demand[:-1], None), a), p.aligned((*demand[:-2], None, demand[-1]), b)),
    )


def _embedding(p: Positions, node: Any, demand: Demand) -> Needs:
    if any(p.in_shape(node.table)):
        return no("embedding looks positions up", at=node)
    return [p.demand(node.table), demand[:-1]]


def over_positions(p: Positions, node: Any) -> bool:
    """Whether queries and keys of an attention run over the sequence."""
    return p.over(node.q.shape[-2]) and p.over(node.k.shape[-2])


def _attention(p: Positions, node: Any, demand: Demand) -> Needs:
    if not over_positions(p, node):
        return _other_attention(p, node, demand)
    for x in (node.q, node.k, node.v):
        if x.shape[-2] != p.size:
            return no("attention runs over {}, not {} positions", x.shape[-2], p.size, at=node)
        if sum(p.in_shape(x)) > 1:
            return no("{} of attention has two dimensions over positions", x.type, at=node)
    if demand[-2] != 0:
        what = "every position" if demand[-2] == ALL else "other positions than the new ones"
        return no("the result of attention is needed at {}", what, at=node)
    if node.past is not None:
        return no("attention has a cache already", at=node)
    found: list[Demand | No] = [p.demand(x) for x in (node.q, node.k, node.v)]
    if node.mask is not None:
        found.append(p.aligned((None,) * (len(demand) - 2) + (0, ALL), node.mask))
        if not node.causal and not any(p.in_shape(node.mask)[-2:-1]):
            return no("the mask of attention is the same for every query: not causal", at=node)
    elif not node.causal:
        return no("every query of attention sees every key: not causal", at=node)
    return _each(p, node, found)


def _other_attention(p: Positions, node: Any, demand: Demand) -> Needs:
    """Over other things than positions: each position for itself."""
    if p.over(node.k.shape[-2]) or p.over(node.v.shape[-1]) or p.over(node.q.shape[-1]):
        return no("attention reads all positions at once", at=node)
    if node.causal and p.over(node.q.shape[-2]):
        return no("attention is causal over {} other keys", node.k.shape[-2], at=node)
    lead = demand[:-2]
    found = [p.aligned((*lead, demand[-2], None), node.q)]
    found += [p.aligned((*lead, None, None), x) for x in (node.k, node.v)]
    if node.mask is not None:
        found.append(p.aligned((*lead, demand[-2], None), node.mask))
    return _each(p, node, found)


# ------------------------------------------------------------------ shapes


def _reshape(p: Positions, node: Any, demand: Demand) -> Needs:
    found: list[Role] = [None] * len(node.x.shape)
    for given, made in groups(node.x.shape, node.to):
        before = [i for i in given if p.over(node.x.shape[i])]
        after = [i for i in made if p.over(node.to[i])]
        if len(before) != len(after) or len(before) > 1:
            shapes = (list(node.x.shape), list(node.to))
            return no("reshape of {} to {} takes positions apart", *shapes, at=node)
        if before:
            role, have, made_of = demand[after[0]], node.x.shape[before[0]], node.to[after[0]]
            if have != made_of and not (p.multiple(have) and p.multiple(made_of)):
                return no("reshape of {} to {} takes positions apart", have, made_of, at=node)
            if have != made_of and role not in (0, ALL):
                return no("reshape merges shifted positions", at=node)
            found[before[0]] = role
    return [tuple(found)]


def groups(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[tuple[list[int], list[int]]]:
    """Dimensions of a reshape that hold the same elements: the finest split of both shapes."""
    starts = [product(before[:i]) for i in range(len(before) + 1)]
    ends = [product(after[:i]) for i in range(len(after) + 1)]
    found, i, j = [], 0, 0
    for a in range(1, len(starts)):
        b = next((b for b in range(j + 1, len(ends)) if ends[b] == starts[a]), None)
        if b is not None:
            found.append((list(range(i, a)), list(range(j, b))))
            i, j = a, b
    rest = list(range(i, len(before))), list(range(j, len(after)))
    if found and not (rest[0] and rest[1]):  # sizes of 1 at the end
        last = found.pop()
        rest = last[0] + rest[0], last[1] + rest[1]
    return [*found, rest]


def _permute(p: Positions, node: Any, demand: Demand) -> Needs:
    return [tuple(demand[node.dims.index(i)] for i in range(len(demand)))]


def _expand(p: Positions, node: Any, demand: Demand) -> Needs:
    return _each(p, node, [p.aligned(demand, node.x)])


def _slice(p: Positions, node: Any, demand: Demand) -> Needs:
    axis = node.dim % len(node.x.shape)
    have, role = node.x.shape[axis], demand[axis]
    rest = (demand[:axis], demand[axis + 1 :])
    if not p.over(have):
        if role is not None and (node.step != 1 or not isinstance(node.start, int)):
            return no("slice makes positions in steps", at=node)
        return [(*rest[0], None, *rest[1])]
    if role is not None:
        if (
            node.step != 1 or not isinstance(node.start, int)
            or p.offset(node.size) is None or p.offset(have) is None
        ):  # fmt: skip
            return no("slice takes some of the positions", at=node)
        role = role if isinstance(role, str) else role + node.start
    elif isinstance(node.start, int) and not p.over(node.size):
        role = ALL  # the same positions in every call
    elif dim(have - node.start) == 1 and node.size == 1 and p.offset(have) == 0:
        role = 0  # the last one
    else:
        return no("slice takes {} positions from {} on", node.size, node.start, at=node)
    return [(*rest[0], role, *rest[1])]


def pieces(p: Positions, node: Any) -> tuple[int, int] | None:
    """(positions before, the operand over positions) of a cat along them; what follows is empty."""
    axis = node.dim % len(node.shape)
    sizes = [x.shape[axis] for x in node.xs]
    index = next(i for i, size in enumerate(sizes) if p.over(size))
    before = sum(s for s in sizes[:index] if isinstance(s, int))
    known = all(isinstance(s, int) for s in sizes[:index])
    return (before, index) if known and index == len(sizes) - 1 else None


def _cat(p: Positions, node: Any, demand: Demand) -> Needs:
    axis = node.dim % len(node.shape)
    role = demand[axis]
    if role is None:
        return _each(p, node, (p.aligned(demand, x) for x in node.xs))
    found = pieces(p, node)
    if found is None or (role != ALL and p.offset(node.xs[found[1]].shape[axis]) is None):
        return no("cat puts something after the last position", at=node)
    shifted = role if isinstance(role, str) else role - found[0]
    rest = (demand[:axis], demand[axis + 1 :])
    needs = [(*rest[0], None, *rest[1])] * found[1] + [(*rest[0], shifted, *rest[1])]
    return _each(p, node, (p.aligned(d, x) for d, x in zip(needs, node.xs, strict=True)))


def _pad(p: Positions, node: Any, demand: Demand) -> Needs:
    found = list(demand)
    for axis, role in enumerate(demand):
        before, after = node.before[axis], node.after[axis]
        if role is None and not p.over(node.x.shape[axis]):
            continue
        known = isinstance(before, int) and isinstance(after, int)
        if not known or before < 0 or after > 0 or p.offset(node.x.shape[axis]) is None:
            return no("pad puts something after the last position, or takes the first", at=node)
        found[axis] = role if isinstance(role, str) or role is None else role - before
    return [tuple(found)]


def _flip(p: Positions, node: Any, demand: Demand) -> Needs:
    if any(p.over(node.x.shape[d]) for d in node.dims):
        return no("flip turns positions round", at=node)
    return [demand]


def _made(p: Positions, node: Any, demand: Demand) -> Needs:
    values = [node.value] if node.name == "full" else [node.start, node.step]
    if any(map(p.over, values)):
        return no("{} computes with the number of positions", node.name, at=node)
    if node.name == "arange" and p.offset(node.size) is None:
        return no("arange runs over {} positions", node.size, at=node)
    return []


RUNNING = ("aten.cumsum.default",)  # element i depends on elements up to i


def _aten(p: Positions, node: Any, demand: Demand) -> Needs:
    if node.target in RUNNING and len(node.operands) == 1:
        axis = node.args[1] % len(demand)
        if p.over(node.shape[axis]) and p.offset(node.shape[axis]) is None:
            return no("{} runs along {}", title(node), node.shape[axis], at=node)
        return [(*demand[:axis], ALL if p.over(node.shape[axis]) else None, *demand[axis + 1 :])]
    return no("effc does not know what {} does to positions", title(node), at=node)


SHAPED = {"reshape", "expand", "slice", "pad", "arange", "full", "aten"}  # T is in their attributes
RULES: dict[str, Callable[[Positions, Any, Demand], Needs]] = {
    "rope": _rope, "matmul": _matmul, "embedding": _embedding, "attention": _attention,
    "reshape": _reshape, "permute": _permute, "expand": _expand, "slice": _slice, "cat": _cat,
    "pad": _pad, "flip": _flip, "arange": _made, "full": _made, "aten": _aten,
    "copy": _expand, "linear": _mixing(lambda node: (-1,)), "decode": _expand,
    "quantize": _mixing(lambda node: (-1,)),  # a scale is one of a row, or of a part of it
    "softmax": _mixing(lambda node: (node.dim,)), "log_softmax": _mixing(lambda node: (node.dim,)),
    "layer_norm": _mixing(lambda node: range(-node.dims, 0)),
    "rms_norm": _mixing(lambda node: range(-node.dims, 0)),
    "batch_norm": _mixing(lambda node: (1,)), "group_norm": _mixing(_all_but(1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "pixel_shuffle", "pixel_unshuffle"),
                    _mixing(_all_but(1))),
    **dict.fromkeys(("sum", "mean", "prod", "amax", "amin", "any", "all"), _mixing(_reduced)),
}  # fmt: skip

__all__ = [
    "ALL", "Demand", "Needs", "Positions", "Role", "groups", "operand_demands", "over_positions",
    "pieces", "title",
]  # fmt: skip
