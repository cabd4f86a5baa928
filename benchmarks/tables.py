"""Results as tables of 100 columns, and what kept a way from being timed as notes below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from effc.show import amount, grid

from .archive import Results
from .limits import rows
from .peers import BASE
from .stats import best_peer, geometric_mean, is_effc, times
from .work import Work

Entry = dict[str, Any]

LABELS = {
    "eager-channels-last": "NHWC", "inductor": "Inductor", "inductor-freezing": "freezing",
    "inductor-max-autotune": "autotune", "onnxruntime": "ORT", "openvino": "OpenVINO",
    "eager-bf16": "bf16", "inductor-bf16": "Inductor", "inductor-freezing-bf16": "freezing",
    "openvino-bf16": "OpenVINO", "effc-high": "effc high", "effc-medium": "medium",
    "eager-tf32": "tf32", "eager-fp16": "fp16", "sdpa-flash": "flash",
    "sdpa-efficient": "efficient", "sdpa-cudnn": "cuDNN", "sdpa-math": "math", "cublas": "cuBLAS",
}  # fmt: skip
"""Short names of columns; NHWC is eager in channels-last, freezing and autotune are Inductor's."""
UNSTEADY = 0.1  # quartile distance over the median from which on a figure is marked


def as_parts(results: Results) -> Iterator[Any]:
    """What to print of a suite."""
    if results.suite == "limits":
        yield from _limits(results)
    elif results.suite == "compile":
        yield from _compile(results)
    elif results.suite in ("decode", "perplexity"):
        yield from _of_tokens(results)
    else:
        for title, entries in _blocks(results.entries):
            yield Text(f"\n{results.suite}, {title}: time over that of the best peer", "bold")
            yield ratios(entries)
            if any("bound" in e for e in entries):
                yield Text(f"\nper cent of {limit_of(results)}", "bold")
                yield fractions(entries)
            yield from notes(entries)


