"""An op computed on several slices of one value is computed once, on all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, Op, no, yes
from effc.ir.ops.pointwise import Pointwise
from effc.ir.rewrite import Answer, op

from .analysis.aliases import shown_values
from .base import Context, Pass, exact
from .common import missed
from .fuse_regions import along_rows, fusable

RULE = "JoinSlices"
TITLE = "f(slice(x, a, b)), f(slice(x, b, c)) => slices of f(slice(x, a, c))"


@dataclass(frozen=True)
class JoinSlices(Pass):
    """Compute a unary op, or a rotary embedding, once for neighbouring slices of one value.

    rewrite:
        q = rope(slice(x, 0, 64), cos, sin); k = rope(slice(x, 64, 32), cos, sin)
        -->
        y = rope(slice(x, 0, 96), cos, sin); q = slice(y, 0, 64); k = slice(y, 64, 32)

    The slices may be split into heads and permuted on their way, in the same manner. What follows
    a layer that was merged from several (merge-qkv) then follows it again.
    """

    name, numerics = (
        "join-slices",
        exact("rounding"),
    )  # a library may round strided values its own way

    def run(self, g: Graph, ctx: Context) -> Graph:
        families: dict[object, list[Piece]] = defaultdict(list)
        for node in g.nodes:
            if node not in g.constants and (piece := Piece.of(node)) is not None:
                families[piece.family].append(piece)
        new: dict[Op, Op] = {}
        for pieces in families.values():
            for run in _neighbours(pieces):
                answer = _legal(g, run)
                if answer:
                    new |= _joined(run)
                    ctx.counted(RULE, TITLE)
                else:
                    missed(ctx, RULE, TITLE, g, run[0].node, answer, near=len(run))
        if not families:
            ctx.note("no op of one operand reads a slice")
        return ctx.substitute(g, new)


@dataclass(frozen=True)
class Piece:
    """`node` applied to a slice of x after `steps`.

    steps: (reshape or permute, the dimension along which the slice was taken, before it).
    axis: that dimension of the result; unit: elements of the slice for one of it.
    """

    node: Any
    cut: Any  # the slice
    steps: tuple[tuple[Any, int], ...]
    axis: int
    unit: int

    @staticmethod
    def of(node: Any) -> Piece | None:
        if not (node.name == "rope" or (isinstance(node, Pointwise) and len(node.operands) == 1)):
            return None
        chain: list[Any] = []
        x = node.operands[0]
        while x.name in ("reshape", "permute"):
            chain.insert(0, x)
            x = x.x
        if x.name != "slice" or x.step != 1 or not isinstance(x.start, int):
            return None
        axis, unit, steps = x.dim % x.tensor.rank, 1, []
        for step in chain:
            steps.append((step, axis))
            if step.name == "permute":
                axis = step.dims.index(axis)
            elif unit == 1 and (heads := _split(step, axis)):
                unit = heads
            else:
                return None
        if not isinstance(x.size, int) or x.start % unit:
            return None
        return Piece(node, x, tuple(steps), axis, unit)

    @property
    def family(self) -> object:
        """What pieces that can be joined have in common."""
        steps = tuple(s.dims if s.name == "permute" else self.unit for s, _ in self.steps)
        n, x = self.node, self.node.operands[0]
        given = tuple(
            "slice" if value is x else value if isinstance(value, Op) else repr(value)
            for value in (getattr(n, f.name) for f in n.fields)
        )
        return self.cut.x, self.cut.dim, steps, self.axis, n.name, given

    @property
    def end(self) -> int:
        return self.cut.start + self.cut.size


def _split(step: Any, axis: int) -> int | None:
    """The inner size where a reshape only splits one dimension in two."""
    shape, to = step.x.shape, step.to
    if (
        len(to) != len(shape) + 1
        or to[:axis] != shape[:axis]
        or to[axis + 2 :] != shape[axis + 1 :]
    ):
        return None
    return to[axis + 1] if isinstance(to[axis + 1], int) else None


def _neighbours(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of two or more pieces, each beginning where the one before it ends."""
    run: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.cut.start):
        if run and piece.cut.start != run[-1].end:
            if len(run) > 1:
                yield run
            run = []
        run.append(piece)
    if len(run) > 1:
        yield run


def _legal(g: Graph, run: list[Piece]) -> Answer:
    first = run[0]
    for piece in run:
        node = piece.node
        if node in shown_values(g):
            return no("an output must have memory of its own, not a slice", at=node)
        if node.pointwise and (near := loop_after(g, node)) is not None:
            return no("{} is computed where {} reads it", node.name, near.name, at=near)
    if first.node.name == "rope":
        axis = first.axis - first.node.tensor.rank
        if axis == -1:
            return no("the pieces lie along the rotated dimension", at=first.node)
        for table in (first.node.cos, first.node.sin):
            if table.tensor.rank >= -axis and table.shape[axis] != 1:
                return no("{} differs from piece to piece", table.name, at=table)
    return yes


def loop_after(g: Graph, node: Op) -> Op | None:
    """A reader in whose loop a pointwise op would be computed."""
    return next((u for u in g.users[node] if fusable(u) or along_rows(u)), None)


def alike(nodes: list[Any]) -> bool:
    """The same unary op, each of its own value."""
    first = nodes[0]
    return isinstance(first, Pointwise) and all(
        type(n) is type(first) and len(n.operands) == 1 and n.attrs == first.attrs
        and [v for v in n.values if not isinstance(v, Op)]
        == [v for v in first.values if not isinstance(v, Op)]
        for n in nodes
    )  # fmt: skip


def _joined(run: list[Piece]) -> dict[Op, Op]:
    """The slice that stands for each piece."""
    first = run[0]
    total = run[-1].end - first.cut.start
    x = first.cut.replace(size=total).from_(*(p.cut for p in run))
    for step, axis in first.steps:
        if step.name == "permute":
            x = op.permute(x, step.dims).from_(step)
        else:
            to = (*step.to[:axis], total // first.unit, *step.to[axis + 1 :])
            x = op.reshape(x, to).from_(step)
    source = first.node.operands[0]
    whole = first.node.map_operands(lambda o: x if o is source else o)
    whole.from_(*(p.node for p in run))
    new: dict[Op, Op] = {}
    for piece in run:
        start = (piece.cut.start - first.cut.start) // first.unit
        size = piece.cut.size // first.unit
        new[piece.node] = op.slice(whole, first.axis, start, size).from_(piece.node)
    return new
