"""Whole models through effc beside eager, channels-last eager and Inductor: ratios, not seconds.

    python -m benchmarks.models [--rounds 15] [--threads 1 2] [--out FILE] [MODEL ...]

All ways of one model run interleaved in one process, on the same inputs and threads, after a
warm-up that includes compilation. The figure is the median of a call; `spread` is the distance
between the quartiles over the median. Beside every two-thread sample a calibration loop is timed:
on shared machines two threads are sometimes worth one, and such samples are dropped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

from effc.backends.cpu.features import detect
from examples.rlfn import rlfn
from examples.zoo.library import LIBRARY

FULL_RLFN = "rlfn-52x6-320x180"
WORTH = 1.6  # two threads must do this many times the work of one, or the sample is dropped


def ways(
    model: torch.nn.Module, args: Any, kwargs: Any, peers: bool
) -> dict[str, Callable[[], Any]]:
    """Each way of running the model on its inputs."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="effc")
    found = {"eager": lambda: model(*args, **kwargs), "effc": lambda: fast(*args, **kwargs)}
    if peers:
        inductor = torch.compile(model)
        found["inductor"] = lambda: inductor(*args, **kwargs)
    if any(isinstance(m, torch.nn.Conv2d) for m in model.modules()):
        import copy

        nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
        moved = pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
            (args, kwargs),
        )
        found["eager channels-last"] = lambda: nhwc(*moved[0], **moved[1])
    return found


def full_rlfn() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    """The paper's network on a 320 x 180 image."""
    torch.manual_seed(0)
    return rlfn().eval(), (torch.rand(1, 3, 180, 320) * 255,), {}


def scaling(threads: int) -> float:
    """How many times the work of one thread `threads` threads do at this moment."""
    a = torch.randn(512, 512)

    def loop(n: int) -> float:
        torch.set_num_threads(n)
        start = time.perf_counter()
        for _ in range(3):
            torch.mm(a, a)
        return time.perf_counter() - start

    one = loop(1)
    many = loop(threads)
    return one / many


def measure(run: dict[str, Callable[[], Any]], rounds: int, threads: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in run}
    dropped = 0
    torch.set_num_threads(threads)
    with torch.no_grad():
        for fn in run.values():
            for _ in range(3):
                fn()
        for _ in range(rounds):
            if threads > 1 and scaling(threads) < WORTH:
                dropped += 1
                torch.set_num_threads(threads)
                continue
            torch.set_num_threads(threads)
            for name, fn in run.items():
                start = time.perf_counter()
                fn()
                times[name].append(time.perf_counter() - start)
    result: dict[str, Any] = {"dropped": dropped}
    for name, found in times.items():
        if len(found) >= 4:
            low, middle, high = statistics.quantiles(found, n=4)
            result[name] = {"ms": round(middle * 1e3, 4), "spread": round((high - low) / middle, 3)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", choices=[*LIBRARY, FULL_RLFN, []])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--no-inductor", action="store_true", help="eager and effc only")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": str(detect()), "torch": torch.__version__,
        "models": {},
    }  # fmt: skip
    table = Table(
        "model", "threads", "eager ms", "effc / eager", "Inductor / eager", "NHWC / eager"
    )
    for name in chosen.models or [*LIBRARY, FULL_RLFN]:
        model, args, kwargs = full_rlfn() if name == FULL_RLFN else LIBRARY[name].build()
        for threads in chosen.threads:
            result = measure(
                ways(model, args, kwargs, not chosen.no_inductor), chosen.rounds, threads
            )
            found["models"].setdefault(name, {})[str(threads)] = result
            base = result.get("eager", {}).get("ms")
            cells = [
                f"{result[w]['ms'] / base:.2f}" if base and w in result else ""
                for w in ("effc", "inductor", "eager channels-last")
            ]
            table.add_row(name, str(threads), f"{base:.2f}" if base else "dropped", *cells)
    Console().print(table)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