def _blocks(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Entries by precision and threads."""
    for precision, threads in dict.fromkeys((e["precision"], e["threads"]) for e in entries):
        same = [e for e in entries if (e["precision"], e["threads"]) == (precision, threads)]
        yield block_title(same[0]), same


def block_title(entry: Entry) -> str:
    """What the entries of a table, or bars of a panel, have in common."""
    if "device" in entry:
        return entry["precision"]
    threads = entry["threads"]
    return f"{entry['precision']}, {threads} thread{'s' * (threads > 1)}"


def limit_of(results: Results) -> str:
    """What times are a part of."""
    return "the data sheet's roofline" if results.suite == "gpu" else "the machine's measured limit"


def ways_of(entries: Sequence[Entry]) -> list[str]:
    """All ways in the order in which they first come."""
    return list(dict.fromkeys(n for e in entries for n in e["ways"]))


# ------------------------------------------------------------------ ratios


def ratios(entries: Sequence[Entry]) -> Table:
    """A row a case; the last row is the geometric mean of each column."""
    ways = ways_of(entries)
    table = grid("", ">eager ms", *(f">{LABELS.get(w, w)}" for w in ways))
    for e in entries:
        table.add_row(e["name"], _eager(e), *(_cell(e, w) for w in ways))
    if len(entries) > 1:
        means = (_mean(entries, w) for w in ways)
        table.add_row("geometric mean", "", *means, style="bold")
    return table


def ratio(entry: Entry, way: str) -> float | None:
    """Time over that of the best peer, which has 1."""
    best, ms = best_peer(entry), times(entry).get(way)
    return ms / best[1] if best and ms is not None else None


def _eager(entry: Entry) -> str:
    ms = times(entry).get(BASE)
    return "" if ms is None else _ms(ms)


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def _cell(entry: Entry, way: str) -> Text:
    found = entry["ways"].get(way)
    if found is None:
        return Text("")
    if found["status"] != "timed":
        return Text(found["status"], style="dim")
    value = ratio(entry, way)
    mark = "~" if found["spread"] > UNSTEADY or "flagged" in found else ""
    text = "" if value is None else f"{mark}{value:.2f}"
    return Text(text, style="green" if is_effc(way) and value is not None and value < 1 else "")


def _mean(entries: Sequence[Entry], way: str) -> str:
    """With the number of cases behind it, where it is not all of them."""
    found = [r for e in entries if (r := ratio(e, way)) is not None]
    mean = geometric_mean(found)
    if mean is None:
        return ""
    return f"{mean:.2f}" if len(found) == len(entries) else f"{mean:.2f} of {len(found)}"


# ------------------------------------------------------------------ fractions


def fractions(entries: Sequence[Entry]) -> Table:
    """How much of what the machine can do each way does; by whichever limit comes first."""
    ways = ways_of(entries)
    table = grid("", ">FLOP", ">bytes", "limit", *(f">{LABELS.get(w, w)}" for w in ways))
    for e in (e for e in entries if "bound" in e):
        work = e["work"]
        table.add_row(
            e["name"], amount(work["flops"], ""), amount(work["bytes"], "B"), e["bound"]["by"],
            *(_per_cent(e["ways"].get(w, {}).get("fraction")) for w in ways),
        )  # fmt: skip
    return table


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.0f}"


# ------------------------------------------------------------------ language models


def _of_tokens(results: Results) -> Iterator[Any]:
    columns = (*_RATES, *(_GENERATED if results.suite == "decode" else _FORETOLD))
    for title, entries in _blocks(results.entries):
        first, times_of = entries[0], "tokens a second"
        if "new" in first:
            times_of = f"{first['new']} tokens after a prompt of {first['prompt']}"
        elif "windows" in first:
            times_of = f"{first['windows']} windows of {first['tokens']} tokens"
        yield Text(f"\n{results.suite}, {title}: {times_of}", "bold")
        table = grid("", "", *(f">{name}" for name, _ in columns))
        for e in entries:
            for n, (way, found) in enumerate(e["ways"].items()):
                name = "" if n else e["name"]
                if found["status"] == "timed":
                    cells = (make(e, way) for _, make in columns)
                    table.add_row(name, way, *cells, style="green" if is_effc(way) else "")
                else:
                    table.add_row(name, way, found["status"], style="dim")
        yield table
        yield from notes(entries)


def _tokens_per_s(e: Entry, way: str) -> str:
    """Medians: a time is that of one new token, or of one window."""
    return f"{e.get('tokens', 1) * 1e3 / e['ways'][way]['ms']:.4g}"


def _over_best(e: Entry, way: str) -> str:
    """Tokens a second over those of the best peer, which has 1."""
    found = ratio(e, way)
    return "" if found is None else f"{1 / found:.2f}"


def _limit(e: Entry, way: str) -> str:
    return f"{_per_cent(e['ways'][way].get('fraction'))} {e['bound']['by']}" if "bound" in e else ""


Column = tuple[str, Callable[[Entry, str], str]]

_RATES: tuple[Column, ...] = (
    ("tokens/s", _tokens_per_s),
    ("spread", lambda e, way: f"{e['ways'][way]['spread']:.0%}"),
    ("× best peer", _over_best),
)
_GENERATED: tuple[Column, ...] = (
    ("first ms", lambda e, way: _ms(e["ways"][way]["first"]["ms"])),
    ("read/token", lambda e, way: amount(weights_read(e), "B")),
    ("read/s", lambda e, way: amount(weights_read(e) / e["ways"][way]["ms"] * 1e3, "B")),
    ("% of limit", _limit),
)
_FORETOLD: tuple[Column, ...] = (
    ("perplexity", lambda e, way: f"{e['ways'][way]['perplexity']:.3f}"),
    ("s/window", lambda e, way: f"{e['ways'][way]['ms'] / 1e3:.2f}"),
    ("% of limit", _limit),
)


def weights_read(entry: Entry) -> int:
    """Bytes of weights that a step reads in the entry's precision."""
    return Work(**entry["work"]).in_precision(entry["precision"]).bytes


# ------------------------------------------------------------------ notes


def notes(entries: Sequence[Entry]) -> Iterator[Text]:
    """Every reason once, with the cases it is about; and how many rounds were flagged."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for e in entries:
        for way, found in e["ways"].items():
            if found["status"] != "timed":
                key = (way, found["status"], found["reason"])
                reasons.setdefault(key, []).append(e["name"])
    for (way, status, reason), where in reasons.items():
        cases = "all" if len(where) == len(entries) else ", ".join(where)
        yield Text(f"{way} {status} ({cases}): {reason}")
    flagged = {e["name"]: e["flagged_rounds"] for e in entries if e.get("flagged_rounds")}
    if flagged:
        counts = ", ".join(f"{name} {n}" for name, n in flagged.items())
        yield Text(f"rounds in which the threads did not have a core each: {counts}")
    if any(w.get("spread", 0) > UNSTEADY or "flagged" in w
           for e in entries for w in e["ways"].values()):  # fmt: skip
        yield Text(f"~ unsteady: quartiles {UNSTEADY:.0%} of the median apart or more, or threads "
                   "that shared a core")  # fmt: skip


# ------------------------------------------------------------------ limits and compilation


def _limits(results: Results) -> Iterator[Any]:
    for threads, found in results.limits["threads"].items():
        yield Text(f"\nlimits, {threads} thread{'s' * (threads != '1')}", style="bold")
        table = grid("", ">best", ">median", "")
        for name, unit, best, median in rows(found):
            table.add_row(name, f"{best:.1f}", f"{median:.1f}", unit)
        yield table


def _compile(results: Results) -> Iterator[Any]:
    yield Text("\nseconds of the first call (shared libraries built, peak MiB)", style="bold")
    ways = ways_of(results.entries)
    table = grid("", *(f">{w}" for w in ways))
    for e in results.entries:
        table.add_row(e["name"], *(_first(e["ways"].get(w)) for w in ways))
    yield table
    yield from notes(results.entries)


def _first(found: Entry | None) -> str:
    if found is None:
        return ""
    if found["status"] != "timed":
        return found["status"]
    return f"{found['ms'] / 1e3:.2f} ({found['kernels']}, {found['rss_mib']})"
