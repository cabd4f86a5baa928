"""What `effc bench` does: run suites, keep what they find, show it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from effc.ir import No, OptionError, nearest
from effc.show import WIDTH

from . import compile_times, decode, limits, perplexity, plots, suites, tables
from .archive import Key, Results, file_of
from .peers import BASE, PRECISIONS, Peer, chosen, peer_names
from .session import PATIENCE, WORKER, Ended, Event, run_job
from .stats import times
from .work import Work, bound

SUITES = ("limits", "kernels", "models", "decode", "compile")
"""What `effc bench` runs without a name; limits first, the others are compared with them."""
OTHERS = ("ops", "gpu", "perplexity")
ROUNDS = {
    "limits": 9, "kernels": 15, "models": 15, "decode": 4, "compile": 3, "ops": 3, "gpu": 30,
    "perplexity": perplexity.WINDOWS,
}  # fmt: skip
USUAL = {"perplexity": ("fp32",)}  # precisions without `--precision`, where not all of them
WORKERS = {"decode": decode.WORKER, "perplexity": perplexity.WORKER}


@dataclass(frozen=True)
class Options:
    """What a run was asked for. Empty sequences mean all; `rounds` None is each suite's own."""

    only: Sequence[str] = ()
    threads: Sequence[int] = (1,)
    rounds: int | None = None
    peers: Sequence[str] = ()
    precisions: Sequence[str] = ()
    out: Path = Path("out/bench")
    resume: bool = False
    patience: float = PATIENCE

    def rounds_of(self, suite: str) -> int:
        return self.rounds or ROUNDS[suite]


def main(names: Sequence[str], options: Options, console: Console | None = None) -> int:
    """Run suites by name, all of SUITES without one. Exit code: 130 after Ctrl-C, else 0."""
    console = console or Console(highlight=False)
    chosen_suites = list(names) or list(SUITES)
    _check(chosen_suites, options)
    for suite in chosen_suites:
        try:
            _run(suite, options, console)
        except KeyboardInterrupt:
            console.print(f"stopped; {file_of(options.out, suite)} holds what was measured")
            show(suite, options.out, console)
            return 130
        show(suite, options.out, console)
    return 0


def show(suite: str, out: Path, console: Console) -> None:
    """Print the tables of a suite's file and draw its picture."""
    path = file_of(out, suite)
    if suite == "ops" or not path.exists():
        return
    found = Results.load(path)
    # a file or pipe gets lines that fit the columns, not those of a terminal that is not there
    wide = console if console.is_terminal else Console(file=console.file, width=WIDTH + 20)
    for part in tables.as_parts(found):
        wide.print(part)
    try:
        pictures = plots.draw(found, out)
    except ImportError:
        console.print('no picture without matplotlib: pip install "effc[bench]"')
        pictures = []
    console.print(f"\n{path}", *(f"  {p.name}" for p in pictures), sep="")


def _check(names: Sequence[str], options: Options) -> None:
    """Mistakes are named before the first minute is spent."""
    for name in names:
        if name not in (*SUITES, *OTHERS):
            raise OptionError(f"no suite {name!r}", fix=nearest(name, (*SUITES, *OTHERS)))
    for name in options.peers:
        known = {n for suite in names for n in _known(suite)}
        if name not in known:
            raise OptionError(f"no peer {name!r}", fix=nearest(name, known))
    cases = {n for suite in names for n in _names(suite)}
    for name in options.only:
        if "ops" not in names and name not in cases:
            raise OptionError(f"no case {name!r} in {', '.join(names)}", fix=nearest(name, cases))
    if any(n < 1 for n in options.threads):
        raise OptionError("threads must be 1 or more")


def _known(suite: str) -> list[str]:
    """What `--peers` may name."""
    return decode.peer_names() if suite == "decode" else peer_names(_device(suite))


def _peers(suite: str, precision: str, names: Sequence[str]) -> Sequence[Peer]:
    if suite == "decode":
        return decode.chosen(precision, names)
    if suite == "perplexity":
        names = names or perplexity.PEERS
    return chosen(precision, names, _device(suite))


