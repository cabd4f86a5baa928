"""Where a factor for each channel of a value goes, on its way to whoever can undo it.

Channels of a layer's or norm's result are numbered. From there the numbers flow through all that
keeps them apart and is linear in positive factors: views, slices, the linear side of a product,
`relu`, rotary embeddings (which tie the two channels they mix), the values of attention (whose
heads repeat under grouped queries). They end in the columns of a layer's weights, or as queries or
keys of attention; whatever else reads them blocks them, with a reason.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from effc.ir import Graph, No, Op, no
from effc.ir.rewrite import Answer

from . import analysis
from .roles import groups

FREE = -1  # the number of a channel that carries no factor


class Ties:
    """Classes of numbers that must have one factor."""

    def __init__(self, count: int) -> None:
        self.above = list(range(count))

    def find(self, i: int) -> int:
        while self.above[i] != i:
            self.above[i] = self.above[self.above[i]]
            i = self.above[i]
        return i

    def tie(self, a: Iterable[int], b: Iterable[int]) -> None:
        for i, j in zip(a, b):
            self.above[self.find(i)] = self.find(j)

    def classes(self) -> torch.Tensor:
        """For each number the smallest of its class."""
        least: dict[int, int] = {}
        for i in range(len(self.above)):
            least.setdefault(self.find(i), i)
        return torch.tensor([least[self.find(i)] for i in range(len(self.above))])


@dataclass
class Flow:
    """What became of the channels 0 ... count - 1 of `start`.

    ends: layers that multiply with them, and the channel of each column. meets: attentions that
    read them as "q" or "k", and the channels of these, [.., heads or 1, 1, size]. blocked: channels
    that someone reads who cannot undo a factor, and why.
    """

    start: Op
    count: int
    ties: Ties
    ends: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    meets: list[tuple[Any, str, torch.Tensor]] = field(default_factory=list)
    blocked: dict[int, No] = field(default_factory=dict)

    def block(self, index: torch.Tensor, why: No) -> None:
        for i in index.unique().tolist():
            if i != FREE:
                self.blocked.setdefault(i, why)


def flow_of(graph: Graph, start: Op, may_end: Callable[[Op], Answer]) -> Flow:
    """Of the channels in the last dimension of a node's result. may_end(layer): whether factors
    can go into the columns of a linear layer's weights."""
    count = start.shape[-1]
    assert isinstance(count, int)
    flow = Flow(start, count, Ties(count))
    first = torch.arange(count).reshape((1,) * (len(start.shape) - 1) + (count,))
    index: dict[Op, torch.Tensor] = {start: first}
    position = _positions(graph)
    outputs = set(graph.outputs)
    waiting: list[tuple[int, Op]] = []
    met: set[Op] = set()

    def push(value: Op) -> None:
        if value in outputs:
            flow.block(index[value], no("it is an output of the graph", at=value))
        for user in graph.users[value]:
            if user not in met:
                met.add(user)
                heapq.heappush(waiting, (position[user], user))

    push(start)
    while waiting:
        _, node = heapq.heappop(waiting)
        read = [o for o in node.operands if o in index]
        rule = RULES.get(node.name)
        made = _unknown(node) if rule is None else rule(flow, index, node, may_end)
        if isinstance(made, No):
            for o in read:
                flow.block(index[o], made)
        elif made is not None:
            index[node] = _squeezed(made)
            push(node)
    return flow


@analysis
def _positions(graph: Graph) -> dict[Op, int]:
    return {n: i for i, n in enumerate(graph.nodes)}


def _squeezed(index: torch.Tensor) -> torch.Tensor:
    """Of size 1 in each dimension that the channel does not depend on."""
    for axis in range(index.dim()):
        if index.shape[axis] > 1 and bool((index == index.narrow(axis, 0, 1)).all()):
            index = index.narrow(axis, 0, 1)
    return index


def _unknown(node: Any) -> No:
    name = node.target if node.name == "aten" else node.name
    if node.pointwise:
        return no("{} of a scaled value is not a scaled {}", name, name, at=node)
    return no("{} reads it, and would read scaled values", name, at=node)


# ------------------------------------------------------------------ what each op does to channels

Index = dict[Op, torch.Tensor]
Made = "torch.Tensor | No | None"


def _aligned(index: torch.Tensor, node: Op) -> torch.Tensor:
    """As of a value that broadcasts to the node's result."""
    return index.reshape((1,) * (len(node.shape) - index.dim()) + tuple(index.shape))


