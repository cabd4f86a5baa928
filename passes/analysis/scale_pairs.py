"""Pairs of constants between which a factor for each channel can be moved without a trace.

    y = norm(x) * g;  q, k, v = y wq, y wk, y wv      g / s  and  w[:, c] * s[c]
    o(attention(q, k, v))                             v's rows / s  and  o's columns * s
    down(silu(gate) * up)                             up's rows / s  and  down's columns * s
    attention(q, k, v)                                q's rows / s  and  k's rows * s

Such factors change nothing but what rounding to codes costs (ABQ-LLM, section 2.4; SmoothQuant).
A pair is legal where every way from the producer ends in constants that take the factor back;
channel_flow.py follows the ways, and has a reason for each that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from effc.ir import Graph, No, Op, PassError, Weight, no, yes
from effc.ir.rewrite import Answer, op
from effc.ir.types import f32
from effc.passes.common import dense_constants

from . import analysis
from .blocks import weights_below
from .channel_flow import FREE, Flow, Ties, flow_of, repeated

NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class End:
    """Constants of one node that factors go into.

    rows: what the node gives (rows of w and the bias of a linear layer; weight and bias of a norm),
    else what it reads (columns of w). index: the number of each row's or column's factor, i64, -1
    for none.
    """

    node: Any
    rows: bool
    index: torch.Tensor

    def factors(self, s: torch.Tensor) -> torch.Tensor:
        """One a row or column, of s [size]."""
        return torch.where(self.index == FREE, 1.0, s[self.index.clamp_min(0)])


@dataclass(frozen=True, eq=False)
class ScalePair:
    """`size` free factors: what the producer gives is divided by them, its consumers multiply.

    kind: "norm, linear", "linear, linear" or "q, k". Channels that rotary embeddings mix have one
    factor, and so has each key or value channel for all query heads that read it.
    """

    kind: str
    size: int
    producer: End
    consumers: tuple[End, ...]

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.producer, *self.consumers)

    @property
    def label(self) -> str:
        """The keys of the weights on both sides."""
        names = [_key(e.node) for e in self.ends]
        return f"{names[0]} -> {', '.join(names[1:])}"


class Refusal(NamedTuple):
    node: Op
    why: No


def find_scale_pairs(graph: Graph) -> tuple[ScalePair, ...]:
    """All pairs, in program order of their producers. No two share a producer's channel or a
    consumer's column."""
    return _found(graph)[0]


def refused_pairs(graph: Graph) -> tuple[Refusal, ...]:
    """Layers and norms of which some channel is in no pair, each with the first reason."""
    return _found(graph)[1]


def scaled(graph: Graph, factors: Mapping[ScalePair, torch.Tensor]) -> Graph:
    """The same function, to rounding, with s[pair] folded into the constants of each pair.

    s: positive, f32[pair.size]. Raises PassError for others.
    """
    return graph.substitute(substitution(factors))


def substitution(factors: Mapping[ScalePair, torch.Tensor]) -> dict[Op, Op]:
    """For Graph.substitute: the nodes of these pairs with their constants scaled."""
    rows: dict[Op, torch.Tensor] = {}
    columns: dict[Op, torch.Tensor] = {}
    for pair, s in factors.items():
        s = s.detach().float()
        if tuple(s.shape) != (pair.size,) or not bool(((s > 0) & s.isfinite()).all()):
            raise PassError(
                f"no factors for {pair.label}",
                why=f"{pair.size} positive numbers are needed, not {list(s.shape)}",
            )
        for e in pair.ends:
            f = e.factors(1 / s if e is pair.producer else s)
            side = rows if e.rows else columns
            side[e.node] = side[e.node] * f if e.node in side else f
    return {n: _scaled(n, rows.get(n), columns.get(n)) for n in dict.fromkeys([*rows, *columns])}


def _scaled(node: Any, rows: torch.Tensor | None, columns: torch.Tensor | None) -> Op:
    key = _key(node)
    changes: dict[str, Op] = {}
    held = "w" if node.name == "linear" else "weight"
    w = getattr(node, held)
    if rows is not None:
        across = rows[:, None] if node.name == "linear" else rows
        w = _times(w, Weight.holding(f"{key}:rows", across.contiguous()))
        if getattr(node, "bias", None) is not None:
            changes["bias"] = _times(node.bias, Weight.holding(f"{key}:rows", rows))
    if columns is not None:
        w = _times(w, Weight.holding(f"{key}:columns", columns))
    return node.replace(**{held: w}, **changes)


def _times(w: Op, factor: Op) -> Op:
    """Rounded once, to the type of w."""
    if w.dtype == f32:
        return op.mul(w, factor)
    return op.cast(op.mul(op.cast(w, f32), factor), w.dtype)


def _key(node: Any) -> str:
    held = node.w if node.name == "linear" else node.weight
    below = weights_below([held])
    return below[0].key if below else node.name


# ------------------------------------------------------------------ which are legal