def _device(suite: str) -> str:
    return "cuda" if suite == "gpu" else "cpu"


def _names(suite: str) -> list[str]:
    if suite == "compile":
        return compile_times.names()
    return [c.name for c in suites.cases(suite)] if suite in suites.SUITES else []


def _run(suite: str, options: Options, console: Console) -> None:
    if suite == "ops":
        from . import op_sweep

        op_sweep.run(options.only, options.rounds_of(suite), file_of(options.out, suite))
    elif suite == "limits":
        measure_limits(options, console)
    elif suite == "compile":
        _compile(options, console)
    elif suite == "gpu":
        _on_gpu(options, console)
    else:
        _timed(suite, options, console)


# ------------------------------------------------------------------ limits


def measure_limits(options: Options, console: Console) -> dict[str, Any]:
    """Measure and keep the machine's limits for every number of threads; {} where it cannot."""
    from effc.backends.cpu.features import CpuFeatures, detect
    from effc.codegen.toolchain import Toolchain, find_toolchain

    cpu, toolchain = detect(), find_toolchain()
    if not isinstance(cpu, CpuFeatures) or not isinstance(toolchain, Toolchain):
        console.print(f"limits cannot be measured: {cpu if not cpu else toolchain}")
        return {}
    samples = options.rounds_of("limits")
    results = Results.here("limits", samples=samples)
    found: dict[str, Any] = {}
    with _progress(console) as progress:
        task = progress.add_task("limits", total=None)
        for threads in options.threads:
            found[str(threads)] = limits.measure(
                cpu, toolchain, threads, samples,
                lambda what, n=threads: progress.update(task, description=f"limits, {n}: {what}"),
            )  # fmt: skip
    results.limits = {"threads": found}
    results.save(file_of(options.out, "limits"))
    return results.limits


def _limits_of(options: Options, console: Console) -> dict[str, Any]:
    """Those kept beside the results, measured anew if they lack a number of threads."""
    path = file_of(options.out, "limits")
    if path.exists():
        kept = Results.load(path).limits
        if all(str(n) in kept.get("threads", {}) for n in options.threads):
            return kept
    return measure_limits(options, console)


# ------------------------------------------------------------------ models and kernels


def _timed(suite: str, options: Options, console: Console) -> None:
    found = _limits_of(options, console)
    results = _begin(suite, options)
    results.limits = found
    wanted = [c.name for c in suites.cases(suite) if not options.only or c.name in options.only]
    keys = [
        Key(name, precision, threads)
        for name in wanted for precision in PRECISIONS for threads in options.threads
        if precision in (options.precisions or USUAL.get(suite, PRECISIONS))
    ]  # fmt: skip

    def measure(key: Key, tell: Callable[[Event], None]) -> dict[str, Any]:
        job = {
            "suite": suite, "name": key.name, "precision": key.precision, "threads": key.threads,
            "rounds": options.rounds_of(suite), "peers": list(options.peers),
        }  # fmt: skip
        worker = WORKERS.get(suite, WORKER)
        return with_bounds(run_job(job, tell, options.patience, worker), found)

    def ways(key: Key) -> list[str]:
        return [p.name for p in _peers(suite, key.precision, options.peers)]

    _each(results, keys, ways, measure, options, console)


def _on_gpu(options: Options, console: Console) -> None:
    from effc.backends.gpu.driver import find_driver

    from . import gpu

    if isinstance(driver := find_driver(), No):
        console.print(f"effc bench gpu needs a GPU that torch uses: {driver}")
        return
    results = _begin("gpu", options)
    found = results.machine["gpu"] = gpu.describe()
    sheet = gpu.sheet_of(found["name"], found["memory"])
    names = [n for n in _names("gpu") if not options.only or n in options.only]
    rounds = options.rounds_of("gpu")
    made = gpu.jobs(names, options.precisions, rounds, options.peers)
    todo = {Key.of(job): job for job in made}

    def measure(key: Key, tell: Callable[[Event], None]) -> dict[str, Any]:
        return gpu.with_roofline(run_job(todo[key], tell, options.patience), sheet)

    def ways(key: Key) -> list[str]:
        return [p.name for p in _peers("gpu", key.precision, options.peers)]

    _each(results, list(todo), ways, measure, options, console)


