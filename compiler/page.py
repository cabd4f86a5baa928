"""The dump's page: one self-contained HTML file with stages, rules, errors and differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2

from effc.pipeline import Stage, stages_diff
from effc.report import Report
from effc.show import amount, duration

__all__ = ["page"]


def page(report: Report, stages: Sequence[Stage], files: Sequence[str]) -> str:
    """HTML of the report with a diff for each stage; full texts are links to `files`."""
    diffs = [stages_diff(stages[i - 1], s) if i and s.changed else "" for i, s in enumerate(stages)]
    return _template().render(
        report=report,
        stages=list(zip(report.stages, files, [d.splitlines()[2:] for d in diffs])),
        last=stages[-1].text if stages else "",
    )


@cache
def _template() -> jinja2.Template:
    folder = Path(__file__).parent / "templates"
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters.update(amount=amount, duration=duration, error=_error)
    return env.get_template("index.html.j2")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"
