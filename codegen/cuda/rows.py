"""Reductions along rows, and pointwise ops with their results: softmax, norms, sums.

A program (codegen/cpp/program.py) has values that are one an element or one a row. It runs in
passes over a row: pass k computes what needs the reductions of pass k - 1. A row belongs to a warp,
or to a block where it is long; elements that several passes need stay in registers as far as they
fit, and are read or computed again where rows are longer or their length is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.program import F32, F64, Program, Value
from effc.codegen.cpp.scalar import literal, register
from effc.ir import DType
from effc.ir.symbols import Dim, product

from .kernel import WARP, Made, Numbers, Schedule, cdiv, kernel, pointer, power_of_two
from .statements import decoded, offset, row_places, whole_runs

KEPT = 32  # elements of a row that a thread holds in registers
CHEAP = 3  # work up to which an element is computed again from kept ones instead of kept
TOGETHER = 4  # rows of a block, where a warp does one
LONGEST = 1024  # threads of a block
UNKNOWN = 256  # threads on a row of unknown length

Body = Callable[[Program], Sequence[Value]]


class DeviceProgram(Program):
    """Sums of float32 in float32: a thread adds up a few elements and the rest is a tree, whose
    error grows with the logarithm of their number; few GPUs are fast in float64."""

    def reduce(self, how: str, x: Value, dtype: DType) -> Value:
        return super().reduce(how, x, F32 if dtype == F64 and x.dtype != F64 else dtype)


def row_kernel(
    nest: Nest, leaves: Sequence[tuple[Any, bool]], outs: int, reduced: Sequence[int],
    order: Sequence[int], body: Body, *, offsets: Sequence[Dim] = (), kind: str = "rows",
    comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """Kernel of a program over `nest`.

    As codegen/cpp/rows.py: row_kernel; offsets: of the operands' pointers.
    """
    outer = nest.collapsed([a for a in order if a not in reduced]).at_least(1)
    inner = nest.collapsed([a for a in order if a in reduced]).at_least(1)
    given = list(offsets) or [0] * len(nest.operands)
    return _Writer(outer, inner, list(leaves), outs, body, kind, given, tuple(comment)).made()


class _Writer:
    def __init__(
        self, outer: Nest, inner: Nest, leaves: list[tuple[Any, bool]], outs: int, body: Body,
        kind: str, offsets: Sequence[Dim], comment: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.outer, self.inner, self.leaves, self.outs = outer, inner, leaves, outs
        self.kind, self.comment, self.numbers = kind, comment, Numbers()
        self.names = [f"y{i}" for i in range(outs)] + [f"x{i}" for i in range(len(leaves))]
        self.operands = [Operand(o.dtype, (*o.strides, i.strides[-1]))
                         for o, i in zip(outer.operands, inner.operands, strict=True)]  # fmt: skip
        self.pointers = [pointer(f"p_{n}", o.dtype, at, written=n[0] == "y")
                         for n, o, at in zip(self.names, self.operands, offsets)]  # fmt: skip
        self.size = product(inner.sizes)
        program = DeviceProgram(self.numbers)  # type: ignore[arg-type]
        for i, (leaf, full) in enumerate(leaves):
            program.nodes[leaf] = program.leaf(self.operands[outs + i].dtype, f"x{i}", full)
        self.leaf_values = [program.nodes[leaf] for leaf, _ in leaves]
        self.results = list(body(program))
        self.values = program.values
        self.full = [v.full for v in self.results] + [full for _, full in leaves]
        self._spread()

    # -------------------------------------------------------------- how rows are spread

    def _spread(self) -> None:
        """vector: elements a thread takes at once; team: threads of a row; parts: vectors of a
        thread, where they are known and few enough to be kept; else 0."""
        self.vector = self._vector()
        self.together = 1
        if not isinstance(self.size, int):
            self.team, self.parts = UNKNOWN, 0
            return
        runs = -(-self.size // self.vector)
        if runs <= WARP * max(1, KEPT // 2 // self.vector):
            self.team, self.together = WARP, TOGETHER
        else:  # two vectors a thread where the block gets large enough
            self.team = min(LONGEST, max(2 * WARP, power_of_two(-(-runs // 2))))
        parts = max(1, -(-runs // self.team))
        # The longest blocks have 64 registers a thread: a float32 layer norm spilled with 32 kept.
        kept = KEPT if self.team < LONGEST else KEPT * 3 // 4
        self.parts = parts if parts * self.vector <= kept else 0

    def _vector(self) -> int:
        """16 bytes of the narrowest operand, if all operands lie so; else single elements, which
        neighbouring threads read side by side."""
        moved = [i for i, full in enumerate(self.full) if full]
        if not moved or self.inner.rank > 1:
            return 1
        width = max(16 * 8 // self.operands[i].dtype.bits for i in moved)
        for unit in (u for u in (8, 4, 2) if u <= width):
            if all(whole_runs(self.pointers[i], self.operands[i], self.size, unit) for i in moved):
                return unit
        return 1

    # -------------------------------------------------------------- passes

    def made(self) -> Made:
        last = max((v.level for v in self.values), default=0)
        self._decide_kept(last)
        self.at = 0
        passes = [self._pass(k) for k in range(last + 1)]
        rows = product(self.outer.sizes)
        lead = [self.outer.operands[i] for i in range(len(self.names))]
        places = row_places(self.names, lead, self.outer.sizes, self.numbers)
        threads = self.team * self.together
        blocks = (("VECTOR", self.vector),)
        return kernel(
            self.kind, "rows", pointers=self.pointers, numbers=self.numbers,
            schedule=Schedule(threads // WARP, 1, blocks), shared=self.at, comment=self.comment,
            grid=[cdiv(rows, self.together)], rows=self.numbers.text(rows), scratch=self.at > 0,
            together=self.together, elements=self.numbers.text(self.size), places=places,
            kept=[{"name": f"s{v.name}", "type": register(v.dtype)} for v in self.kept],
            parts=self.parts, team=self.team, passes=passes,
            row_stores=[f"effc::store({self.names[i]}, {self._stored(i, v)});"
                        for i, v in enumerate(self.results) if not v.full],
        )  # fmt: skip

    def _decide_kept(self, last: int) -> None:
        """Which elements stay in registers from the pass that computes them: those of several."""
        self.kept: dict[Value, int] = {}
        if not self.parts:
            return
        needed: dict[Value, set[int]] = {}
        for k in range(last + 1):
            for v in self._wanted(k):
                self._note(v, k, needed)
        for v in self.values:
            below = [a for a in v.args if a.full]
            again = below and v.work <= CHEAP and all(a in self.kept for a in below)
            if v.full and len(needed.get(v, ())) > 1 and not again:
                self.kept[v] = min(needed[v])
        # Nothing below a kept value is needed in the later passes because of it.
        needed = {}
        for k in range(last + 1):
            for v in self._wanted(k):
                self._note(v, k, needed)
        self.kept = {v: k for v, k in self.kept.items() if len(needed.get(v, ())) > 1}

    def _wanted(self, k: int) -> list[Value]:
        """Elements that pass k reduces or stores."""
        reduced = [v.args[0] for v in self.values if v.kind == "reduce" and v.args[0].level == k]
        return [v for v in reduced if v.full] + [v for v in self.results if v.full and v.level == k]

    def _note(self, v: Value, k: int, needed: dict[Value, set[int]]) -> None:
        if not v.full or k in needed.setdefault(v, set()):
            return
        needed[v].add(k)
        if self.kept.get(v, k) < k:
            return
        for a in v.args:
            self._note(a, k, needed)

    def _pass(self, k: int) -> dict[str, Any]:
        self.lines: list[str] = []
        self.runs, self.axes = decoded(self.inner.sizes, self.numbers, "e", "k")
        self.done: set[Value] = set()
        whole = "true" if self.vector > 1 else "false"
        for v in self._wanted(k):
            self._element(v, k)
        stores = []
        for i, v in enumerate(self.results):
            if v.full and v.level == k:
                name, out = self.names[i], self.operands[i].dtype
                self.runs.append(f"{register(out)} {name}v[{self.vector}];")
                self.lines.append(f"{name}v[j] = {self._stored(i, v)};")
                stores.append(self._moved("store", name, i, whole))
        folds = [self._fold(v) for v in self.values if v.kind == "reduce" and v.args[0].level == k]
        return {
            "before": [f"const {register(v.dtype)} {v.name} = {self._row_text(v)};"
                       for v in self.values if not v.full and v.level == k],
            "runs": self.runs, "lines": self.lines or (["{}"] if folds else []), "stores": stores,
            "folds": folds,
        }  # fmt: skip

    def _element(self, v: Value, k: int) -> None:
        """Emit what pass k needs to have v, an element."""
        if v in self.done or not v.full:
            return
        self.done.add(v)
        held = f"s{v.name}[part][j]"
        if self.kept.get(v, k) < k:
            self.lines.append(f"const {register(v.dtype)} {v.name} = {held};")
            return
        for a in v.args:
            self._element(a, k)
        if v.kind == "leaf":
            text = self._loaded(v)
        else:
            text = v.text.format(*(a.name for a in v.args))
        self.lines.append(f"const {register(v.dtype)} {v.name} = {text};")
        if v in self.kept:
            self.lines.append(f"{held} = {v.name};")

    def _loaded(self, v: Value) -> str:
        i = self.outs + self.leaf_values.index(v)
        name = self.names[i]
        self.runs.append(f"{register(v.dtype)} {name}v[{self.vector}];")
        self.runs.append(self._moved("load", name, i, "true" if self.vector > 1 else "false"))
        return f"{name}v[j]"

    def _moved(self, how: str, name: str, i: int, whole: str) -> str:
        at = offset(name, self.axes, self.inner.operands[i], self.numbers)
        given = f"{name}v, {at}" if how == "load" else f"{at}, {name}v"
        return f"effc::{how}_run<{whole}>({given}, elements - e);"

    def _stored(self, i: int, v: Value) -> str:
        """As the registers of the output's type."""
        to = self.operands[i].dtype
        if register(v.dtype) == register(to):
            return v.name
        return f"effc::cast<{register(to)}>({v.name})"

    def _row_text(self, v: Value) -> str:
        if v.kind == "reduce":
            return f"effc::cast<{register(v.dtype)}>(a{v.name})"
        return f"effc::load({v.text})" if v.kind == "leaf" else (
            v.text.format(*(a.name for a in v.args))
        )  # fmt: skip

    def _fold(self, v: Value) -> dict[str, Any]:
        """A reduction: `a` in registers of type `part`, which the threads of a row then join."""
        x = v.args[0]
        real, how = register(x.dtype), v.reduction
        if how in ("sum", "prod"):
            part = real if x.dtype.is_float else "int64_t"
            neutral = literal(int(how == "prod"), x.dtype) if x.dtype.is_float else str(
                int(how == "prod"))  # fmt: skip
        elif how in ("any", "all"):
            part, neutral = "int", str(int(how == "all"))
        else:
            part = real if x.dtype.is_float else "int64_t"
            low = how == "amax"
            if x.dtype.is_float:
                neutral = f"{'-' if low else ''}std::numeric_limits<{part}>::infinity()"
            else:
                neutral = f"std::numeric_limits<{part}>::{'lowest' if low else 'max'}()"
        value = x.name if part == real else f"effc::cast<{part}>({x.name})"
        if part == "int":
            value = f"int({x.name})" if x.dtype.kind == "bool" else (
                f"int({x.name} != {literal(0, x.dtype)})")  # fmt: skip
        at = self.at
        if self.team > WARP:
            self.at += self.team // WARP * 8
        return {"name": v.name, "part": part, "neutral": neutral, "value": value, "at": at,
                "how": how.capitalize()}  # fmt: skip


__all__ = ["DeviceProgram", "row_kernel"]
