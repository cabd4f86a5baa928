"""Attention kernels: softmax(scale q k^T + mask) v without ever holding all scores.

One launch, or two where few queries look at many keys: programs take equal runs of the keys, and a
second kernel puts their parts together in a fixed order, so that results repeat exactly.

Blocks of a schedule: rows (queries of a program, times the heads that share keys), keys (of a
tile), piece (of the depth, that is multiplied at once) and splits (of all keys). Which there are is
in attention_schedules.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from effc.codegen.cpp.loops import Operand
from effc.ir import DType
from effc.ir.symbols import Dim, dim, product
from effc.ir.types import f32, i64

from .kernel import Made, Schedule, cdiv, indent, kernel, power_of_two
from .numbers import Numbers, is_wide
from .products import PRECISION
from .scalar import storage
from .tile import Axis, Element, Tile, pointer

LOG2E = math.log2(math.e)
LANES = 32  # of a warp; AMD's have twice as many
Finish = Callable[[Tile, str], Element]  # (tile, variable of the result) -> what to store


@dataclass(frozen=True)
class Attention:
    """What is computed. Operands walk [batch, heads, rows, size].

    heads: of k and v; each is read by `sharing` heads of q. order: a macro of attention_orders.j2.
    past: k and v are a cache, of which the kernel reads how many keys there are before those of the
    queries; others than these do not exist.
    """

    batch: Dim
    heads: Dim
    queries: Dim
    keys: Dim
    depth: int  # of q and k
    results: int  # of v
    q: Operand
    k: Operand
    v: Operand
    mask: Operand | None = None
    sharing: int = 1
    scale: float = 1.0
    causal: bool = False
    precision: str = "highest"  # of float32 products
    order: str = "every"
    past: bool = False

    @property
    def dtype(self) -> DType:
        return self.q.dtype

    @property
    def rows(self) -> Dim:
        return self.queries * self.sharing

    @property
    def deep(self) -> int:
        return max(16, power_of_two(self.depth))

    @property
    def wide(self) -> int:
        return max(16, power_of_two(self.results))

    @property
    def diagonal(self) -> bool:
        """Some queries see fewer keys than others. The only query of a step sees all there are."""
        return self.causal and not (self.past and self.queries == 1)

    @property
    def plain(self) -> bool:
        """Scores are scaled where they become weights, which keeps their order."""
        return self.mask is None and self.scale > 0

    @property
    def factor(self) -> float:
        """Weights are 2 to the power of a score's distance to the best one, times this."""
        return self.scale * LOG2E if self.plain else LOG2E

    def parts(self, splits: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
        """Shapes of what splits hand over: sums, and best scores or totals; float32."""
        shape = (product((self.batch, self.heads)), splits, self.rows)
        return (*shape, self.results), shape


# ------------------------------------------------------------------ kernels


def attention(
    a: Attention, schedule: Schedule, y: Operand, leaves: Sequence[tuple[Any, Operand]] = (),
    finish: Finish | None = None, *, offsets: dict[str, Dim] | None = None,
    comment: Iterable[str] = (),
) -> list[Made]:  # fmt: skip
    """The launches of a schedule: one, or the parts and what joins them.

    y: the result, and leaves: what `finish` reads besides, along [batch, heads * sharing, queries,
    results]. offsets: of pointers by name, where they are not 0. Pointers of a single launch are y,
    what is read, x0p...; of parts: sums, tops, totals, what is read; of what joins them: y, sums,
    tops, totals, x0p.... Read are q, k, v, the mask where there is one, and where there is a past,
    that and the error word, which is set where it does not fit into the cache.
    """
    kept = offsets or {}
    sizes = dict(schedule.blocks)
    reads = {"q": a.q, "k": a.k, "v": a.v} | ({"mask": a.mask} if a.mask is not None else {})
    if a.past:
        reads |= {"past": Operand(i64, ()), "error": Operand(i64, (1,))}
    ends = {"y": y}, {f"x{i}p": operand for i, (_, operand) in enumerate(leaves)}
    if sizes["splits"] == 1:
        t = Tile(Numbers())
        lines = _averages(t, "[:, None]")
        _finish(t, lines, _axes(a, t, sizes["rows"]), y, leaves, finish)
        return [_main(a, t, schedule, {**ends[0], **reads, **ends[1]}, kept, comment)]
    t = Tile(Numbers())
    _store_parts(a, t, sizes)
    parts = {n: Operand(f32, (1,)) for n in ("sum_parts", "top_parts", "total_parts")}
    main = _main(a, t, schedule, {**parts, **reads}, kept, comment)
    joined = _join(a, sizes["splits"], {**ends[0], **parts, **ends[1]}, y, leaves, finish, kept,
                   comment)  # fmt: skip
    return [main, joined]


def _main(
    a: Attention, t: Tile, schedule: Schedule, operands: dict[str, Operand],
    offsets: dict[str, Dim], comment: Iterable[str],
) -> Made:  # fmt: skip
    sizes, text = dict(schedule.blocks), t.numbers.text
    rows, keys = sizes["rows"], sizes["keys"]
    blocks = cdiv(a.rows, rows)
    ragged = a.past or not isinstance(a.keys, int) or a.keys % keys != 0
    axes = _axes(a, t, rows)
    count = "present" if a.past else text(a.keys)
    holes: dict[str, Any] = {
        "pieces": _pieces(a, t, axes, rows, sizes["piece"]), "mask": "", "mask_partial": "",
        "blocks": text(blocks), "heads": text(a.heads), "row_count": text(a.rows),
        "key_count": count, "query_count": text(a.queries), "capacity": text(a.keys),
        "past": a.past, "most": 1 << 30,
        "edge": _edge(a, rows), "ragged": ragged, "short": _short(a, rows),
        "wide": a.wide, "result_mask": [m for m in [_padded("result", a.results, a.wide)] if m],
        "sharing": a.sharing, "causal": a.diagonal, "order": a.order, "plain": a.plain,
        "scale": repr(float(a.scale)), "factor": repr(a.factor),
        "precision": f', input_precision="{PRECISION[a.precision]}"' if a.dtype == f32 else "",
        "narrow": "" if a.dtype == f32 else f".to({storage(a.dtype)})",
        "places": {"k": _place(t, a.k), "v": _place(t, a.v)},
        "run": "run" if a.past else text(_run(a, sizes)),
        "walks": {"k": _walk(t, a.k, keys), "v": _walk(t, a.v, keys)},
    }  # fmt: skip
    if a.mask is not None:
        within = f"(column < {holes['key_count']})[None, :]"
        for name, bound in (("mask", ""), ("mask_partial", within)):
            column = Axis("column[None, :]", a.keys, bound)
            holes[name] = _mask(t, a.mask, (*axes[:3], column))
    pointers = [pointer(n, o.dtype, offsets.get(n, 0)) for n, o in operands.items()]
    grid = product((a.batch, a.heads, blocks, sizes["splits"]))
    kind = "attention" if sizes["splits"] == 1 else "attention_parts"
    return kernel(kind, "attention", pointers=pointers, numbers=t.numbers, schedule=schedule,
                  grid=[grid], comment=comment, finish=indent(t.lines, 4), **holes)  # fmt: skip


def _join(
    a: Attention, splits: int, operands: dict[str, Operand], y: Operand,
    leaves: Sequence[tuple[Any, Operand]], finish: Finish | None, offsets: dict[str, Dim],
    comment: Iterable[str],
) -> Made:  # fmt: skip
    t = Tile(Numbers())
    lines = _averages(t, "")
    column = Axis("result", a.results, _bound("result", a.results, a.wide))
    axes = (Axis("batch", a.batch), Axis("head", a.heads), Axis("query", a.queries), column)
    _finish(t, lines, axes, y, leaves, finish)
    pointers = [pointer(n, o.dtype, offsets.get(n, 0)) for n, o in operands.items()]
    holes = {
        "row_count": t.numbers.text(a.rows), "heads": t.numbers.text(a.heads), "sharing": a.sharing,
        "results": a.results, "wide": a.wide, "splits": splits, "factor": repr(a.factor),
    }  # fmt: skip
    return kernel(
        "attention_join", "attention_join", pointers=pointers, numbers=t.numbers,
        schedule=Schedule(min(4, max(1, a.wide // LANES)), 1), comment=comment,
        grid=[product((a.batch, a.heads, a.rows))], finish=indent(t.lines, 4), **holes,
    )  # fmt: skip


def _averages(t: Tile, along: str) -> str:
    """Weights of a query sum to 1, and one that sees nothing gives 0."""
    t.lines.append("share = tl.where(total == 0.0, 0.0, 1.0 / total)")
    return f"sums * share{along}"


def _finish(
    t: Tile, text: str, axes: Sequence[Axis], y: Operand, leaves: Sequence[tuple[Any, Operand]],
    finish: Finish | None,
) -> None:  # fmt: skip
    for i, (leaf, operand) in enumerate(leaves):
        t.load(leaf, f"x{i}p", operand, axes)
    total, _ = t.let(f32, text, "y")
    value = finish(t, total) if finish else (total, f32)
    t.store("y", y, axes, value)


def _store_parts(a: Attention, t: Tile, sizes: dict[str, int]) -> None:
    """Sums, best scores and totals as they are: [groups, splits, rows], sums [..., results]."""
    rows = t.numbers.text(a.rows)
    inside = ["inside"] if _edge(a, sizes["rows"]) else []
    mask = f", mask={inside[0]}" if inside else ""
    columns = [f"{m}[:, None]" for m in inside]
    columns += [m for m in [_padded("result", a.results, a.wide)] if m]
    both = f", mask={' & '.join(columns)}" if columns else ""
    t.lines += [
        f"part = (group * {sizes['splits']} + split) * {rows} + row",
        f"tl.store(top_parts + part, top{mask})",
        f"tl.store(total_parts + part, total{mask})",
        f"tl.store(sum_parts + part[:, None] * {a.results} + result[None, :], sums{both})",
    ]


def _axes(a: Attention, t: Tile, rows: int) -> tuple[Axis, ...]:
    """[batch, heads, queries, results] as a block of rows walks them."""
    edge = "inside[:, None]" if _edge(a, rows) else ""
    head = Axis("head[:, None]", a.heads, edge) if a.sharing > 1 else Axis("head", a.heads)
    return (
        Axis("batch", a.batch), head, Axis("query[:, None]", a.queries, edge),
        Axis("result[None, :]", a.results, _padded("result", a.results, a.wide)),
    )  # fmt: skip


def _load(
    t: Tile, name: str, operand: Operand, axes: Sequence[Axis], shape: tuple[int, int]
) -> str:
    """A tile in its own element type; what lies outside is 0."""
    address, mask = t.place(name, operand, axes)
    text = f"tl.load({address}, mask={mask}, other=0.0)" if mask else f"tl.load({address})"
    whole = all(side in text for side in ("[:, None]", "[None, :]"))
    return text if whole else f"tl.broadcast_to({text}, ({shape[0]}, {shape[1]}))"


def _mask(t: Tile, operand: Operand, axes: Sequence[Axis]) -> str:
    address, mask = t.place("mask", operand, axes)
    load = f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"
    if operand.dtype.kind == "bool":  # added, as torch does: a NaN stays one
        return f'tl.where({load}, 0.0, float("-inf"))'
    return f"{load}.to(tl.float32)"


def _pieces(
    a: Attention, t: Tile, axes: Sequence[Axis], rows: int, size: int
) -> list[dict[str, Any]]:
    """The depth in pieces that pass through registers one after the other, and q's tiles."""
    found = []
    for start in range(0, max(1, a.depth), size):
        name = str(start // size) if size < a.depth else ""
        index = f"depth{name}"
        mask = f"({index} < {a.depth})[None, :]" if start + size > a.depth else ""
        place = (*axes[:3], Axis(f"{index}[None, :]", a.depth, mask))
        found.append({
            "name": name, "index": index, "size": size, "start": f"{start} + " if start else "",
            "mask": [mask] if mask else [], "load": _load(t, "q", a.q, place, (rows, size)),
        })  # fmt: skip
    return found


def _place(t: Tile, operand: Operand) -> str:
    """Where keys or values of a program's batch and head begin."""
    batch, heads = (_factored(t, s) for s in operand.strides[:2])
    return f"batch * {batch} + shared * {heads}"


def _factored(t: Tile, size: Dim) -> str:
    """A size with what divides it apart, so that Triton sees how addresses are aligned."""
    if isinstance(size, int):
        return str(size)
    factor, rest = sympy.sympify(size).primitive()
    return f"{t.numbers.text(dim(rest))} * {factor}"


def _walk(t: Tile, operand: Operand, keys: int) -> tuple[str, str, str]:
    """From a key to the next, what an index along it is multiplied by, and its conversion."""
    step, unit = operand.strides[2:]
    far = isinstance(step, int) and is_wide(step * keys)
    along = "" if unit == 1 else f" * {t.numbers.text(unit)}"
    return t.numbers.text(step), along, ".to(tl.int64)" if far else ""


def _bound(index: str, size: int, block: int) -> str:
    return f"({index} < {size})" if size != block else ""


def _padded(index: str, size: int, block: int) -> str:
    """The same as a mask of columns."""
    return f"({index} < {size})[None, :]" if size != block else ""


def _edge(a: Attention, rows: int) -> bool:
    """The last block of rows is not full."""
    return not isinstance(a.rows, int) or a.rows % rows != 0


def _short(a: Attention, rows: int) -> str:
    return "" if is_wide(a.rows + rows) else ".to(tl.int32)"


def _run(a: Attention, sizes: dict[str, int]) -> Dim:
    """Keys of a split: whole tiles."""
    return cdiv(cdiv(a.keys, sizes["keys"]), sizes["splits"]) * sizes["keys"]


__all__ = ["Attention", "attention"]
