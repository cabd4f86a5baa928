"""A full-sequence forward as graphs over new tokens, whose keys and values are declared states.

The forward is captured once. `insert-kv-cache` makes a graph over n new tokens of it, which is then
specialised: n = 1 is a decode step, a batch of 1 has no symbolic sizes but n and the capacity. Each
specialisation is planned when it is first called; all of them read the same weights, and constants
made of those (joined, packed) are made once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from effc.backends import Constants, find_backend
from effc.calibration import progress
from effc.calling import Calling, Source
from effc.capture import Captured, capture_exported
from effc.collector import collector_paused
from effc.compiled import LiveWeights
from effc.dump import write_dump
from effc.engine import build, check_strict, guards_of
from effc.importer import Imported, import_captured
from effc.instruments import Verify
from effc.interop import Checkpoint, placed
from effc.ir import EffcError, UnsupportedError
from effc.ir import Tensor as TensorType
from effc.ir.specialise import specialise
from effc.ir.symbols import symbolic
from effc.options import Options
from effc.passes.base import Pipeline
from effc.passes.cache import Cache, cache_of
from effc.passes.cache.insert_kv_cache import STATES
from effc.pipeline import Instrument, run_pipeline
from effc.record import Guard, Record
from effc.stage import Stage

if TYPE_CHECKING:
    import sympy

__all__ = ["VARIANTS", "Compiled", "Form", "Incremental", "Variant"]


@dataclass(frozen=True)
class Form:
    """A way to call the model whole: `module(ids, **given)` -> logits.

    ids: int64 [B, T]. given: tensors of that shape, by name. Logits: [B, T, vocabulary].
    """

    module: nn.Module
    given: tuple[str, ...] = ()


class Variant(NamedTuple):
    """Which graph: n = 1 or any n, a batch of 1 or any, told of padding or not, with the logits of
    every position or of the last."""

    decode: bool
    one: bool
    padded: bool = False
    every: bool = False

    def __str__(self) -> str:
        said = {"batch=1": self.one, "padded": self.padded, "every": self.every}
        options = ",".join(name for name, is_so in said.items() if is_so)
        return ("decode" if self.decode else "prefill") + (f"{{{options}}}" if options else "")


# every: a decode step has one position anyway
VARIANTS = {
    str(v): v
    for v in (Variant(*four) for four in product((False, True), repeat=4))
    if not (v.decode and v.every)
}


def with_cache(recipe: str, size: str, each: Pipeline) -> str:
    """A recipe with insert-kv-cache before what reads its states, or at its end.

    each: passes of every specialised graph. Where a recipe has all of them in a row (as the named
    ones end), they are left to those graphs.
    """
    passes, run = list(Pipeline.parse(recipe).passes), list(each.passes)
    for i in reversed(range(len(passes) - len(run) + 1) if run else ()):
        if passes[i : i + len(run)] == run:
            del passes[i : i + len(run)]
    at = next((i for i, p in enumerate(passes) if STATES in p.needs), len(passes))
    texts = [*map(str, passes)]
    return ",".join([*texts[:at], f"insert-kv-cache{{dim={size}}}", *texts[at:]])


@dataclass(eq=False)
class Incremental:
    """The graph over new tokens, and what is planned of it.

    stages: from the capture to the graph with states. batch, size: the symbols of rows and of
    tokens in a row. longest: tokens that the model takes. weights: of the model, by name. ready:
    what was compiled before, in another process.
    """

    name: str
    options: Options
    pipeline: str
    stages: list[Stage]
    batch: Any
    size: sympy.Symbol
    longest: int | None
    weights: Sequence[Source]
    guards: list[Guard] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    ready: Mapping[Variant, Callable[[], Record]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.stages[-1].graph
        self.device = find_backend(self.options.target).device
        self.cache: Cache = cache_of(self.graph)
        self._live = LiveWeights(self.weights, _Bindings)
        self._variants: dict[Variant, Compiled] = {}
        self._lock = threading.Lock()

    @staticmethod
    def of(
        form: Form, name: str, recipe: str, options: Options,
        calibration: Sequence[Sequence[Tensor]] | None = None, checkpoint: Checkpoint | None = None,
    ) -> Incremental:  # fmt: skip
        """One form of a model, captured. Raises UnsupportedError with the reason where it cannot
        be."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "export"):
            program = _exported(form)
        with collector_paused():
            with _timed(seconds, "capture"):
                captured, imported = _captured(program, name)
                imported = placed(imported, checkpoint)
                calling = Calling.of(captured, imported)
                batch, size = _sizes(name, imported, calling)
            backend = find_backend(options.target)
            pipeline = with_cache(recipe, str(size), options.passes)
            with _timed(seconds, "passes"):
                stages = run_pipeline(
                    imported.graph, Pipeline.parse(pipeline), supports=backend.supports,
                    rates=backend.rates, calibration=calibration, progress=progress,
                    instruments=_instruments(options),
                )  # fmt: skip
        longest = _upper_bound(captured, size)
        return Incremental(
            name, options, pipeline, stages, batch, size, longest, calling.weights,
            guards_of(captured), seconds,
        )  # fmt: skip

    def text(self) -> str:
        """Of the graph as captured; it holds the digests of all weights."""
        return self.stages[0].text

    def states(self, batch: int, capacity: int) -> list[Tensor]:
        """Memory for every state."""
        return self._memory({self.batch: batch, self.cache.capacity: capacity})

    def pool(self, pages: int) -> list[Tensor]:
        """Memory for every state, where they lie in pages."""
        return self._memory({self.cache.states[0].shape[0]: pages})

    def _memory(self, sizes: Mapping[Any, int]) -> list[Tensor]:
        return [
            torch.empty([sizes.get(n, n) for n in s.shape], dtype=s.dtype.torch, device=self.device)
            for s in self.cache.states
        ]

    def variant(self, wanted: Variant) -> Compiled:
        found = self._variants.get(wanted)
        if found is None:
            with self._lock:
                found = self._variants.get(wanted)
                if found is None:
                    with collector_paused():
                        found = self._compile(wanted)
                    self._variants[wanted] = found
        return found

    @property
    def compiled(self) -> Mapping[Variant, Compiled]:
        return dict(self._variants)

    def refresh(self) -> None:
        self._live.refresh()

    def _compile(self, wanted: Variant) -> Compiled:
        record = self.ready[wanted]() if wanted in self.ready else self._planned(wanted)
        return Compiled(wanted, record, [i.key for i in self.cache.given], self._live)

    def _planned(self, wanted: Variant) -> Record:
        known = {self.cache.size: 1} if wanted.decode else {}
        if wanted.one:
            known[self.batch] = 1
        options, one_row = self.options, wanted.decode or wanted.every
        passes = options.passes if one_row else Pipeline.parse(f"keep-last,{options.pipeline}")
        record = Record(
            f"{self.name}: {wanted}", f"{self.pipeline},{passes}", options.target,
            seconds=dict(self.seconds), guards=list(self.guards),
        )  # fmt: skip
        with record.phase("passes"):
            graph = specialise(self.graph, known)
            told = ",".join(f"{k}={v}" for k, v in known.items()) or "no size"
            at = len(self.stages)
            backend = find_backend(options.target)
            stages = run_pipeline(
                graph, passes, supports=backend.supports, rates=backend.rates,
                instruments=_instruments(options),
            )  # fmt: skip
            special = Stage(at, f"specialise {told}", "sizes known", graph, changed=bool(known))
            record.stages = [
                *self.stages, special, *(replace(s, index=at + s.index) for s in stages[1:])
            ]  # fmt: skip
        build(record, graph, options)
        if options.dump is not None:
            part = re.sub(r"\W+", "_", str(wanted)).strip("_")
            write_dump(Path(options.dump) / f"graph_{part}", record)
        check_strict(record, options)
        return record


