"""Attention over a cache as it lies: rows of floats or of codes with a scale, whole or in pages.

Between the cache and attention stand ops that say what it means: `gather_pages`, `encoded`,
`decode`. Where all who read them are attention (`reads_cache`), nothing of them is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effc.codegen.cpp.products import BF16, F16, F32, core
from effc.ir import No, Op, no, yes
from effc.ir.formats import GroupQuant, code_range
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim
from effc.ir.types import Dense, row_major

from ..plan.builder import Builder
from ..plan.host import fallback
from ..plan.memory import Ref, whole
from ..plan.moves import packed_ref
from .lowering import lowers
from .operands import unit

KINDS = {F32: 0, F16: 1, BF16: 2}  # of floats, as kernels number them
READERS = {
    F32: "attention_of_codes_f32", BF16: "attention_of_codes_bf16", F16: "attention_of_codes_f16",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Keys or values where they lie. table: they lie in pages, which it names."""

    value: Any
    coded: bool = False
    table: Op | None = None

    @property
    def plain(self) -> bool:
        return not self.coded and self.table is None

    def part(self, b: Builder, index: int) -> Ref:
        """The rows (0), or their scales (1); [pages, ...] where they lie in pages."""
        if not self.coded:
            return b.ref(self.value.pool if self.table is not None else self.value)
        if self.table is not None:
            return b.ref(self.value.x.xs[index].pool)
        return b.part(self.value.x, index)


def kept(value: Op) -> Kept | No:
    """What attention reads of keys or values, where that is not the value itself."""
    if value.name == "gather_pages":
        return Kept(value, table=value.table)
    if value.name != "decode":
        return Kept(value)
    found: Any = value.x
    answer = _readable(found)
    if isinstance(answer, No):
        return answer
    tables = [getattr(x, "table", None) for x in found.operands if x.name == "gather_pages"]
    if found.name != "encoded" or not tables:
        return Kept(value, coded=True)
    if len(tables) != len(found.xs) or len(set(tables)) > 1:
        return no("codes and scales lie in different pages", at=value)
    return Kept(value, True, tables[0])


def _readable(x: Any) -> Answer:
    t, f = x.tensor, x.tensor.format
    if x.name not in ("encoded", "quantize") or not isinstance(f, GroupQuant):
        return no("{} is no cache of codes", f, at=x)
    if not isinstance(f.codes, Dense) or code_range(t.dtype)[0] >= 0 or f.zero is not None:
        return no("codes of {} have zeros or are packed", t, at=x)
    whole_rows = f.group is None or (isinstance(t.shape[-1], int) and f.group >= t.shape[-1])
    if not whole_rows or f.scale not in KINDS:
        return no("{} has no scale of a float for each row", f, at=x)
    return yes


def caches(node: Any, operands: Mapping[Op, Op]) -> tuple[Kept, Kept] | No:
    """Keys and values of attention as the kernels read them; operands: its values in the plan."""
    if node.k not in operands or node.v not in operands:
        return no("a value of the region itself", at=node)
    k, v = kept(operands[node.k]), kept(operands[node.v])
    if isinstance(k, No):
        return k
    if isinstance(v, No):
        return v
    if k.coded != v.coded or k.table is not v.table:
        return no("keys and values do not lie in the same way", at=node)
    if k.plain:
        return k, v
    depth, heads = node.k.shape[-1], (*node.q.shape[-3:-2], *node.k.shape[-3:-2])
    known = isinstance(depth, int) and all(isinstance(n, int) for n in heads)
    if node.tensor.dtype not in KINDS or node.tensor.rank > 4 or not known:
        return no("no kernel for {} over such a cache", node.type, at=node)
    if k.table is not None and (node.past is None or node.tensor.rank != 4):
        return no("rows in pages are read up to `past` only", at=node)
    if k.table is not None and not node.gqa and node.k.shape[1] != node.q.shape[1]:
        return no("heads share keys without saying so", at=node)
    return k, v


def reads_cache(b: Builder, node: Any, value: Op, operands: Mapping[Op, Op]) -> bool:
    """Whether all that attention does with a value is to read the cache behind it."""
    places = (node.q, node.mask, node.past)
    if not b.kernels or any(p is not None and operands.get(p) is value for p in places):
        return False
    found = caches(node, operands)
    return not isinstance(found, No) and not found[0].plain


