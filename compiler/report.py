"""What a compilation did, as plain data: the source of `explain`, report.json and the dump's page.

Built once from a Record; holds text and numbers only, so that it saves, loads and compares. How it
looks on a terminal is `render`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from effc import plain
from effc.ir import Graph, NearMiss, Op, RuleStats, evaluate, nearest, node_text, symbol
from effc.ir.errors import OptionError
from effc.ir.symbols import dim_text, symbolic
from effc.passes.analysis.blocks import Run, find_runs, weight_bytes
from effc.record import Break, Guard, Record

if TYPE_CHECKING:
    from effc.difference import Difference
    from effc.stage import Stage

__all__ = ["VERSION", "Break", "Explanation", "Report", "StepRow", "sized"]

VERSION = 1  # of the JSON form; raised when a field changes its meaning or goes away
MISSES = 3  # near misses shown of one rule


@dataclass(frozen=True)
class Miss:
    node: str
    reason: str
    where: str
    depth: int  # nodes of the pattern that did match
    checked: bool  # all of it matched, and a condition said no


@dataclass(frozen=True)
class RuleRow:
    rule: str
    title: str
    attempts: int
    hits: int
    seconds: float
    misses: list[Miss]


@dataclass(frozen=True)
class ErrorRow:
    max_abs: float
    relative_l2: float


@dataclass(frozen=True)
class NodeErrorRow:
    before: str
    after: str
    where: str
    error: ErrorRow


@dataclass(frozen=True)
class StageRow:
    """One step. flops and bytes are numbers, or text where sizes are symbols."""

    index: int
    name: str
    title: str
    numerics: str
    seconds: float
    rewrites: int
    changed: bool
    nodes: int
    flops: float | str
    bytes: float | str
    error: ErrorRow | None = None
    total_error: ErrorRow | None = None
    violation: str | None = None
    unchanged: str | None = None
    notes: list[str] = field(default_factory=list)
    rules: list[RuleRow] = field(default_factory=list)
    node_errors: list[NodeErrorRow] = field(default_factory=list)
    stored: float | str = 0  # bytes of the weights that the graph still reads


@dataclass(frozen=True)
class Line:
    """One value of the final graph and the user's line it comes from."""

    text: str
    where: str


@dataclass(frozen=True)
class Fallback:
    """Nodes that run in PyTorch for one reason."""

    op: str
    reason: str
    nodes: list[Line]


@dataclass(frozen=True)
class Launch:
    """Steps of the plan that make one call: kind is "kernel", "library", "copy" or "view"."""

    kind: str
    call: str
    count: int
    lines: int = 0  # of the kernel's source
    note: str = ""


@dataclass(frozen=True)
class RunRow:
    """Equal blocks in a row, in the graph of a stage. bytes: of the weights of one block alone;
    before, after: what stands around the run; shared: values that all blocks read."""

    stage: int
    blocks: int
    nodes: int  # of one block
    updates: int  # residual sums of one block
    bytes: float | str
    before: str
    after: str
    shared: list[Line]
    where: str  # of the first block


@dataclass(frozen=True)
class RefusalRow:
    kind: str
    reason: str
    where: str


@dataclass(frozen=True)
class Report:
    """One compiled graph. `json()` is stable within a VERSION; `str()` is for people."""

    name: str
    pipeline: str = ""
    target: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    refusal: RefusalRow | None = None
    stages: list[StageRow] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    memory: int | None = None  # arena bytes of a call; None: known only at the call
    sizes: dict[str, float] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    recompile_cause: str = ""
    graph_break: Break | None = None
    error: str | None = None  # why the compilation stopped
    version: int = VERSION
    runs: list[RunRow] = field(default_factory=list)

    @staticmethod
    def of(record: Record, error: Exception | None = None) -> Report:
        stages, ex = record.stages, record.executable
        return Report(
            record.name, record.pipeline, record.target, dict(record.seconds),
            _refusal(record.refusal), [_stage(s, record.sizes) for s in stages],
            _launches(ex), _fallbacks(ex, stages[-1].graph if stages else None),
            getattr(ex, "memory", None), dict(record.sizes),
            list(record.guards), record.recompile_cause,
            record.graph_break, str(error) if error else None,
            runs=[] if error else _runs(stages, record.sizes),
        )  # fmt: skip

    @property
    def rewrites(self) -> int:
        return sum(s.rewrites for s in self.stages)

    def rule(self, name: str) -> list[tuple[StageRow, RuleRow]]:
        """Everything about one rule. Raises OptionError naming the nearest known one."""
        found = [(s, r) for s in self.stages for r in s.rules if r.rule == name]
        if not found:
            known = {r.rule for s in self.stages for r in s.rules}
            raise OptionError(f"no rule {name!r} ran", fix=nearest(name, known) if known else None)
        return found

    def json(self) -> str:
        return plain.write(self)

    @staticmethod
    def read(text: str) -> Report:
        """What `json` wrote. Raises InputError for anything else, another version included."""
        return plain.read(text, Report, VERSION)

    def __str__(self) -> str:
        from effc.render import report_parts
        from effc.show import as_text

        return as_text(report_parts(self))

    def __rich_console__(self, *_: object) -> Iterable[Any]:
        from effc.render import report_parts

        yield from report_parts(self)


