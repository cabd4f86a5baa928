"""`compiled.save("model.effc")` and `effc.load`: a compiled model as one file, without pickle.

    manifest.json         versions, the machine it was built on, hashes (artefact_file)
    graph.py              the graph after the last pass; capture.py as it was captured
    weights.safetensors   values; module.json says how they lie in memory and how a call maps on
    module.json           the graph: arguments, results, what is written back
    report.json           what `effc.explain` shows
    kernels/              plan.txt, and each translation unit as source and object; of a GPU's
                          kernels the Python, PTX or AMD's assembly, and binary for each target

Loading plans the graph again, which gives the same plan, and takes its kernels from the objects;
the plan is made as on the machine that built them. So neither the model's code nor a compiler is
needed. Nothing of the file is executed but the objects, once every hash holds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import nn

from effc import __version__
from effc.artefact_decoder import KIND, load_decoder
from effc.artefact_file import BINARY, Contents, read_file, work_folder, write_file
from effc.artefact_spec import read_spec, write_spec
from effc.artefact_tensors import read_tensors, write_tensors
from effc.backends import Backend, Executable, Object, find_backend
from effc.backends.base import check_shared
from effc.calling import Calling
from effc.collector import collector_paused
from effc.compiled import CompiledGraph
from effc.ir import (
    ArtefactError,
    EffcError,
    Graph,
    InputError,
    Number,
    Op,
    Origin,
    Weight,
    parse,
    text,
)
from effc.module import Ahead, CompiledModule
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline
from effc.record import Record
from effc.report import Report
from effc.stage import Stage

__all__ = ["Artefact", "build", "load", "read_artefact", "save"]

if TYPE_CHECKING:
    from effc.decoding import Decoder

T = TypeVar("T")
AHEAD = "compile it whole: effc.compile(model, example_inputs=(...)).save(path)"
ELSEWHERE = "load it on a machine with such a device"
REBUILD = "build its kernels for this machine: effc.load(path, rebuild=True)"

# ------------------------------------------------------------------ saving


def save(compiled: nn.Module | Decoder, path: str | os.PathLike[str]) -> None:
    """Write what effc.compile (with example_inputs), effc.decoder or effc.load returned to a file.

    Raises ArtefactError for what cannot be saved, with the reason, and where `path` cannot be
    written; a file that was there before stays as it was.
    """
    from effc.decoding import Decoder  # which others do without

    if isinstance(compiled, Decoder):
        compiled.save(path)
        return
    ahead, run = _whole(compiled)
    record = run.record
    graph, executable = record.stages[-1].graph, record.executable
    tensors = _tensors(run.calling, graph)
    objects = executable.objects
    module = {
        "in_spec": write_spec(ahead.in_spec, "takes"),
        "out_spec": write_spec(ahead.out_spec, "returns"),
        "keywords": ahead.names,
        "calling": run.calling.data(),
        "weights": [w.key for w in weights_of(graph)],
        "native": executable.native,
        "objects": [o.row for o in objects],
    }
    with work_folder(path) as folder:
        values = folder / "weights.safetensors"
        module["tensors"] = write_tensors(values, tensors)
        members = {**_members(record, module, objects), "weights.safetensors": values}
        write_file(folder, path, _facts(record), members)


def _facts(record: Record) -> dict[str, Any]:
    return {
        "name": record.name, "target": record.target, "pipeline": record.pipeline,
        "effc": __version__, "torch": torch.__version__,
        "machine": record.executable.machine,
    }  # fmt: skip


def _members(
    record: Record, module: Mapping[str, Any], objects: Sequence[Object]
) -> dict[str, bytes | Path]:
    """Everything of a compiled graph but its weights' values."""
    return {
        "graph.py": text(record.stages[-1].graph).encode(),
        "capture.py": text(record.stages[0].graph).encode(),
        "module.json": json.dumps(module, indent=1, allow_nan=False).encode(),
        "report.json": record.report().json().encode(),
        "kernels/plan.txt": record.executable.text.encode(),
        **{f"kernels/{name}": data for o in objects for name, data in o.files.items()},
    }


