"""`effc.compile`: the engine of `torch.compile(..., backend="effc")`, ahead of the first call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effc.calibration import Arguments, argument_sets, asked_for, flattened
from effc.capture import Refusal, capture_exported
from effc.collector import collector_paused
from effc.dynamo import HandedOver
from effc.engine import compile_captured
from effc.interop import Checkpoint, load
from effc.ir import EffcError, OptionError
from effc.module import Ahead, CompiledModule
from effc.options import Options
from effc.record import Record


def compile(
    model: nn.Module | Callable[..., Any],
    recipe: str | None = None,
    calibrate: Any = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    weights: Checkpoint | str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Compile a model for inference and return an nn.Module that is called as the model is.

    recipe: pipeline text; None runs the exact passes only. calibrate: an iterable of sets of
    arguments, each a tensor, a tuple or a mapping of names, for passes that learn from data.
    example_inputs: arguments of one call, by default the first set of `calibrate`; with them the
    whole graph is compiled now (through torch.export) and every pass's error is measured on them;
    without them compilation waits for the first call. dynamic_shapes: as in torch.export.
    weights: a quantised checkpoint of another tool (effc.interop.read, or its path): the compiled
    graph computes with its codes, and the model's parameters become the numbers that they stand
    for. options: fields of effc.options.Options.

    Raises OptionError, PipelineError, and with strict=True UnsupportedError.
    """
    if recipe is not None:
        if "pipeline" in options:
            raise OptionError("recipe and pipeline both name the passes", fix="drop one of them")
        options["pipeline"] = recipe
    if not callable(model):
        raise OptionError(f"model must be an nn.Module or a function, not {type(model).__name__}")
    given = example_inputs is not None or calibrate is not None
    chosen = Options.of({"measure": given, **options})
    module = model if isinstance(model, nn.Module) else _Function(model)
    asked_for(chosen.passes, calibrate)
    checkpoint = None
    if weights is not None:
        if not given:
            raise OptionError(
                "weights are put into a graph that is captured whole",
                fix="give example_inputs, or use effc.decoder",
            )
        checkpoint = load(module, weights)
    if not given:
        return CompiledModule(module, None, _dynamo(module, options))
    sets = None if calibrate is None else argument_sets(calibrate)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    example: Arguments = (tuple(example_inputs or ()), dict(example_kwargs or {}))
    if sets and example_inputs is None and not example_kwargs:
        example = sets[0]
    learning = None if sets is None else flattened(sets, example)
    compiled = _ahead(module, *example, dynamic_shapes, chosen, learning, checkpoint)
    return CompiledModule(module, compiled, None)


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def _dynamo(module: nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
    return torch.compile(module, backend="effc", options=dict(options))


def _ahead(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any,
    options: Options, calibration: Sequence[Sequence[Any]] | None, checkpoint: Checkpoint | None,
) -> Ahead:  # fmt: skip
    record = Record(type(module).__name__, pipeline=str(options.passes), target=options.target)
    with record.phase("export"), torch.no_grad():
        program = _export(module, args, kwargs, dynamic)
    with collector_paused():
        return _compiled(module, args, kwargs, program, record, options, calibration, checkpoint)


def _compiled(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
    program: torch.export.ExportedProgram, record: Record, options: Options,
    calibration: Sequence[Sequence[Any]] | None, checkpoint: Checkpoint | None,
) -> Ahead:  # fmt: skip
    with record.phase("capture"):
        captured = capture_exported(program)
    flat = pytree.tree_leaves((args, kwargs))

    def original(*flat_arguments: Any) -> list[Any]:
        a, k = pytree.tree_unflatten(flat_arguments, program.call_spec.in_spec)
        return pytree.tree_leaves(module(*a, **k))

    made: Any = captured
    if not isinstance(captured, Refusal):
        made = compile_captured(captured, options, record, original, flat, calibration, checkpoint)
    if isinstance(made, Refusal):
        record.refusal = made
        made = HandedOver(original, record)
    spec = program.call_spec
    return Ahead(made, record, spec.in_spec, spec.out_spec, list(kwargs))


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as e:  # torch.export documents no narrower class
        raise EffcError(
            f"torch.export cannot capture {type(module).__name__} whole",
            why=str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__,
            fix="leave out example_inputs: the first call then captures it piece by piece",
        ) from e


__all__ = ["Ahead", "CompiledModule", "compile"]
