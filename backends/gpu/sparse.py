"""`linear(x, decode(w))` of few rows, with a w of which only some groups of codes are stored.

What many rows read is the dense weight: tiles that are empty in all rows are rare, and expanding
the groups for each tile would save memory only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from effc.codegen.triton.codes import UNIT
from effc.codegen.triton.codes_schedules import FEW
from effc.codegen.triton.codes_sparse import WARPS, Tasks, joined_runs, sparse_sums
from effc.codegen.triton.products import Factor, Products, Walk
from effc.ir import DType, No, Op, no, yes
from effc.ir.formats import Encoded, GroupQuant, GroupSparse
from effc.ir.rewrite import Answer
from effc.ir.symbols import product
from effc.ir.types import DTYPES, Tensor, f32, row_major

from ..plan.builder import Builder
from ..plan.memory import Ref, whole
from ..plan.moves import packed_ref
from ..plan.regions import Region
from . import anchored, codes
from .anchored import Parts, left_of
from .codes import FACTORS, Stored, outer, stored
from .lowering import GPU, call, lowers
from .products import device
from .quantize import lead_of

I16, I32 = DTYPES["i16"], DTYPES["i32"]
COLUMNS = 1 << 15  # groups of a row: a place is two bytes, one bit of which says where runs begin
EACH = (8, 4, 2, 1)  # units of a lane
FULL = 4  # tasks of every unit of a GPU, where there are enough


@dataclass(frozen=True)
class Kept:
    """How a weight's groups are packed; `of` is its type."""

    of: Tensor
    units: int  # of the device
    read: int  # rows of x

    @property
    def format(self) -> GroupSparse:
        assert isinstance(self.of.format, GroupSparse)
        return self.of.format

    @property
    def values(self) -> Stored:
        """The groups as rows of a matrix."""
        return Stored(self.format.parts(self.of)["values"])

    @property
    def tasks(self) -> Tasks:
        f, rows = self.format, self.of.shape[0]
        assert isinstance(rows, int)
        walk = replace(self.values.walk, group=f.group)  # a scale a group, in any case
        for each in EACH:
            if each * self.read > EACH[0]:  # registers
                continue
            t = Tasks(walk, f.kept, rows, max(1, each * WARPS * 32 * UNIT // f.group))
            if t.count >= FULL * self.units:
                return t
        return t

    def starts(self, value: Encoded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The places of all groups, the first run of each task, and of each row."""
        t = self.tasks
        mask = self.format.mask(self.of, value.parts)
        row, column = mask.nonzero(as_tuple=True)
        at = torch.arange(len(row), device=row.device)
        begins = at % t.groups == 0
        begins[1:] |= row[1:] != row[:-1]
        place = column << 1 | begins
        run = begins.cumsum(0) - 1
        first = run[:: t.groups]
        counts = torch.bincount(row[begins], minlength=t.rows)
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.nn.functional.pad(place, (0, t.count * t.groups - len(place)))
        return place.to(torch.int32).to(torch.int16), first.to(torch.int32), start.to(torch.int32)

    def start(self, index: int, value: Encoded) -> torch.Tensor:
        return self.starts(value)[index].contiguous()

    def of_groups(self, make: Any, each: int, value: Encoded) -> torch.Tensor:
        """What Stored makes of the kept groups, and nothing for those that fill the last task."""
        made = make(value["values"])
        t = self.tasks
        return torch.nn.functional.pad(made, (0, t.count * t.groups * each - len(made)))

    def refs(self, b: Builder, node: Op) -> tuple[list[Ref], Ref]:
        """What the sums read, in the kernel's order; and where the runs of each row begin."""
        t, key = self.tasks, (GPU.name, self.tasks.groups)
        groups, c, values = t.count * t.groups, t.codes, self.values
        units = c.size // UNIT

        def ref(what: str, make: Any, count: int, dtype: DType) -> Ref:
            return b.derived_ref(node, what, make, count, key, dtype)

        found = [
            ref("places of groups", partial(self.start, 0), groups, I16),
            ref("runs of tasks", partial(self.start, 1), t.count, I32),
            ref("scales", partial(self.of_groups, values.scale, 1), groups, c.scale),
        ]
        for j, dtype in enumerate(c.words):
            what = f"{c.bits}-bit codes, part {j} of {len(c.words)}"
            make = partial(self.of_groups, partial(values.words, j, whole_rows=False), units)
            found.append(ref(what, make, groups * units, dtype))
        if isinstance(c.zero, DType):
            found.append(ref("zeros", partial(self.of_groups, values.zero, 1), groups, c.zero))
        return found, ref("runs of rows", partial(self.start, 2), t.rows + 1, I32)


def _weight(node: Op) -> Any:
    """The one weight of a node's product that is stored by groups; None where there is none."""
    region = Region.of(node)
    found = outer(region)
    linears: list[Any] = [n for n in region.nodes if n.name == "linear"]
    read = [found.get(n.w, n.w) for n in linears]
    sparse = [w for w in read if stored(w) and isinstance(w.x.tensor.format, GroupSparse)]
    return sparse[0] if sparse else None


def check(node: Op) -> Answer:
    """Whether the groups are read as they are stored."""
    if not (answer := anchored.check(node)):
        return answer
    region = Region.of(node)
    parts, w = Parts.of(region), _weight(node)
    anchor: Any = parts.anchors[0]
    if len(parts.anchors) > 1 or parts.before or parts.stores:
        return no("only what follows one product is computed with groups", at=node)
    if anchor.tensor.dtype.name not in FACTORS:
        return no("codes are not multiplied with {}", anchor.tensor.dtype, at=anchor)
    rows = product(anchor.shape[:-1])
    if not isinstance(rows, int) or not 0 < rows <= FEW:
        return no("{} rows; up to {} read groups", rows, FEW, at=node)
    leaf = next(k for k, v in outer(region).items() if v is w)
    if any(o is leaf for n in parts.rest for o in n.operands) or anchor.x is leaf:
        return no("the weight is also read as numbers", at=node)
    t = w.x.tensor
    f = t.format
    if not isinstance(f.of, GroupQuant) or not (f.of.group is None or f.of.group >= f.group):
        return no("groups in {} are read by no kernel", f.of, at=w)
    if f.group % UNIT or f.group & (f.group - 1) or f.group > 1024:
        return no("a group of {} codes is no power of two from {} on", f.group, UNIT, at=w)
    if t.dtype.bits > 7:
        return no("groups of {} are read by no kernel", t.dtype, at=w)
    if f.groups(t) > COLUMNS or not f.kept:
        return no("{} groups of {} a row are kept", f.kept, f.groups(t), at=w)
    return yes


def lower(b: Builder, node: Op) -> None:
    w = _weight(node)
    if w is None:
        codes.lower(b, node)
    elif isinstance(answer := check(node), No):
        codes.lower(b, node, answer)
    else:
        _lower(b, node, w)


def _lower(b: Builder, node: Op, w: Any) -> None:
    region = Region.of(node)
    parts = Parts.of(region)
    anchor: Any = parts.anchors[0]
    read = {o for n in region.computed() for o in n.operands} - {anchor.w}
    refs = region.refs(b, read)
    x = refs[anchor.x]
    if (lead := lead_of(x)).rank > 1:
        x = packed_ref(b, anchor.x, x, row_major)
        lead = lead_of(x)
    rows = product(anchor.shape[:-1])
    assert isinstance(rows, int)
    kept = Kept(w.x.tensor, device(b).units, rows)
    t = kept.tasks
    memory, starts = kept.refs(b, w.x)
    space = codes.anchor_of(b, anchor, memory[0])
    leaves = anchored.leaves_of(b, parts, refs)
    (out,) = b.results(node)
    comment = tuple(region.comment(b))
    work = Products(
        space.space, Factor(left_of(anchor), ()), (Walk(anchor.dtype),), space.spread(out),
        tuple((leaf, space.spread(ref)) for leaf, ref in leaves.items()),
        partial(anchored.after, parts=parts), anchor.dtype, comment=comment,
    )  # fmt: skip
    far = lead.operands[0].strides[0] if lead.rank else 0
    sums = whole(b.new_root("arena", node, Tensor((rows * t.runs,), f32)))
    made = sparse_sums(t, x.dtype, rows, far, x.strides[-1], x.offset, comment)
    call(b, node, made, [sums], [x, *memory], note=f"{t.count} tasks of {t.groups} groups")
    ends = joined_runs(work, t.runs)
    call(b, node, ends, [out], [sums, starts, *leaves.values()], note="sums of the runs")
    b.set(node, out)


lowers("linear", check=anchored.check)(lower)

__all__ = ["check", "lower"]
