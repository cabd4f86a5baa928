"""Kernels that reduce along some dimensions and compute with the results: softmax, norms, sums.

The iteration space is rows (the dimensions that are kept) times the elements of a row. A program
over it has values of two kinds, one an element or one a row. It runs in passes over each row: pass
k computes what needs the reductions of pass k - 1. Elements needed in several passes are kept in a
buffer when computing them again would cost more.

Two layouts of the loops: along a row where its elements lie together, else over a block of
neighbouring rows at once (`columns`), so that the innermost loop always walks memory in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from effc.ir import DType

from .kernel import kernel
from .loops import Nest, Numbers, in_floats, step
from .pointwise import NEVER, SHARE, Made
from .program import F32, Program, Value
from .region import store
from .scalar import literal, register, storage

LANES = 64  # rows of a block in the columns layout
CHEAP = 3  # work up to which an element is computed again instead of kept
WIDE = 20  # work of a pass up to which its loop is written out for several vectors
LINE = 64  # bytes
AHEAD = 16384  # elements of a row up to which the next one is fetched: it stays in a near cache


Body = Callable[[Program], Sequence[Value]]


def row_kernel(
    nest: Nest, leaves: Sequence[tuple[Any, bool]], outs: int, reduced: Sequence[int],
    order: Sequence[int], body: Body, *, kind: str = "rows", comment: Iterable[str] = (),
    far: int = NEVER,
) -> Made:  # fmt: skip
    """Kernel of a program over `nest`.

    leaves: each with whether it has a value for every element, or one a row. reduced: dimensions of
    a row's elements. order: all dimensions, outermost in memory first. The nest's operands are
    outputs, then leaves; body(program) uses program.nodes[leaf] and gives the values to store. An
    output that is one a row has stride 0 in the reduced dimensions. far: bytes of a result from
    which on it is written past the caches.
    """
    kept = [a for a in order if a not in reduced]
    outer = nest.collapsed(kept).at_least(1)
    inner = nest.collapsed([a for a in order if a in reduced]).at_least(1)
    return _Writer(outer, inner, list(leaves), outs, body, kind, tuple(comment), far).made()


def by_columns(outer: Nest, inner: Nest, outs: int) -> bool:
    """Whether neighbouring rows, not neighbouring elements of a row, lie together."""
    kept = reduced = 0
    for i, (across, along) in enumerate(zip(outer.operands, inner.operands, strict=True)):
        full = any(s != 0 for s in along.strides)
        weight = 2 if i >= outs else 1
        reduced += weight * (full and along.kinds[-1] == 1)
        kept += weight * (full and across.kinds[-1] == 1)
    return kept > reduced


class _Writer:
    def __init__(
        self, outer: Nest, inner: Nest, leaves: list[tuple[Any, bool]], outs: int, body: Body,
        kind: str, comment: tuple[str, ...], far: int,
    ) -> None:  # fmt: skip
        self.outer, self.inner, self.leaves, self.outs = outer, inner, leaves, outs
        self.kind, self.comment, self.body, self.far = kind, comment, body, far
        self.numbers = Numbers()
        self.names = [f"y{i}" for i in range(outs)] + [f"x{i}" for i in range(len(leaves))]
        self.columns = by_columns(outer, inner, outs)

    # -------------------------------------------------------------- places in memory

    def _places(self) -> None:
        """Text of sizes, of each operand's row address, and of its innermost element."""
        add = self.numbers.add
        self.outer_sizes = [add(("outer", a), s) for a, s in enumerate(self.outer.sizes)]
        self.inner_sizes = [add(("inner", a), s) for a, s in enumerate(self.inner.sizes)]
        self.rows, self.hops, self.elements = [], [], []
        for i in range(len(self.names)):
            across = [self._stride(i, a, self.outer, "outer") for a in range(self.outer.rank)]
            along = [self._stride(i, a, self.inner, "inner") for a in range(self.inner.rank)]
            if self.columns:
                self.rows.append("".join(step(f"i{a}", s) for a, s in enumerate(across)))
                self.hops.append([step(f"k{a}", s).strip() for a, s in enumerate(along)])
                self.elements.append(step("j", across[-1]))
            else:
                self.rows.append("".join(step(f"i{a}", s) for a, s in enumerate(across)))
                self.hops.append([step(f"k{a}", s).strip() for a, s in enumerate(along[:-1])])
                self.elements.append(step("j", along[-1]))

    def _stride(self, i: int, axis: int, nest: Nest, part: str) -> str:
        kind, value = nest.operands[i].kind(axis), nest.operands[i].strides[axis]
        return str(kind) if kind is not None else self.numbers.add((part, i, axis), value)

    # -------------------------------------------------------------- the program in passes

    def made(self) -> Made:
        self._places()
        program = Program(self.numbers)
        for i, (leaf, full) in enumerate(self.leaves):
            at = self.outs + i
            operand = self.inner.operands[at]
            name = f"x{i}{'k' if full else 'r'}"
            element = self.elements[at] if full or self.columns else ""
            program.nodes[leaf] = program.leaf(operand.dtype, f"effc::load({name + element})", full)
        self.results = list(self.body(program))
        self.blocked = [i for i, v in enumerate(self.results) if self._is_blocked(i, v)]
        self.program = program
        self.last = max((v.level for v in program.values), default=0)
        self._decide_kept()
        passes = [p for k in range(self.last + 1) if (p := self._pass(k))]
        if loops := [p for p in passes if p["wide"]]:
            max(reversed(loops), key=lambda p: p["work"])["ahead"] = self._ahead()
        work = sum(v.work for v in program.values if v.full) + len(self.names)
        return self._fill(passes, work)

    def _decide_kept(self) -> None:
        """Which elements a pass leaves in a buffer for later ones."""
        need: dict[Value, set[int]] = {}
        again: dict[Value, int] = {}
        self.kept: dict[Value, int] = {}  # value -> the pass that computes it
        for v in self.program.values:
            below = sum(again.get(a, 0) for a in v.args if a.full)
            again[v] = v.work + below if v.full else 0
        for v in self.results:
            need.setdefault(v, set()).add(v.level)
        for v in reversed(self.program.values):
            if v.kind == "reduce":
                need.setdefault(v.args[0], set()).add(v.args[0].level)
            passes = need.get(v, set())
            if not v.full or not passes or v.kind != "let":
                continue
            if len(passes) > 1 and again[v] > CHEAP:
                self.kept[v] = min(passes)
                passes = {min(passes)}
            for a in v.args:
                if a.full:
                    need.setdefault(a, set()).update(passes)

    def _pass(self, k: int) -> dict[str, Any] | None:
        before = [v for v in self.program.values if not v.full and v.level == k]
        reductions = [v for v in self.program.values
                      if v.kind == "reduce" and v.args[0].level == k]  # fmt: skip
        stores = [(i, v) for i, v in enumerate(self.results) if v.full and v.level == k]
        row_stores = [(i, v) for i, v in enumerate(self.results) if not v.full and v.level == k]
        lines: list[str] = []
        done: set[Value] = set()
        for v in self.program.values:
            if self.kept.get(v) == k:
                self._element(v, k, lines, done)
        for v in [r.args[0] for r in reductions] + [v for _, v in stores]:
            self._element(v, k, lines, done)
        for i, v in stores:
            blocked = i in self.blocked
            place = f"y{i}b + k" if blocked else f"y{i}k{self.elements[i]}"
            dtype = F32 if blocked else self.inner.operands[i].dtype
            lines.append(store(place, dtype, self._shown(v)))
        work = sum(v.work for v in done if v.kind == "let")
        folds = [self._fold(v) for v in reductions]
        text = "\n".join(lines)
        return {
            "used": [n for n in self.names if re.search(rf"\b{n}[kb]\b", text)],
            "blocked": [self._operand(i) for i, _ in stores if i in self.blocked],
            "kept": [_buffer(v) for v in self.kept if f"s{v.name}[" in text],
            "before": [self._row_line(v) for v in before if v.kind != "reduce"],
            "results": [self._row_line(v) for v in before if v.kind == "reduce"],
            "lines": lines, "folds": folds, "wide": bool(folds) and work <= WIDE, "work": work,
            "ahead": [],
            "row_stores": [
                store(f"y{i}r{self.elements[i] if self.columns else ''}",
                      self.inner.operands[i].dtype, self._shown(v))
                for i, v in row_stores
            ],
        }  # fmt: skip

    def _ahead(self) -> list[str]:
        """Places of the next row to fetch with 32 elements of this one, by the pass that takes
        longest: the processor's own prefetching starts anew with each row."""
        places: list[str] = []
        for i, (_, full) in enumerate(self.leaves, self.outs):
            operand, last = self.inner.operands[i], self.outer.rank - 1
            stride = self._stride(i, last, self.outer, "outer")
            if full and self.inner.rank == 1 and operand.kind(0) == 1 and stride != "0":
                each = LINE * 8 // operand.dtype.bits
                place = f"{self.names[i]}r + (short_rows ? {stride} : 0) + begin_rest"
                places += [place, *(f"{place} + {at}" for at in range(each, 32, each))]
        return places

    def _element(self, v: Value, k: int, lines: list[str], done: set[Value]) -> None:
        """Emit what pass k needs to have v, an element."""
        if v in done or not v.full:
            return
        done.add(v)
        if v in self.kept and self.kept[v] < k:
            lines.append(f"const {register(v.dtype)} {v.name} = s{v.name}[j];")
            return
        for a in v.args:
            self._element(a, k, lines, done)
        lines.append(f"const {register(v.dtype)} {v.name} = {self._text(v)};")
        if self.kept.get(v) == k:
            lines.append(f"s{v.name}[j] = {v.name};")

    def _text(self, v: Value) -> str:
        if v.kind == "leaf":
            return v.text
        return v.text.format(*(self._use(a) for a in v.args))

    def _use(self, v: Value) -> str:
        return f"{v.name}[j]" if self.columns and not v.full else v.name

    def _shown(self, v: Value) -> tuple[str, DType, bool]:
        return self._use(v), v.dtype, v.full

    # -------------------------------------------------------------- values of a row

    def _row_line(self, v: Value) -> dict[str, str]:
        text = f"effc::cast<{register(v.dtype)}>(a{v.name}{'[j]' if self.columns else ''})"
        if v.kind != "reduce":
            text = self._text(v)
        return {"type": register(v.dtype), "name": v.name, "text": text}

    def _fold(self, v: Value) -> dict[str, str]:
        """How a reduction goes: `a` over the row in type `whole`, in parts of type `part`.

        A value joins by `sign`=, or by a function.
        """
        x = v.args[0]
        real, sign, function = register(x.dtype), "", ""
        if v.reduction in ("sum", "prod"):
            part = real if x.dtype.is_float else "int64_t"
            whole = "double" if x.dtype.is_float else "int64_t"
            start, sign = ("0", "+") if v.reduction == "sum" else ("1", "*")
            value = x.name if part == real else f"effc::cast<{part}>({x.name})"
        elif v.reduction in ("any", "all"):
            part = whole = "int"
            start, sign = ("0", "|") if v.reduction == "any" else ("1", "&")
            value = x.name if x.dtype.kind == "bool" else f"({x.name} != {literal(0, x.dtype)})"
        else:
            part = whole = "int" if real == "bool" else real
            function = {"amax": "maximum", "amin": "minimum"}[v.reduction]
            low = v.reduction == "amax"
            if x.dtype.is_float:
                start = f"{'-' if low else ''}std::numeric_limits<{part}>::infinity()"
            else:
                start = f"std::numeric_limits<{part}>::{'lowest' if low else 'max'}()"
            value = f"effc::cast<{part}>({x.name})"
        joined = sign or (f"effc::{v.reduction}" if x.dtype.is_float else function[:3])
        return {
            "name": v.name, "part": part, "whole": whole, "start": start, "value": value,
            "sign": sign, "function": function, "clause": f"{joined} : ",
        }  # fmt: skip

    # -------------------------------------------------------------- text

    def _fill(self, passes: list[dict[str, Any]], work: int) -> Made:
        operands = [self._operand(i) for i in range(len(self.names))]
        far = self.numbers.add("far", self.far) if self.blocked else ""
        elements = " * ".join(self.inner_sizes)
        made = kernel(
            self.kind, "columns" if self.columns else "rows",
            numbers=list(self.numbers.text.values()), comment=self.comment, operands=operands,
            outer=[{"index": f"i{a}", "size": s} for a, s in enumerate(self.outer_sizes)],
            inner=self.inner_sizes, elements=elements, work=work, share=SHARE, lanes=LANES,
            kept=[_buffer(v) for v in self.kept], passes=passes, far=far,
            blocked=[operands[i] for i in self.blocked], ahead=AHEAD,
            converted=[o for i, o in enumerate(operands) if self._is_converted(i)],
        )  # fmt: skip
        return Made(made, tuple(self.numbers.values))

    def _operand(self, i: int) -> dict[str, Any]:
        name, const = self.names[i], "" if i < self.outs else "const "
        return {
            "name": name, "qualified": f"{const}{storage(self.inner.operands[i].dtype)}",
            "row": self.rows[i], "hops": self.hops[i], "at": f"{name}k",
        }  # fmt: skip

    def _is_converted(self, i: int) -> bool:
        """Whether rows of the operand are converted to float before the passes."""
        return (
            not self.columns and i >= self.outs and self.leaves[i - self.outs][1]
            and self.inner.rank == 1 and in_floats(self.inner.operands[i], 0)
        )  # fmt: skip

    def _is_blocked(self, i: int, v: Value) -> bool:
        """Whether the result goes through blocks of floats."""
        operand, last = self.inner.operands[i], self.inner.rank - 1
        far = self.far != NEVER and operand.dtype == F32 and operand.kind(last) == 1
        return not self.columns and v.full and (far or in_floats(operand, last))


def _buffer(v: Value) -> dict[str, str]:
    return {"name": f"s{v.name}", "type": register(v.dtype)}


__all__ = ["by_columns", "row_kernel"]
