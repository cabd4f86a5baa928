"""Runs of equal blocks as loops: one body in the place of its copies."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from effc.ir import Graph, Input, Item, Op, no, yes
from effc.ir.ops.region import Loop
from effc.ir.rewrite import Answer, op
from effc.ir.types import Tensor
from effc.passes.analysis.blocks import Block, Run, find_runs
from effc.passes.base import Context, Pass, exact
from effc.passes.common import missed

RULE, TITLE = "RollBlocks", "block(w3, block(w2, block(w1, x))) => loop(block, x, stacked w1 w2 w3)"


@dataclass(frozen=True)
class RollBlocks(Pass):
    """Write each run of equal blocks as one loop over stacked constants.

    rewrite:
        x1 = block(x0, table, w1); x2 = block(x1, table, w2)
        -->
        x2 = loop((x0,), (table,), (stack(w1, w2),), body=block, trip=2)

    The graph, its text and its dump then grow with the number of distinct blocks. Plans open loops
    again and read each time's constants where they are, so that kernels and results stay the same.
    blocks: shorter runs stay as they are. Passes behind this one see a block's weights as values.
    """

    name, numerics = "roll-blocks", exact()
    blocks: int = 2

    def run(self, g: Graph, ctx: Context) -> Graph:
        new: dict[Op, Op] = {}
        runs = find_runs(g)
        for run in runs:
            answer = self.legal(g, run)
            if answer:
                new |= rolled(g, run)
                ctx.counted(RULE, TITLE)
                ctx.note(f"{len(run)} blocks of {len(run.blocks[0].nodes)} nodes are one loop")
            else:
                missed(ctx, RULE, TITLE, g, run.blocks[-1].result, answer, near=len(run))
        if not runs:
            ctx.note("no two equal blocks follow each other")
        return ctx.substitute(g, new)

    def legal(self, g: Graph, run: Run) -> Answer:
        if len(run) < self.blocks:
            return no("{} equal blocks, of at least {}", len(run), self.blocks)
        first = run.blocks[0]
        for node in first.nodes:
            if node.random:
                return no("{} draws random numbers, whose order must stay", node.name, at=node)
        for value in (*first.emitted, first.carry, *run.shared):
            if not isinstance(value.type, Tensor):
                return no("{} is {}, not a tensor", value.name, value.type, at=value)
        for value in (*first.weights, *first.given):
            if value.type != Tensor(value.shape, value.dtype):
                return no("{} cannot be stacked", value.type, at=value)
        if template(run) is None:
            return no("a value has one part in some blocks and two in others", at=first.result)
        return yes


def rolled(g: Graph, run: Run) -> dict[Op, Op]:
    """What stands for the values of a run that others read."""
    first, trip = run.blocks[0], len(run)
    columns = zip(*(b.weights + b.given for b in run.blocks))
    stacked = tuple(op.stack(column).from_(*column) for column in columns)
    loop = Loop((first.carry,), run.shared, stacked, body_of(g, run), trip).from_(*first.nodes)
    if not first.emitted:
        return {run.blocks[-1].result: loop}
    new: dict[Op, Op] = {run.blocks[-1].result: Item(loop, 0)}
    for place in range(len(first.emitted)):
        for block in run.blocks:
            value = block.emitted[place]
            new.setdefault(value, Item(loop, 1 + place * trip + block.index).from_(value))
    return new


def template(run: Run) -> Block | None:
    """A block in which each value that it reads from outside has one place."""
    return next((b for b in run.blocks if len(set(_read(run, b))) == len(_read(run, b))), None)


def _read(run: Run, block: Block) -> tuple[Op, ...]:
    return (block.carry, *run.shared, *block.weights, *block.given)


def body_of(g: Graph, run: Run) -> Graph:
    """A block as a graph of its carry, the shared values and its own ones."""
    block = template(run)
    assert block is not None
    values = _read(run, block)
    taken = {s.name for s in g.all_symbols}
    free = (name for i in count() if (name := f"a{i}") not in taken)
    inputs = tuple(Input(name, v.tensor) for name, v in zip(free, values))
    inner: dict[Op, Op] = dict(zip(values, inputs, strict=True))
    for node in block.nodes:
        made = node.map_operands(inner.__getitem__)
        inner[node] = node.replace() if made is node else made
    outputs = (inner[block.result], *(inner[n] for n in block.emitted))
    return Graph(inputs, tuple(inner[n] for n in block.nodes), outputs, "block")


__all__ = ["RollBlocks"]
