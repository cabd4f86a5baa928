"""Results as one picture per suite, written as PNG and SVG beside the JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .archive import Results
from .peers import BASE
from .stats import is_effc, times
from .tables import block_title, limit_of

Entry = dict[str, Any]

COLOURS = {
    "eager": "#7f7f7f", "eager-channels-last": "#bcbcbc", "eager-bf16": "#bcbcbc",
    "inductor": "#9ecae1", "inductor-bf16": "#9ecae1", "dynamo": "#bcbcbc",
    "inductor-freezing": "#4292c6", "inductor-freezing-bf16": "#4292c6",
    "inductor-max-autotune": "#08519c", "inductor-cold": "#08519c", "inductor-warm": "#9ecae1",
    "onnxruntime": "#74c476", "openvino": "#9e9ac8", "openvino-bf16": "#9e9ac8",
    "effc": "#e6550d", "effc-high": "#fdae6b", "effc-medium": "#e6550d",
    "eager-tf32": "#bcbcbc", "eager-fp16": "#bcbcbc", "cublas": "#74c476", "sdpa-flash": "#9e9ac8",
    "sdpa-efficient": "#bcbddc", "sdpa-cudnn": "#54278f", "sdpa-math": "#dadaeb",
    "llama.cpp": "#31a354", "llama.cpp-f16": "#a1d99b", "llama.cpp-bf16": "#31a354",
    "effc-bf16": "#e6550d", "effc-cold": "#e6550d", "effc-warm": "#fdae6b",
}  # fmt: skip
"""effc's in orange; those of one project in shades of one colour."""
BAR = 0.16  # inches of height
ROW = 0.28  # of a line of dots


def draw(results: Results, out: Path) -> list[Path]:
    """Write the picture of a suite; nothing for limits, or where nothing was timed."""
    panels = _panels(results)
    if not panels:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "effc"  # the same picture is the same file
    from matplotlib import pyplot

    height = max(panel.height for panel in panels) + 2.0
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.2 + 5.4 * len(panels), height), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, panel in zip(axes[0], panels):
        panel.draw(axis)
    figure.suptitle(_title(results), fontsize=11)
    drawn = dict.fromkeys(w for p in panels for e in p.entries for w in p.ways(e))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(way)) for way in drawn]
    figure.legend(
        handles, list(drawn), loc="outside lower center", fontsize=8, frameon=False,
        ncols=min(3 * len(panels), len(drawn)),
    )  # fmt: skip
    paths = [out / f"{results.suite}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
    pyplot.close(figure)
    return paths


def _colour(way: str) -> str:
    return COLOURS.get(way, "#636363")


class Panel:
    """Groups of horizontal bars, one group a case, on one axis."""

    def __init__(
        self, title: str, label: str, entries: Sequence[Entry],
        value: Callable[[Entry, str, float], float | None], line: float | None, *,
        base: bool = True, log: bool = False,
    ) -> None:  # fmt: skip
        """`value(entry, way, ms)` is the length of a bar for a time of so many milliseconds.

        line: what bars are compared with. base: draw eager, too, where it is not that line.
        """
        self.title, self.label, self.entries = title, label, list(entries)
        self.value, self.line, self.base, self.log = value, line, base, log

    def ways(self, entry: Entry) -> list[str]:
        """Those that have a bar."""
        return [w for w in times(entry) if self.base or w != BASE]

    @property
    def height(self) -> float:
        return BAR * sum(len(self.ways(e)) + 1 for e in self.entries)

    def draw(self, axis: Any) -> None:
        place, ticks = 0.0, []
        for entry in self.entries:
            start = place
            for way in self.ways(entry):
                self._bar(axis, entry, way, place)
                place += 1
            ticks.append((start + place - 1) / 2)
            place += 1
        axis.set_yticks(ticks, [e["name"] for e in self.entries])
        axis.set_ylim(place - 0.5, -1)
        axis.tick_params(axis="y", length=0)
        self._finish(axis)

    def _bar(self, axis: Any, entry: Entry, way: str, place: float) -> None:
        found = entry["ways"][way]
        length = self.value(entry, way, found["ms"])
        if length is None:
            return
        ends = [self.value(entry, way, found[k]) or length for k in ("low", "high")]
        axis.barh(place, length, height=0.86, color=_colour(way))
        axis.hlines(place, min(ends), max(ends), color="#303030", linewidth=0.7)
        weight = "bold" if is_effc(way) else "normal"
        axis.annotate(
            f"{length:.3g}" if length >= 10 else f"{length:.2f}", (max(length, *ends), place),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5, weight=weight,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # over the line at 1
        )  # fmt: skip

    def _finish(self, axis: Any) -> None:
        if self.log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")  # 2 × 10^0 and the like where there is room
        if self.line is not None:
            axis.axvline(self.line, color="black", linewidth=0.9)
        axis.margins(x=0.1)
        axis.set_title(self.title, fontsize=10)
        axis.set_xlabel(self.label, fontsize=9)
        axis.xaxis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)


