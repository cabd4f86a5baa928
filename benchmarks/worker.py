"""One case in a process of its own: prepare every way, check it, time all of them in turns.

`python -m effc.benchmarks.worker FD` reads a job as JSON from stdin and writes events as JSON lines
to the file descriptor; stdout and stderr belong to the libraries. The session that starts it knows
from the last event what a crash was about.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from effc.ir import EffcError

from .peers import BASE, Peer, Prepared, Unable, as_tensor, chosen, relative_l2
from .stats import summarise, usable
from .suites import case
from .timing import WORTH, Series, Way, clocked, interleave
from .work import work_of

TOLERANCE = {"fp32": 1e-3, "tf32": 0.05, "fp16": 0.1, "bf16": 0.25}
"""Relative L2 to float32 eager from which on a result is wrong: far above what rounding gives at
this depth (1e-6, and 1e-2 to 0.12 in bfloat16; tf32 and fp16 have three bits more), and below what
a wrong kernel gives (about 1)."""

Tell = Callable[..., None]
T = TypeVar("T")


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The entry of a job: suite, name, precision, threads, rounds, peers, and `skip`: reasons of
    peers not to try, because they crashed; `device`: "cuda", or the CPU without it."""
    torch.set_num_threads(job["threads"])
    device = job.get("device", "cpu")
    model, args = case(job["suite"], job["name"]).build()
    entry: dict[str, Any] = {k: job[k] for k in ("name", "precision", "threads")}
    entry["group"] = case(job["suite"], job["name"]).group
    tell("cost")
    entry["work"] = work(model, args)
    if device != "cpu":
        entry["device"] = device
        model, args = model.to(device), tuple(a.to(device) for a in args)
    entry["ways"] = {}
    ways: dict[str, Way] = {}
    want: Tensor | None = None
    with torch.no_grad():
        for peer in chosen(job["precision"], job["peers"], device):
            tell("prepare", way=peer.name)
            found, call, got = prepare(peer, model, args, job, want)
            entry["ways"][peer.name] = found
            if peer.name == BASE:
                want = got
            if call is not None:
                ways[peer.name] = Way(call, _setting(peer), _clock(device))
        tell("time", rounds=job["rounds"])
        scaling = interleave(ways, job["rounds"], job["threads"], lambda n: tell("round", done=n))
    return with_times(entry, ways, scaling)


def work(model: torch.nn.Module, args: tuple[Tensor, ...]) -> dict[str, Any]:
    try:
        return asdict(work_of(model, args))
    except EffcError as e:
        return {"reason": str(e).splitlines()[0]}


def _setting(peer: Peer) -> Callable[[], None]:
    """What torch is set to while a peer is prepared and called."""

    def set_up() -> None:
        torch.set_float32_matmul_precision(peer.matmul)
        if torch.cuda.is_available():  # of its convolutions
            torch.backends.cudnn.allow_tf32 = peer.matmul != "highest"

    return set_up


def _clock(device: str) -> Callable[..., float]:
    if device == "cpu":
        return clocked
    from .gpu import clocked as by_events

    return by_events


def prepare(
    peer: Peer, model: torch.nn.Module, args: tuple[Tensor, ...], job: dict[str, Any],
    want: Tensor | None,
) -> tuple[dict[str, Any], Prepared | None, Tensor | None]:  # fmt: skip
    """What to keep of a peer, and the callable to time if its result is right."""

    def make() -> tuple[Prepared, Tensor]:
        _setting(peer)()
        call = peer.prepare(model, args, precision, job["threads"])
        return call, as_tensor(call())

    precision = "fp32" if peer.name == BASE else job["precision"]
    found, made = attempt(peer, make, job["skip"].get(peer.name))
    if made is None:
        return found, None, None
    call, got = made
    if want is None:
        return found, call, got
    found["error"] = error = float(f"{relative_l2(got, want):.3g}")
    if not error <= TOLERANCE[job["precision"]]:
        reason = f"relative L2 to eager is {error:.2g}"
        return {**found, "status": "wrong", "reason": reason}, None, got
    return found, call, got


def attempt(
    peer: Peer, make: Callable[[], T], crashed: str | None = None
) -> tuple[dict[str, Any], T | None]:
    """What to keep of a peer, and what `make` made; None, and the reason, where it could not.

    crashed: why it is not tried at all.
    """
    if crashed:
        return {"status": "failed", "reason": crashed}, None
    if reason := peer.available():
        return {"status": "absent", "reason": reason}, None
    start = time.perf_counter()
    try:
        made = make()
    except Unable as e:
        return {"status": "unable", "reason": str(e)}, None
    except Exception as e:  # peers raise what they like; the reason is the result
        traceback.print_exc()
        return {"status": "failed", "reason": _brief(e)}, None
    found = {"status": "timed", "prepare_s": round(time.perf_counter() - start, 3)}
    return {**found, "notes": peer.notes} if peer.notes else found, made


def _brief(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0][:300] if lines else 'no message'}"


def with_times(
    entry: dict[str, Any], ways: Mapping[str, Series], scaling: list[float | None]
) -> dict[str, Any]:
    """Add to each timed way its samples in milliseconds, and what they come to."""
    if any(s is not None for s in scaling):
        entry["scaling"] = [None if s is None else round(s, 3) for s in scaling]
        entry["flagged_rounds"] = sum(s is not None and s < WORTH for s in scaling)
    for name, way in ways.items():
        taken, flagged = usable(way.samples, scaling, WORTH)
        entry["ways"][name] |= {
            **summarise(taken).as_json(),
            "burst": way.burst,
            "samples": [None if s is None else float(f"{s:.5g}") for s in way.samples],
        }
        if flagged:
            entry["ways"][name]["flagged"] = "timed while the threads shared one core"
    return entry


def serve(run: Callable[[dict[str, Any], Tell], dict[str, Any]]) -> None:
    """Answer the one job on stdin through the file descriptor that the command line names."""
    stream = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    def tell(event: str, **more: Any) -> None:
        stream.write(json.dumps({"event": event, **more}) + "\n")

    job = json.load(sys.stdin)
    tell("entry", entry=run(job, tell))


if __name__ == "__main__":
    serve(run)
