"""One captured graph through the house: import, passes, backend.

Both ways in (Dynamo's backend, `effc.compile`) end here, so a graph compiles the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import effc.aten  # noqa: F401  (registers the converters)
from effc.backends import find_backend
from effc.calibration import progress
from effc.calling import Calling
from effc.capture import Captured, Refusal
from effc.compiled import CompiledGraph
from effc.dump import Dump
from effc.importer import import_captured
from effc.instruments import Verify
from effc.interop import Checkpoint, placed
from effc.ir import Graph, OptionError, UnsupportedError, bind_symbols, node_text
from effc.options import Options
from effc.pipeline import run_pipeline
from effc.record import Guard, Record

if TYPE_CHECKING:
    import sympy


def compile_captured(
    captured: Captured,
    options: Options,
    record: Record,
    original: Callable[..., Any],
    sample_arguments: Sequence[Any] | None = None,
    calibration: Sequence[Sequence[Any]] | None = None,
    checkpoint: Checkpoint | None = None,
) -> CompiledGraph | Refusal:
    """Raises UnsupportedError (strict), PassError, and what a backend's compile raises.

    original: runs the same arguments as PyTorch would; used where a call cannot be taken.
    sample_arguments: real runtime arguments, to measure passes with. calibration: many such sets,
    for passes that learn from data. checkpoint: what the graph computes with in place of the
    captured weights.
    """
    with record.phase("import"):
        imported = import_captured(captured)
        if isinstance(imported, Refusal):
            return imported
        imported = placed(imported, checkpoint)
    record.guards += guards_of(captured)
    backend = find_backend(options.target)
    dump = None if options.dump is None else Dump(options.dump, record=record)
    samples = None
    if sample_arguments is not None and (options.measure or options.dump):
        samples = [_number(_argument(captured, i, sample_arguments)) for i in imported.arguments]
        record.sizes = {str(k): v for k, v in bind_symbols(imported.graph, samples).items()}
        if dump is not None:
            dump.inputs = samples
    learning = None
    if calibration is not None:
        learning = [
            [_argument(captured, i, arguments) for i in imported.arguments]
            for arguments in calibration
        ]
        for values in learning:
            bind_symbols(imported.graph, values)  # a set that does not fit is found before any pass
    with record.phase("passes"):
        record.stages = run_pipeline(
            imported.graph, options.passes, supports=backend.supports, rates=backend.rates,
            sample_inputs=samples if options.measure else None,
            calibration=learning, progress=progress,
            instruments=[*([Verify()] if options.verify else []), *([dump] if dump else [])],
        )  # fmt: skip
    build(record, imported.graph, options)
    if dump is not None:
        dump.complete()
    check_strict(record, options)
    return CompiledGraph(Calling.of(captured, imported), imported.graph, record, original)


def build(record: Record, captured: Graph, options: Options) -> None:
    """Plan the graph of the last stage. captured: the plan shares memory only where this does."""
    told = {
        "captured": captured,
        "float32_matmul_precision": options.float32_matmul_precision,
        "tune": options.tune,
        "cuda_graphs": options.cuda_graphs,
    }
    backend = find_backend(options.target)
    if options.cuda_graphs and not backend.graphs:
        raise OptionError(
            f"target {backend.name!r} has no CUDA graphs", fix="drop cuda_graphs=True"
        )
    with record.phase("backend"):
        executable = backend.compile(record.stages[-1].graph, told)
    record.executable = executable


def check_strict(record: Record, options: Options) -> None:
    """Raises UnsupportedError where strict=True and something runs through ATen."""
    if options.strict and record.executable.fallbacks:
        raise unsupported(record)


def unsupported(record: Record) -> UnsupportedError:
    """strict=True: every node without a kernel at once, with its line, reason and a fix."""
    graph = record.stages[-1].graph
    rows = []
    for node, why in record.executable.fallbacks:
        rows.append(f"  {node_text(graph, node).partition('  #')[0]}")
        rows += [f"    at    {node.where}"] if node.where else []
        rows.append(f"    why   {why}")
    return UnsupportedError(
        f"{len(record.executable.fallbacks)} nodes of {record.name} have no kernel for "
        f"target {record.target}",
        fix="drop strict=True to run them through ATen, or add a kernel (examples/add_an_op.py)",
        context="\n".join(rows),
    )


def guards_of(captured: Captured) -> list[Guard]:
    """Facts about sizes that the compiled code relies on, from torch's own shape environment."""
    for given in captured.inputs:
        val = given.node.meta.get("val")
        sizes = list(val.shape) if isinstance(val, torch.Tensor) else [val]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                return [
                    *(_range(s, r) for s, r in env.var_to_range.items()),
                    *(Guard(str(g.expr), _line(g)) for g in env.guards),
                ]
    return []


def _range(name: sympy.Symbol, values: Any) -> Guard:
    top = "" if values.upper > 10**9 else f" <= {values.upper}"
    return Guard(f"{values.lower} <= {name}{top}")


def _line(guard: Any) -> str:
    frame = next(iter(getattr(guard.sloc, "user_stack", None) or ()), None)
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" if frame is not None else ""


def _number(value: Any) -> Any:
    """A size that Dynamo knows symbolically, as it is in this call."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def _argument(captured: Captured, index: int, arguments: Sequence[Any]) -> Any:
    given = captured.inputs[index]
    return given.tensor if given.position is None else arguments[given.position]


__all__ = ["CompiledGraph", "build", "check_strict", "compile_captured", "guards_of"]
