"""A compilation as a folder that reads as a story: one runnable file a stage, a report, kernels.

    out/000_capture.py  001_fold-batch-norm.py ...   each runs on its own: `python out/001_...py`
    out/report.json     out/index.html               the same report, for programs and for people
    out/kernels/        sources as generated, and plan.txt
    out/weights.safetensors, inputs.safetensors      where asked for; else values are random

Written beside and renamed into place, so there is never half a dump, and only a folder that is
empty or a dump of ours is ever replaced.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from effc.difference import sample_list
from effc.ir import EffcError, Graph, InputError, OptionError, Weight, text
from effc.pipeline import Instrument, Run, Stage
from effc.record import Record

if TYPE_CHECKING:
    from effc.report import Report

__all__ = ["Dump", "check_folder", "stage_source", "write_dump"]

_OURS = re.compile(
    r"\d{3}_[\w.-]+\.py|(report|manifest)\.json|index\.html|(weights|inputs)\.safetensors"
    r"|kernels|graph_[\w]+"
)

_FOOTER = """

if __name__ == "__main__":
    from effc.rerun import main

    main(__file__)
"""


class Dump(Instrument):
    """Writes the dump when the pipeline ends, well or badly; `complete()` adds what came after.

    record: where the pipeline's stages go, with what else is known; a graph that is one of several
    gets a folder of its own inside `folder`. inputs: values to keep, so that files rerun on them.
    weights: keep their values too.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        record: Record | None = None,
        inputs: Sequence[Any] | None = None,
        weights: bool = False,
    ) -> None:
        self.record, self.inputs, self.weights = record, inputs, weights
        self.due = False  # a dump is still to be written
        part = record.part if record is not None else ""
        self.folder = Path(folder) / part if part else Path(folder)

    def start(self, run: Run) -> None:
        check_folder(self.folder)
        if self.record is None:
            self.record = Record("graph", str(run.pipeline))
        self.due = True

    def failed(self, run: Run, error: EffcError) -> None:
        if self.due:
            run.stages = [s for s in run.stages if _printable(s)]
            self._write(run, error)

    def finish(self, run: Run) -> None:
        self._write(run, None)

    def complete(self) -> None:
        """Write again, with the kernels, plan and times that the record has by now."""
        assert self.record is not None
        write_dump(self.folder, self.record, inputs=self.inputs, weights=self.weights)

    def _write(self, run: Run, error: EffcError | None) -> None:
        assert self.record is not None
        self.due = False
        self.record.stages = run.stages
        inputs = self.inputs if self.inputs is not None else run.sample_inputs
        write_dump(self.folder, self.record, inputs=inputs, weights=self.weights, error=error)


def write_dump(
    folder: str | os.PathLike[str],
    record: Record,
    *,
    inputs: Sequence[Any] | None = None,
    weights: bool = False,
    error: EffcError | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a record as a dump; returns the folder. Raises OptionError where it cannot.

    inputs, weights: values to keep. error: why the compilation stopped. files: more to write.
    """
    from effc.page import page
    from effc.report import Report

    report = record.report() if error is None else Report.of(record, error)
    with _as_option_error(folder), _replacing(check_folder(folder)) as new:
        names = [_file_name(s) for s in record.stages]
        for stage, name in zip(record.stages, names):
            _put(new / name, stage_source(stage))
        _put(new / "report.json", report.json())
        _put(new / "index.html", page(_held(report, record.stages), record.stages, names))
        for name, content in (files or {}).items():
            _put(new / name, content)
        if inputs is not None and record.stages:
            _save(new / "inputs.safetensors", _named(record.stages[0].graph, inputs))
        if weights:
            _save(new / "weights.safetensors", _weights(s.graph for s in record.stages))
        _kernels(new / "kernels", record.executable)
    return Path(folder)


def _held(report: Report, stages: Sequence[Stage]) -> Report:
    """The report without rows for stages whose graphs are not at hand: an artefact has two."""
    indices = {s.index for s in stages}
    return replace(report, stages=[row for row in report.stages if row.index in indices])


def stage_source(stage: Stage) -> str:
    """The stage as a Python file that runs by itself."""
    rows = [f"# {stage.header()}", f"# {stage.title}"]
    if stage.numerics is not None:
        rows.append(f"# numerics: {stage.numerics}")
    rows += [f"# {n}" for n in (stage.violation, stage.why_unchanged, *stage.notes) if n]
    head = "\n".join(line for row in rows for line in row.replace("\n", "\n# ").splitlines())
    return f"{head}\nfrom __future__ import annotations\n\n\n{text(stage.graph)}{_FOOTER}"


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, if a dump can be written there. Raises OptionError; changes nothing."""
    path = Path(folder).resolve()
    cannot = f"cannot write a dump to {folder}"
    if path.exists():
        if not path.is_dir():
            raise OptionError(cannot, why="it is a file", fix="name a folder")
        foreign = sorted(n for n in os.listdir(path) if not _OURS.fullmatch(n))
        if foreign:
            raise OptionError(
                cannot, why=f"it holds files that are not of a dump: {', '.join(foreign[:3])}",
                fix="name an empty or a new folder",
            )  # fmt: skip
    parent = next(p for p in path.parents if p.exists())
    for place in (parent, path) if path.exists() else (parent,):
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise OptionError(
                cannot, why=f"{place} is not writable", fix="name a folder that you can write to"
            )
    return path


@contextmanager
def _as_option_error(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OptionError(
            f"cannot write a dump to {folder}", why=e.strerror or str(e), fix="free or name a place"
        ) from e


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid4().hex}")
    old = new.with_name(f"{new.name}.old")
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _put(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _file_name(stage: Stage) -> str:
    return f"{stage.index:03d}_{stage.name.partition('{')[0]}.py"


def _printable(stage: Stage) -> bool:
    """False for the invalid graph that a failed verification is about."""
    try:
        return bool(stage.text)
    except (KeyError, TypeError, ValueError):
        return False


def _named(graph: Graph, inputs: Sequence[Any]) -> dict[str, Any]:
    sample = sample_list(inputs)[0]
    if len(sample) != len(graph.inputs):
        raise InputError(f"{graph.name} takes {len(graph.inputs)} inputs, got {len(sample)}")
    return {node.key: value for node, value in zip(graph.inputs, sample)}


def _weights(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Values by digest: a weight that several stages share is stored once."""
    found: dict[str, Any] = {}
    for graph in graphs:
        for node in graph.nodes:
            if isinstance(node, Weight) and node.data is not None:
                found.setdefault(node.content, node.data)
            found.update(_weights(node.regions))
    return found


def _save(path: Path, values: Mapping[str, Any]) -> None:
    """Tensors and numbers as safetensors; element types that format lacks are left out."""
    tensors = {k: torch.as_tensor(v).detach().cpu().contiguous().clone() for k, v in values.items()}
    save_file({k: t for k, t in tensors.items() if t.dtype in _STORED}, path)


_STORED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def _kernels(folder: Path, executable: Any) -> None:
    kernels: Mapping[str, str] = getattr(executable, "kernels", {})
    plan = str(getattr(executable, "text", ""))
    if kernels or plan:
        folder.mkdir()
        _put(folder / "plan.txt", plan)
    for name, source in kernels.items():
        stem = re.sub(r"[^\w.-]", "_", name)
        _put(folder / (stem if "." in stem else f"{stem}{_suffix(source)}"), source)


def _suffix(source: str) -> str:
    if "@triton" in source:
        return ".py"
    return ".cu" if "__global__" in source else ".cpp"
