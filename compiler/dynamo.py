"""The Dynamo backend: `torch.compile(model, backend="effc")`.

A graph that cannot be taken (training, an alias that functional code loses, ...) runs as PyTorch
would run it, or through Inductor with `fallback="inductor"`; the refusal is in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch._guards import CompileContext

from effc.capture import Refusal, capture_dynamo
from effc.collector import collector_paused
from effc.engine import CompiledGraph, compile_captured
from effc.explanation import graph_break
from effc.ir import UnsupportedError
from effc.options import Options
from effc.record import Record


@collector_paused()
def dynamo_backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's. Raises OptionError, and with strict=True UnsupportedError."""
    chosen = Options.of(options)
    record = Record(_name(), pipeline=str(chosen.passes), target=chosen.target)
    record.recompile_cause = _recompile_cause()
    record.graph_break = graph_break(gm)
    with record.phase("capture"):
        captured = capture_dynamo(gm, example_inputs)
    made: CompiledGraph | Refusal = (
        captured
        if isinstance(captured, Refusal)
        else compile_captured(captured, chosen, record, gm.forward, _real(example_inputs))
    )
    if isinstance(made, Refusal):
        return _refused(gm, example_inputs, made, chosen, record)
    return made


def _refused(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    why: Refusal,
    options: Options,
    record: Record,
) -> Callable[..., Any]:
    record.refusal = why
    if options.strict and why.kind != "training":
        raise UnsupportedError(
            f"graph {record.name} is not taken: {why.kind}", where=why.where, why=why.reason,
            fix="drop strict=True to run it as PyTorch would",
        )  # fmt: skip
    run: Callable[..., Any] = gm.forward
    if options.fallback == "inductor":
        from torch._inductor.compile_fx import compile_fx

        run = cast("Callable[..., Any]", compile_fx(gm, list(example_inputs)))
    return HandedOver(run, record)


class HandedOver:
    """A graph that PyTorch or Inductor runs, with the reason at hand for the report."""

    def __init__(self, run: Callable[..., Any], record: Record) -> None:
        self._run, self._effc_record = run, record

    def __call__(self, *arguments: Any) -> Any:
        return self._run(*arguments)


def _name() -> str:
    context = CompileContext.try_get()
    return f"graph {context.compile_id}" if context is not None else "graph"


def _recompile_cause() -> str:
    from torch._dynamo.utils import get_metrics_context

    context = get_metrics_context()
    if not context.in_progress():
        return ""
    return str(context._metrics.get("recompile_reason") or "")


def _real(example_inputs: Sequence[Any]) -> Sequence[Any] | None:
    from torch._subclasses.fake_tensor import FakeTensor

    if any(isinstance(i, FakeTensor) for i in example_inputs):
        return None
    return example_inputs


__all__ = ["dynamo_backend"]
