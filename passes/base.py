"""What a pass is: a frozen dataclass with a name, its options as fields, and `run(graph, ctx)`.

    @dataclass(frozen=True)
    class FoldBatchNorm(Pass):
        \"\"\"Fold inference batch norms into the convolution before them.

        rewrite:
            y = batch_norm(conv2d(x, w, b), mean, var, gamma, beta)
            -->
            y = conv2d(x, w', b')
        \"\"\"

        name, numerics = "fold-batch-norm", exact("rounding")

        def run(self, g, ctx):
            return ctx.rewrite(g, [FoldBatchNormIntoConv()])

A pass changes the graph and says nothing about time, dumping or measuring: instruments do that.
Defining the class registers it; packages outside effc register through the entry-point group
`effc.passes` (each entry names a module to import or a Pass class).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeAlias

from effc.ir import (
    Engine,
    Graph,
    NearMiss,
    Op,
    PassError,
    PipelineError,
    Rates,
    Rule,
    RuleStats,
    nearest,
    yes,
)  # fmt: skip
from effc.ir.rewrite import Answer, Journal

from .pipelines import NAMED

GROUP = "effc.passes"

# ------------------------------------------------------------------ numeric contracts


@dataclass(frozen=True)
class Numerics:
    """What a pass may do to values. `metric`: "max_abs" or "relative_l2"; `value`: its bound."""

    kind: str  # "exact" | "bounded" | "lossy"
    metric: str = "relative_l2"
    value: float = 0.0

    def __str__(self) -> str:
        if self.kind == "exact":
            return "exact (bit-equal)" if self.value == 0 else "exact (rounding)"
        return (
            f"{self.kind}({self.metric}{f' <= {self.value:g}' if self.kind == 'bounded' else ''})"
        )


# Rounding-level: a few float32 roundings of reassociated sums, measured against the values' norm.
ROUNDING = 1e-5


def exact(level: str = "bits") -> Numerics:
    """level "bits": not one bit differs. "rounding": the same real number, rounded differently."""
    return Numerics("exact", value={"bits": 0.0, "rounding": ROUNDING}[level])


def bounded(metric: str, value: float) -> Numerics:
    return Numerics("bounded", metric, value)


def lossy(metric: str) -> Numerics:
    return Numerics("lossy", metric)


# ------------------------------------------------------------------ context

Progress: TypeAlias = "Callable[[Sequence[Any], str], Iterable[Any]]"


@dataclass
class Context:
    """What a pass may ask for while it runs, and what it leaves behind for the report.

    calibration: sets of values for the graph's inputs, for passes that declare `calibrated`.
    uncompressed: the graph that exact passes alone made, before any pass that loses accuracy.
    earlier: the graphs of all stages before, the captured one first.
    progress: progress(steps, title) yields the steps; a driver may show a bar meanwhile.
    """

    supports: Callable[[Op], Answer] = lambda node: yes  # would the target claim this node?
    rates: Rates = field(default_factory=Rates)  # what the target's time goes by
    sample_inputs: Sequence[Any] | None = None
    calibration: Sequence[Sequence[Any]] | None = None
    uncompressed: Graph | None = None
    earlier: Sequence[Graph] = ()
    progress: Progress = lambda steps, title: steps
    stats: dict[str, RuleStats] = field(default_factory=dict)
    touched: list[Op] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rewrite(self, graph: Graph, rules: Sequence[Rule], limit: int = 100) -> Graph:
        """Apply rules until none matches; their counts and nearest misses go to the report."""
        engine = Engine(rules, limit)
        result = engine.run(graph)
        for name, stats in engine.stats.items():
            if name in self.stats:
                _merge(self.stats[name], stats)
            else:
                self.stats[name] = stats
        self.touched += engine.touched
        return result

    def substitute(self, graph: Graph, new: Mapping[Op, Op]) -> Graph:
        """graph.substitute(new), for passes without rules: errors are then known per node too."""
        if not new:
            return graph
        self.touched += new.values()
        journal = Journal.current()
        return graph.substitute(new) if journal is None else journal.substitute(graph, dict(new))

    def data(self, p: Pass) -> Sequence[Sequence[Any]]:
        """The calibration data. Raises PassError where none was given."""
        if not self.calibration:
            raise PassError(
                f"{p} needs calibration data",
                fix="effc.compile(model, recipe=..., calibrate=batches): some sets of arguments",
            )
        return self.calibration

    def counted(self, rule: str, title: str, hits: int = 1) -> None:
        """Count rewrites that a pass makes without the rule engine."""
        self.stats.setdefault(rule, RuleStats(rule, title)).hits += hits

    def missed(self, rule: str, title: str, miss: NearMiss) -> None:
        """Record a place where a pass without the rule engine decided against a rewrite."""
        self.stats.setdefault(rule, RuleStats(rule, title)).missed(miss)

    def note(self, text: str) -> None:
        """A sentence for the report."""
        self.notes.append(text)


def _merge(into: RuleStats, new: RuleStats) -> None:
    into.attempts += new.attempts
    into.hits += new.hits
    into.seconds += new.seconds
    for miss in new.misses:
        into.missed(miss)


# ------------------------------------------------------------------ passes

PASSES: dict[str, type[Pass]] = {}


@dataclass(frozen=True)
class Pass:
    """Base. `needs`: facts (words) that an earlier pass of the pipeline must give.

    changes_interface: the graph may get other inputs, other outputs, and states.
    """

    name: ClassVar[str] = ""
    numerics: ClassVar[Numerics] = exact()
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    changes_interface: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if cls.name:
            if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name):
                raise PassError(f"pass name {cls.name!r} is not kebab-case")
            taken = PASSES.get(cls.name)
            if taken and (taken.__module__, taken.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise PassError(f"pass {cls.name!r} is already registered by {taken.__module__}")
            PASSES[cls.name] = cls

    def run(self, g: Graph, ctx: Context) -> Graph:
        raise NotImplementedError(f"{type(self).__name__} declares no run")

    def inputs_after(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> Sequence[Any]:
        """Inputs that ask of the new graph what `inputs` ask of the old one.

        Its first outputs are then those of the old one. For passes with changes_interface.
        """
        return inputs

    @property
    def title(self) -> str:
        return (inspect.getdoc(self) or self.name).splitlines()[0]

    @property
    def calibrated(self) -> bool:
        """Whether it reads ctx.calibration, with these options."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether it can do without calibration data: it kept what it learnt from them before."""
        return False

    def __str__(self) -> str:
        """Text form: the name and the options that differ from their defaults."""
        options = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                options.append(f"{f.name}={value if isinstance(value, str) else repr(value)}")
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


