"""One captured graph through the house: import, passes, backend; and the object that runs it.

Both ways in (Dynamo's backend, `effc.compile`) end here, so a graph compiles the same either way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

import effc.aten  # noqa: F401  (registers the converters)
from effc.backends import find_backend
from effc.calling import Calling, Viewed
from effc.capture import Captured, Refusal, overlapping
from effc.dump import Dump
from effc.importer import Imported, import_captured
from effc.instruments import Verify
from effc.ir import Graph, UnsupportedError, bind_symbols, evaluate, node_text
from effc.options import Options
from effc.pipeline import run_pipeline
from effc.record import Guard, Record

# Weight sets whose folded and packed constants are kept at once. More than one is needed where one
# code object serves several module instances (regional compilation of repeated layers).
KEPT_WEIGHT_SETS = 64


def compile_captured(
    captured: Captured,
    options: Options,
    record: Record,
    original: Callable[..., Any],
    sample_arguments: Sequence[Any] | None = None,
) -> CompiledGraph | Refusal:
    """Raises UnsupportedError (strict), PassError, and what a backend's compile raises.

    original: runs the same arguments as PyTorch would; used where a call cannot be taken.
    sample_arguments: real runtime arguments, to measure passes with.
    """
    with record.phase("import"):
        imported = import_captured(captured)
    if isinstance(imported, Refusal):
        return imported
    record.guards += guards_of(captured)
    backend = find_backend(options.target)
    dump = None if options.dump is None else Dump(options.dump, record=record)
    samples = None
    if sample_arguments is not None and (options.measure or options.dump):
        samples = [_number(_argument(captured, i, sample_arguments)) for i in imported.arguments]
        record.sizes = {str(k): v for k, v in bind_symbols(imported.graph, samples).items()}
        if dump is not None:
            dump.inputs = samples
    with record.phase("passes"):
        record.stages = run_pipeline(
            imported.graph, options.passes, supports=backend.supports,
            sample_inputs=samples if options.measure else None,
            instruments=[*([Verify()] if options.verify else []), *([dump] if dump else [])],
        )  # fmt: skip
    with record.phase("backend"):
        told = {
            "captured": imported.graph,  # the plan shares memory only where it does
            "float32_matmul_precision": options.float32_matmul_precision,
        }
        record.executable = backend.compile(record.stages[-1].graph, told)
    if dump is not None:
        dump.complete()
    if options.strict and record.executable.fallbacks:
        raise unsupported(record, imported)
    return CompiledGraph(Calling.of(captured, imported), imported.graph, record, original)


def unsupported(record: Record, imported: Imported) -> UnsupportedError:
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


class CompiledGraph:
    """Callable on the runtime arguments of the captured graph, in Dynamo's order.

    graph: its inputs say which sizes a call has. original: runs a call as PyTorch would, where the
    graph cannot take it.

    Weights are looked at on every call: a parameter that was replaced or changed in place since
    they were folded and packed makes the next call fold and pack again. (A write through
    `tensor.data` does not move torch's version counter and cannot be seen; call `refresh()`.)
    """

    def __init__(
        self, calling: Calling, graph: Graph, record: Record, original: Callable[..., Any]
    ) -> None:
        self.calling, self.graph, self.record = calling, graph, record
        self._effc_record = record
        self._original = original
        self._bound: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._last: tuple[tuple[Any, ...], Any] | None = None
        self._lock = threading.Lock()
        # unpacked here, because every call goes through them
        self._weights: list[tuple[str, int | None, Any]] = [
            (w.name, w.position, w.tensor) for w in calling.weights
        ]
        self._inputs: list[tuple[int | None, Any]] = [
            (i.position, i.tensor) for i in calling.inputs
        ]
        self._copies: list[tuple[int | None, Any, Any]] = [
            (s.position, s.tensor, result) for s, result in calling.copies
        ]
        self._results = calling.results
        symbols = any(_symbolic(r) or _symbolic(s) for r, s in self._results)
        self._needs_sizes = symbols or any(_symbolic(r) for _, _, r in self._copies)

    def __call__(self, *arguments: Any) -> list[Any]:
        if self._copies and self._overlap(arguments):
            return list(self._original(*arguments))
        if torch.is_autocast_enabled("cpu"):  # its casts are nodes of the graph already
            with torch.autocast("cpu", enabled=False):
                return self(*arguments)
        grad = torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            return self._run(arguments)
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    def _run(self, arguments: Sequence[Any]) -> list[Any]:
        inputs = [owned if at is None else arguments[at] for at, owned in self._inputs]
        outputs = self._bind(arguments)(inputs)
        env = bind_symbols(self.graph, inputs) if self._needs_sizes else None
        if self._copies:
            outputs = self._write_back(arguments, outputs, env)
        results = []
        for result, strides in self._results:
            if isinstance(result, Viewed):
                value = result.of(arguments)
            else:
                value = _result(result, outputs, env)
            results.append(value if strides is None else _restride(value, strides, env))
        return results

    def _write_back(self, arguments: Sequence[Any], outputs: Sequence[Any], env: Any) -> list[Any]:
        """Copy results into the arguments that the model writes; results keep their values."""
        targets = [owned if at is None else arguments[at] for at, owned, _ in self._copies]
        written = {t.untyped_storage().data_ptr() for t in targets}
        kept = [
            v.clone()
            if isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() in written
            else v
            for v in outputs
        ]
        for target, (_, _, result) in zip(targets, self._copies):
            target.copy_(_result(result, kept, env))
        return kept

    def _overlap(self, arguments: Sequence[Any]) -> bool:
        tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        positions = {at for at, _, _ in self._copies}
        written = [n for n, (i, _) in enumerate(tensors) if i in positions]
        return overlapping([a for _, a in tensors], written)

    # -------------------------------------------------------------- weights

    def _bind(self, arguments: Sequence[Any]) -> Any:
        tensors = [owned if at is None else arguments[at] for _, at, owned in self._weights]
        key = tuple(map(_stamp, tensors))
        last = self._last
        if last is not None and last[0] == key:
            return last[1]
        with self._lock:
            bound = self._bound.get(key)
            if bound is None:
                places = {stamp[:1] for stamp in key}
                for old in [k for k in self._bound if places and {s[:1] for s in k} == places]:
                    del self._bound[old]  # the same memory with older contents
                named = {name: t for (name, _, _), t in zip(self._weights, tensors)}
                bound = self.record.executable.bind(named)
                self._bound[key] = bound
                while len(self._bound) > KEPT_WEIGHT_SETS:
                    self._bound.popitem(last=False)
            else:
                self._bound.move_to_end(key)
            self._last = (key, bound)
        return bound

    def refresh(self) -> None:
        """Forget folded and packed weights; the next call makes them anew."""
        with self._lock:
            self._bound.clear()
            self._last = None


def _stamp(t: torch.Tensor) -> tuple[int, int]:
    # inference tensors carry no version counter; they cannot be written outside inference mode
    return t.data_ptr(), -1 if t.is_inference() else t._version


def _symbolic(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_symbolic, value))
    return isinstance(value, sympy.Basic)


def _result(result: Any, outputs: Sequence[Any], env: Any) -> Any:
    if isinstance(result, tuple) and result[:1] == ("node",):
        return outputs[result[1]]
    return evaluate(result, env) if isinstance(result, sympy.Basic) else result


def _restride(value: torch.Tensor, strides: tuple[Any, ...], env: Any) -> torch.Tensor:
    """The value with eager's strides: code after it (`.view`, ...) finds what it expects."""
    want: Any = evaluate(strides, env) if env is not None else strides
    if value.stride() == want or value.numel() < 2:
        return value
    if all(a == b for a, b, n in zip(value.stride(), want, value.shape) if n != 1):
        return value
    made = torch.empty_strided(value.shape, want, dtype=value.dtype, device=value.device)
    return made.copy_(value)


__all__ = ["CompiledGraph", "compile_captured", "guards_of"]
