"""The first call: Dynamo alone, Inductor and effc, with caches cold and warm, by depth.

Every figure is the time of a first call in a fresh process, after imports and after the model is
built; the call itself is in it, and is small. Caches are private folders: cold is the first process
with them, warm the second. `python -m effc.benchmarks.compile_times FD` is the worker.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .session import Ended, Event, events
from .stats import summarise

LLAMAS = (4, 12, 24, 48)
BACKENDS = {"dynamo": "eager", "inductor": "inductor", "effc": "effc"}
WORKER = "effc.benchmarks.compile_times"


def names() -> list[str]:
    return ["rlfn", *(f"llama-{layers}" for layers in LLAMAS)]


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """RLFN as the paper has it on a small image, or a Llama of so many layers, 256 wide."""
    from effc.examples.rlfn import rlfn

    torch.manual_seed(0)
    if name == "rlfn":
        return rlfn().eval(), (torch.rand(1, 3, 24, 32) * 255,)
    return _llama(int(name.removeprefix("llama-"))), (torch.randint(0, 199, (1, 32)),)


def _llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=199, hidden_size=256, intermediate_size=688, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ------------------------------------------------------------------ the session's side


def measure(
    name: str, ways: Sequence[str], rounds: int, threads: int, tell: Callable[[Event], None],
    patience: float,
) -> dict[str, Any]:  # fmt: skip
    """The entry of one model: `ways` are keys of BACKENDS, each cold and warm but Dynamo's."""
    found: dict[str, list[dict[str, Any]]] = {}
    entry: dict[str, Any] = {
        "name": name, "precision": "fp32", "threads": threads, "group": "compile", "ways": {},
    }  # fmt: skip
    for n in range(rounds):
        tell({"event": "round", "done": n})
        for way in ways:
            _round(name, way, threads, found, entry["ways"], tell, patience)
    for label, samples in found.items():
        summary = summarise([s["seconds"] * 1e3 for s in samples]).as_json()
        extra = {k: samples[-1][k] for k in ("kernels", "rss_mib", "next_call_ms")}
        times = [round(s["seconds"] * 1e3, 1) for s in samples]
        entry["ways"][label] = {"status": "timed", **summary, **extra, "samples": times}
    return entry


def _round(
    name: str, way: str, threads: int, found: dict[str, list[dict[str, Any]]],
    failed: dict[str, Any], tell: Callable[[Event], None], patience: float,
) -> None:  # fmt: skip
    """One cold process and one warm one with the same private caches."""
    with tempfile.TemporaryDirectory(prefix="effc-bench-") as folder:
        caches = {"EFFC_CACHE_DIR": f"{folder}/effc", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch"}
        for state in ("cold",) if way == "dynamo" else ("cold", "warm"):
            label = way if way == "dynamo" else f"{way}-{state}"
            tell({"event": "prepare", "way": label})
            job = {"name": name, "way": way, "threads": threads}
            try:
                (result,) = events(job, patience, WORKER, caches)
            except Ended as e:
                failed[label] = {"status": "failed", "reason": str(e)}
                found.pop(label, None)
                return
            if label not in failed:
                found.setdefault(label, []).append(result)


# ------------------------------------------------------------------ the worker's side


def first_call(name: str, way: str, threads: int) -> dict[str, Any]:
    """Seconds of the first call, milliseconds of a later one, libraries built, peak memory."""
    torch.set_num_threads(threads)
    model, args = build(name)
    fast = torch.compile(model, backend=BACKENDS[way])
    with torch.no_grad():
        start = time.perf_counter()
        fast(*args)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        fast(*args)
        later = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3), "next_call_ms": round(later * 1e3, 3),
        "kernels": libraries(), "rss_mib": peak_memory(),
    }  # fmt: skip


def libraries() -> int:
    """Shared libraries in the private caches: what compilers were run for."""
    folders = [os.environ.get(n) for n in ("EFFC_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
    return sum(len(list(Path(f).rglob("*.so"))) for f in folders if f)


def peak_memory() -> int:
    """MiB of this process at its largest, compilers it started not counted."""
    # getrusage would also count what the process that started this one had in memory
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def main() -> None:
    job = json.load(sys.stdin)
    with os.fdopen(int(sys.argv[1]), "w") as stream:
        result = first_call(job["name"], job["way"], job["threads"])
        stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
