"""A model's plan on GPUs that need not be here: kernels, what compilers say of them, a roofline.

    print(effc.explain(compiled, target="cuda:sm_90"))       # or hip:gfx942, or a device: h100

Times are estimates: the least that a device's peak and bandwidth allow, which no kernel reaches.
They are called so wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effc import plain
from effc.backends.base import Options
from effc.backends.cuda.lowering import CUDA
from effc.backends.gpu import GPU
from effc.backends.gpu.backend import model_of
from effc.backends.plan.plan import Plan
from effc.backends.plan.planner import make_plan
from effc.backends.plan.steps import HostCall, KernelCall
from effc.codegen.gpu import DEVICES, Device, estimate, occupancy, resources
from effc.codegen.gpu.compile import compile_kernels
from effc.codegen.triton.compile import Target, target
from effc.ir import Graph, InputError, Op, OptionError, nearest
from effc.ir.op import Cost
from effc.ir.symbols import product
from effc.ir.types import Tensor
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline
from effc.report import sized
from effc.stage import Stage

__all__ = [
    "GpuExplanation", "GpuReport", "explain_graph", "explain_records", "explain_saved", "gpu_plan",
    "gpu_stages",
]  # fmt: skip

VERSION = 1  # of the JSON form
WITH_CUDA = ("cuda", "cuda-host")  # targets whose plans have CUDA C++ kernels
PRECISION = "float32_matmul_precision"  # among the facts of the machine that a plan was made for


@dataclass(frozen=True)
class EstimateRow:
    """Of all launches of a kernel in one forward. bound: "products" or "memory"."""

    device: str
    seconds: float
    bound: str


@dataclass(frozen=True)
class KernelRow:
    """A kernel of the plan. launches: in one forward; flops and bytes are of all of them, as text
    where sizes are symbols. registers: of a thread; shared: bytes of a block; tensor: tensor-core
    instructions in its text. occupancy: share of a unit's warps, and `limit` what keeps it there.
    """

    kernel: str
    launches: int
    registers: int
    spills: int
    shared: int
    tensor: int
    flops: float | str
    bytes: float | str
    nodes: list[str]
    occupancy: float | None = None
    limit: str = ""
    estimates: list[EstimateRow] = field(default_factory=list)


@dataclass(frozen=True)
class GpuReport:
    """One graph on one target. hosted: routines of torch's own between the launches, by name."""

    name: str
    target: str
    launches: int
    kernels: list[KernelRow]
    hosted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuExplanation:
    """What GPUs would run for a model. `json()` is stable within a VERSION; `str()` for people."""

    name: str
    reports: list[GpuReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: int = VERSION

    def json(self) -> str:
        return plain.write(self)

    @staticmethod
    def read(text: str) -> GpuExplanation:
        return plain.read(text, GpuExplanation, VERSION)

    def __str__(self) -> str:
        from effc.show import as_text

        return as_text(gpu_parts(self))

    def __rich_console__(self, *_: object) -> Iterable[Any]:
        yield from gpu_parts(self)


# ------------------------------------------------------------------ plans


def gpu_stages(captured: Graph, pipeline: str) -> list[Stage]:
    """The captured graph through the passes of a pipeline, asked what GPUs have kernels for."""
    return run_pipeline(captured, Pipeline.parse(pipeline), supports=GPU.claim, rates=GPU.rates)


def gpu_plan(
    graph: Graph, captured: Graph | None = None, precision: str | None = None,
    to: Target | None = None, cuda: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a graph after its passes. Reads no weights.

    to: the kind of GPU that schedules are for; None: what fits all of them. cuda: with the kernels
    of target `cuda`.
    """
    options = Options(captured=captured, float32_matmul_precision=precision)
    lowerings = CUDA if cuda else GPU
    return make_plan(graph, options, lowerings if to is None else lowerings.on(model_of(to)))


# ------------------------------------------------------------------ what is explained


def explain_records(name: str, records: Sequence[Any], targets: Sequence[str]) -> GpuExplanation:
    """The GPU plans of compiled graphs. Raises what `explain_graph` raises."""
    reports, notes = [], []
    for record in records:
        if not record.stages:
            why = getattr(record.refusal, "reason", "it was not compiled")
            notes.append(f"{record.name} runs in PyTorch as a whole: {why}")
            continue
        precision = getattr(record.executable, "machine", {}).get(PRECISION)
        captured = record.stages[0].graph
        reports += explain_graph(
            record.name, captured, targets, pipeline=record.pipeline, precision=precision,
            sizes=record.sizes, cuda=record.target in WITH_CUDA,
        )  # fmt: skip
    return GpuExplanation(name, reports, notes)


def explain_saved(path: Path, targets: Sequence[str]) -> GpuExplanation:
    """The GPU plans of what a saved model, a dump folder or a graph in text form holds."""
    from effc.artefact_file import is_artefact

    if path.is_file() and is_artefact(path):
        from effc.artefact import read_artefact

        a = read_artefact(path)
        precision = a.facts["machine"].get(PRECISION)
        reports = explain_graph(
            a.facts["name"], a.stages[0].graph, targets, pipeline=a.facts["pipeline"],
            precision=precision, sizes=a.report.sizes, cuda=a.facts["target"] in WITH_CUDA,
        )  # fmt: skip
        return GpuExplanation(a.facts["name"], reports)
    found = [p.parent for p in sorted(path.rglob("000_*.py"))] if path.is_dir() else [path]
    if not found:
        raise InputError(
            f"{path} is no dump: it has no 000_capture.py", fix="name a dump folder, a saved model "
            "or a graph in text form",
        )  # fmt: skip
    reports = [r for each in found for r in _explain_text(each, targets)]
    return GpuExplanation(path.stem, reports)


def _explain_text(path: Path, targets: Sequence[str]) -> list[GpuReport]:
    """A folder of one graph's stages, or one graph as it is."""
    from effc.ir import parse
    from effc.listing import read_reports
    from effc.report import Report

    if path.is_file():
        return explain_graph(path.stem, parse(path.read_text(encoding="utf-8")), targets)
    captured = parse(next(path.glob("000_*.py")).read_text(encoding="utf-8"))
    report = read_reports(path / "report.json")
    assert isinstance(report, Report)
    return explain_graph(
        report.name, captured, targets, pipeline=report.pipeline, sizes=report.sizes
    )


def explain_graph(
    name: str, captured: Graph, targets: Sequence[str], *, pipeline: str = "",
    precision: str | None = None, sizes: Mapping[str, int | float] = {}, cuda: bool = False,
) -> list[GpuReport]:  # fmt: skip
    """A report of the graph for each target, after the passes of the pipeline.

    targets: "cuda:sm_90", "hip:gfx942", or devices by name: "h100". sizes: numbers behind the
    graph's symbols, for costs. cuda: of target `cuda`, not `triton`. Raises OptionError for a
    target of which nothing is known, and UnsupportedError where Triton is not installed.
    """
    chosen = [find_target(t) for t in targets]
    graph = gpu_stages(captured, pipeline)[-1].graph
    return [
        _report(name, gpu_plan(graph, captured, precision, to, cuda), to, devices, sizes)
        for to, devices in chosen
    ]


def find_target(text: str) -> tuple[Target, list[Device]]:
    """What to compile for, and the devices of that kind; one where a device is named."""
    given = text.casefold()
    if ":" in text:
        to = target(text)
        return to, [d for d in DEVICES.values() if d.target == str(to)]
    named = [d for d in DEVICES.values() if given and d.name.casefold().startswith(given)]
    if not named:
        fix = nearest(text, [*DEVICES, *(d.target for d in DEVICES.values())])
        raise OptionError(
            f"nothing is known of a GPU {text!r}", fix=fix or f"one of {', '.join(DEVICES)}"
        )
    return target(named[0].target), named[:1]


# ------------------------------------------------------------------ counting


def _report(
    name: str, plan: Plan, to: Target, devices: Sequence[Device], sizes: Mapping[str, int | float]
) -> GpuReport:
    calls = [s for s in plan.steps if isinstance(s, KernelCall)]
    work = _work(calls)
    hosted: dict[str, int] = {}
    for step in plan.steps:
        if isinstance(step, HostCall) and step.launch.kind != "view":
            hosted[step.launch.call] = hosted.get(step.launch.call, 0) + 1
    rows = []
    for compiled in compile_kernels(plan.kernels.values(), to):
        mine = [c for c in calls if c.kernel.name == compiled.kernel.name]
        r = resources(compiled)
        fits = occupancy(r, devices[0]) if devices else None
        costs = [_sized(work[c], sizes) for c in mine]
        rows.append(KernelRow(
            compiled.kernel.name, len(mine), r.registers, r.spills, r.shared, r.tensor,
            _sum(c.flops for c in costs), _sum(c.bytes for c in costs),
            list(dict.fromkeys(c.launch.result for c in mine)),
            fits.share if fits else None, fits.bound if fits else "",
            [row for d in devices if (row := _estimate(mine, costs, r.tensor, d)) is not None],
        ))  # fmt: skip
    return GpuReport(name, str(to), len(calls), rows, hosted)


def _work(calls: Sequence[KernelCall]) -> dict[KernelCall, Cost]:
    """FLOPs and bytes of each call: a node's are its first kernel's, further kernels of the node
    (sums of parts, copies) only move what they read and write."""
    seen: set[Op] = set()
    found = {}
    for call in calls:
        node = call.launch.node
        first = call.launch.kind == "kernel" and node not in seen
        found[call] = node.cost() if first else Cost(0, sum(map(_moved, call.refs)))
        seen.update({node} if first else ())
    return found


def _moved(ref: Any) -> Any:
    """Bytes of the elements that a view shows, each once."""
    elements = product(tuple(n for n, s in zip(ref.shape, ref.strides) if s != 0))
    return elements * (ref.dtype.bits // 8)


def _sized(cost: Cost, sizes: Mapping[str, int | float]) -> Cost:
    return Cost(sized(cost.flops, sizes), sized(cost.bytes, sizes))  # type: ignore[arg-type]


def _sum(values: Iterable[Any]) -> float | str:
    given = list(values)
    texts = list(dict.fromkeys(v for v in given if isinstance(v, str)))
    if not texts:
        return sum(given)
    return texts[0] if len(given) == 1 else f"{len(given)} x {texts[0]}" if len(texts) == 1 else "?"


def _estimate(
    calls: Sequence[KernelCall], costs: Sequence[Any], tensor: int, on: Device
) -> EstimateRow | None:
    """The sum of every launch's roofline; None where sizes are not known."""
    found = []
    for call, cost in zip(calls, costs):
        if isinstance(cost.flops, str) or isinstance(cost.bytes, str):
            return None
        whole = Cost(int(cost.flops), int(cost.bytes))
        found.append(estimate(whole, _kind(call.launch.node, tensor), on))
    known = [e for e in found if e is not None]
    bounds = {e.bound: e.seconds for e in sorted(known, key=lambda e: e.seconds)}
    return EstimateRow(on.name, sum(e.seconds for e in known), next(reversed(bounds), ""))


def _kind(node: Op, tensor: int) -> str:
    """Element type of a node's products, as devices name their peaks."""
    types = [o.type for o in node.operands if isinstance(o.type, Tensor)]
    names = [t.dtype.name for t in types]
    if not tensor:
        return "f64" if "f64" in names else "f32"
    return next((n for n in names if n in ("f16", "bf16", "i8")), "tf32")


# ------------------------------------------------------------------ for people


def gpu_parts(found: GpuExplanation) -> Iterator[Any]:
    from rich.text import Text

    from effc.show import counted

    for note in found.notes:
        yield Text(note)
    for report in found.reports:
        title = f"{counted(report.launches, 'launch', 'launches')} of "
        title += f"{counted(len(report.kernels), 'kernel')} a forward"
        yield Text.assemble((report.name, "bold"), f" on {report.target}: {title}")
        yield _table(report)
        for call, n in report.hosted.items():
            yield Text(f"{n} × {call} by torch")
        yield from _totals(report)
        yield Text("")


def _table(report: GpuReport) -> Any:
    from effc.show import amount, grid

    table = grid("kernel", ">×", ">registers", ">spills", ">shared", ">occupancy", ">tensor",
                 ">FLOP", ">bytes", ">estimate")  # fmt: skip
    for r in report.kernels:
        held = f"{r.occupancy:.0%} {_LIMITS[r.limit]}" if r.occupancy is not None else "?"
        table.add_row(
            r.kernel, str(r.launches), str(r.registers), str(r.spills),
            amount(r.shared, "B") if r.shared else "0", held, str(r.tensor), _brief(r.flops),
            _brief(r.bytes),
            f"≥ {_time(r.estimates[0].seconds)}" if r.estimates else "?",
        )  # fmt: skip
    return table


_LIMITS = {"registers": "reg", "shared memory": "shm", "warps": "warp", "blocks": "blk", "": ""}


def _totals(report: GpuReport) -> Iterator[Any]:
    from rich.text import Text

    names = [e.device for e in report.kernels[0].estimates] if report.kernels else []
    for i, name in enumerate(names):
        if all(len(r.estimates) > i for r in report.kernels):
            total = sum(r.estimates[i].seconds for r in report.kernels)
            yield Text(f"estimate for {name}: at least {_time(total)}, by roofline; not measured")


def _brief(value: float | str) -> str:
    from effc.show import amount

    return "symbolic" if isinstance(value, str) else amount(value, "").strip()


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