class _Bindings:
    """Executables with one set of weights, bound when first called; they share what they can."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.constants = weights, Constants()
        self.bound: dict[Compiled, Any] = {}
        self.lock = threading.Lock()

    def of(self, variant: Compiled) -> Any:
        found = self.bound.get(variant)
        if found is None:
            with self.lock:
                found = self.bound.get(variant)
                if found is None:
                    executable = variant.record.executable
                    found = executable.bind(self.weights, self.constants)
                    self.bound[variant] = found
        return found


class Compiled:
    """One specialised graph, planned: new tokens and states in, logits and states out."""

    def __init__(self, which: Variant, record: Record, given: list[str], live: LiveWeights) -> None:
        self.which, self.record, self.name = which, record, str(which)
        self.given = given  # names of all inputs but `past` and the states, ids first
        self._live = live
        self.calls, self.tokens, self.seconds = 0, 0, 0.0
        self._counting = threading.Lock()

    def bound(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """The executable with the weights as they are now: inputs in order -> outputs."""
        return self._live().of(self)

    def count(self, tokens: int, seconds: float) -> None:
        with self._counting:
            self.calls += 1
            self.tokens += tokens
            self.seconds += seconds


# ------------------------------------------------------------------ capture


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[what] = perf_counter() - start


def _instruments(options: Options) -> list[Instrument]:
    return [Verify()] if options.verify else []


BATCH, LENGTH = 2, 8  # of the traced call; both are sizes of the graph, not numbers


def _exported(form: Form) -> torch.export.ExportedProgram:
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    kwargs = {name: torch.ones_like(ids) for name in form.given}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes: dict[str, Any] = {"ids": free, **dict.fromkeys(form.given, free)}
    try:
        with torch.no_grad():
            return torch.export.export(
                form.module, (ids,), kwargs, dynamic_shapes=shapes, strict=False
            )
    except EffcError:
        raise
    except Exception as e:  # torch.export documents no narrower class
        lines = str(e).strip().splitlines()
        raise UnsupportedError(
            f"torch.export cannot capture {form.module} for every batch and length",
            why=lines[0] if lines else type(e).__name__,
            fix="write the forward so that batch and length of its ids may be any number",
        ) from e


def _captured(program: torch.export.ExportedProgram, name: str) -> tuple[Captured, Imported]:
    captured = capture_exported(program)
    imported = import_captured(captured) if isinstance(captured, Captured) else captured
    if isinstance(captured, Captured) and isinstance(imported, Imported):
        return captured, imported
    raise UnsupportedError(
        f"{name} cannot be captured as one graph", why=str(imported),
        fix="effc.compile without example_inputs compiles it piece by piece",
    )  # fmt: skip


def _sizes(name: str, imported: Imported, calling: Calling) -> tuple[Any, sympy.Symbol]:
    """The symbols of batch and length. Raises UnsupportedError for another interface."""
    if calling.copies:
        written = calling.copies[0][0].name.removeprefix("model.")
        raise UnsupportedError(
            f"{name} writes into {written}", why="a call would see what another call left there",
            fix="give it a forward over the whole sequence that keeps nothing",
        )  # fmt: skip
    graph = imported.graph
    first, result = graph.inputs[0].of, graph.outputs[0].type if graph.outputs else None
    assert isinstance(first, TensorType)
    batch, size = first.shape
    shape = result.shape if isinstance(result, TensorType) else ()
    free = symbolic(batch) and symbolic(size)
    if len(graph.outputs) != 1 or len(shape) != 3 or shape[1] != size or not free:
        given = ", ".join(str(o.type) for o in graph.outputs)
        raise UnsupportedError(
            f"{name} must map ids [B, T] to logits [B, T, vocabulary]",
            why=f"ids {first} give {given or 'no tensor'}",
        )
    return batch, size


def _upper_bound(captured: Captured, size: Any) -> int | None:
    """The longest sequence for which the trace holds."""
    for given in captured.inputs:
        val = given.node.meta.get("val")
        for s in val.shape if isinstance(val, Tensor) else ():
            if isinstance(s, torch.SymInt) and str(s) == str(size):
                upper = s.node.shape_env.var_to_range[s.node.expr].upper
                return None if upper > 10**9 else int(upper)
    return None
