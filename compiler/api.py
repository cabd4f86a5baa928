"""`effc.compile`: the engine of `torch.compile(..., backend="effc")`, ahead of the first call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effc.capture import Refusal, capture_exported
from effc.dynamo import HandedOver
from effc.engine import CompiledGraph, compile_captured
from effc.ir import EffcError, InputError, OptionError
from effc.options import Options
from effc.record import Record


def compile(
    model: nn.Module | Callable[..., Any],
    recipe: str | None = None,
    calibrate: Any = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> nn.Module:
    """Compile a model for inference and return an nn.Module that is called as the model is.

    recipe: pipeline text; None runs the exact passes only. example_inputs: arguments of one call;
    with them the whole graph is compiled now (through torch.export) and every pass's error is
    measured on them; without them compilation waits for the first call. dynamic_shapes: as in
    torch.export. options: fields of effc.options.Options.

    Raises OptionError, PipelineError, and with strict=True UnsupportedError.
    """
    if calibrate is not None:
        raise OptionError(
            "calibrate is for passes that lose accuracy, and none of the passes here takes data",
            fix="drop calibrate",
        )
    if recipe is not None:
        if "pipeline" in options:
            raise OptionError("recipe and pipeline both name the passes", fix="drop one of them")
        options["pipeline"] = recipe
    if not callable(model):
        raise OptionError(f"model must be an nn.Module or a function, not {type(model).__name__}")
    chosen = Options.of({"measure": example_inputs is not None, **options})
    module = model if isinstance(model, nn.Module) else _Function(model)
    if example_inputs is None:
        return CompiledModule(module, None, _dynamo(module, options))
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    kwargs = dict(example_kwargs or {})
    compiled = _ahead(module, tuple(example_inputs), kwargs, dynamic_shapes, chosen)
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


class Ahead:
    """A whole compiled graph with the calling convention of the model it came from.

    names: keyword arguments in the order of the example call.
    """

    def __init__(
        self,
        run: CompiledGraph | HandedOver,
        record: Record,
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        names: list[str],
    ) -> None:
        self.run, self.record, self.names = run, record, names
        self.in_spec, self.out_spec = in_spec, out_spec
        # Tensors in a row and one result need no walk over nested containers, which costs more than
        # the rest of a small call.
        leaves = in_spec.num_leaves
        self._row = leaves if in_spec == pytree.tree_structure(((0,) * leaves, {})) else -1
        self._one = out_spec == pytree.tree_structure(0)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat: Sequence[Any] = args
        if kwargs or len(args) != self._row or any(type(a) is not torch.Tensor for a in args):
            flat, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.in_spec:
                flat, spec = self._reordered(args, kwargs)
        results = self.run(*flat)
        return results[0] if self._one else pytree.tree_unflatten(results, self.out_spec)

    def _reordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        """Keyword arguments in the order of the example call."""
        if sorted(self.names) == sorted(kwargs):
            flat, spec = pytree.tree_flatten((args, {n: kwargs[n] for n in self.names}))
            if spec == self.in_spec:
                return flat, spec
        raise InputError(
            "the arguments are not arranged as in the example call",
            why=f"expected {self.in_spec}", fix="call it as example_inputs and example_kwargs do",
        )  # fmt: skip


def _ahead(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any, options: Options
) -> Ahead:
    record = Record(type(module).__name__, pipeline=str(options.passes), target=options.target)
    with record.phase("export"), torch.no_grad():
        program = _export(module, args, kwargs, dynamic)
    with record.phase("capture"):
        captured = capture_exported(program)
    flat = pytree.tree_leaves((args, kwargs))

    def original(*flat_arguments: Any) -> list[Any]:
        a, k = pytree.tree_unflatten(flat_arguments, program.call_spec.in_spec)
        return pytree.tree_leaves(module(*a, **k))

    made: Any = captured
    if not isinstance(captured, Refusal):
        made = compile_captured(captured, options, record, original, flat)
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


class CompiledModule(nn.Module):
    """What effc.compile returns. Holds the model as `module`: parameters and state stay reachable.

    In training mode, or where a gradient is asked for, the model itself runs.
    """

    _lazy: Callable[..., Any] | None

    def __init__(
        self, module: nn.Module, ahead: Ahead | None, lazy: Callable[..., Any] | None
    ) -> None:
        super().__init__()
        self.module = module
        self._ahead = ahead
        # not as an attribute of nn.Module, which would list its parameters a second time
        object.__setattr__(self, "_lazy", lazy)
        self._effc_records: list[Record] = [] if ahead is None else [ahead.record]
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._ahead is None:
            assert self._lazy is not None
            return self._lazy(*args, **kwargs)
        if self.training or (torch.is_grad_enabled() and self._wants_grad(args, kwargs)):
            return self.module(*args, **kwargs)
        return self._ahead(args, kwargs)

    def _wants_grad(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        return any(p.requires_grad for p in self.module.parameters()) or any(
            t.requires_grad for t in tensors
        )

    def refresh(self) -> None:
        """Fold and pack weights anew (needed only after writes through `tensor.data`)."""
        if self._ahead is not None and isinstance(self._ahead.run, CompiledGraph):
            self._ahead.run.refresh()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write graph, weights and kernels to one file, which `effc.load` makes a module of.

        Raises ArtefactError for what cannot be saved whole, with the reason and what to do instead.
        """
        from effc.artefact import save

        save(self, path)