def build(
    path: str | os.PathLike[str], targets: Sequence[str], out: str | os.PathLike[str]
) -> None:
    """Write a saved model anew for GPUs that need not be here: its plan, and for each target every
    kernel's binary, so that loading it there compiles nothing.

    path: what .save() of a model compiled for any target wrote; compiled for `cuda` or `cuda-host`
    it gets CUDA C++ kernels as that target does, else Triton's alone. targets: "cuda:sm_90",
    "hip:gfx942". Raises ArtefactError for what cannot be read or written, OptionError for an
    unknown target, UnsupportedError where Triton is not installed.
    """
    from effc.backends.gpu.backend import GpuBackend  # which loading for the CPU does without
    from effc.codegen.triton.compile import target

    a = read_artefact(path)
    if a.facts.get("kind") == KIND:
        a.refuse("it is a decoder, whose plans depend on the device", "compile it there")
    backend = find_backend("cuda" if a.facts["target"] in ("cuda", "cuda-host") else "triton")
    assert isinstance(backend, GpuBackend)
    chosen = [target(t) for t in dict.fromkeys(targets)]
    captured = a.stages[0].graph
    pipeline = Pipeline.parse(a.facts["pipeline"])
    stages = run_pipeline(captured, pipeline, supports=backend.supports, rates=backend.rates)
    precision = a.facts["machine"].get("float32_matmul_precision")
    told = {"captured": captured, "float32_matmul_precision": precision}
    graph = stages[-1].graph
    executable = backend.cross_compile(graph, chosen, told)
    for weight in weights_of(graph):
        if weight.key not in a.tensors:
            a.refuse(f"it has no values of weight {weight.key!r}", "save the model again")
    record = Record(
        a.facts["name"], a.facts["pipeline"], backend.name, stages, executable,
        sizes=a.report.sizes,
    )  # fmt: skip
    module = {
        **a.module, "weights": [w.key for w in weights_of(graph)], "native": executable.native,
        "objects": [o.row for o in executable.objects],
    }  # fmt: skip
    values = a.contents.members["weights.safetensors"]
    members = {**_members(record, module, executable.objects), "weights.safetensors": values}
    with work_folder(out) as folder:
        write_file(folder, out, _facts(record), members)


def _whole(compiled: Any) -> tuple[Ahead, CompiledGraph]:
    """The one graph behind a compiled module. Raises ArtefactError where there is none."""
    name = type(getattr(compiled, "module", compiled)).__name__
    if not isinstance(compiled, CompiledModule):
        why = "torch.compile compiles a model piece by piece, at the calls it sees"
        if not hasattr(compiled, "_orig_mod"):
            why = "it is not what effc.compile or effc.load returned"
        raise ArtefactError(f"{type(compiled).__name__} cannot be saved", why=why, fix=AHEAD)
    ahead = compiled._ahead
    if ahead is None:
        why = "it was compiled without example_inputs: the first call compiles it, piece by piece"
        raise ArtefactError(f"{name} cannot be saved", why=why, fix=AHEAD)
    if not isinstance(ahead.run, CompiledGraph):
        why = f"PyTorch runs it as a whole, {ahead.record.refusal}"
        raise ArtefactError(f"{name} cannot be saved", why=why)
    return ahead, ahead.run


def weights_of(graph: Graph) -> Iterator[Weight]:
    """Every weight of a graph, by name once; regions included."""
    found: dict[str, Weight] = {}
    stack = [graph]
    while stack:
        for node in stack.pop().nodes:
            if isinstance(node, Weight):
                found.setdefault(node.key, node)
            stack += node.regions
    yield from found.values()


def _tensors(calling: Calling, graph: Graph) -> dict[str, torch.Tensor]:
    """The live tensors by name: weights that the last graph still reads, and the module's state."""
    live = {w.name: w.tensor for w in calling.weights}
    check_shared(weights_of(graph), {name: t for name, t in live.items() if t is not None})
    found = {w.key: live.get(w.key, w.data) for w in weights_of(graph)}
    found.update((s.name, s.tensor) for s in calling.owned)
    for name, t in found.items():
        if t is None:
            raise ArtefactError(f"weight {name!r} has no values to save")
    return found  # type: ignore[return-value]


# ------------------------------------------------------------------ what is in a file