@analysis
def _found(graph: Graph) -> tuple[tuple[ScalePair, ...], tuple[Refusal, ...]]:
    pairs: list[ScalePair] = []
    refused: list[Refusal] = []
    sides: dict[Op, dict[str, list[tuple[Flow, torch.Tensor]]]] = {}

    def may_end(layer: Op) -> Answer:
        return foldable(graph, layer, columns=True)

    for node in graph.nodes:
        if node in graph.constants or not (node.name == "linear" or node.name in NORMS):
            continue
        answer = foldable(graph, node, columns=False)
        if not answer:
            refused.append(Refusal(node, answer))  # type: ignore[arg-type]
            continue
        flow = flow_of(graph, node, may_end)
        classes = flow.ties.classes()
        for i, why in list(flow.blocked.items()):
            flow.block((classes == classes[i]).nonzero()[:, 0], why)
        for attention, side, index in flow.meets:
            sides.setdefault(attention, {}).setdefault(side, []).append((flow, index))
        pair = _to_columns(flow, classes)
        if pair is not None:
            pairs.append(pair)
        if flow.blocked:
            refused.append(Refusal(node, next(iter(flow.blocked.values()))))
    for attention, found in sides.items():
        made = _queries_and_keys(attention, found)
        if isinstance(made, ScalePair):
            pairs.append(made)
        else:
            refused.append(Refusal(attention, made))
    place = {n: i for i, n in enumerate(graph.nodes)}
    pairs.sort(key=lambda p: place[p.producer.node])
    refused.sort(key=lambda r: place[r.node])
    return tuple(pairs), tuple(refused)


def foldable(graph: Graph, node: Any, columns: bool) -> Answer:
    """Whether factors can go into a node's constants: into columns of w, or into what it gives."""
    held = _constants(node, columns)
    if node.name in NORMS:
        if node.weight is None:
            return no("{} has no weight to scale", node.name, at=node)
        if node.dims != 1:
            return no("{} is over {} dimensions", node.name, node.dims, at=node)
    answer = dense_constants(graph, *held)
    if not answer:
        return answer
    for c in held:
        if not c.dtype.is_float or any(n.name == "decode" for n in _computed_of(c)):
            return no("its weight is compressed already", at=c)
        below = weights_below([c])
        if not below or any(w.data is None for w in below):
            return no("its weight has no values", at=c)
        others = [u.name for u in graph.users[c] if u is not node]
        if others or c in graph.outputs:
            return no("its weight is also read by {}", ", ".join(others) or "the caller", at=c)
    return yes


def _constants(node: Any, columns: bool) -> list[Any]:
    if node.name in NORMS:
        held = [node.weight, getattr(node, "bias", None)]
    else:
        held = [node.w] if columns else [node.w, node.bias]
    return [c for c in held if c is not None]


def _computed_of(constant: Op) -> Iterator[Op]:
    stack = [constant]
    while stack:
        node = stack.pop()
        yield node
        stack += node.operands


def _to_columns(flow: Flow, classes: torch.Tensor) -> ScalePair | None:
    """The pair of all channels that end in columns and nowhere else."""
    ending = {i for _, index in flow.ends for i in classes[index[index != FREE]].tolist()}
    meeting = {i for *_, index in flow.meets for i in classes[index[index != FREE]].tolist()}
    blocked = set(classes[torch.tensor([*flow.blocked], dtype=torch.long)].tolist())
    number = _numbered(classes, ending - meeting - blocked)
    if not bool((number != FREE).any()):
        return None
    kind = "linear, linear" if flow.start.name == "linear" else "norm, linear"
    consumers = []
    for layer, index in flow.ends:
        own = _through(number, index)
        if bool((own != FREE).any()):
            consumers.append(End(layer, False, own))
    return ScalePair(kind, int(number.max()) + 1, End(flow.start, True, number), tuple(consumers))


def _queries_and_keys(
    attention: Any, found: dict[str, list[tuple[Flow, torch.Tensor]]]
) -> ScalePair | No:
    """The pair of what makes the queries and what makes the keys of one attention."""
    sides = [found.get("q", []), found.get("k", [])]
    for name, side in zip(("queries", "keys"), sides):
        if len(side) != 1:
            return no("{} come from {} layers that can be scaled", name, len(side), at=attention)
    (fq, iq), (fk, ik) = (side[0] for side in sides)
    ik = repeated(attention, ik)
    for flow, index in ((fq, iq), (fk, ik)):
        if bool((index == FREE).any()):
            return no("some channels of queries or keys cannot be scaled", at=flow.start)
        stopped = [flow.blocked[i] for i in index.unique().tolist() if i in flow.blocked]
        if stopped:
            return stopped[0]
        readers = [of for *_, of in flow.meets] + [of for _, of in flow.ends]
        if sum(bool(torch.isin(index, of).any()) for of in readers) > 1:
            return no("another attention or layer reads them too", at=flow.start)
    together = Ties(fq.count + fk.count)
    together.tie(range(fq.count), fq.ties.classes().tolist())
    together.tie(range(fq.count, fq.count + fk.count), (fk.ties.classes() + fq.count).tolist())
    a, b = torch.broadcast_tensors(iq, ik)
    together.tie(a.reshape(-1).tolist(), (b.reshape(-1) + fq.count).tolist())
    classes = together.classes()
    number = _numbered(classes, set(classes[iq.reshape(-1)].tolist()))
    q, k = End(fq.start, True, number[: fq.count]), End(fk.start, True, number[fq.count :])
    return ScalePair("q, k", int(number.max()) + 1, q, (k,))


def _numbered(classes: torch.Tensor, wanted: set[int]) -> torch.Tensor:
    """For each channel the place of its class among the wanted ones, FREE for others."""
    place = {c: i for i, c in enumerate(sorted(wanted))}
    return torch.tensor([place.get(c, FREE) for c in classes.tolist()])


def _through(number: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.where(index == FREE, FREE, number[index.clamp_min(0)])


__all__ = [
    "End", "Refusal", "ScalePair", "find_scale_pairs", "foldable", "refused_pairs", "scaled",
    "substitution",
]  # fmt: skip
