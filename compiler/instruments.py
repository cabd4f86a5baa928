"""Instruments: what is done around passes without their knowing. Verifying and measuring.

run_pipeline(graph, pipeline, instruments=[Verify(), Measure(inputs, strict=True), Dump("out")])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from effc.difference import SAME, Difference, NodeError, compare, sample_list, violation, worst
from effc.dump import Dump
from effc.ir import (
    EffcError,
    Graph,
    InputError,
    Op,
    PassError,
    VerifyError,
    interpret,
    parse,
    verify,
)  # fmt: skip
from effc.ir.rewrite import Journal
from effc.ir.text import node_text
from effc.passes.base import Pass
from effc.pipeline import Instrument, Run, Stage

__all__ = ["Dump", "Instrument", "Measure", "Verify", "evaluate"]


class Verify(Instrument):
    """Checks every stage's invariants and, with `round_trip`, that its text parses to itself."""

    def __init__(self, round_trip: bool = True) -> None:
        self.round_trip = round_trip

    def start(self, run: Run) -> None:
        self._check(run.stages[0])

    def after(self, run: Run, stage: Stage, journal: Journal) -> Stage:
        if stage.changed:
            self._check(stage)
        return stage

    def _check(self, stage: Stage) -> None:
        made = f"{stage.name} (stage {stage.index}) made an invalid graph"
        try:
            verify(stage.graph)
        except VerifyError as e:
            raise PassError(
                made, node=e.node, where=e.where, why=f"{e.what}: {e.why}" if e.why else e.what,
                context=e.context,
            ) from e  # fmt: skip
        if not self.round_trip:
            return
        try:
            back = parse(stage.text)
        except EffcError as e:
            raise PassError(
                f"{made}: its text does not parse", where=e.where, why=e.what, fix=e.fix
            ) from e
        if back != stage.graph:
            raise PassError(
                f"{made}: its text parses to another graph", why=_first_change(stage, back)
            )


