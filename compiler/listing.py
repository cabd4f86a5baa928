"""What the command line shows of passes, dump folders, graphs and the cache."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from effc.artefact_file import is_artefact
from effc.codegen.store import LAYOUT, cache_dir
from effc.ir import Graph, InputError, OptionError
from effc.passes.base import PASSES, Pass, find_pass, load_plugins
from effc.render import report_parts
from effc.report import Explanation, Report, sized
from effc.show import amount, grid

__all__ = [
    "artefact_parts",
    "cache_table",
    "clear_cache",
    "folder_parts",
    "graph_parts",
    "pass_list",
    "pass_page",
    "read_reports",
]  # fmt: skip


# ------------------------------------------------------------------ passes


def pass_list() -> Iterator[Any]:
    """All passes, with what they promise and take; those of other packages name their package."""
    load_plugins()
    for name, cls in sorted(PASSES.items()):
        options = ",".join(f.name for f in dataclasses.fields(cls))
        head = Text.assemble((name, "bold"), f"{{{options}}}" if options else "")
        head.append(f"  {cls.numerics}", style="dim")
        if origin := _plugin(cls):
            head.append(f"  from {origin}")
        yield head
        yield Padding(Text(_doc(cls).partition("\n")[0]), (0, 0, 0, 4))


def pass_page(name: str) -> Group:
    """One pass: its documentation, options with defaults, needs and gives."""
    cls = find_pass(name)
    head = Text.assemble((name, "bold"), f"  {cls.numerics}")
    if origin := _plugin(cls):
        head.append(f"  from {origin}")
    rows: list[Any] = [head, Text(""), Text(_doc(cls))]
    options = dataclasses.fields(cls)
    if options:
        table = grid("option", "type", "default")
        for f in options:
            required = f.default is dataclasses.MISSING
            table.add_row(f.name, str(f.type), "required" if required else repr(f.default))
        rows += [Text(""), table]
    for word, facts in (("needs", cls.needs), ("gives", cls.gives)):
        if facts:
            rows.append(Text(f"{word}: {', '.join(facts)}"))
    return Group(*rows)


def _doc(cls: type[Pass]) -> str:
    return inspect.getdoc(cls) or cls.name


def _plugin(cls: type[Pass]) -> str:
    package = cls.__module__.partition(".")[0]
    return "" if package == "effc" else package


# ------------------------------------------------------------------ dumps and graphs


def read_reports(path: Path) -> Report | Explanation:
    """The report in a file, artefact or dump folder; all where a model became several graphs."""
    if is_artefact(path):
        from effc.artefact import read_artefact

        return read_artefact(path).report
    if path.is_dir():
        files = [f for f in [path / "report.json", *_parts(path)] if f.exists()]
        if not files:
            raise InputError(f"{path} is no dump: it has no report.json", fix="name a dump folder")
        if len(files) == 1:
            return read_reports(files[0])
        return Explanation(path.name, [Report.read(f.read_text(encoding="utf-8")) for f in files])
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no report", why=str(e)) from e
    several = isinstance(data, dict) and "reports" in data
    return Explanation.read(text) if several else Report.read(text)


def _parts(folder: Path) -> list[Path]:
    """Reports of the graphs of one model, in the order of compilation."""
    found = folder.glob("graph_*/report.json")
    return sorted(found, key=lambda p: [int(n) for n in p.parent.name.split("_")[1:]])


def folder_parts(folder: Path) -> Iterator[Any]:
    """The stages of every report in a dump folder, and its files."""
    found = read_reports(folder)
    for report in found.reports if isinstance(found, Explanation) else [found]:
        yield from _brief_parts(report)
    table = grid("file", "bytes")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        table.add_row(str(path.relative_to(folder)), amount(path.stat().st_size, "B"))
    yield table


def _brief_parts(report: Report) -> Iterator[Any]:
    brief = dataclasses.replace(
        report, launches=[], fallbacks=[], guards=[],
        stages=[dataclasses.replace(s, rules=[]) for s in report.stages],
    )  # fmt: skip
    yield from report_parts(brief)
    yield Text("")


def artefact_parts(path: Path) -> Iterator[Any]:
    """What an artefact was made of and for, its stages, and what is in it. Runs nothing of it."""
    from effc.artefact import read_artefact

    a = read_artefact(path)
    yield from _brief_parts(a.report)
    table = grid("", "")
    table.add_row("written by", f"effc {a.facts['effc']}, torch {a.facts['torch']}")
    machine = a.facts["machine"]
    built = ", ".join(machine.get("targets", ())) or str(machine.get("capability", "any machine"))
    table.add_row("built for", built)
    table.add_row("kernels", str(sum(len(o.functions) for o in a.objects)))
    yield table
    yield Text("")
    table = grid("member", "bytes")
    for name, content in sorted(a.contents.members.items()):
        table.add_row(name, amount(len(content), "B"))
    yield table


def graph_parts(graph: Graph) -> Iterator[Any]:
    """The text of a graph and what it is made of."""
    yield Text(graph.text)
    cost = graph.cost()
    yield Text(
        f"{len(graph.nodes)} nodes; {amount(sized(cost.flops, {}), 'FLOP')}, "
        f"{amount(sized(cost.bytes, {}), 'B')} moved, "
        f"{amount(sum(int(w.of.nbytes) for w in graph.weights), 'B')} of weights"
    )
    table = grid("", "")
    for name, count in Counter(_op_names(graph)).most_common():
        table.add_row(f"{count} ×", name)
    yield Padding(table, (0, 0, 0, 2))


def _op_names(graph: Graph) -> Iterable[str]:
    for node in graph.nodes:
        yield getattr(node, "target", node.name)


# ------------------------------------------------------------------ cache


def cache_table() -> Table:
    folder = cache_dir()
    table = grid("", "")
    table.add_row("folder", str(folder))
    for kind in _kinds(folder):
        files = [p.stat().st_size for p in kind.rglob("*") if p.is_file()]
        table.add_row(kind.name, f"{len(files)} files, {amount(sum(files), 'B')}")
    return table


def clear_cache() -> str:
    """Remove what is built; returns a sentence. Locks and unfinished work of others stay."""
    folder = cache_dir()
    freed = 0
    for kind in _kinds(folder):
        freed += sum(p.stat().st_size for p in kind.rglob("*") if p.is_file())
        trash = folder / LAYOUT / "tmp" / f"clear.{uuid4().hex}"
        try:
            trash.parent.mkdir(exist_ok=True)
            kind.rename(trash)  # at once, so that nobody sees half an entry
        except OSError as e:
            raise OptionError(f"cannot clear {kind}", why=e.strerror) from e
        shutil.rmtree(trash, ignore_errors=True)
    return f"removed {amount(freed, 'B')} from {folder}"


def _kinds(folder: Path) -> list[Path]:
    kinds = sorted(p for p in (folder / LAYOUT).glob("*") if p.is_dir())
    return [p for p in kinds if p.name not in ("locks", "tmp")]