def _same(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    if not node.dtype.is_float:
        return no("{} makes {} of it", node.name, node.dtype, at=node)
    return _aligned(index[node.operands[0]], node)


def _mul(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    scaled = [v for v in (node.a, node.b) if isinstance(v, Op) and v in index]
    if len(scaled) > 1:
        return no("{} has it on both sides", node.name, at=node)
    return _aligned(index[scaled[0]], node)


def _div(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    if isinstance(node.b, Op) and node.b in index:
        return no("div divides by it", at=node)
    return _aligned(index[node.a], node)


def _add(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    given = [index.get(v) if isinstance(v, Op) else None for v in (node.a, node.b)]
    a, b = (None if i is None else _aligned(i, node) for i in given)
    if a is None or b is None:
        return no("{} joins it with what is not scaled, as in a residual sum", node.name, at=node)
    return a if torch.equal(a, b) else no("{} joins different channels", node.name, at=node)


def _permute(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    return index[node.x].permute(node.dims)


def _reshape(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    of, full, made = index[node.x], [], []
    for given, new in groups(node.x.shape, node.to):
        if all(of.shape[i] == 1 for i in given):
            full += [1] * len(given)
            made += [1] * len(new)
            continue
        sizes = [node.x.shape[i] for i in given]
        if not all(isinstance(s, int) for s in sizes):
            return no("reshape mixes channels with a dimension of {}", sizes[0], at=node)
        full += sizes
        made += [node.to[i] for i in new]
    return of.expand(full).reshape(made)


def _slice(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    axis = node.dim % len(node.shape)
    of = index[node.x]
    if of.shape[axis] == 1:
        return of
    if not isinstance(node.start, int) or not isinstance(node.size, int):
        return no("slice takes channels that are known only in a call", at=node)
    places = torch.arange(node.size) * node.step + node.start
    return of.index_select(axis, places)


def _cat(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    axis = node.dim % len(node.shape)
    if not all(isinstance(x.shape[axis], int) for x in node.xs):
        return no("cat joins channels along {}", node.shape[axis], at=node)
    rank = len(node.shape)
    none = torch.full((1,) * rank, FREE)
    parts = [index.get(x, none) for x in node.xs]
    sizes = [max(p.shape[i] for p in parts) for i in range(rank)]
    wide = []
    for x, part in zip(node.xs, parts):
        sizes[axis] = x.shape[axis]
        wide.append(part.expand(sizes))
    return torch.cat(wide, axis)


def _reduced(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    of = index[node.x]
    dims = [d % of.dim() for d in node.dims] or list(range(of.dim()))
    if any(of.shape[d] > 1 for d in dims):
        return no("{} adds channels up", node.name, at=node)
    return of if node.keepdim else of.reshape([s for d, s in enumerate(of.shape) if d not in dims])


def _rope(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    if node.cos in index or node.sin in index:
        return no("rope turns by it", at=node)
    of = _aligned(index[node.x], node)
    size = of.shape[-1]
    if size > 1:
        place = torch.arange(size)
        other = place ^ 1 if node.interleaved else (place + size // 2) % size
        mixed = of.index_select(-1, other)
        alone = (of == FREE) != (mixed == FREE)
        if bool(alone.any()):
            why = no("rope mixes it with a channel that is not scaled", at=node)
            flow.block(torch.where(alone, torch.maximum(of, mixed), FREE), why)
        both = (of != FREE) & (mixed != FREE)
        flow.ties.tie(of[both].tolist(), mixed[both].tolist())
    return of


def _linear(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    if node.w in index or node.bias in index:
        return no("linear reads it as weights", at=node)
    answer = may_end(node)
    if not answer:
        return answer
    of = index[node.x]
    if any(s > 1 for s in of.shape[:-1]):
        return no("the columns of linear would differ along another dimension", at=node)
    flow.ends.append((node, of.reshape(-1).expand(node.x.shape[-1])))
    return None


def _attention(flow: Flow, index: Index, node: Any, may_end: Any) -> Any:
    """Queries, keys and values may be slices of one layer's result, if each has its own."""
    roles = [r for r in ("q", "k", "v", "mask", "past") if getattr(node, r) in index]
    own = torch.cat([index[getattr(node, r)].unique() for r in roles])
    if {"mask", "past"} & {*roles} or len(own) > len(own.unique()):
        return no("attention reads it as {}", " and ".join(roles), at=node)
    made = None
    for role in roles:
        of = index[getattr(node, role)]
        if of.dim() > 1 and of.shape[-2] > 1:
            return no("attention sees other channels at other positions", at=node)
        if role == "v":
            made = _aligned(repeated(node, of), node)
        else:
            flow.meets.append((node, role, of))
    return made


def repeated(node: Any, of: torch.Tensor) -> torch.Tensor:
    """Channels of an attention's keys or values as its query heads read them."""
    if not node.gqa or of.dim() < 3 or of.shape[-3] == 1:
        return of
    return of.repeat_interleave(node.q.shape[-3] // of.shape[-3], -3)


Rule = Callable[[Flow, Index, Any, Any], Any]
RULES: dict[str, Rule] = {
    "cast": _same, "copy": _same, "expand": _same, "neg": _same, "abs": _same, "relu": _same,
    "leaky_relu": _same, "to_layout": _same, "mul": _mul, "div": _div, "add": _add, "sub": _add,
    "permute": _permute, "reshape": _reshape, "slice": _slice, "cat": _cat, "sum": _reduced,
    "mean": _reduced, "rope": _rope, "linear": _linear, "attention": _attention,
}  # fmt: skip

__all__ = ["FREE", "Flow", "Ties", "flow_of", "repeated"]
