"""How a call's arguments and results map onto the inputs and outputs of a compiled graph.

Everything that capture learnt about a call and that running it needs: where inputs come from, what
is written back, which results are memory of an argument. It is plain data, so an artefact keeps it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from effc.aliasing import ArgumentView
from effc.ir import ArtefactError
from effc.ir.symbols import dim_text, from_torch, parse_dim, symbolic

if TYPE_CHECKING:
    from effc.capture import Captured
    from effc.importer import Imported

__all__ = ["Calling", "Source", "Viewed"]


@dataclass(frozen=True, eq=False)
class Source:
    """A value of a call: the argument at `position`, or a tensor that the graph owns."""

    name: str
    position: int | None
    tensor: torch.Tensor | None = None

    def of(self, arguments: Sequence[Any]) -> Any:
        return self.tensor if self.position is None else arguments[self.position]


@dataclass(frozen=True, eq=False)
class Viewed:
    """A result that is memory of a written argument."""

    source: Source
    view: ArgumentView

    def of(self, arguments: Sequence[Any]) -> Any:
        return self.view.of(self.source.of(arguments))


@dataclass(frozen=True, eq=False)
class Calling:
    """weights: of the captured graph, by name. inputs: of the graph, in order.

    copies: what a call writes into, and the result that it writes. results: what a call returns,
    and the strides that eager gives it. A result is ("node", i) for output i of the graph, a
    Viewed, or a size or constant itself.
    """

    weights: tuple[Source, ...]
    inputs: tuple[Source, ...]
    copies: tuple[tuple[Source, Any], ...]
    results: tuple[tuple[Any, tuple[Any, ...] | None], ...]

    @staticmethod
    def of(captured: Captured, imported: Imported) -> Calling:
        sources = [Source(g.name, g.position, g.tensor) for g in captured.inputs]
        used = {w.key for w in imported.graph.weights}
        weights = [
            source
            for given, source in zip(captured.inputs, sources)
            if given.kind == "weight" and given.name in used
        ]
        copies, results = [], []
        for output, result in zip(captured.outputs, imported.results):
            if output.mutates is not None:
                copies.append((sources[output.mutates], result))
                continue
            if isinstance(result, ArgumentView):
                result = Viewed(sources[result.index], result)
            results.append((result, _strides(output.value)))
        inputs = tuple(sources[i] for i in imported.arguments)
        return Calling(tuple(weights), inputs, tuple(copies), tuple(results))

    @property
    def owned(self) -> tuple[Source, ...]:
        """The tensors of the graph's own that a call reads or writes, weights aside."""
        views = [r.source for r, _ in self.results if isinstance(r, Viewed)]
        sources = [*self.inputs, *(s for s, _ in self.copies), *views]
        return tuple(s for s in dict.fromkeys(sources) if s.position is None)

    # -------------------------------------------------------------- as data

    def data(self) -> dict[str, Any]:
        """As JSON data, without the tensors. Raises ArtefactError for a result JSON lacks."""
        return {
            "inputs": [_source(s) for s in self.inputs],
            "copies": [[_source(s), _write(r)] for s, r in self.copies],
            "results": [[_write(r), s and [_size(n) for n in s]] for r, s in self.results],
        }

    @staticmethod
    def read(
        data: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        weights: Sequence[str],
        reals: frozenset[str] = frozenset(),
    ) -> Calling:
        """What `data` gave, on these tensors, some of which are weights.

        reals: names of symbols that are floats. Raises KeyError, TypeError or ValueError
        (ParseError is one) for anything else.
        """
        r = _Reader(tensors, reals)
        return Calling(
            tuple(Source(name, None, tensors[name]) for name in weights),
            tuple(r.source(s) for s in data["inputs"]),
            tuple((r.source(s), r.value(v)) for s, v in data["copies"]),
            tuple((r.value(v), r.strides(s)) for v, s in data["results"]),
        )


def _source(source: Source) -> dict[str, Any]:
    if source.position is None:
        return {"tensor": source.name}
    return {"argument": source.position, "name": source.name}


def _write(value: Any) -> dict[str, Any]:
    """A result as JSON data."""
    if isinstance(value, Viewed):
        v = value.view
        size = None if v.size is None else [*v.size]
        place = {"size": size, "stride": [*v.stride], "offset": v.offset}
        return {"view": _source(value.source), **place}
    if isinstance(value, tuple) and value[:1] == ("node",):
        return {"output": value[1]}
    if symbolic(value):
        return {"size": dim_text(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ArtefactError(
        f"a model that returns a {type(value).__name__} cannot be saved",
        why="an artefact keeps tensors, numbers, text and None", fix="return it another way",
    )  # fmt: skip


def _size(value: Any) -> int | str:
    return dim_text(value) if symbolic(value) else value


@dataclass(frozen=True)
class _Reader:
    tensors: Mapping[str, torch.Tensor]
    reals: frozenset[str]

    def source(self, data: Mapping[str, Any]) -> Source:
        if "tensor" in data:
            return Source(data["tensor"], None, self.tensors[data["tensor"]])
        return Source(data["name"], _index(data["argument"]))

    def value(self, data: Mapping[str, Any]) -> Any:
        match data:
            case {"view": source, "size": size, "stride": stride, "offset": int(offset)}:
                shape = None if size is None else tuple(map(_index, size))
                view = ArgumentView(0, shape, tuple(map(_index, stride)), offset)
                return Viewed(self.source(source), view)
            case {"output": int(i)}:
                return ("node", _index(i))
            case {"size": str(text)}:
                return self.size(text)
            case {"float": str(text)}:
                return float(text)
            case {"value": None | bool() | int() | float() | str() as value}:
                return value
        raise ValueError(f"no such result: {data}")

    def strides(self, data: Sequence[Any] | None) -> tuple[Any, ...] | None:
        return None if data is None else tuple(map(self.size, data))

    def size(self, value: int | str) -> Any:
        if isinstance(value, str):
            return parse_dim(ast.parse(value, mode="eval").body, self.reals)
        return _index(value)


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no index or size")
    return value


def _strides(value: Any) -> tuple[Any, ...] | None:
    """Strides that eager gives a result, where they step through packed memory; else None."""
    val = value.meta.get("val") if isinstance(value, torch.fx.Node) else None
    if not isinstance(val, torch.Tensor) or val.layout is not torch.strided:
        return None
    sizes = [from_torch(s) for s in val.shape]
    strides = [from_torch(s) for s in val.stride()]
    left = {i for i, size in enumerate(sizes) if size != 1}
    step: Any = 1
    while left:  # peel off the innermost dimension: the one whose stride is the elements inside it
        inner = next((i for i in sorted(left, reverse=True) if strides[i] == step), None)
        if inner is None:
            return None
        left.remove(inner)
        step = step * sizes[inner]
    return tuple(strides)