@cache
def load_plugins() -> tuple[str, ...]:
    """Import what other packages registered in `effc.passes`; returns their entry names."""
    loaded = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except ImportError as e:
            raise PassError(
                f"plug-in {entry.name!r} ({entry.value}) cannot be imported",
                why=str(e),
                fix=f"repair or uninstall {entry.dist.name if entry.dist else entry.name}",
            ) from e  # fmt: skip
        loaded.append(entry.name)
    return tuple(loaded)


def find_pass(name: str) -> type[Pass]:
    load_plugins()
    if name not in PASSES:
        raise PipelineError(f"unknown pass {name!r}", fix=nearest(name, PASSES))
    return PASSES[name]


# ------------------------------------------------------------------ pipelines as text


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Prints as one line that parses back."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    @staticmethod
    def parse(text: str) -> Pipeline:
        """`a,b{k=1}` -> Pipeline. Raises PipelineError naming the nearest pass or option.

        The name of a pipeline (passes/pipelines.py) stands for its passes: `raised,a,default`.
        """
        items = [i for item in _split(text) for i in _split(NAMED.get(item, item)) if i]
        return Pipeline(tuple(map(_parse_pass, items)))

    def check(self) -> None:
        """Refuse an order in which a pass misses a fact that an earlier one must give."""
        given: set[str] = set()
        for p in self.passes:
            for fact in p.needs:
                if fact not in given:
                    givers = [n for n, c in sorted(PASSES.items()) if fact in c.gives]
                    raise PipelineError(
                        f"{p.name} needs {fact}, which no pass before it gives",
                        fix=f"put one of {', '.join(givers)} before it" if givers else None,
                    )
            given.update(p.gives)


def _split(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    if depth:
        raise PipelineError(f"unbalanced braces in pipeline {text!r}")
    return [*items, text[start:].strip()]


def _parse_pass(item: str) -> Pass:
    m = re.fullmatch(r"([\w-]+)\s*(?:\{(.*)\})?", item, re.S)
    if not m:
        raise PipelineError(f"not a pass: {item!r}", fix="write name or name{option=value,...}")
    cls = find_pass(m[1])
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    for part in filter(None, _split(m[2] or "")):
        key, equals, raw = (s.strip() for s in part.partition("="))
        if key not in known:
            listed = nearest(key, known) if known else f"{m[1]} has no options"
            raise PipelineError(f"{m[1]} has no option {key!r}", fix=listed)
        options[key] = _option(m[1], key, raw if equals else "True", hints[key])
    return cls(**options)


def _option(owner: str, key: str, raw: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    try:
        value: Any = ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        value = raw
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    allowed = tuple(typing.get_origin(k) or k for k in kinds)
    allowed = tuple(k for k in allowed if isinstance(k, type))
    if str in allowed and not isinstance(value, allowed):
        value = raw
    if type(value) not in allowed:
        names = " or ".join(k.__name__ for k in allowed)
        raise PipelineError(f"{owner}: option {key} must be {names}, not {raw!r}")
    return value


__all__ = [
    "PASSES", "Context", "Numerics", "Pass", "Pipeline", "bounded", "exact",
    "find_pass", "load_plugins", "lossy",
]  # fmt: skip
