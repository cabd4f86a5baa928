"""Reports on a terminal: readable in 100 columns, and without colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from effc.report import Explanation, Fallback, Miss, Report, RuleRow, RunRow, StageRow, StepRow
from effc.show import amount, counted, duration, grid

__all__ = ["explanation_parts", "report_parts", "rule_parts"]

SHARED = 4  # values that all blocks share, shown of one run


def report_parts(report: Report) -> Iterable[Any]:
    yield _title(report)
    if report.error:
        yield _section("Stopped", [Text(report.error)])
    if report.refusal:
        r = report.refusal
        yield _section(
            "Runs in PyTorch as a whole", [_row(f"{r.kind}: {r.reason}", r.where)]
        )  # fmt: skip
    if report.stages:
        yield _section("Passes", [_stages(report.stages), *_stage_notes(report.stages)])
    rules = [r for s in report.stages for r in s.rules if r.hits or _near(r)]
    if rules:
        yield _section("Rules", [_rule(r, _near(r)) for r in rules])
    if report.runs:
        yield _section("Blocks", map(_run, report.runs))
    if report.launches:
        arena = f", {amount(report.memory, 'B')} of memory for values" if report.memory else ""
        yield _section(f"Plan: {counted(_steps(report), 'step')}{arena}", [_launches(report)])
    if report.fallbacks:
        count = sum(len(f.nodes) for f in report.fallbacks)
        yield _section(
            f"Runs in PyTorch: {counted(count, 'node')}", map(_fallback, report.fallbacks)
        )
    if report.guards:
        yield _section("Holds for calls where", [_row(g.expr, g.where) for g in report.guards])
    if report.graph_break:
        yield _section("Ends early", [_row(report.graph_break.reason, report.graph_break.where)])
    if report.recompile_cause:
        yield _section("Compiled again because", [Text(report.recompile_cause)])


def explanation_parts(explanation: Explanation) -> Iterable[Any]:
    parts = [counted(len(explanation.reports), "graph")]
    if explanation.breaks:
        parts.append(f"capture stopped {counted(len(explanation.breaks), 'time')}")
    yield Text(f"{explanation.name}: {', '.join(parts)}", style="bold")
    for note in explanation.notes:
        yield Padding(Text(note), (0, 0, 0, 2))
    if explanation.steps:
        yield _section("Steps", [_steps_run(explanation.steps)])
    for report in explanation.reports:
        yield Text("")
        yield from report_parts(report)


def rule_parts(found: Sequence[tuple[StageRow, RuleRow]]) -> Iterable[Any]:
    for stage, rule in found:
        yield Text(f"stage {stage.index}, {stage.name}", style="bold")
        yield _rule(rule, rule.misses)


def _title(report: Report) -> Text:
    passes = counted(max(len(report.stages) - 1, 0), "pass", "passes")
    parts = [f"{passes}, {counted(report.rewrites, 'rewrite')}"]
    if report.target:
        parts.append(f"target {report.target}")
    parts += [f"{phase} {duration(s)}" for phase, s in report.seconds.items()]
    return Text.assemble((report.name, "bold"), ": ", "; ".join(parts))


def _section(title: str, parts: Iterable[Any]) -> Any:
    return Group(Text(f"\n{title}", style="bold"), *(Padding(p, (0, 0, 0, 2)) for p in parts))


def _stages(stages: Sequence[StageRow]) -> Table:
    measured = any(s.error for s in stages)
    errors = (">error", ">total") if measured else ()
    lossy = any(s.changed and not s.numerics.startswith("exact") for s in stages[1:])
    stored = (">stored",) if lossy else ()
    table = grid(">", "pass", ">rewrites", ">nodes", ">time", *errors, ">FLOP", ">bytes", *stored)
    for s in stages:
        shown = [_error(s.error), _error(s.total_error)] if measured else []
        table.add_row(
            str(s.index), Text(s.name), str(s.rewrites) if s.index else "", str(s.nodes),
            duration(s.seconds) if s.index else "", *shown,
            _brief(s.flops), _brief(s.bytes), *([_brief(s.stored)] if lossy else []),
        )  # fmt: skip
    return table


def _brief(value: float | str) -> str:
    return "symbolic" if isinstance(value, str) else amount(value, "").strip()


def _error(error: Any) -> str:
    if error is None:
        return ""
    return "0" if not error.max_abs else f"{error.relative_l2:.1e}"


def _stage_notes(stages: Sequence[StageRow]) -> Iterable[Text]:
    for s in stages:
        for note in filter(None, (s.violation, s.unchanged, *s.notes)):
            yield Text.assemble((f"{s.name}: ", "bold"), note)


def _near(rule: RuleRow) -> list[Miss]:
    """Misses worth a line: more than the first node of the pattern matched."""
    return [m for m in rule.misses if m.checked or m.depth > 1]


def _rule(rule: RuleRow, shown: Sequence[Miss]) -> Any:
    head = Text.assemble(
        (rule.rule, "bold"), f"  {_hits(rule)}  ",
        "" if rule.title == rule.rule else rule.title,
    )  # fmt: skip
    misses = [_row(f"not at {m.node}", m.where, m.reason) for m in shown]
    return Group(head, *(Padding(m, (0, 0, 0, 2)) for m in misses))


def _hits(rule: RuleRow) -> str:
    """Passes that work without the rule engine count what they did, not what they tried."""
    if rule.attempts < rule.hits:
        return counted(rule.hits, "time")
    return f"{rule.hits} of {counted(rule.attempts, 'try', 'tries')}"


def _fallback(fallback: Fallback) -> Any:
    places: dict[str, int] = {}
    for node in fallback.nodes:
        places[node.where or node.text] = places.get(node.where or node.text, 0) + 1
    head = Text(f"{len(fallback.nodes)} × {fallback.op}: {fallback.reason}")
    rows = [Text(f"{n} × {where}" if n > 1 else where) for where, n in list(places.items())[:5]]
    if len(places) > 5:
        rows.append(Text(f"and {len(places) - 5} more places"))
    return Group(head, *(Padding(r, (0, 0, 0, 4)) for r in rows))


def _steps_run(steps: Sequence[StepRow]) -> Table:
    table = grid("", ">calls", ">tokens", ">per call", ">tokens/s")
    for s in steps:
        rate = f"{s.tokens / s.seconds:.1f}" if s.seconds else ""
        table.add_row(
            Text(s.run), str(s.calls), str(s.tokens), duration(s.seconds / max(s.calls, 1)), rate
        )
    return table


def _steps(report: Report) -> int:
    return sum(r.count for r in report.launches) + sum(len(f.nodes) for f in report.fallbacks)


def _run(run: RunRow) -> Any:
    own = run.bytes if isinstance(run.bytes, str) else amount(run.bytes, "B").strip()
    parts = filter(None, (run.before, f"{run.blocks} × block", run.after))
    head = Text.assemble(
        (f"{run.blocks} blocks of {counted(run.nodes, 'node')}", "bold"),
        f", {own} of weights each: {' | '.join(parts)}",
    )  # fmt: skip
    rows = [_row(f"shared by all: {s.text}", s.where) for s in run.shared[:SHARED]]
    if len(run.shared) > SHARED:
        rows.append(Text(f"and {len(run.shared) - SHARED} more"))
    return Group(head, *(Padding(r, (0, 0, 0, 2)) for r in rows))


def _launches(report: Report) -> Table:
    table = grid("", ">", "", "")
    for row in report.launches:
        source = f"{row.lines} lines" if row.lines else ""
        table.add_row(
            row.kind, f"{row.count} ×", Text(row.call), "; ".join(filter(None, (source, row.note)))
        )
    return table


def _row(text: str, where: str, below: str = "") -> Text:
    row = Text(text)
    if where:
        row.append(f"  {where}", style="dim")
    if below:
        row.append(f"\n  {below}")
    return row