class Measure(Instrument):
    """Runs the reference interpreter before and after each pass and records the differences.

    Of the outputs, against the stage before and against the capture; and of every value that a rule
    replaced, against what now stands for it. inputs: default the pipeline's sample inputs.
    strict: an error beyond what the pass declares raises PassError instead of being recorded.
    """

    KEEP = 32  # node errors kept of one pass, the largest

    def __init__(self, inputs: Sequence[Any] | None = None, strict: bool = False) -> None:
        self.inputs, self.strict = inputs, strict

    def start(self, run: Run) -> None:
        self.samples = sample_list(run.sample_inputs if self.inputs is None else self.inputs)
        graph = run.stages[0].graph
        empty = next((w for w in graph.weights if w.data is None), None)
        if self.samples and empty is not None:
            raise InputError(
                f"errors cannot be measured: weight {empty.key!r} has no values",
                fix="pass weights= to parse(), or give no sample inputs",
            )
        self.first = [evaluate(graph, s) for s in self.samples]
        self.last = self.first

    def before(self, run: Run, p: Pass) -> None:
        self.applied = p

    def after(self, run: Run, stage: Stage, journal: Journal) -> Stage:
        if not self.samples:
            return stage
        if not stage.changed:
            return replace(stage, error=SAME, total_error=run.stages[-1].total_error or SAME)
        before, pairs = run.stages[-1].graph, _pairs(run.stages[-1].graph, stage.graph, journal)
        if self.applied.changes_interface:
            return self._across(before, stage)
        seen: list[list[Difference]] = [[] for _ in pairs]
        results = []
        for sample in self.samples:
            old: dict[Op, Any] = {}
            new: dict[Op, Any] = {}
            if pairs:
                evaluate(before, sample, {a for a, _ in pairs}, old)
            results.append(self._evaluate(stage, sample, {b for _, b in pairs}, new))
            for differences, (a, b) in zip(seen, pairs):
                differences.append(compare([old[a]], [new[b]]))
        error = worst(compare(a, b) for a, b in zip(self.last, results))
        total = worst(compare(a, b) for a, b in zip(self.first, results))
        self.last = results
        by_node = _node_errors(before, stage.graph, pairs, [worst(s) for s in seen], self.KEEP)
        stage = replace(stage, error=error, total_error=total, node_errors=by_node)
        return self._judge(stage)

    def _across(self, before: Graph, stage: Stage) -> Stage:
        """Of a pass that changes the interface: the results that both graphs have."""
        inputs = [tuple(self.applied.inputs_after(before, stage.graph, s)) for s in self.samples]
        self.samples = inputs
        results = [self._evaluate(stage, s, set(), {}) for s in inputs]
        kept = [(i.key, i.of) for i in before.states] == [(i.key, i.of) for i in stage.graph.states]
        n = len(before.outputs) - (0 if kept else len(before.states))
        error = worst(compare(a[:n], b[:n]) for a, b in zip(self.last, results))
        total = worst(compare(a[:n], b[:n]) for a, b in zip(self.first, results))
        self.last = results
        self.first = [(*a[:n], *b[n:]) for a, b in zip(self.first, results)]
        return self._judge(replace(stage, error=error, total_error=total))

    def _evaluate(self, stage: Stage, sample: Any, watch: set[Op], into: dict[Op, Any]) -> Any:
        try:
            return evaluate(stage.graph, sample, watch, into)
        except Exception as e:
            raise PassError(
                f"{stage.name} (stage {stage.index}) made a graph that cannot be run",
                why=f"{type(e).__name__}: {e}",
            ) from e

    def _judge(self, stage: Stage) -> Stage:
        assert stage.numerics is not None and stage.error is not None
        why = violation(stage.numerics, stage.error)
        if why and self.strict:
            broken = (n for n in stage.node_errors if violation(stage.numerics, n.error))
            bad = next(broken, None)  # the first in program order: later ones inherit its error
            raise PassError(
                f"{stage.name} (stage {stage.index}) breaks its numeric contract", why=why,
                node=bad.after if bad else None, where=bad.where if bad else None,
                fix="effc.bisection.bisect(graph, pipeline, inputs) names the rewrite",
            )  # fmt: skip
        return replace(stage, violation=why)


def evaluate(
    graph: Graph, inputs: Sequence[Any], watch: set[Op] | None = None, into: Any = None
) -> tuple[Any, ...]:
    """Results of the reference interpreter, with the generator at a fixed seed.

    Values of the nodes in `watch` are stored in the dict `into`.
    """

    def observe(node: Op, value: Any) -> None:
        if watch and node in watch:
            into[node] = value

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return interpret(graph, inputs, observe=observe if watch else None)


def _pairs(before: Graph, after: Graph, journal: Journal) -> list[tuple[Op, Op]]:
    """Values that a rule replaced, with what stands for each in the new graph."""
    alive = set(after.nodes)
    return [
        (old, new)
        for old, new, rewritten in journal.now(before)
        if rewritten and new in alive and old.type == new.type
    ]


def _node_errors(
    before: Graph,
    after: Graph,
    pairs: Sequence[tuple[Op, Op]],
    errors: Sequence[Difference],
    keep: int,
) -> tuple[NodeError, ...]:
    """The `keep` largest, in program order."""
    ranked = sorted(range(len(pairs)), key=lambda i: errors[i].relative_l2, reverse=True)[:keep]
    return tuple(
        NodeError(node_text(before, a), node_text(after, b), b.where or a.where, errors[i])
        for i in sorted(ranked)
        for a, b in [pairs[i]]
    )


def _first_change(stage: Stage, back: Graph) -> str:
    pairs = zip(stage.text.splitlines(), back.text.splitlines())
    return next((f"wrote {a.strip()!r}, read {b.strip()!r}" for a, b in pairs if a != b), "")
