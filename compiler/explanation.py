"""`effc.explain(compiled)`: what effc did for a model, found again from what the user holds.

A model from `effc.compile` carries its records. One from `torch.compile(..., backend="effc")` does
not: Dynamo keeps what it compiled with each function's code, so the records are found there,
through the callables that our backend returned. Dynamo's cache is private to torch and is read in
this file only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from effc.ir import EffcError, InputError
from effc.record import Break, Record
from effc.report import Explanation

if TYPE_CHECKING:
    from effc.gpu import GpuExplanation

__all__ = ["explain", "graph_break", "records_of"]


@overload
def explain(compiled: Any, target: None = None) -> Explanation: ...
@overload
def explain(compiled: Any, target: str | Sequence[str]) -> GpuExplanation: ...
def explain(
    compiled: Any, target: str | Sequence[str] | None = None
) -> Explanation | GpuExplanation:
    """What effc did for a compiled module or function: a report for each of its graphs.

    target: GPUs that need not be here, as "cuda:sm_90", "hip:gfx942" or a device's name; the result
    is then a table of the kernels they would run.

    Raises InputError for what effc did not compile, and for what was never called.
    """
    records, notes = records_of(compiled)
    if target is not None:
        from effc.gpu import explain_records

        targets = [target] if isinstance(target, str) else target
        return explain_records(_name(compiled), records, targets)
    breaks = list(dict.fromkeys(r.graph_break for r in records if r.graph_break is not None))
    return Explanation(
        _name(compiled), [r.report() for r in records], breaks, notes,
        steps=getattr(compiled, "_effc_steps", []), records=records,
    )  # fmt: skip


def records_of(compiled: Any) -> tuple[list[Record], list[str]]:
    """The records behind a compiled object, in the order of compilation, and remarks on them."""
    records: list[Record] = list(getattr(compiled, "_effc_records", ()))
    if records:
        return records, []
    if getattr(compiled, "_lazy", None) is not None:  # effc.compile without an example
        return records_of(compiled._lazy)
    name, backends = _name(compiled), list(_backends(compiled))
    if not backends:
        raise InputError(
            f"{name} is not compiled",
            fix='pass what torch.compile(model, backend="effc") or effc.compile(model) returned',
        )
    entries = list(_entries())
    found = _records(e for e in entries if any(e.backend is b for b in backends))
    if found:
        return found, []
    found = _records(_shared(compiled, backends, entries))
    if found:
        return found, ["shares code that was compiled for another module of the same class"]
    if not any(map(_is_effc, backends)):
        others = {str(getattr(b, "compiler_name", b)) for b in backends}
        raise InputError(
            f"{name} is compiled by {', '.join(sorted(others))}, not by effc",
            fix='compile it with torch.compile(model, backend="effc") or effc.compile(model)',
        )
    raise InputError(
        f"{name} has no compiled graph yet",
        why="graphs are compiled when it is called", fix="call it once first",
    )  # fmt: skip


def graph_break(gm: torch.fx.GraphModule) -> Break | None:
    """Why Dynamo ended the graph that it gives a backend, and the user's line; None at a return."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    said = [line.strip() for line in str(why.reason).splitlines() if line.strip()]
    detail = next((s.partition(": ")[2] for s in said if s.startswith("Explanation: ")), "")
    reason = ": ".join(filter(None, (said[0] if said else "unknown", detail)))
    reason = re.sub(r" at 0x[0-9a-f]+", "", reason)
    frames = [f for f in why.user_stack if not f.filename.startswith(_TORCH)]
    frame = (frames or list(why.user_stack) or [None])[-1]
    return Break(reason, f"{Path(frame.filename).name}:{frame.lineno}" if frame else "")


_TORCH = str(Path(torch.__file__).parent)

# ------------------------------------------------------------------ what the user holds


def _name(compiled: Any) -> str:
    inner = getattr(compiled, "_orig_mod", None) or getattr(compiled, "module", None)
    if isinstance(compiled, nn.Module):
        return type(inner if isinstance(inner, nn.Module) else compiled).__name__
    return getattr(compiled, "__qualname__", type(compiled).__name__)


def _backends(compiled: Any) -> Iterator[Any]:
    """The backend objects of every torch.compile call on the object or on a module within it."""
    parts = compiled.modules() if isinstance(compiled, nn.Module) else [compiled]
    for part in parts:
        context = vars(part).get("dynamo_ctx") if hasattr(part, "__dict__") else None
        if context is not None:
            yield _innermost(context.callback)
        call = vars(part).get("_compiled_call_impl") if isinstance(part, nn.Module) else part
        for cell in getattr(call, "__closure__", None) or ():
            callback = getattr(cell.cell_contents, "callback", None)
            if callback is not None:
                yield _innermost(callback)


def _innermost(callback: Any) -> Any:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return callback


def _is_effc(backend: Any) -> bool:
    from effc.dynamo import dynamo_backend

    return getattr(backend, "compiler_fn", backend) is dynamo_backend


# ------------------------------------------------------------------ what Dynamo holds


@dataclass(frozen=True)
class _Entry:
    """One compiled version of one piece of the user's code."""

    code: CodeType  # the user's, or what remains of it after a graph break
    order: tuple[int, int]  # frame, version
    backend: Any
    calls: dict[str, Any]  # the globals that Dynamo made for it: graphs and continuations


def _entries() -> Iterator[_Entry]:
    """Every version that Dynamo holds, of all code it has seen."""
    try:
        from torch._dynamo.convert_frame import input_codes
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        codes = [code for ref in input_codes.seen if (code := ref()) is not None]
    except (ImportError, AttributeError) as e:
        raise EffcError(
            f"torch {torch.__version__} does not show what it compiled",
            why=str(e), fix="use effc.compile, whose result carries its own records",
        ) from e  # fmt: skip
    for code in codes:
        for entry in _debug_get_cache_entry_list(code):
            scope = (entry.guard_manager.global_scope or {}).get("G", {})
            calls = {n: scope[n] for n in entry.code.co_names if n.startswith("__") and n in scope}
            order = (entry.compile_id.frame_id or 0, entry.compile_id.frame_compile_id or 0)
            yield _Entry(code, order, entry.backend, calls)


def _records(entries: Iterable[_Entry]) -> list[Record]:
    """Records of the graphs that the entries call, once each."""
    found: dict[int, Record] = {}
    for entry in sorted(entries, key=lambda e: e.order):
        for call in entry.calls.values():
            record = getattr(call, "_effc_record", None)
            if isinstance(record, Record):
                found[id(record)] = record
    return list(found.values())


def _shared(compiled: Any, backends: list[Any], entries: list[_Entry]) -> Iterator[_Entry]:
    """Entries of the object's own code, compiled under an equal backend for another object."""
    known = [e for e in entries if any(e.backend == b for b in backends)]
    waiting, seen = list(_codes(compiled)), set()
    while waiting:
        code = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        for entry in known:
            if entry.code is code:
                yield entry
                functions = (c for c in entry.calls.values() if isinstance(c, FunctionType))
                waiting += [f.__code__ for f in functions]  # goes on after graph breaks


def _codes(compiled: Any) -> Iterator[CodeType]:
    if isinstance(compiled, nn.Module):
        for module in compiled.modules():
            yield from _codes(type(module).forward)
        return
    while hasattr(compiled, "_torchdynamo_orig_callable"):
        compiled = compiled._torchdynamo_orig_callable
    code = getattr(compiled, "__code__", None)
    if code is not None:
        yield code
