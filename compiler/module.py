"""What `effc.compile` and `effc.load` return: an nn.Module that is called as the model is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effc.compiled import CompiledGraph
from effc.ir import InputError
from effc.record import Record

if TYPE_CHECKING:
    from effc.dynamo import HandedOver

__all__ = ["Ahead", "CompiledModule"]


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