@dataclass(frozen=True)
class Artefact:
    """A file with all hashes checked, taken apart; nothing of it has run."""

    path: Path
    contents: Contents
    module: Mapping[str, Any]
    report: Report
    objects: tuple[Object, ...]
    device: str = "cpu"  # where its tensors are put

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.contents.facts

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        data = self.contents.members["weights.safetensors"]
        return self.reading(
            "weights", lambda: read_tensors(data, self.module["tensors"], self.device)
        )

    @cached_property
    def stages(self) -> list[Stage]:
        """The capture, and the graph after the last pass."""
        rows = self.report.stages
        last = self.graph("graph.py")
        if len(rows) < 2:
            return [Stage(0, "capture", "as captured", last)]
        made = Stage(rows[-1].index, rows[-1].name, rows[-1].title, last, changed=True)
        return [Stage(0, rows[0].name, rows[0].title, self.graph("capture.py")), made]

    def graph(self, member: str) -> Graph:
        data = self.contents.members[member]
        return self.reading(member, lambda: _parsed(data.decode(), self.tensors))

    def check_weights(self, graph: Graph) -> None:
        """Refuses a file whose tensors are not those of the graph's weights."""
        for weight in weights_of(graph):
            t = self.tensors.get(weight.key)
            if t is None or (tuple(t.shape), t.dtype) != weight.of.stored:
                why = f"its values of weight {weight.key!r} are not {weight.of}"
                self.refuse(why, "save it again")

    def record(self, executable: Any) -> LoadedRecord:
        return LoadedRecord(
            self.facts["name"], self.facts["pipeline"], self.facts["target"], self.stages,
            executable, saved=self.report,
        )  # fmt: skip

    def dump(self, folder: str | os.PathLike[str]) -> Path:
        """Write it as a dump folder; returns the folder. Raises OptionError where it cannot."""
        from effc.dump import write_dump

        kernels = {o.name: o.source for o in self.objects if not o.target}
        for o in self.objects:
            texts = [n for n in o.files if not n.endswith(BINARY)] if o.target else []
            kernels |= {n: o.files[n].decode() for n in texts}
        plan = self.contents.members["kernels/plan.txt"].decode()
        record = self.record(SimpleNamespace(kernels=kernels, text=plan))
        files = {"manifest.json": self.contents.manifest}
        return write_dump(folder, record, weights=True, files=files)

    def reading(self, what: str, read: Callable[[], T]) -> T:
        """read(), with what is wrong with the file as the one error it raises."""
        try:
            return read()
        except ArtefactError:
            raise
        except _MISREAD as e:
            self.refuse(f"its {what} cannot be read: {_sentence(e)}", "save the model again")

    def refuse(self, why: str, fix: str) -> NoReturn:
        raise ArtefactError(f"{self.path.name} cannot be loaded", why=why, fix=fix)


def _parsed(source: str, tensors: Mapping[str, torch.Tensor]) -> Graph:
    """The graph of a text, with the origins that stand at the ends of its lines."""
    graph = parse(source, tensors)
    lines = (line for line in source.splitlines() if not _FRAME.match(line))
    for node, line in zip(_in_print_order(graph), lines):
        where = line.rpartition("  # ")
        if where[1] and not _SIZE.fullmatch(where[2]):
            node.at(Origin(source=where[2]))
    return graph


_SIZE = re.compile(r"[\d.]+ bits an element")  # a remark on a type, not an origin
_FRAME = re.compile(r"\s*(def |return\b|#|$)")  # lines of a graph's text that are no node's


def _in_print_order(graph: Graph) -> Iterator[Op]:
    for node in graph.nodes:
        for body in node.regions:
            yield from _in_print_order(body)
        yield node


# what reading text, JSON and tensors that somebody else wrote may raise
_MISREAD = (
    EffcError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
    RecursionError,
)  # fmt: skip


def _sentence(e: BaseException) -> str:
    return e.what if isinstance(e, EffcError) else str(e) or type(e).__name__


@dataclass
class LoadedRecord(Record):
    """A compilation that another process did. Its report is the one that was saved with it."""

    saved: Report | None = None
    rebuilt: bool = False  # with this machine's kernels, which may be others

    def report(self) -> Report:
        assert self.saved is not None
        if not self.rebuilt:
            return self.saved
        own = Report.of(Record(self.name, stages=self.stages, executable=self.executable))
        return replace(
            self.saved, launches=own.launches, fallbacks=own.fallbacks, memory=own.memory
        )


def read_artefact(path: str | os.PathLike[str]) -> Artefact:
    """A file, checked and taken apart. Raises ArtefactError naming what is wrong with it."""
    contents = read_file(path)
    needed = {"graph.py", "capture.py", "module.json", "report.json", "kernels/plan.txt"}
    missing = needed | {"weights.safetensors"} - contents.members.keys()
    missing -= contents.members.keys()
    if missing:
        raise ArtefactError(f"{Path(path).name} has no {min(missing)}", fix="save the model again")
    bare = Artefact(Path(path), contents, {}, Report(""), ())
    return bare.reading("description", lambda: _taken_apart(bare))


def _taken_apart(bare: Artefact) -> Artefact:
    members = bare.contents.members
    module = json.loads(members["module.json"])
    files = {name.removeprefix("kernels/"): data for name, data in members.items()}
    objects = tuple(Object.read(row, files) for row in module["objects"])
    for fact in ("name", "target", "pipeline", "effc", "torch"):
        if not isinstance(bare.facts[fact], str):
            raise ValueError(f"{fact} is no text")
    if not isinstance(bare.facts["machine"], dict):
        raise ValueError("machine is no table")
    report = Report.read(members["report.json"].decode())
    return replace(bare, module=module, report=report, objects=objects)