def with_bounds(entry: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Add the least possible time, and the part of the limit that each way reaches."""
    if "flops" not in entry["work"]:
        return entry
    work = Work(**entry["work"])
    for way, ms in times(entry).items():
        # eager runs in float32 in every entry
        precision = "fp32" if way == BASE else entry["precision"]
        least = bound(work.in_precision(precision), found, entry["threads"], precision)
        if least is None:
            return entry
        entry["ways"][way]["fraction"] = round(least.ms / ms, 4)
        if precision == entry["precision"]:
            entry["bound"] = {"ms": float(f"{least.ms:.4g}"), "by": least.by}
    return entry


# ------------------------------------------------------------------ compilation


def _compile(options: Options, console: Console) -> None:
    results = _begin("compile", options)
    names = [n for n in compile_times.names() if not options.only or n in options.only]
    backends = [
        b for b in compile_times.BACKENDS if not options.peers or b in (*options.peers, "dynamo")
    ]
    keys = [Key(name, "fp32", threads) for name in names for threads in options.threads]

    def measure(key: Key, tell: Callable[[Event], None]) -> dict[str, Any]:
        rounds = options.rounds_of("compile")
        return compile_times.measure(
            key.name, backends, rounds, key.threads, tell, options.patience
        )

    def ways(key: Key) -> list[str]:
        labels = [f"{b}-{state}" for b in backends if b != "dynamo" for state in ("cold", "warm")]
        return ["dynamo", *labels]

    _each(results, keys, ways, measure, options, console)


# ------------------------------------------------------------------ running


def _begin(suite: str, options: Options) -> Results:
    """A new file's content, or with `resume` what the file has."""
    path = file_of(options.out, suite)
    if options.resume and path.exists():
        return Results.load(path)
    return Results.here(
        suite, rounds=options.rounds_of(suite), interleaved=suite != "compile",
        order="shuffled in every round",
    )  # fmt: skip


def _each(
    results: Results, keys: Sequence[Key], ways: Callable[[Key], list[str]],
    measure: Callable[[Key, Callable[[Event], None]], dict[str, Any]],
    options: Options, console: Console,
) -> None:  # fmt: skip
    """Measure what is missing, one key after another; the file is complete after each."""
    path = file_of(options.out, results.suite)
    left = [k for k in keys if not (options.resume and results.done(k, ways(k)))]
    with _progress(console) as progress:
        task = progress.add_task(results.suite, total=len(left))
        for key in left:
            start = time.perf_counter()
            say = _teller(progress, task, key)
            say({"event": "start"})
            try:
                entry = measure(key, say)
            except Ended as e:
                console.print(f"{_title(key)}: {e}")
                entry = _lost(key, ways(key), str(e))
            entry["seconds"] = round(time.perf_counter() - start, 1)
            results.put(entry)
            results.save(path)
            progress.advance(task)
            if not console.is_terminal:  # a log shows no bar
                console.print(f"{_title(key)}: {entry['seconds']:.0f} s")


def _title(key: Key) -> str:
    return f"{key.name} {key.precision} ×{key.threads}"


def _lost(key: Key, ways: Sequence[str], reason: str) -> dict[str, Any]:
    """An entry of which nothing could be measured."""
    return {
        "name": key.name, "precision": key.precision, "threads": key.threads, "group": "",
        "work": {}, "ways": {w: {"status": "failed", "reason": reason} for w in ways},
    }  # fmt: skip


def _teller(progress: Progress, task: Any, key: Key) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        what = {
            "prepare": lambda: f"preparing {event['way']}",
            "cost": lambda: "counting FLOPs",
            "round": lambda: f"round {event['done']}",
        }.get(event["event"], lambda: event["event"])
        progress.update(task, description=f"{_title(key)}: {what()}")

    return tell


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
