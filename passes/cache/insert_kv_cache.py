"""insert-kv-cache: a program for a whole sequence becomes one for the next tokens, with states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from effc.ir import Graph, Input, No, PassError, bind_symbols, evaluate, no, symbol
from effc.passes.analysis.roles import Positions, over_positions
from effc.passes.base import Context, Numerics, Pass, exact

from .builder import Builder
from .cuts import LENGTH, cuts
from .demands import demands

if TYPE_CHECKING:
    import sympy

STATES = "a cache of keys and values"
TITLE = "attention(q, k, v) => attention(q, update(keys, k, past), update(values, v, past), past)"


@dataclass(frozen=True)
class InsertKvCache(Pass):
    """Compute only new tokens; keys and values of earlier ones are states.

    dim: the name of the size that is the length of the sequence; without it, the size that causal
    attention runs over. The graph gets the input `past`, the number of tokens that went before,
    and a state for every keys and values; sizes of the sequence mean the new tokens, `C` is the
    capacity of the states. Inputs of which every position is needed (a padding mask) are [.., C].

    rewrite:
        def graph(ids: i64[B, T]):
            y = attention(q, k, v, causal=True)
        -->
        def graph(ids: i64[B, T], past: i64[()], k0: State[f32[B, h, C, d]], v0: State[...]):
            k1 = update(k0, k, past, dim=2)
            v1 = update(v0, v, past, dim=2)
            y = attention(q, k1, v1, causal=True, past=past)
            return ..., k1, v1
    """

    dim: str = ""

    name: ClassVar[str] = "insert-kv-cache"
    numerics: ClassVar[Numerics] = exact("rounding")
    gives: ClassVar[tuple[str, ...]] = (STATES,)
    changes_interface: ClassVar[bool] = True

    def run(self, g: Graph, ctx: Context) -> Graph:
        if g.states:
            raise PassError("the graph has states already", node=g.states[0].key)
        positions = Positions(_sequence(g, self.dim))
        masks = _masks(g, positions)
        builder = Builder(g, positions, demands(g, positions, _both_ways(masks)))
        made = builder.graph()
        ctx.counted("CacheAttention", TITLE, builder.attentions)
        for sentence in dict.fromkeys(map(_said, masks.values())):
            ctx.note(sentence)
        return made

    def inputs_after(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> list[Any]:
        """All positions as new ones, into states that hold nothing yet."""
        env = bind_symbols(before, inputs)
        cache = cache_of(after)
        env |= {cache.capacity: env[cache.size]}
        given = dict(zip(cache.given, inputs, strict=True)) | {cache.past: torch.tensor(0)}
        for state in cache.states:
            dtype = state.dtype.torch
            fill = torch.nan if dtype.is_floating_point else 0
            shape: Any = evaluate(state.shape, env)
            given[state] = torch.full(shape, fill, dtype=dtype)
        return [given[i] for i in after.inputs]


# ------------------------------------------------------------------ masks

Masks = dict[Any, "tuple[int, ...] | None"]


def _masks(g: Graph, p: Positions) -> Masks:
    """Masks over positions, and before which positions a call may end under each."""
    found = [
        n.mask
        for n in _attentions(g)
        if not n.causal and n.mask is not None and over_positions(p, n)
    ]
    return {mask: cuts(mask, p.size) for mask in dict.fromkeys(found)}


def _both_ways(masks: Masks) -> list[No]:
    return [
        no("under the mask of attention every query sees later keys: not causal", at=mask)
        for mask, places in masks.items()
        if places == ()
    ]


def _said(places: tuple[int, ...] | None) -> str:
    if places is None:
        return (
            "a mask of attention is computed from inputs or weights: that no query sees a key of a "
            "later call is taken on trust"
        )
    if len(places) == LENGTH - 1:
        return f"a mask of attention is causal, as seen for {LENGTH} positions"
    listed = ", ".join(map(str, places[:4]))
    return f"queries see later keys: a call may end only after {listed} ... positions"


# ------------------------------------------------------------------ what a cached graph says


@dataclass(frozen=True)
class Cache:
    """The interface of a graph with a cache.

    given: the inputs of the original, in order; size: the number of new tokens in a call, and
    capacity: that of the states, as they stand in the types of inputs (numbers once specialised).
    table: where states lie in pages, of `page` rows: which page holds which rows.
    """

    past: Input
    size: Any
    capacity: Any
    states: tuple[Input, ...]
    given: tuple[Input, ...]
    table: Input | None = None
    page: int = 0


def cache_of(graph: Graph) -> Cache:
    """Read off a graph that `insert-kv-cache` made. PassError where there is no cache."""
    states = graph.states
    users = [u for s in states for u in graph.users[s] if u.name in ("update", "update_pages")]
    if not users:
        raise PassError("the graph has no cache", fix="run insert-kv-cache")
    first: Any = users[0]
    table = getattr(first, "table", None)
    given = tuple(i for i in graph.inputs if not i.state and i not in (first.start, table))
    if table is None:
        axis = first.dim
        return Cache(first.start, first.new.shape[axis], first.x.shape[axis], states, given)
    page = first.pool.shape[2]
    room = table.shape[1] * page
    return Cache(first.start, first.new.shape[2], room, states, given, table, page)


# ------------------------------------------------------------------ the sequence


def _sequence(g: Graph, name: str) -> sympy.Symbol:
    """The size of the sequence."""
    found: dict[Any, None] = {}
    fixed: set[int] = set()
    for node in _attentions(g):
        q, k = node.q.shape[-2], node.k.shape[-2]
        if q == k and (node.causal or node.mask is not None):
            if isinstance(q, int):
                fixed.add(q)
            elif q.is_Symbol:
                found[q] = None
    names = [s.name for s in found]
    if name:
        if symbol(name) not in g.all_symbols:
            known = ", ".join(sorted(s.name for s in g.all_symbols)) or "none"
            raise PassError(f"the graph has no size {name!r}", why=f"its sizes are {known}")
        return symbol(name)
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise PassError(
            f"attention runs over several sizes, {', '.join(names)}",
            fix=f"name the sequence: insert-kv-cache{{dim={names[0]}}}",
        )
    if fixed:
        raise PassError(
            f"the length of the sequence is fixed, {min(fixed)}",
            fix="capture with a dynamic size: dynamic_shapes={'ids': {1: torch.export.Dim('T')}}",
        )
    raise PassError(
        "no causal attention in the graph",
        why="attention has neither causal=True nor a mask, or is not recognised",
        fix="run raise-ops before it, and no fuse-regions",
    )


def _attentions(g: Graph) -> Iterator[Any]:
    return (n for n in g.nodes if n.name == "attention")