# ------------------------------------------------------------------ loading


@collector_paused()
def load(path: str | os.PathLike[str], rebuild: bool = False) -> Any:
    """What was saved to a file: a module that is called as the model was, or a decoder.

    rebuild: build its kernels anew, for this machine, with the compiler found here.

    Raises ArtefactError for a file that is damaged, foreign, or was built for another machine, and
    BuildError where kernels cannot be built. Objects in the file are native code and run in this
    process, so load files only from where you would install a package from.
    """
    a = read_artefact(path)
    backend = _backend(a, rebuild)
    a = replace(a, device=backend.device)
    if a.facts.get("kind") == KIND:
        return load_decoder(a, backend, rebuild)
    executable = executable_of(a, backend, rebuild)
    record = a.record(executable)
    record.rebuilt = rebuild
    graph = record.stages[-1].graph
    a.check_weights(graph)
    reals = frozenset(
        i.key for i in graph.inputs if isinstance(i.of, Number) and not i.of.integer
    )  # fmt: skip
    m = a.module
    calling = a.reading(
        "calling", lambda: Calling.read(m["calling"], a.tensors, m["weights"], reals)
    )
    ahead = a.reading(
        "calling",
        lambda: Ahead(
            CompiledGraph(calling, graph, record, _overlapping), record,
            read_spec(m["in_spec"]), read_spec(m["out_spec"]), [str(k) for k in m["keywords"]],
        ),
    )  # fmt: skip
    return CompiledModule(_module(record.name, a.tensors), ahead, None)


def _backend(a: Artefact, rebuild: bool) -> Backend:
    """What runs it. Refuses a machine that its code is not for."""
    try:
        backend = find_backend(a.facts["target"])
    except EffcError as e:
        a.refuse(e.what, e.fix or "install the package that has it")
    if not rebuild and not (answer := backend.runs(a.facts["machine"])):
        a.refuse(str(answer), REBUILD if backend.machine() else ELSEWHERE)
    return backend


def executable_of(a: Artefact, backend: Backend, rebuild: bool) -> Executable:
    captured, graph = a.stages[0].graph, a.stages[-1].graph
    if rebuild:
        return _rebuilt(a, backend, graph, captured)
    options = {"captured": captured, "kernels": bool(a.module["native"])}
    try:
        return backend.load(graph, a.objects, a.facts["machine"], options)
    except EffcError as e:
        why = f"{e.what} ({e.why})" if e.why else e.what
        raise ArtefactError(f"{a.path.name} cannot be loaded", why=why, fix=REBUILD) from e


def _rebuilt(a: Artefact, backend: Backend, graph: Graph, captured: Graph) -> Executable:
    precision = a.facts["machine"].get("float32_matmul_precision")
    made = backend.compile(graph, {"captured": captured, "float32_matmul_precision": precision})
    if not made.native:
        why = next((str(reason) for _, reason in made.fallbacks), "no kernel can be built here")
        raise ArtefactError(
            f"the kernels of {a.path.name} cannot be rebuilt", why=why,
            fix="effc doctor names what is missing",
        )  # fmt: skip
    return made


def _overlapping(*arguments: Any) -> Any:
    raise InputError(
        "an argument that the model writes into shares memory with another argument",
        why="PyTorch would run such a call, and an artefact has not the model's code",
        fix="clone one of the two",
    )


class SavedModel(nn.Module):
    """The tensors of a loaded model, under the names they had in it."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ArtefactError(
            f"{type(self).__name__} was loaded from an artefact and cannot compute gradients",
            why="an artefact holds a graph for inference, not the model's code",
            fix="call it in eval mode, under torch.no_grad(); train the model it was made of",
        )


def _module(name: str, tensors: Mapping[str, torch.Tensor]) -> SavedModel:
    # a class of its own, so that it prints and explains itself under the model's name
    root: SavedModel = type(name, (SavedModel,), {})()
    for key, t in tensors.items():
        *path, leaf = key.split(".")
        place: nn.Module = root
        for part in path:
            if part not in place._modules:
                part = _free(place, part)
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        if isinstance(t, nn.Parameter):
            place.register_parameter(_free(place, leaf), t)
        else:
            place.register_buffer(_free(place, leaf), t)
    return root.eval()


def _free(module: nn.Module, name: str) -> str:
    """The name, or one like it that no attribute of a module has."""
    while not name or hasattr(module, name):
        name += "_"
    return name
