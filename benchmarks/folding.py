"""FoldGPT on SmolLM2-135M: what dropping, sharing and repair cost in perplexity and save in bytes.

    python -m effc.benchmarks.folding --out benchmarks/results/2027-01-31
    python -m effc.benchmarks.folding --only singles --only pairs

Windows of wikitext-2: gates, influence and repair see the first of the validation split, and every
figure is the loss on the same first ones of the test split, which nothing else looks at. The file
is written after every figure, and a run takes up where the last one stopped. Hours of one core in
all; `--only` names parts.
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
from effc.examples.fold_smollm2 import draw, points
from effc.examples.zoo import smollm2, text
from effc.importer import import_captured
from effc.ir import Graph
from effc.passes.analysis.blocks import weight_bytes
from effc.passes.base import Context, Pipeline
from effc.passes.fold.baselines import (
    at_random,
    block_influence,
    greedy_loss,
    losses_alone,
    losses_without,
)
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
LENGTHS = {"calibration": (8, 128), "held out": (4, 128)}  # windows, tokens
STEPS = {"gates": 16, "exchanges": 4, "repair": 24}
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
        net = smollm2.load(source)
        self.config: Any = net.config
        self.graph = raised(net)
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
        self.held_out = Objective(self.graph, [[ids] for ids in kept.split(4)])
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

    def point(
        self, name: str, loss: float, started: float, graph: Graph, way: str, **more: Any
    ) -> None:
        """A folded model for the picture: what it stores, and which line it is on."""
        stored = int(weight_bytes(graph.weights))  # type: ignore[arg-type]  # no symbolic sizes
        self.put(name, loss, started, way=way, stored=stored, **{"repaired": False, **more})

    def dropped(self, out: Iterable[int], way: str = "") -> None:
        """The loss without some blocks."""
        out = sorted(out)
        name = "drop " + ",".join(map(str, out))
        started = time.process_time()
        graph = self.graph.substitute(without(self.units[i] for i in out))
        if self.done(name) is None:
            self.put(name, self.held_out.mean(graph), started)
        if way:
            loss = self.loss(name)
            line = f"drop, {way.partition(' ')[2]}" if out else way
            self.point(way, loss, started, graph, line, dropped=out, card=self.card(len(out)))

    def loss(self, name: str) -> float:
        entry = self.done(name)
        assert entry is not None
        return entry["loss"]

    def card(self, dropped: int, rank: int | None = None) -> int:
        """Stored bytes by FoldGPT's count (card, 2.5), of the model's sizes; rank: of pairs that
        share. What lies outside blocks is the embedding, the last norm and rotary frequencies."""
        c = self.config
        d, kv, i = c.hidden_size, c.head_dim * c.num_key_value_heads, c.intermediate_size
        matrices = [(d, d), (kv, d), (kv, d), (d, d), (i, d), (i, d), (d, i)]
        block = 2 * d * d + 2 * d * kv + 3 * d * i
        extras = sum((rank or 0) * (n + k) + n for n, k in matrices)  # A, B and the scale
        blocks = len(self.units) - dropped
        children = 0 if rank is None else blocks // 2
        each = (blocks - children) * (block + 2 * d) + children * (2 * d + extras)
        return 4 * (c.vocab_size * d + d + c.head_dim // 2 + each)

    def scores(self, way: str, score: Callable[[Objective], Sequence[float]]) -> list[float]:
        """Of each block: the smallest goes first. Kept, since to learn them takes long."""
        name = f"scores by {way}"
        if self.done(name) is None:
            started = time.process_time()
            scores = list(score(Objective(self.graph, self.calibration)))
            shown = [s if math.isfinite(s) else None for s in scores]
            self.put(name, None, started, order=order_of(scores), scores=shown)
        entry = self.done(name)
        assert entry is not None
        return [math.inf if s is None else s for s in entry["scores"]]

    # -------------------------------------------------------------- parts

    def base(self) -> None:
        self.dropped((), "whole")

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

    def alone(self) -> None:
        self.cut("alone", self.alone_scores)

    def alone_scores(self, objective: Objective) -> list[float]:
        return losses_alone(self.graph, self.units, objective)

    def gates(self) -> None:
        for count in COUNTS:
            self.dropped(self.gated(count), f"{count} by gates")

    def gated(self, count: int) -> list[int]:
        """What gates that are trained for this rate leave out."""
        alone = self.scores("alone", self.alone_scores)
        training = GateTraining(
            count / len(self.units), STEPS["gates"], exchanges=STEPS["exchanges"]
        )
        learn = lambda o: training.run(self.graph, self.units, o, told, alone)  # noqa: E731
        return order_of(self.scores(f"gates, {count}", learn))[:count]

    def perplexity(self) -> None:
        self.cut("perplexity", lambda o: greedy_loss(self.graph, self.units, o, COUNTS[-1], told))

    def random(self) -> None:
        self.cut("random", lambda o: at_random(len(self.units), 0))

    def cut(self, way: str, score: Callable[[Objective], Sequence[float]]) -> None:
        order = order_of(self.scores(way, score))
        for count in COUNTS:
            self.dropped(order[:count], f"{count} by {way}")

    def ranks(self) -> None:
        """The gap to the uncompressed model after sharing and repair, as rank grows."""
        for rank in RANKS:
            self.folded(0, rank, f"distil{{steps={STEPS['repair']},rank=0}}")

    def ways(self) -> None:
        """What gates leave out, repaired; and pairs of the rest shared, too."""
        for count in (8, 4):
            for rank in (None, RANKS[-1]):
                self.folded(count, rank, f"distil{{steps={STEPS['repair']}}}")

    def folded(self, count: int, rank: int | None, repair: str) -> None:
        """`count` blocks left out by gates, pairs of others shared at a rank; then repaired."""
        share = "" if rank is None else f"share-blocks{{rank={rank},scale=True,fit=outputs}}"
        before = ",".join(filter(None, (f"{count} by gates" if count else "", share)))
        line = ("drop + share" if share else "drop, by gates") if count else "share"
        if self.done(f"{before},{repair}") is not None:
            return
        graph = self.graph
        if count:
            graph = graph.substitute(without(self.units[i] for i in self.gated(count)))
        for name, passes in ((before, share), (f"{before},{repair}", repair)):
            ctx, started = self.context(), time.process_time()
            for p in Pipeline.parse(passes):
                graph = p.run(graph, ctx)
            if self.done(name) is None:
                facts = {"card": self.card(count, rank), "notes": ctx.notes}
                loss, repaired = self.held_out.mean(graph), passes == repair
                self.point(name, loss, started, graph, line, repaired=repaired, **facts)

    def context(self) -> Context:
        return Context(calibration=self.calibration, uncompressed=self.graph)


def order_of(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=scores.__getitem__)


PARTS = "base singles influence random alone gates pairs ranks ways perplexity".split()


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
    draw(points({"entries": bench.results.entries}), bench.path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