@dataclass(frozen=True)
class StepRow:
    """What an executable of a step plan has done: seconds in its calls, sampling aside."""

    run: str
    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """Everything effc did for one model: a report for each graph, and why there are several."""

    name: str
    reports: list[Report] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: int = VERSION
    steps: list[StepRow] = field(default_factory=list)  # of a decoder
    records: list[Record] = field(default_factory=list, repr=False, compare=False)  # not in JSON

    def rule(self, name: str) -> list[tuple[StageRow, RuleRow]]:
        known = {r.rule for g in self.reports for s in g.stages for r in s.rules}
        if name not in known:
            raise OptionError(f"no rule {name!r} ran", fix=nearest(name, known) if known else None)
        return [
            (s, r) for g in self.reports for s in g.stages for r in s.rules if r.rule == name
        ]  # fmt: skip

    def json(self) -> str:
        return plain.write(self)

    @staticmethod
    def read(text: str) -> Explanation:
        return plain.read(text, Explanation, VERSION)

    def __str__(self) -> str:
        from effc.render import explanation_parts
        from effc.show import as_text

        return as_text(explanation_parts(self))

    def __rich_console__(self, *_: object) -> Iterable[Any]:
        from effc.render import explanation_parts

        yield from explanation_parts(self)


# ------------------------------------------------------------------ from what the compiler holds


def _stage(stage: Stage, sizes: Mapping[str, int | float]) -> StageRow:
    cost = stage.cost
    return StageRow(
        stage.index, stage.name, stage.title, str(stage.numerics or ""), stage.seconds,
        stage.rewrites, stage.changed, len(stage.graph.nodes), sized(cost.flops, sizes),
        sized(cost.bytes, sizes), _error(stage.error), _error(stage.total_error),
        stage.violation, stage.why_unchanged, list(stage.notes), [_rule(r) for r in stage.rules],
        [
            NodeErrorRow(n.before, n.after, n.where, ErrorRow(n.error.max_abs, n.error.relative_l2))
            for n in stage.node_errors
        ],
        sized(weight_bytes(stage.graph.weights), sizes),
    )  # fmt: skip


def sized(value: Any, sizes: Mapping[str, int | float]) -> float | str:
    """A cost with sizes put in; text where some are not known."""
    env = {symbol(k): v for k, v in sizes.items()}
    if not symbolic(value):
        return value
    missing = value.free_symbols - env.keys()
    return dim_text(value) if missing else evaluate(value, env)  # type: ignore[return-value]


def _error(error: Difference | None) -> ErrorRow | None:
    return None if error is None else ErrorRow(error.max_abs, error.relative_l2)


def _rule(stats: RuleStats) -> RuleRow:
    misses = [_miss(m) for m in stats.misses[:MISSES]]
    return RuleRow(stats.rule, stats.title, stats.attempts, stats.hits, stats.seconds, misses)


def _miss(miss: NearMiss) -> Miss:
    line = miss.node_text.partition("  # ")[0]
    return Miss(line, miss.reason, miss.where, miss.depth, miss.checked)


def _runs(stages: Sequence[Stage], sizes: Mapping[str, int | float]) -> list[RunRow]:
    """Of the last graph; of the one before where the last pass rolled them, or of the capture."""
    for stage in (*stages[:-3:-1], *stages[:1]):
        rows = [_run(stage, run, sizes) for run in find_runs(stage.graph)]
        if rows:
            return rows
    return []


def _run(stage: Stage, run: Run, sizes: Mapping[str, int | float]) -> RunRow:
    first = run.blocks[0]
    return RunRow(
        stage.index, len(run), len(first.nodes), len(first.updates),
        sized(weight_bytes(first.weights), sizes), _ops(run.before), _ops(run.after),
        [Line(_line(stage.graph, s), s.where) for s in run.shared], first.result.where,
    )  # fmt: skip


def _ops(nodes: Sequence[Op]) -> str:
    """Few nodes by their ops, many by their number; those that only look at memory aside."""
    found = [n.name for n in nodes if not n.view]
    return ", ".join(found) if len(found) <= 3 else f"{len(found)} nodes"


def _refusal(refusal: Any) -> RefusalRow | None:
    if refusal is None:
        return None
    return RefusalRow(refusal.kind, refusal.reason, refusal.where or "")


def _fallbacks(executable: Any, graph: Graph | None) -> list[Fallback]:
    groups: dict[tuple[str, str], list[Line]] = {}
    for node, answer in getattr(executable, "fallbacks", ()):
        key = (getattr(node, "target", node.name), str(answer))
        groups.setdefault(key, []).append(Line(_line(graph, node), node.where))
    rows = [Fallback(name, reason, nodes) for (name, reason), nodes in groups.items()]
    return sorted(rows, key=lambda f: -len(f.nodes))


def _line(graph: Graph | None, node: Op) -> str:
    if graph is None or node not in graph.users:
        return repr(node)
    return node_text(graph, node).partition("  # ")[0]


def _launches(executable: Any) -> list[Launch]:
    counts: dict[tuple[str, str], int] = {}
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for launch in getattr(executable, "launches", ()):
        if launch.reason is None:  # the others are listed with their reasons
            key = (launch.kind, launch.call)
            counts[key] = counts.get(key, 0) + 1
            notes.setdefault(key, {}).update({launch.note: None} if launch.note else {})
    kernels = getattr(executable, "kernels", {})
    return [
        Launch(kind, call, n, len(kernels.get(call, "").splitlines()), "; ".join(notes[kind, call]))
        for (kind, call), n in sorted(counts.items(), key=lambda i: (_KINDS.get(i[0][0], 9), -i[1]))
    ]


_KINDS = {"kernel": 0, "library": 1, "copy": 2, "view": 3}
