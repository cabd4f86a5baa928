"""A decoder as one file: `decoder.save("model.effc")` and `effc.load`.

Beside the members of every artefact, of which `graph.py` is the graph over new tokens with its
states, there are for each plan, such as decode{batch=1}:

    graph_0_decode_batch_1.py       the graph after the last pass
    capture_0_decode_batch_1.py     that it was planned from, sizes known
    report_0_decode_batch_1.json    what effc.explain shows

All read the same weights. What was never asked for before saving is planned when it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from effc import __version__
from effc.artefact_file import work_folder, write_file
from effc.artefact_tensors import write_tensors
from effc.backends import Backend, Object
from effc.backends.base import check_shared
from effc.calling import Source
from effc.incremental import VARIANTS, Compiled, Incremental, Variant
from effc.ir import ArtefactError, Graph, symbol, text
from effc.options import Options
from effc.record import Guard, Record
from effc.report import Report
from effc.stage import Stage

if TYPE_CHECKING:
    from effc.artefact import Artefact
    from effc.decoding import Decoder

__all__ = ["KIND", "load_decoder", "save_decoder"]

KIND = "decoder"
FORMS = ("", "_padded")  # what tells the members of a graph that is told of padding

# ------------------------------------------------------------------ saving


def save_decoder(decoder: Decoder, path: str | os.PathLike[str]) -> None:
    """Raises ArtefactError for what cannot be saved, and where `path` cannot be written."""
    objects: dict[str, Object] = {}
    members: dict[str, bytes | Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for form, graph in zip(FORMS, decoder.graphs):
        members[f"graph{form}.py"] = text(graph.graph).encode()
        members[f"capture{form}.py"] = graph.text().encode()
        plans = {}
        for compiled in graph.compiled.values():
            part = _part(form, compiled.which)
            plans[str(compiled.which)] = _plan(part, compiled, members, objects)
            _take(tensors, graph, compiled.record.stages[-1].graph)
        _take(tensors, graph, graph.graph)
        rows.append(_row(graph, plans))
    whole = decoder.graph
    plain = SimpleNamespace(launches=(), fallbacks=(), memory=None, kernels={}, text="")
    target = whole.options.target
    record = Record(decoder.name, whole.pipeline, target, whole.stages, plain, guards=whole.guards)
    module: dict[str, Any] = {
        "kind": KIND, "eos": list(decoder.eos), "graphs": rows,
        "precision": whole.options.float32_matmul_precision, "passes": whole.options.pipeline,
        "objects": [o.row for o in objects.values()],
    }  # fmt: skip
    machines = [c.record.executable.machine for g in decoder.graphs for c in g.compiled.values()]
    facts = {
        "kind": KIND, "name": decoder.name, "target": target, "pipeline": whole.pipeline,
        "effc": __version__, "torch": torch.__version__, "machine": machines[0],
    }  # fmt: skip
    with work_folder(path) as folder:
        values = folder / "weights.safetensors"
        module["tensors"] = write_tensors(values, tensors)
        members |= {
            "module.json": json.dumps(module, indent=1, allow_nan=False).encode(),
            "report.json": record.report().json().encode(),
            "kernels/plan.txt": _plans(decoder).encode(),
            "weights.safetensors": values,
        }
        for o in objects.values():
            members |= {f"kernels/{name}": data for name, data in o.files.items()}
        write_file(folder, path, facts, members)


def _part(form: str, variant: Variant) -> str:
    """The end of the names of a plan's members."""
    return f"{form}_{re.sub(r'[^a-z0-9]+', '_', str(variant)).strip('_')}"


def _row(graph: Incremental, plans: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "batch": str(graph.batch), "size": str(graph.size), "longest": graph.longest,
        "guards": [[g.expr, g.where] for g in graph.guards],
        "weights": [w.name for w in graph.weights], "plans": dict(plans),
    }  # fmt: skip


def _plan(
    part: str, compiled: Compiled, members: dict[str, bytes | Path], objects: dict[str, Object]
) -> dict[str, Any]:
    """Put a plan among the members, and its kernels among the objects."""
    record = compiled.record
    stages, executable = record.stages, record.executable
    planned = next((s for s in stages if s.name.startswith("specialise ")), stages[0])
    members[f"graph{part}.py"] = text(stages[-1].graph).encode()
    members[f"capture{part}.py"] = text(planned.graph).encode()
    members[f"report{part}.json"] = record.report().json().encode()
    names = []
    for o in executable.objects:
        if objects.get(o.name, o) != o:  # another plan's of the same name
            o = replace(o, name=f"{part.strip('_')}.{o.name}")
        objects[o.name] = o
        names.append(o.name)
    return {"objects": names, "native": executable.native, "machine": executable.machine}