def more_reads(
    b: Builder, node: Any, pair: tuple[Kept, Kept], share: Any, operands: Mapping[Op, Op]
) -> tuple[Any, tuple[Ref, ...], tuple[Dim, ...]]:
    """Of attention over a cache: the core; what it reads after q, k, v and the mask; and what it is
    told after whether there is a past. share(ref): it by batch, head and row."""
    k = pair[0]
    none = b.ref(operands[node.q])  # in places of what is not there
    past = (none, none)
    if node.past is not None:
        past = b.ref(operands[node.past]), whole(b.error_word())
    table, numbers = none, (0, 0, 0)
    if k.table is not None:
        table = b.ref(k.table)
        table = table if unit(table, -1) else packed_ref(b, k.table, table, row_major)
        pool = k.part(b, 0)
        numbers = (pool.shape[2], table.strides[0], pool.shape[0])
    if not k.coded:
        return None, (*past, table), numbers
    scales = tuple(share(one.part(b, 1)) for one in pair)
    for scale in scales:
        numbers += (KINDS[scale.dtype], *scale.strides[:3])
    return core(READERS[node.tensor.dtype]), (*past, table, *scales), numbers


# ------------------------------------------------------------------ pages


@lowers("update_pages")
def _update_pages(b: Builder, node: Any) -> None:
    """Into the memory of the pool, or of a copy where that is read later."""
    out = b.ref(node.pool)
    if not (out.whole and b.overwrites(node.pool, node)):
        old, (out,) = out, b.results(node)
        b.target.copy_into(b, node, out, old, note="the old value is read later")
    new, table = b.ref(node.new), b.ref(node.table)
    if not unit(new, -1):
        new = packed_ref(b, node.new, new, row_major)
    if not unit(table, -1):
        table = packed_ref(b, node.table, table, row_major)
    each = out.dtype.bits // 8
    (batch, heads, rows, size), (pages, _, page, _) = new.shape, out.shape
    steps = [each * s for s in (*new.strides[:3], *out.strides[:3])]
    numbers: tuple[Dim, ...] = (
        each * size, batch, heads, rows, *steps, page, table.shape[1], table.strides[0], pages,
    )  # fmt: skip
    b.kernel(core("update_pages"), node, [out],
             [new, table, b.ref(node.start), whole(b.error_word())], numbers)  # fmt: skip
    b.set(node, out)


@lowers("gather_pages")
def _gather_pages(b: Builder, node: Any) -> None:
    """Nothing where attention reads the rows in their pages; else a copy of them, by torch."""
    if node in b.graph.outputs or not all(_in_pages(b, u, node) for u in b.graph.users[node]):
        fallback(b, node, None)
    else:
        b.values[node] = b.held(node.pool)


def _in_pages(b: Builder, user: Any, value: Op) -> bool:
    """Whether what uses gathered rows reads them in their pages."""
    if user.name == "encoded":  # of codes: who reads what is decoded
        decoded = b.graph.users[user]
        return user not in b.graph.outputs and all(
            d.name == "decode" and d not in b.graph.outputs
            and all(_in_pages(b, u, d) for u in b.graph.users[d])
            for d in decoded
        )  # fmt: skip
    found = readers(user, value)
    return found is not None and all(
        n.name == "attention" and reads_cache(b, n, value, found[1]) for n in found[0]
    )


def readers(user: Any, value: Op) -> tuple[list[Op], dict[Op, Op]] | None:
    """Of a node, or of those of its region: who read the value, and their operands in the plan.
    None: the region gives the value back."""
    outer: dict[Op, Op] = {o: o for o in user.operands}
    nodes: tuple[Op, ...] = (user,)
    if user.name == "fused":
        outer = dict(zip(user.body.inputs, user.xs, strict=True))
        nodes = user.body.nodes
        if any(outer.get(o) is value for o in user.body.outputs):
            return None
    return [n for n in nodes if any(outer.get(o) is value for o in n.operands)], outer


__all__ = ["Kept", "caches", "more_reads", "readers", "reads_cache"]
