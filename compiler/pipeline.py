"""The pipeline driver: applies passes in order and keeps every stage.

A pass changes the graph; everything else done around it (verifying, measuring, dumping) is an
instrument's work. Nothing here knows what a pass does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effc.ir import EffcError, Graph, Op, PassError, Rates, Tensor, yes
from effc.ir.rewrite import Answer, Journal
from effc.ir.verify import window
from effc.passes.base import Context, Pass, Pipeline, Progress
from effc.stage import Stage
from effc.stagediff import graph_diff

__all__ = ["Instrument", "Run", "Stage", "run_pipeline", "stages_diff"]


class Instrument:
    """Watches a pipeline. Every hook is optional; an EffcError raised in a hook stops the run."""

    def start(self, run: Run) -> None:
        """Before the first pass; `run.stages` holds the capture."""

    def before(self, run: Run, p: Pass) -> None:
        """Before a pass sees the last stage's graph."""

    def after(self, run: Run, stage: Stage, journal: Journal) -> Stage:
        """After a pass; returns the stage, possibly with more filled in."""
        return stage

    def failed(self, run: Run, error: EffcError) -> None:
        """A pass or a hook failed; `run.stages` holds the stages that were reached."""

    def finish(self, run: Run) -> None:
        """After the last pass."""


@dataclass
class Run:
    """One pipeline applied to one graph, as instruments see it."""

    pipeline: Pipeline
    sample_inputs: Sequence[Any] | None = None
    calibration: Sequence[Sequence[Any]] | None = None
    progress: Progress | None = None
    rates: Rates = field(default_factory=Rates)
    stages: list[Stage] = field(default_factory=list)


def run_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    supports: Callable[[Op], Answer] | None = None,
    rates: Rates | None = None,
    sample_inputs: Sequence[Any] | None = None,
    calibration: Sequence[Sequence[Any]] | None = None,
    progress: Progress | None = None,
    instruments: Sequence[Instrument] = (),
) -> list[Stage]:
    """Apply the passes; the result has one stage for the capture and one for each pass.

    supports, rates: what the target takes, and what its time goes by.
    sample_inputs: values for the graph's inputs (or a list of such sets). With them at hand every
    pass's error is measured. calibration: many such sets, for passes that learn from data; while
    they do, `progress(steps, title)` may show how far they are. Raises PipelineError for an
    impossible order before anything runs, PassError naming pass, stage and node when a pass fails.
    """
    pipeline.check()
    run = Run(pipeline, sample_inputs, calibration, progress, rates or Rates())
    run.stages.append(Stage(0, "capture", "the model as captured", graph))
    watching = _with_measure(instruments, sample_inputs)
    try:
        for i in watching:
            i.start(run)
        for p in pipeline:
            for i in watching:
                i.before(run, p)
            stage, journal = _apply(run, p, supports or _supports_all)
            try:
                for i in watching:
                    stage = i.after(run, stage, journal)
            finally:
                run.stages.append(stage)  # the stage that an instrument objects to is kept too
        for i in watching:
            i.finish(run)
    except EffcError as e:
        for i in watching:
            i.failed(run, e)
        raise
    return run.stages


def stages_diff(a: Stage, b: Stage) -> str:
    """Unified diff of two stages' texts; empty when they are equal."""
    titles = (f"{a.index:03d} {a.name}", f"{b.index:03d} {b.name}")
    return graph_diff(a.text, b.text, *titles)


def _supports_all(node: Op) -> Answer:
    return yes


def _with_measure(
    instruments: Sequence[Instrument], sample_inputs: Sequence[Any] | None
) -> list[Instrument]:
    from effc.instruments import Measure

    found = list(instruments)
    if sample_inputs is not None and not any(isinstance(i, Measure) for i in found):
        found.insert(0, Measure())  # first, so that dumps show what was measured
    return found


def _apply(run: Run, p: Pass, supports: Callable[[Op], Answer]) -> tuple[Stage, Journal]:
    before = run.stages[-1].graph
    index = len(run.stages)
    ctx = Context(
        supports=supports, rates=run.rates, sample_inputs=run.sample_inputs,
        calibration=run.calibration, uncompressed=_uncompressed(run.stages),
        earlier=[s.graph for s in run.stages],
    )  # fmt: skip
    if run.progress is not None:
        ctx.progress = run.progress
    start = time.perf_counter()
    try:
        with Journal() as journal:
            graph = p.run(before, ctx)
        _check_interface(before, graph, p.changes_interface)
    except Exception as e:
        raise _pass_error(run, p, before, e) from e
    stage = Stage(
        index, str(p), p.title, graph, p.numerics, time.perf_counter() - start,
        sum(s.hits for s in ctx.stats.values()), tuple(ctx.stats.values()), tuple(ctx.notes),
        graph is not before,
    )  # fmt: skip
    return stage, journal


def _uncompressed(stages: Sequence[Stage]) -> Graph:
    """The last graph that only exact passes made."""
    graph = stages[0].graph
    for stage in stages[1:]:
        if stage.changed and stage.numerics is not None and stage.numerics.kind != "exact":
            break
        graph = stage.graph
    return graph


def _check_interface(before: Graph, after: object, may_change: bool) -> None:
    if not isinstance(after, Graph):
        raise PassError(f"run returned {type(after).__name__}, not a graph", fix="return the graph")
    if may_change:
        return
    if [(i.key, i.state) for i in before.inputs] != [(i.key, i.state) for i in after.inputs]:
        raise PassError("the pass changes the inputs of the graph")
    if len(before.outputs) != len(after.outputs):
        raise PassError(
            f"the graph had {len(before.outputs)} outputs and now has {len(after.outputs)}"
        )
    for position, (old, new) in enumerate(zip(before.outputs, after.outputs)):
        if not _same_interface(old.type, new.type):
            raise PassError(f"output {position} was {old.type} and now is {new.type}")


def _same_interface(old: object, new: object) -> bool:
    """Same element type and rank and no size known to differ; symbolic sizes may be respelled."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return old == new
    known = all(
        a == b for a, b in zip(old.shape, new.shape) if isinstance(a, int) and isinstance(b, int)
    )
    return old.dtype == new.dtype and old.rank == new.rank and known


def _pass_error(run: Run, p: Pass, graph: Graph, e: Exception) -> PassError:
    what = f"{p} failed at stage {len(run.stages)} of {len(run.pipeline.passes)}"
    if isinstance(e, EffcError):
        return PassError(
            f"{what}: {e.what}", node=e.node, where=e.where, why=e.why, fix=e.fix,
            context=e.context or _window(graph, e),
        )  # fmt: skip
    node = _node_at_fault(graph, e)
    return PassError(
        f"{what}: {type(e).__name__}: {e}", where=node.where if node else None,
        node=repr(node) if node else None, context=_window(graph, e),
    )  # fmt: skip


def _node_at_fault(graph: Graph, e: BaseException) -> Op | None:
    """The node that the innermost frame of the failure was looking at, if it held just that one."""
    known, found = set(graph.nodes), None
    trace = e.__traceback__
    while trace is not None:
        here = {v for v in trace.tb_frame.f_locals.values() if isinstance(v, Op) and v in known}
        found = here.pop() if len(here) == 1 else found
        trace = trace.tb_next
    return found


def _window(graph: Graph, e: BaseException) -> str | None:
    node = _node_at_fault(graph, e)
    return window(graph, node) if node is not None else None