def _take(tensors: dict[str, torch.Tensor], graph: Incremental, read: Graph) -> None:
    """The tensors behind the weights that a graph reads."""
    from effc.artefact import weights_of

    live = {w.name: w.tensor for w in graph.weights}
    check_shared(weights_of(read), {name: t for name, t in live.items() if t is not None})
    for w in weights_of(read):
        t = live.get(w.key)
        t = w.data if t is None else t
        if t is None:
            raise ArtefactError(f"weight {w.key!r} has no values to save")
        if tensors.setdefault(w.key, t) is not t:
            raise ArtefactError(
                f"two graphs of the decoder have a weight {w.key!r} each",
                why="its recipe made other values of it for prompts of different lengths",
            )


def _plans(decoder: Decoder) -> str:
    every = (c for g in decoder.graphs for c in g.compiled.values())
    return "\n".join(f"# {c.name}\n{c.record.executable.text}" for c in every)


# ------------------------------------------------------------------ loading


def load_decoder(a: Artefact, backend: Backend, rebuild: bool) -> Decoder:
    """What `save_decoder` wrote. Raises ArtefactError naming what is wrong with it."""
    from effc.decoding import Decoder

    def read() -> Decoder:
        graphs = [_graph(a, backend, rebuild, f, row) for f, row in zip(FORMS, a.module["graphs"])]
        padded = (lambda: graphs[1]) if len(graphs) > 1 else None
        eos = [int(token) for token in a.module["eos"]]
        return Decoder(a.facts["name"], graphs[0], padded, eos)

    return a.reading("decoder", read)


def _graph(
    a: Artefact, backend: Backend, rebuild: bool, form: str, row: Mapping[str, Any]
) -> Incremental:
    pipeline, longest = a.facts["pipeline"], row["longest"]
    view = _view(a, {"graph.py": f"graph{form}.py", "capture.py": f"capture{form}.py"})
    stages = [
        Stage(0, "capture", "the model as captured", view.graph("capture.py")),
        Stage(1, pipeline, "before it was saved", view.graph("graph.py"), changed=True),
    ]
    a.check_weights(stages[-1].graph)
    options = Options.of({
        "target": backend.name, "pipeline": str(a.module["passes"]),
        "float32_matmul_precision": a.module["precision"],
    })  # fmt: skip
    ready = {
        VARIANTS[name]: partial(_record, a, backend, rebuild, _part(form, VARIANTS[name]), plan)
        for name, plan in row["plans"].items()
    }
    weights = [Source(str(name), None, a.tensors[name]) for name in row["weights"]
               if name in a.tensors]  # fmt: skip
    batch, size = symbol(str(row["batch"])), symbol(str(row["size"]))
    if strange := {batch, size} - stages[-1].graph.all_symbols:
        raise ValueError(f"{strange.pop()} is no size of the graph")
    longest = None if longest is None else int(longest)
    return Incremental(
        a.facts["name"], options, pipeline, stages, batch, size, longest, weights,
        [Guard(str(expr), str(where)) for expr, where in row["guards"]], ready=ready,
    )  # fmt: skip


def _record(
    a: Artefact, backend: Backend, rebuild: bool, part: str, plan: Mapping[str, Any]
) -> Record:
    """One plan, with its kernels."""
    from effc.artefact import executable_of

    names = {"graph.py": f"graph{part}.py", "capture.py": f"capture{part}.py"}
    view = _view(a, names, plan["machine"], set(plan["objects"]))
    module = {**a.module, "native": plan["native"]}
    report = Report.read(a.contents.members[f"report{part}.json"].decode())
    view = replace(view, module=module, report=report)
    a.check_weights(view.stages[-1].graph)
    executable = executable_of(view, backend, rebuild)
    record = view.record(executable)
    record.rebuilt = rebuild
    return record


def _view(
    a: Artefact, names: Mapping[str, str], machine: Mapping[str, Any] | None = None,
    objects: set[str] | None = None,
) -> Artefact:  # fmt: skip
    """The artefact with other members under the names of its own."""
    members = {**a.contents.members, **{k: a.contents.members[v] for k, v in names.items()}}
    facts = {**a.facts, "machine": machine or a.facts["machine"]}
    view = replace(a, contents=replace(a.contents, facts=facts, members=members))
    view.__dict__["tensors"] = a.tensors  # read once
    if objects is None:
        return view
    view = replace(view, objects=tuple(o for o in a.objects if o.name in objects))
    view.__dict__["tensors"] = a.tensors
    return view
