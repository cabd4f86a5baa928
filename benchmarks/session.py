"""Runs jobs, each in a fresh process, and turns a crash or a hang into a reason.

A fresh process gives every case the same start: no other model's memory, thread pool or compiled
code. A way that ends the process, or is not ready in time, is tried no more: the job runs again
without it, and the reason stays in the results.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

PATIENCE = 1200.0  # seconds without news after which a way is given up
WORKER = "effc.benchmarks.worker"

Event = dict[str, Any]


class Ended(Exception):
    """A worker ended without a result; the text says how."""


def run_job(
    job: Mapping[str, Any], tell: Callable[[Event], None], patience: float = PATIENCE,
    worker: str = WORKER,
) -> Event:  # fmt: skip
    """The entry of a job; `tell` gets every event on the way. Raises Ended where not even eager
    runs."""
    skip: dict[str, str] = {}
    while True:
        last: Event = {}
        try:
            for event in events({**job, "skip": skip}, patience, worker):
                if event["event"] == "entry":
                    return event["entry"]
                if event["event"] != "round":
                    last = event
                tell(event)
        except Ended as e:
            if last.get("event") != "prepare" or last["way"] in skip:
                raise
            skip[last["way"]] = str(e)


def events(
    job: Mapping[str, Any], patience: float = PATIENCE, worker: str = WORKER,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Start a worker and yield what it tells. Raises Ended if its exit code is not 0."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as log, os.fdopen(read, "rb", buffering=0) as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", worker, str(write)], pass_fds=[write], stdin=subprocess.PIPE,
            stdout=log, stderr=log, text=True, start_new_session=True,
            env=_environment(job, environment or {}),
        )  # fmt: skip
        os.close(write)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            yield from _lines(stream, patience)
            if code := process.wait():
                raise Ended(_why(code, log))
        finally:
            _end(process)


def _environment(job: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, str]:
    threads = str(job.get("threads", 1))
    return {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "CI": "true",  # OpenVINO's converter sends usage data elsewhere, except in CI
        **more,
    }


def _lines(stream: IO[bytes], patience: float) -> Iterator[Event]:
    """Events until the pipe closes. Raises Ended after `patience` seconds without one."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(patience):
                raise Ended(f"not ready after {patience:.0f} s")
            chunk = stream.read(1 << 16)
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, whole)


def _why(code: int, log: IO[str]) -> str:
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    log.seek(0)
    said = [line.strip() for line in log.read().splitlines() if line.strip()]
    return f"{how}: {said[-1][:300]}" if said else how


def _end(process: subprocess.Popen[str]) -> None:
    """The worker and all it started: compilers run in its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
