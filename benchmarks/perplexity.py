"""`effc bench perplexity`: how well SmolLM2 foretells wikitext-2, whole windows at a time.

The test split is tokenised once and cut into windows without overlap; every way runs each window,
in turns. That is the protocol behind the figure that is published beside the weights, 25.62 over
the first 40 windows of 512 tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effc.examples.zoo import text

from .peers import Prepared, chosen
from .suites import Built, Case, case
from .timing import Series, interleave
from .worker import Tell, prepare, serve, with_times, work

WORKER = "effc.benchmarks.perplexity"
WINDOWS, LENGTH = 40, 512
PEERS = ("effc",)
"""What runs beside eager without `--peers`: a window takes seconds."""
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "text" / "wikitext2_test.txt.gz"


class Logits(nn.Module):
    """ids [1, T] -> logits [1, T, vocabulary] of a causal model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def cases() -> list[Case]:
    return [Case("smollm2-135m", "perplexity", _smollm2)]


def _smollm2() -> Built:
    from effc.examples.zoo import smollm2

    return Logits(smollm2.load(smollm2.source())), (torch.zeros(1, LENGTH, dtype=torch.long),)


def windows(count: int) -> Tensor:
    """The first so many windows [count, LENGTH]. Raises FileNotFoundError."""
    from effc.examples.zoo import smollm2

    if not TEXT.exists():
        raise FileNotFoundError(f"perplexity needs ../shared/data/text/{TEXT.name}")
    return text.windows(smollm2.tokenizer(smollm2.source()), text.read(TEXT), LENGTH, count)


@dataclass
class Windows(Series):
    """Samples are the milliseconds of a window each; `call` reads it from `ids`."""

    call: Prepared
    ids: Tensor
    windows: Tensor
    losses: list[float] = field(default_factory=list)

    def settle(self) -> None:
        self.call()

    def sample(self) -> float:
        self.ids.copy_(self.windows[len(self.samples)])
        start = time.perf_counter()
        logits = torch.as_tensor(self.call())
        seconds = time.perf_counter() - start
        self.losses.append(float(text.next_token_loss(logits.float(), self.ids)))
        return seconds * 1e3


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The entry of a job; see worker.run. A round is a window; times are those of one."""
    torch.set_num_threads(job["threads"])
    texts = windows(job["rounds"])
    model, (ids,) = case("perplexity", job["name"]).build()
    ids.copy_(texts[0])
    entry: dict[str, Any] = {k: job[k] for k in ("name", "precision", "threads")}
    entry |= {"group": "perplexity", "tokens": ids.shape[1], "windows": len(texts)}
    entry["work"], entry["ways"] = work(model, (ids,)), {}
    ways: dict[str, Windows] = {}
    want: Tensor | None = None
    with torch.no_grad():
        for peer in chosen(job["precision"], job["peers"] or PEERS):
            tell("prepare", way=peer.name)
            found, call, got = prepare(peer, model, (ids,), job, want)
            entry["ways"][peer.name] = found
            want = got if want is None else want
            if call is not None:
                ways[peer.name] = Windows(call, ids, texts)
        tell("time", rounds=len(texts))
        scaling = interleave(ways, len(texts), job["threads"], lambda n: tell("round", done=n))
    entry = with_times(entry, ways, scaling)
    for name, way in ways.items():
        mean = sum(way.losses) / len(way.losses)
        entry["ways"][name]["perplexity"] = round(math.exp(mean), 4)
    return entry


if __name__ == "__main__":
    serve(run)