class Dots(Panel):
    """One line a case with a dot for every way: for many cases, where bars would fill pages."""

    @property
    def height(self) -> float:
        return ROW * len(self.entries)

    def draw(self, axis: Any) -> None:
        for place, entry in enumerate(self.entries):
            axis.axhline(place, color="#eeeeee", linewidth=0.8, zorder=0)
            for way in self.ways(entry):
                self._dot(axis, entry, way, place)
        axis.set_yticks(range(len(self.entries)), [e["name"] for e in self.entries], fontsize=8.5)
        axis.set_ylim(len(self.entries) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        self._finish(axis)
        axis.set_xlim(left=0)  # last: it ends the scaling that the line at 1 needs

    def _dot(self, axis: Any, entry: Entry, way: str, place: int) -> None:
        length = self.value(entry, way, entry["ways"][way]["ms"])
        if length is not None:
            size, edge = (64, "black") if is_effc(way) else (34, "none")
            axis.scatter(
                length, place, s=size, color=_colour(way), edgecolors=edge, linewidths=0.7,
                zorder=3 if is_effc(way) else 2,
            )  # fmt: skip


def _panels(results: Results) -> list[Panel]:
    entries = [e for e in results.entries if times(e)]
    if results.suite == "compile":
        panel = Panel("first call", "seconds (log scale)", entries, _seconds, None, log=True)
        return [panel] if entries else []
    if results.suite == "perplexity":
        return []
    limit = results.suite in ("kernels", "gpu") and any("bound" in e for e in entries)
    value, label = (
        (_of_limit, f"part of {limit_of(results)}")
        if limit
        else (_speed, "times the speed of float32 eager")
    )
    blocks = dict.fromkeys((e["precision"], e["threads"]) for e in entries)
    same = [[e for e in entries if (e["precision"], e["threads"]) == block] for block in blocks]
    if results.suite == "decode":
        label = "tokens per second (log scale)"
        return [Panel(block_title(es[0]), label, es, _rate, None, log=True) for es in same]
    kind = Dots if limit else Panel
    return [kind(block_title(es[0]), label, es, value, 1.0, base=limit) for es in same]


def _speed(entry: Entry, way: str, ms: float) -> float | None:
    return times(entry)[BASE] / ms if BASE in times(entry) else None


def _of_limit(entry: Entry, way: str, ms: float) -> float | None:
    found = entry["ways"][way]
    return found["fraction"] * found["ms"] / ms if "fraction" in found else None


def _seconds(entry: Entry, way: str, ms: float) -> float:
    return ms / 1e3


def _rate(entry: Entry, way: str, ms: float) -> float:
    return 1e3 / ms


def _title(results: Results) -> str:
    cpu = results.machine.get("cpu", {})
    where = f"{cpu.get('model', '')} ({cpu.get('level', '')})".strip()
    where = results.machine.get("gpu", {}).get("name", where)
    torch = f"torch {results.versions.get('torch', '')}"
    return f"effc bench {results.suite}: {where}, {torch}, {results.date}"
