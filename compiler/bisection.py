"""Which pass breaks a result, and which single rewrite of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from effc.difference import Difference, compare, sample_list, worst
from effc.instruments import evaluate
from effc.ir import Graph, InputError, Op, Rates, node_text, yes
from effc.ir.rewrite import Answer, Journal
from effc.passes.base import Context, Pass, Pipeline
from effc.pipeline import Stage, run_pipeline

__all__ = ["Culprit", "bisect"]


@dataclass(frozen=True)
class Culprit:
    """The first step after which the result is wrong.

    rewrite: 1 for the first rewrite of the pass, and so on; None where the pass does not use rules,
    or where no rewrite alone is to blame. before, after: the line it replaced, and by what.
    """

    stage: int
    name: str
    error: Difference
    rewrite: int | None = None
    rewrites: int = 0
    rule: str = ""
    before: str = ""
    after: str = ""
    where: str = ""

    def __str__(self) -> str:
        rows = [f"{self.name} (stage {self.stage}) breaks the result: {self.error}"]
        if self.rewrite is not None:
            rows.append(f"  rewrite {self.rewrite} of {self.rewrites}, by {self.rule}")
            rows += [f"  - {self.before}", f"  + {self.after}"]
            rows += [f"  at {self.where}"] if self.where else []
        return "\n".join(rows)


def bisect(
    graph: Graph,
    pipeline: Pipeline | str,
    inputs: Sequence[Any],
    tolerance: float = 1e-4,
    metric: str = "relative_l2",
    supports: Callable[[Op], Answer] | None = None,
    rates: Rates | None = None,
) -> Culprit | None:
    """The first pass after which an output differs by more than `tolerance` from the graph's own.

    Within the pass, the number of rewrites is bisected. None when the whole pipeline is within.
    inputs: values for the graph's inputs, or a list of such sets.
    """
    if metric not in ("relative_l2", "max_abs"):
        raise InputError(f"metric must be relative_l2 or max_abs, not {metric!r}")
    passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    stages = run_pipeline(graph, passes, supports=supports, rates=rates, sample_inputs=inputs)
    samples = sample_list(inputs)
    want = [evaluate(graph, s) for s in samples]

    def limited(p: Pass, before: Graph, limit: int | None) -> _Trial:
        ctx = Context(supports or (lambda node: yes), rates or Rates(), inputs)
        with Journal(limit) as journal:
            after = p.run(before, ctx)
        error = worst(compare(w, evaluate(after, s)) for w, s in zip(want, samples))
        return _Trial(after, journal, error, getattr(error, metric) > tolerance)

    for previous, stage in pairwise(stages):
        assert stage.total_error is not None
        if getattr(stage.total_error, metric) > tolerance:
            p = passes.passes[stage.index - 1]
            return _within(stage, partial(limited, p, previous.graph))
    return None


@dataclass(frozen=True)
class _Trial:
    """One pass with a limited number of rewrites."""

    graph: Graph
    journal: Journal
    error: Difference
    wrong: bool


def _within(stage: Stage, trial: Callable[[int | None], _Trial]) -> Culprit:
    whole = trial(None)
    count = len(whole.journal.rewrites)
    if not count or trial(0).wrong:  # it is what the pass does beside its rules
        return Culprit(stage.index, stage.name, whole.error, rewrites=count)
    fine, bad, found = 0, count, whole
    while bad - fine > 1:
        middle = trial((fine + bad) // 2)
        if middle.wrong:
            bad, found = (fine + bad) // 2, middle
        else:
            fine = (fine + bad) // 2
    last = found.journal.rewrites[-1]
    return Culprit(
        stage.index, stage.name, found.error, bad, count, last.rule, _line(last.graph, last.root),
        _line(found.graph, found.journal.moves[-1][last.root]), last.root.where,
    )  # fmt: skip


def _line(graph: Graph, node: Op) -> str:
    line = node_text(graph, node) if node in graph.users else repr(node)
    return line.partition("  # ")[0]
