"""page-kv-cache: the states of a cache lie in pages of a pool, and a table says whose are where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effc.ir import Graph, Input, Op, PassError, Tensor, bind_symbols, node_text, symbol
from effc.ir.rewrite import op as ops
from effc.ir.specialise import specialise
from effc.ir.types import i64
from effc.passes.base import Context, Numerics, Pass, exact

from .insert_kv_cache import STATES, cache_of

TABLE = "table"
TITLE = "update(state, new, past) => gather_pages(update_pages(pool, new, table, past), table)"


@dataclass(frozen=True)
class PageKvCache(Pass):
    """Keep the rows of a cache in pages that sequences may share.

    page: rows of one. The graph gets the input `table`, which page holds which rows of each
    sequence; states are pools of as many pages as their owner likes, and the capacity of a sequence
    is that of its row of the table. Refused where a state is no [batch, heads, C, size].

    rewrite:
        k1 = update(k0: State[f32[B, h, C, d]], k, past, dim=2)
        y = attention(q, k1, v1, causal=True, past=past)
        -->
        k1 = update_pages(k0: State[f32[P, h, page, d]], k, table: i64[B, M], past)
        y = attention(q, gather_pages(k1, table), ..., causal=True, past=past)
    """

    page: int = 64

    name: ClassVar[str] = "page-kv-cache"
    numerics: ClassVar[Numerics] = exact()
    needs: ClassVar[tuple[str, ...]] = (STATES,)
    changes_interface: ClassVar[bool] = True

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.page < 1:
            raise PassError(f"pages of {self.page} rows", fix="use 16 up")
        cache = cache_of(g)
        if isinstance(cache.capacity, int):
            raise PassError("the capacity of the cache is a number already")
        taken = {s.name for s in g.all_symbols} | {i.key for i in g.inputs}
        pages, pool = (symbol(_free(name, taken)) for name in ("M", "P"))
        g = specialise(g, {cache.capacity: pages * self.page})
        batch = _batch(g, pages * self.page)
        table = Input(_free(TABLE, taken), Tensor((batch, pages), i64))
        new: dict[Op, Op] = {}
        states: dict[Op, Op] = {}
        for state in g.states:
            update: Any = g.users[state][0]
            _, heads, _, size = state.shape
            kept = state.replace(of=state.tensor.with_(shape=(pool, heads, self.page, size)))
            written = ops.update_pages(kept, update.new, table, update.start).from_(update)
            states[state], new[update] = kept, written
            ctx.counted("PageState", TITLE)
        made = _rebuilt(g, states, new, table)
        ctx.note(f"{len(states)} states in pages of {self.page} rows")
        return made

    def inputs_after(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> list[Any]:
        """The same rows in pages, one sequence after the other."""
        old = dict(zip((i.key for i in before.inputs), inputs, strict=True))
        env = bind_symbols(before, inputs)
        cache = cache_of(before)
        count = -(-int(env[cache.capacity]) // self.page)
        found: list[Any] = []
        for i in after.inputs:
            if i.key not in old:
                (batch,) = {x.shape[0] for x, s in zip(inputs, before.inputs) if s.state}
                found.append(torch.arange(batch * count).view(batch, count))
            elif i.state:
                x = old[i.key]
                short = count * self.page - x.shape[2]
                padded = torch.nn.functional.pad(x, (0, 0, 0, short))
                split = padded.unflatten(2, (count, self.page)).transpose(1, 2)
                found.append(split.flatten(0, 1).contiguous())
            else:
                found.append(_filled(i, old[i.key], count * self.page, int(env[cache.capacity])))
        return found


def _filled(i: Input, x: Any, room: int, capacity: int) -> Any:
    """An input over all positions, with room for those of the last page."""
    if not isinstance(x, torch.Tensor) or not isinstance(i.of, Tensor):
        return x
    over = [not (isinstance(size, int) or size.is_Symbol) for size in i.of.shape]
    grown = [n for is_so in reversed(over) for n in (0, room - capacity if is_so else 0)]
    return torch.nn.functional.pad(x, grown) if any(grown) else x


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _batch(g: Graph, room: Any) -> Any:
    """The batch of all states; PassError where one does not lie as pages do."""
    found = []
    for state in g.states:
        users: Any = g.users[state]
        fits = (
            len(state.shape) == 4 and state.shape[2] == room and len(users) == 1
            and users[0].name == "update" and users[0].dim % 4 == 2 and state not in g.outputs
        )  # fmt: skip
        if not fits:
            raise PassError(
                f"state {state.key} cannot lie in pages", node=node_text(g, state),
                why="it is not [batch, heads, capacity, size], with new rows written into it",
            )  # fmt: skip
        found.append(state.shape[0])
    return found[0]


def _rebuilt(g: Graph, states: dict[Op, Op], new: dict[Op, Op], table: Input) -> Graph:
    """The graph on pools; who read an update's rows reads those of its pages."""
    made: dict[Op, Op] = {**{i: i for i in g.inputs}, **states}
    pools: dict[Op, Op] = {}
    nodes: list[Op] = []
    for node in g.nodes:
        if node in new:
            written = new[node].map_operands(lambda o: made.get(o, o))
            rows = ops.gather_pages(written, table).from_(node)
            nodes += [written, rows]
            pools[node], made[node] = written, rows
        else:
            made[node] = node.map_operands(made.__getitem__)
            nodes.append(made[node])
    outputs = tuple(pools.get(o, made[o]) for o in g.outputs)
    inputs = [i for i in g.inputs if not i.state]
    inputs += [table, *(states[s] for s in g.states)]
    return Graph(tuple(inputs), (), outputs, g.name).with_nodes(nodes)  # type: ignore[arg-type]
