"""Fusion: groups of ops become regions, each to be computed by one kernel.

Two shapes of region. An anchor (convolution, matrix product, attention) with the pointwise ops that
follow it, and for a matrix product also those before it, or a second product of the same value; for
a convolution the pooling or change of layout before it, pictures enlarged for what follows, and for
a 1x1 one the convolution before it; and a loop, pointwise ops over one iteration shape with at most
one op along rows.
The target is asked about each region; a refused one shrinks, or its ops stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effc.ir import Graph, No, Op, Tensor, no
from effc.ir.ops.reduce import Reduction
from effc.ir.ops.region import Fused
from effc.ir.rewrite import Answer
from effc.ir.types import Dense, Layout, row_major

from .analysis.grouping import Grouping, operands_of, results_of
from .base import Context, Pass, exact
from .common import missed
from .outline import condense, outline
from .stack_pointwise import is_pointwise

ANCHORS = ("conv1d", "conv2d", "conv3d", "linear", "matmul", "attention", "group_norm")
ROWS = ("softmax", "log_softmax", "layer_norm", "rms_norm")
PRODUCTS = ("linear", "matmul")
PICTURES = ("to_layout", "max_pool2d", "avg_pool2d")  # a convolution may read through them
EPILOGUE = (
    "FuseEpilogue",
    "norm? + conv | linear | attention | group_norm ... + pointwise ops => one region",
)
LOOP = ("FuseLoop", "pointwise ops over one shape, with at most one op along rows => one region")


@dataclass(frozen=True)
class FuseRegions(Pass):
    """Group ops into regions that read and write memory once.

    rewrite:
        y = conv2d(x, w); z = relu(y); out = add(z, x)
        -->
        def r0(a0, a1): y = conv2d(a0, a1); z = relu(y); return add(z, a0)
        out = fused((x, w), body=r0)

    max_operands: a region reads at most so many values.
    anchors: also join pointwise ops to the convolution or matrix product before them.
    rows: at most one softmax, norm or reduction along rows inside a loop.
    rows_first: a pointwise op that feeds an op along rows goes into its loop, not into the region
        of the anchor before it; for targets whose anchors are library calls.
    """

    name, numerics = "fuse-regions", exact()
    max_operands: int = 16
    anchors: bool = True
    rows: bool = True
    rows_first: bool = False

    def run(self, g: Graph, ctx: Context) -> Graph:
        fusion = _Fusion(g, ctx, self)
        if self.anchors:
            fusion.anchor_regions()
        fusion.loop_regions()
        if not fusion.regions:
            ctx.note("no two ops can share a loop")
            return g
        result = condense(g, fusion.regions)
        ctx.touched += [n for n in result.nodes if isinstance(n, Fused) and n not in g.users]
        return result


# ------------------------------------------------------------------ what can be fused


def fusable(node: Op) -> bool:
    """A pointwise op on plainly stored tensors, in one layout."""
    if not node.pointwise or not _plain(node):
        return False
    full = [o for o in node.operands if isinstance(o.type, Tensor) and o.shape == node.shape]
    return all(map(_plain, node.operands)) and all(
        o.tensor.layout == node.tensor.layout for o in full
    )


def _plain(value: Op) -> bool:
    t = value.type
    return isinstance(t, Tensor) and isinstance(t.format, Dense) and t.dtype.torch is not None


def along_rows(node: Op) -> bool:
    """An op over the last dimension whose result is a row, or one value a row kept as size 1."""
    if isinstance(node, Reduction):
        rank = node.x.tensor.rank
        along = node.keepdim and node.dims == (rank - 1,) and node.name != "prod"
    elif node.name in ("softmax", "log_softmax"):
        along = node.dim % node.tensor.rank == node.tensor.rank - 1
    else:
        along = node.name in ROWS and node.dims == 1
    return along and _plain(node) and node.x.tensor.rank > 0 and node.x.tensor.layout == row_major


@dataclass
class Loop:
    """What a group of the loop kind iterates over."""

    shape: tuple[Any, ...]
    layout: Layout
    row: Op | None = None

    @property
    def row_shape(self) -> tuple[Any, ...]:
        return (*self.shape[:-1], 1)


class _Fusion:
    def __init__(self, graph: Graph, ctx: Context, options: FuseRegions) -> None:
        self.graph, self.ctx, self.options = graph, ctx, options
        self.groups = Grouping(graph)
        self.regions: list[tuple[list[Op], Fused]] = []
        self.taken: set[Op] = set()  # members of accepted regions
        self.refused: set[Op] = set()  # nodes that the target does not take into a loop

    def ask(self, members: list[Op]) -> tuple[Fused, Answer]:
        region = outline(self.graph, members)
        if len(region.xs) > self.options.max_operands:
            return region, no("{} operands, at most {}", len(region.xs), self.options.max_operands)
        return region, self.ctx.supports(region)

    def accept(self, rule: tuple[str, str], members: list[Op], region: Fused) -> None:
        self.groups.merge_nodes(members)
        self.taken.update(members)
        self.regions.append((members, region))
        self.ctx.counted(*rule)

    def miss(self, rule: tuple[str, str], node: Op, why: Answer) -> None:
        missed(self.ctx, *rule, self.graph, node, why)

    # -------------------------------------------------------------- anchors

    def anchor_regions(self) -> None:
        """Later anchors first: of add(conv(x), conv(y)), the result just computed takes the add."""
        for anchor in reversed(self.graph.nodes):
            known = anchor in self.groups.group and anchor not in self.taken
            if anchor.name in ANCHORS and known and _plain(anchor):
                for members in self.around(anchor):
                    if len(members) == 1:
                        break
                    region, answer = self.ask(members)
                    if answer:
                        self.accept(EPILOGUE, members, region)
                        break
                    self.miss(EPILOGUE, anchor, answer)

    def around(self, anchor: Op) -> Iterator[list[Op]]:
        """Groups of members around an anchor, best first, the anchor alone last."""
        for other in self.siblings(anchor):
            yield from self.joined([other, anchor])
        spine = self.spine([anchor])
        head = self.norm_before(anchor) or self.picture_before(anchor)
        heads = self.chained(anchor) or ([[head]] if head else self.before([anchor]))
        for end in range(len(spine), 0, -1):
            part = spine[:end]
            results = results_of(self.graph, part)
            if len(results) > 1:
                if end > 1 and results[0] is anchor:
                    self.miss(EPILOGUE, anchor, self.used_twice(anchor, part))
                continue
            part = self.with_sides([anchor], part)
            if anchor.name != "conv2d":
                yield from self.mergeable(part, [*heads, []], [[]])
                continue
            tails, enlarged = self.stores_after(results[0]), self.enlarged(part)
            for more in [enlarged, []] if enlarged else [[]]:
                yield from self.mergeable([*part, *more], [*heads, []], tails)

    def joined(self, anchors: list[Op]) -> Iterator[list[Op]]:
        """Two products of one value with what joins their results to one."""
        spine = self.spine(anchors)
        for end in range(len(spine), len(anchors), -1):
            part = spine[:end]
            if len(results_of(self.graph, part)) == 1 and all(a in part for a in anchors):
                part = self.with_sides(anchors, part)
                yield from self.mergeable(part, [*self.before(anchors), []], [[]])

    def mergeable(
        self, part: list[Op], heads: list[list[Op]], tails: list[list[Op]]
    ) -> Iterator[list[Op]]:
        for head in heads:
            for tail in tails:
                members = self.sorted([*head, *part, *tail])
                if self.groups.can_merge(self.groups.group[n] for n in members):
                    yield members

    def siblings(self, anchor: Any) -> list[Op]:
        """Other linear layers of the same value, with results of the same shape."""
        if anchor.name != "linear":
            return []
        return [
            n for n in self.graph.users[anchor.x]
            if n.name == "linear" and n is not anchor and n.x is anchor.x and n.type == anchor.type
            and n in self.groups.group and n not in self.taken
        ]  # fmt: skip

    def before(self, anchors: list[Any]) -> list[list[Op]]:
        """Pointwise ops on a product's first operand, if nothing else reads them; none where they
        follow an op that can take them as what comes after it."""
        if anchors[0].name not in PRODUCTS:
            return []
        left = anchors[0].x if anchors[0].name == "linear" else anchors[0].a
        inside, waiting = set(anchors), [left]
        while waiting:
            node = waiting.pop()
            if node in inside or node not in self.groups.group or node in self.taken:
                continue
            only = all(u in inside for u in self.graph.users[node])
            only = only and node not in self.graph.outputs
            if node.name in (*ANCHORS, *ROWS):
                return []
            if only and fusable(node) and node.shape == left.shape:
                inside.add(node)
                waiting += node.operands
        found = self.sorted([n for n in inside if n not in anchors])
        return [found] if found else []

    def used_twice(self, anchor: Op, part: list[Op]) -> No:
        if anchor in self.graph.outputs:
            return no("{} is also an output", anchor.name, at=anchor)
        other = next(u for u in self.graph.users[anchor] if u not in part)
        return no("{} is also used by {}", anchor.name, other.name, at=anchor)

    def spine(self, anchors: list[Op]) -> list[Op]:
        """Anchors and the pointwise ops of their shape that follow from them, in program order."""
        anchor, spine, inside = anchors[0], [*anchors], {*anchors}
        waiting = {u for a in anchors for u in self.graph.users[a]}
        while waiting:
            node = min(waiting, key=self.groups.position.__getitem__)
            waiting.discard(node)
            if node in self.taken or node in inside or not fusable(node):
                continue
            if node.shape != anchor.shape or node.tensor.layout != anchor.tensor.layout:
                continue
            if self.options.rows_first and any(map(along_rows, self.graph.users[node])):
                continue
            if not self.groups.can_merge(self.groups.group[n] for n in (*spine, node)):
                continue
            spine.append(node)
            inside.add(node)
            waiting.update(self.graph.users[node])
        return self.sorted(spine)

    def with_sides(self, anchors: list[Op], spine: list[Op]) -> list[Op]:
        """Add pointwise ops of the same shape that only the epilogue reads."""
        anchor = anchors[0]
        inside, sides = {n for n in spine if n not in anchors}, []
        waiting = [o for n in inside for o in n.operands if o not in anchors]
        while waiting:
            node = waiting.pop()
            if node in inside or node not in self.groups.group or node in self.taken:
                continue
            only = (
                all(u in inside for u in self.graph.users[node]) and node not in self.graph.outputs
            )
            if only and fusable(node) and node.shape == anchor.shape:
                if node.tensor.layout == anchor.tensor.layout:
                    sides.append(node)
                    inside.add(node)
                    waiting += node.operands
        return self.sorted([*spine, *sides])

    def norm_before(self, anchor: Op) -> Op | None:
        if anchor.name != "linear":
            return None
        norm = anchor.x
        if norm.name not in ("layer_norm", "rms_norm") or norm in self.taken or norm.dims != 1:
            return None
        if norm not in self.groups.group:
            return None
        if self.graph.uses(norm) > 1:
            self.miss(EPILOGUE, anchor, no("{} is also used elsewhere", norm.name, at=norm))
            return None
        return norm

    def chained(self, anchor: Any) -> list[list[Op]]:
        """The convolution before a 1x1 one with what is between them, if nothing else reads it;
        with what its own picture is read through, and without."""
        if anchor.name != "conv2d" or not is_pointwise(anchor):
            return []
        first, inside, waiting = None, {anchor}, [anchor.x]
        while waiting:
            node = waiting.pop(0)
            if node in inside or node not in self.groups.group or node in self.taken:
                continue
            only = all(u in inside for u in self.graph.users[node])
            if not only or node in self.graph.outputs or node.shape != anchor.x.shape:
                continue
            if node.name == "conv2d" and first is None:
                first = node
                inside.add(node)
            elif fusable(node):
                inside.add(node)
                waiting += node.operands
        if first is None:
            return []
        found = [n for n in inside if n is not anchor]
        found += self.enlarged(found)
        picture = self.picture_before(first)
        return [[picture, *found], found] if picture else [found]

    def picture_before(self, anchor: Any) -> Op | None:
        """A pooling or a change of layout that only this convolution reads."""
        if anchor.name != "conv2d" or anchor.x.name not in PICTURES:
            return None
        picture = anchor.x
        free = picture in self.groups.group and picture not in self.taken and _plain(picture)
        return picture if free and self.only_user(picture) is anchor else None

    def enlarged(self, part: list[Op]) -> list[Op]:
        """Pictures that are enlarged for these nodes alone."""
        read = dict.fromkeys(o for n in part if n.pointwise for o in n.operands)
        return [
            o for o in read
            if o.name == "interpolate" and o in self.groups.group and o not in self.taken
            and o not in self.graph.outputs and all(u in part for u in self.graph.users[o])
        ]  # fmt: skip

    def stores_after(self, last: Op) -> list[list[Op]]:
        """Ops that only say where results are stored: pixel_shuffle, to_layout; longest first."""
        tails: list[list[Op]] = [[]]
        for name in ("pixel_shuffle", "to_layout"):
            user = self.only_user(last)
            if user is not None and user.name == name and user not in self.taken:
                tails.insert(0, [*tails[0], user])
                last = user
        return tails

    def only_user(self, value: Op) -> Op | None:
        users = self.graph.users[value]
        return users[0] if len(users) == self.graph.uses(value) == 1 else None

    def sorted(self, members: list[Op]) -> list[Op]:
        return sorted(members, key=self.groups.position.__getitem__)

    # -------------------------------------------------------------- loops

    def loop_regions(self) -> None:
        """Grow, ask, forbid what was refused; again until the target takes every region."""
        while True:
            found = [m for m in self.grow() if len(m) > 1]
            refusals = [m for m in found if not self.try_loop(m)]
            if not refusals:
                return
            self.groups = Grouping(self.graph)
            for members, _ in self.regions:
                self.groups.merge_nodes(members)

    def try_loop(self, members: list[Op]) -> bool:
        region, answer = self.ask(members)
        if answer:
            self.accept(LOOP, members, region)
            return True
        self.miss(LOOP, members[0], answer)
        self.refused.update(self.culprits(members, region, answer))
        return False

    def culprits(self, members: list[Op], region: Fused, answer: Answer) -> list[Op]:
        """The op that the refusal is about; else the op along rows; else all of them."""
        at = answer.at if isinstance(answer, No) else None
        for member, inner in zip(members, region.body.nodes, strict=True):
            if at is inner:
                return [member]
        return [n for n in members if not n.pointwise] or members

    def grow(self) -> list[list[Op]]:
        loops: dict[int, Loop] = {}
        for node in self.graph.nodes:
            if node not in self.groups.group or node in self.taken or node in self.refused:
                continue
            row = self.options.rows and along_rows(node)
            if not row and not fusable(node):
                continue
            own = self.groups.group[node]
            x: Any = node
            loops[own] = (
                Loop(x.x.shape, row_major, node) if row else Loop(node.shape, node.tensor.layout)
            )
            read = dict.fromkeys(
                self.groups.group[o] for o in node.operands if o in self.groups.group
            )
            near = [g for g in read if g in loops and g != own and self.takes(loops[g], node)]
            if len(near) > 1:
                self.join(loops, [*near, own], node)
            for g in sorted(near, key=lambda g: g in loops and loops[g].row is None):
                if g in loops and self.groups.group[node] != g:
                    self.join(loops, [g, self.groups.group[node]], node)
        return [self.groups.members[g] for g in loops]

    def takes(self, loop: Loop, node: Any) -> bool:
        """Whether a node that reads a value of the loop can be computed inside it."""
        if along_rows(node):
            return loop.row is None and node.x.shape == loop.shape and loop.layout == row_major
        if node.shape == loop.shape and node.tensor.layout == loop.layout:
            return loop.row is None or not self.begins_a_row(node)
        return loop.row is not None and node.shape == loop.row_shape

    def begins_a_row(self, node: Op) -> bool:
        """Read once, on the way to an op along rows: stored there it would be read back at once."""
        while node.pointwise and self.graph.uses(node) == 1:
            users = self.graph.users[node]
            if not users or (users[0].operands[0] is not node and not users[0].pointwise):
                return False
            node = users[0]
            if along_rows(node):
                return True
        return False

    def join(self, loops: dict[int, Loop], groups: list[int], node: Op) -> None:
        """Merge groups that a node reads with the node's own, if they agree on what to iterate."""
        groups = list(dict.fromkeys(groups))
        members = [n for g in groups for n in self.groups.members[g]]
        given = [loops[g] for g in groups if self.groups.members[g] != [node]]
        rows = [loops[g].row for g in groups if loops[g].row is not None]
        first = given[0]
        if any((o.shape, o.layout) != (first.shape, first.layout) for o in given) or len(rows) > 1:
            return
        count = len(operands_of(members))
        if count > self.options.max_operands:
            why = no("{} operands, at most {}", count, self.options.max_operands, at=node)
            return self.miss(LOOP, node, why)
        if not self.groups.can_merge(groups):
            why = no("an op outside would run between {} and what it reads", node.name, at=node)
            return self.miss(LOOP, node, why)
        for g in groups:
            del loops[g]
        row = rows[0] if rows else None
        loops[self.groups.merge(groups)] = Loop(first.shape, first.layout, row)
