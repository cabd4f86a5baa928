"""What a file holds, and a graph with it in place of its own weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import nn

from effc.ir import Graph, InputError, Op, Weight, nearest
from effc.ir.formats import Encoded
from effc.ir.rewrite import op
from effc.passes.quantize.weights import encoded_weight

if TYPE_CHECKING:
    from effc.importer import Imported

Value: TypeAlias = Union[Encoded, torch.Tensor]  # noqa: UP007  (evaluated: Python 3.10)
SHOWN = 4  # names in a message
CONFIGURE = "make the model from the configuration that belongs to the checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """source: its file, for messages. entries: what makes each value, by transformers' name.

    Values are read when they are asked for; two names with one maker are one tensor (tied).
    """

    source: str
    entries: Mapping[str, Callable[[], Value]]

    def __getitem__(self, name: str) -> Value:
        """Raises InputError where there is no such tensor."""
        if name not in self.entries:
            raise InputError(f"{self.source} has no {name}", fix=nearest(name, self.entries))
        return self.entries[name]()

    def find(self, keys: Iterable[str]) -> str | None:
        """The name of a weight that a graph knows by these keys.

        A model inside another has its name before those of its weights.
        """
        for key in keys:
            parts = key.split(".")
            for start in range(len(parts)):
                name = ".".join(parts[start:])
                if name in self.entries:
                    return name
        return None


def with_checkpoint(graph: Graph, checkpoint: Checkpoint, dense: bool = True) -> Graph:
    """The graph with the checkpoint's values in place of its weights of the same names.

    What is quantised is read by `decode`, in the weight's own element type; its parts are weights
    named `key:codes`, `key:scale`, ..., and a dense value is `key:dense`. Weights that the
    checkpoint lacks stay as they are; those that it has as dense numbers too, without `dense`.

    Raises InputError for shapes that differ, and where no weight has a value there.
    """
    new: dict[Op, Op] = {}
    known = {w: checkpoint.find((w.key, *w.also)) for w in graph.weights}
    for w, name in known.items():
        if name is None:
            continue
        value = checkpoint[name]
        _check(checkpoint, name, value, w.shape)
        if isinstance(value, Encoded):
            new[w] = op.decode(encoded_weight(w, value), w.dtype)
        elif dense:
            held = value.to(w.dtype.torch).contiguous()
            new[w] = Weight.holding(f"{w.key}:dense", held, w.of)
    if not any(known.values()):
        raise InputError(
            f"no weight of the graph is in {checkpoint.source}",
            why=f"the graph has {_listed([w.key for w in graph.weights])}, "
            f"the file {_listed(list(checkpoint.entries))}",
        )
    return graph.substitute(new)


def placed(imported: Imported, checkpoint: Checkpoint | None) -> Imported:
    """A captured model, into which the checkpoint has been loaded, that computes with its codes.

    Dense values are the module's own already, and stay live weights.
    """
    if checkpoint is None:
        return imported
    return replace(imported, graph=with_checkpoint(imported.graph, checkpoint, dense=False))


@torch.no_grad()
def load(model: nn.Module, weights: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """Give a model's parameters the numbers that a checkpoint, or the one at a path, stands for.

    Raises InputError where a parameter has no value, a value no parameter, or shapes differ.
    """
    from .read import read

    checkpoint = weights if isinstance(weights, Checkpoint) else read(weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {key: checkpoint.find([key]) for key in parameters}
    used = {checkpoint.entries[n] for n in names.values() if n is not None}
    lacking = [key for key, name in names.items() if name is None]
    if lacking:
        raise InputError(f"{checkpoint.source} has no {_listed(lacking)}", fix=CONFIGURE)
    unused = [n for n, make in checkpoint.entries.items() if make not in used]
    placeless = [n for n in unused if not _nothing(n, checkpoint)]
    if placeless:
        what = f"{type(model).__name__} has no place for {_listed(placeless)}"
        raise InputError(f"{what} of {checkpoint.source}", fix=CONFIGURE)
    done: set[int] = set()
    for key, p in parameters.items():
        if id(p) not in done:  # tied ones once
            name = names[key]
            assert name is not None
            value = checkpoint[name]
            _check(checkpoint, name, value, p.shape)
            p.copy_(value.decode() if isinstance(value, Encoded) else value)
            done.add(id(p))
    return checkpoint


def _nothing(name: str, checkpoint: Checkpoint) -> bool:
    """A bias of zeros, which AutoGPTQ writes for layers that have none."""
    if not name.endswith(".bias"):
        return False
    value = checkpoint[name]
    return isinstance(value, torch.Tensor) and not bool(value.any())


def _check(checkpoint: Checkpoint, name: str, value: Value, wanted: Iterable[Any]) -> None:
    shape, wanted = _shape(value), tuple(wanted)
    if shape != wanted:
        raise InputError(
            f"{name} of {checkpoint.source} is {list(shape)}, the model's {list(wanted)}",
            fix=CONFIGURE,
        )


def _shape(value: Value) -> tuple[Any, ...]:
    return tuple(value.type.shape if isinstance(value, Encoded) else value.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


__all__ = ["Checkpoint", "Value", "load", "placed", "with_checkpoint"]
