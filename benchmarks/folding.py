"""FoldGPT on SmolLM2-135M: what dropping, sharing and repair cost in perplexity and save in bytes.

    python -m effc.benchmarks.folding --out benchmarks/results/2027-01-31
    python -m effc.benchmarks.folding --only singles --only pairs

Windows of wikitext-2: gates, influence and repair see some of the validation split, and every
figure is the loss on the same few of the test split. The file is written after every figure, and a
run takes up where the last one stopped. Hours of one core in all; `--only` names parts.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.export import Dim

import effc.aten  # noqa: F401  (registers the converters)
from effc.capture import capture_exported
from effc.examples.zoo import smollm2, text
from effc.importer import import_captured
from effc.ir import Graph
from effc.passes.analysis.blocks import weight_bytes
from effc.passes.base import Context, Pipeline
from effc.passes.fold.baselines import at_random, block_influence, greedy_loss, losses_without
from effc.passes.fold.gates import GateTraining
from effc.passes.fold.objective import Objective
from effc.passes.fold.units import find_units, without
from effc.pipeline import run_pipeline

from .archive import Key, Results, file_of

CONSOLE = Console(highlight=False, soft_wrap=True)
SUITE = "folding"
COUNTS = (2, 4, 6, 8)
PAIRS = 60
RANKS = (4, 16, 64)
LENGTHS = {"calibration": (24, 64), "held out": (4, 128)}  # windows, tokens
STEPS = {"gates": 400, "repair": 60}
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"


class Bench:
    """The model as a raised graph, the windows, and the file of results."""

    def __init__(self, out: Path, texts: Path) -> None:
        self.path = file_of(out, SUITE)
        settings = {"windows": LENGTHS, "steps": STEPS, "model": smollm2.FOLDER}
        self.results = Results.here(SUITE, **settings)
        if self.path.exists():
            self.results = Results.load(self.path)
        source = smollm2.source()
        self.graph = raised(smollm2.load(source))
        tokens = smollm2.tokenizer(source)
        count, length = LENGTHS["calibration"]
        learnt = text.windows(
            tokens, text.read(texts / "wikitext2_valid.txt.gz")[:60_000], length, count
        )
        count, length = LENGTHS["held out"]
        kept = text.windows(
            tokens, text.read(texts / "wikitext2_test.txt.gz")[:60_000], length, count
        )
        self.calibration = [[ids[None]] for ids in learnt]
        self.held_out = Objective(self.graph, [[kept]])
        self.units = find_units(self.graph, "block")

    # -------------------------------------------------------------- figures

    def put(self, name: str, loss: float | None, started: float, **more: Any) -> None:
        found = {} if loss is None else {"loss": loss, "perplexity": math.exp(min(loss, 700))}
        seconds = time.process_time() - started
        self.results.put(
            {
                "name": name,
                "precision": "fp32",
                "threads": 1,
                **found,
                "cpu_seconds": seconds,
                **more,
            }
        )
        self.results.save(self.path)
        shown = "" if loss is None else f"{math.exp(min(loss, 700)):.2f}"
        CONSOLE.print(f"{name}: {shown} {more.get('notes', '')}", markup=False)

    def done(self, name: str) -> dict[str, Any] | None:
        return self.results.entry(Key(name, "fp32", 1))

    def dropped(self, out: Iterable[int], way: str = "") -> None:
        """The loss without some blocks."""
        out = sorted(out)
        name = "drop " + ",".join(map(str, out))
        known, started = self.done(name), time.process_time()
        graph = self.graph.substitute(without(self.units[i] for i in out))
        if known is not None:
            loss = known["loss"]
        else:
            loss = self.held_out.mean(graph)
            self.put(name, loss, started, stored=int(weight_bytes(graph.weights)))  # type: ignore[arg-type]
        if way:
            self.put(way, loss, started, dropped=out, stored=int(weight_bytes(graph.weights)))  # type: ignore[arg-type]

    def pipeline(self, passes: str) -> None:
        """The loss after some passes, and what they said."""
        self.after(passes, self.graph, passes)

    def ranking(self, way: str, score: Callable[[Objective], Sequence[float]]) -> list[int]:
        """Blocks in the order in which they go; kept, since to learn it takes long."""
        name = f"order by {way}"
        if self.done(name) is None:
            started = time.process_time()
            scores = list(score(Objective(self.graph, self.calibration)))
            shown = [s if math.isfinite(s) else None for s in scores]
            order = sorted(range(len(scores)), key=scores.__getitem__)
            self.put(name, None, started, order=order, scores=shown)
        entry = self.done(name)
        assert entry is not None
        return entry["order"]

    # -------------------------------------------------------------- parts

    def base(self) -> None:
        self.dropped(())

    def singles(self) -> None:
        missing = [i for i in range(len(self.units)) if self.done(f"drop {i}") is None]
        self.without([], missing)

    def pairs(self) -> None:
        every = list(itertools.combinations(range(len(self.units)), 2))
        chosen = sorted(random.Random(0).sample(every, PAIRS))
        for i, group in itertools.groupby(chosen, key=lambda p: p[0]):
            self.without([i], [j for _, j in group if self.done(f"drop {i},{j}") is None])

    def without(self, out: list[int], more: list[int]) -> None:
        if not more:
            return
        started = time.process_time()
        for j, loss in losses_without(self.graph, self.units, self.held_out, out, more).items():
            self.put("drop " + ",".join(map(str, [*out, j])), loss, started)

    def influence(self) -> None:
        self.cut("influence", lambda o: block_influence(self.graph, self.units, o))

    def gates(self) -> None:
        """One training, at the largest rate; smaller rates take the first of its order."""
        training = GateTraining(COUNTS[-1] / len(self.units), STEPS["gates"])
        self.cut("gates", lambda o: training.run(self.graph, self.units, o, told))

    def perplexity(self) -> None:
        self.cut("perplexity", lambda o: greedy_loss(self.graph, self.units, o, COUNTS[-1], told))

    def random(self) -> None:
        self.cut("random", lambda o: at_random(len(self.units), 0))

    def cut(self, way: str, score: Callable[[Objective], Sequence[float]]) -> None:
        order = self.ranking(way, score)
        for count in COUNTS:
            self.dropped(order[:count], f"{count} by {way}")

    def ranks(self) -> None:
        """The gap to the uncompressed model after sharing and repair, as rank grows."""
        for rank in RANKS:
            self.pipeline(f"share-blocks{{rank={rank}}},distil{{steps={STEPS['repair']},rank=0}}")

    def ways(self) -> None:
        """Drop, share, and both, with and without repair. What is dropped is what gates learnt."""
        repair = f"distil{{steps={STEPS['repair']}}}"
        for passes in ("share-blocks{rank=16}", f"share-blocks{{rank=16}},{repair}"):
            self.pipeline(passes)
        order = self.ranking("gates", lambda o: [])
        for count in (4, 8):
            gone = self.graph.substitute(without(self.units[i] for i in order[:count]))
            for passes in (repair, "share-blocks{rank=16}", f"share-blocks{{rank=16}},{repair}"):
                self.after(f"{count} by gates,{passes}", gone, passes)

    def after(self, name: str, graph: Graph, passes: str) -> None:
        if self.done(name) is not None:
            return
        started, notes = time.process_time(), []
        for p in Pipeline.parse(passes):
            ctx = Context(calibration=self.calibration, uncompressed=self.graph)
            graph = p.run(graph, ctx)
            notes += ctx.notes
        stored = stored_bytes(graph)
        self.put(name, self.held_out.mean(graph), started, stored=stored, notes=notes)


def stored_bytes(graph: Graph) -> int:
    size = weight_bytes(graph.weights)
    assert isinstance(size, int)  # weights have no symbolic sizes
    return size


PARTS = "base singles influence random gates ranks pairs ways perplexity".split()


def raised(net: torch.nn.Module) -> Graph:
    """The graph of ids -> logits as passes about blocks want it, for any batch and length."""
    auto = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    kwargs = {"input_ids": torch.zeros(2, 16, dtype=torch.long), "use_cache": False}
    program = torch.export.export(net, (), kwargs, dynamic_shapes=auto, strict=False)
    captured: Any = import_captured(capture_exported(program))  # type: ignore[arg-type]
    return run_pipeline(captured.graph, Pipeline.parse("raised"))[-1].graph


def told(steps: Sequence[Any], title: str) -> Iterable[Any]:
    """The steps, with a line for every tenth of them."""
    for i, step in enumerate(steps):
        if not i % max(1, len(steps) // 10):
            CONSOLE.print(f"  {title}: {i} of {len(steps)}")
        yield step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--text", type=Path, default=TEXT, help="folder of wikitext2_*.txt.gz")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.out, options.text)
    for part in options.only or PARTS:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
