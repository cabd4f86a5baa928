"""Export by sample: equal calls of a graph are traced once, however often a deep model makes them.

Tracing costs milliseconds a call, and every block of a model makes the same calls again. A call on
values of the same types gives the same operators wherever nothing is written and every size is
known. So a graph of the distinct calls alone is exported, and the whole graph is put together from
the pieces. `sampled` gives None where calls depend on each other in other ways than through their
results; the graph is then exported as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module

from effc.aliasing import is_written
from effc.regions import drop_checks

Export: TypeAlias = Callable[[GraphModule, Sequence[Any]], tuple[GraphModule, Any]]

_PLAIN = (
    bool, int, float, complex, str, type(None), EllipsisType,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack")  # what `origins` reads


@dataclass(frozen=True)
class Signature:
    """What the export of a graph that writes nothing says about it, named as torch names it."""

    user_inputs: list[str]
    inputs_to_parameters: dict[str, str] = field(default_factory=dict)
    inputs_to_buffers: dict[str, str] = field(default_factory=dict)
    user_inputs_to_mutate: dict[str, str] = field(default_factory=dict)
    buffers_to_mutate: dict[str, str] = field(default_factory=dict)
    parameters_to_mutate: dict[str, str] = field(default_factory=dict)


def sampled(gm: GraphModule, export: Export) -> tuple[Module, Graph, Signature] | None:
    """What owns the graph's constants, the functional graph and its signature, or None where they
    cannot be had from a sample."""
    try:
        calls = [_Call.of(n) for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
        distinct: dict[object, _Call] = {}
        for call in calls:
            distinct.setdefault(call.key, call)
        return _assemble(gm, calls, _Sample(distinct, export))
    except _Dependent:
        return None


class _Dependent(Exception):
    """The calls of this graph, or what was traced of them, cannot be told apart."""


# ------------------------------------------------------------------------------------------- calls


@dataclass(frozen=True, eq=False)
class _Call:
    """A call; those with equal keys give the same operators."""

    node: Node
    operands: tuple[Node, ...]
    key: object

    @staticmethod
    def of(node: Node) -> _Call:
        if node.op not in ("call_function", "call_method"):
            raise _Dependent
        if isinstance(node.target, HigherOrderOperator):
            raise _Dependent
        numbers: dict[Node, int] = {}
        given = _described((node.args, node.kwargs), numbers)
        result = None if _value(node) is None else _type(node)
        key = (node.op, node.target, given, tuple(map(_type, numbers)), result)
        return _Call(node, tuple(numbers), key)

    @property
    def arguments(self) -> list[Any]:
        return [leaf for operand in self.operands for leaf in _leaves(_value(operand))]


def _described(value: Any, numbers: dict[Node, int]) -> object:
    """Arguments as they compare: 1 is not True, 0.0 is not -0.0; values by number of first use."""
    if isinstance(value, Node):
        return numbers.setdefault(value, len(numbers))
    if isinstance(value, (tuple, list)):
        return (type(value), *(_described(v, numbers) for v in value))
    if isinstance(value, dict):
        return tuple((k, _described(v, numbers)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _described((value.start, value.stop, value.step), numbers))
    if not isinstance(value, _PLAIN):
        raise _Dependent
    return (type(value), repr(value))


def _value(node: Node) -> Any:
    """The fake tensor, or tensors, that a node stood for when Dynamo or torch.export traced it."""
    return node.meta.get("example_value", node.meta.get("val"))


def _type(node: Node) -> object:
    return _type_of(_value(node))


def _type_of(value: Any) -> object:
    """All of a value that tracing can see; only tensors, or tuples of them, of known sizes."""
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_type_of, value))
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise _Dependent
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    if is_written(value) or not all(type(size) is int for size in sizes):
        raise _Dependent
    marks = (value.is_conj(), value.is_neg(), value.requires_grad, value.is_inference())
    return (type(value), value.dtype, value.device, value.dim(), sizes, marks)


def _leaves(value: Any) -> list[Any]:
    """The tensors, or nodes, in a value; none in None."""
    if isinstance(value, (tuple, list)):
        return [leaf for v in value for leaf in _leaves(v)]
    return [] if value is None else [value]


def _filled(value: Any, nodes: Iterator[Node]) -> Any:
    """The value with a node in the place of each tensor."""
    if isinstance(value, (tuple, list)):
        return tuple(_filled(v, nodes) for v in value)
    return next(nodes)


# ------------------------------------------------------------------------------------------ sample


@dataclass(frozen=True)
class _Piece:
    """What one call became: operators on `inputs`; `results` may be inputs too."""

    inputs: list[Node]
    nodes: list[Node]
    results: list[Node]


class _Sample:
    """The export of distinct calls on common placeholders, taken apart again.

    Arguments of one type are one placeholder for all calls: what a call writes would show, and is
    refused. The arguments of a single call stay apart.
    """

    def __init__(self, distinct: Mapping[object, _Call], export: Export) -> None:
        graph, calls = Graph(), list(distinct.values())
        shared: dict[object, int] = {}  # type, and how many of it a call has before -> placeholder
        values: list[Any] = []
        places = [_places(call, shared, values) for call in calls]
        nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
        made = [_copy(graph, call, [nodes[i] for i in at]) for call, at in zip(calls, places)]
        graph.output(tuple(n for n in made if _value(n) is not None))
        self.module, signature = export(GraphModule(Module(), graph), values)
        written = (signature.user_inputs_to_mutate, signature.buffers_to_mutate)
        if any(written) or len(self.module.graph.find_nodes(op="placeholder")) != len(values):
            raise _Dependent
        drop_checks(self.module.graph)
        self.pieces = dict(zip(distinct, self._pieces(calls, places)))

    def _pieces(self, calls: list[_Call], places: list[list[int]]) -> list[_Piece]:
        graph = self.module.graph
        given = graph.find_nodes(op="placeholder")
        results = iter(graph.output_node().args[0])
        owner: dict[Node, int] = {}
        pieces = []
        for number, (call, at) in enumerate(zip(calls, places)):
            inputs = [given[i] for i in at]
            found = [next(results) for _ in _leaves(_value(call.node))]
            _own(found, inputs, number, owner)
            pieces.append(_Piece(inputs, [], found))
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                if node not in owner:  # an effect that no result shows
                    raise _Dependent
                pieces[owner[node]].nodes.append(node)
        return pieces


def _places(call: _Call, shared: dict[object, int], values: list[Any]) -> list[int]:
    """Numbers of the placeholders that stand for a call's arguments; new ones join `values`."""
    count: Counter[object] = Counter()
    places = []
    for value in call.arguments:
        kind = _type_of(value)
        place = shared.setdefault((kind, count[kind]), len(values))
        count[kind] += 1
        if place == len(values):
            values.append(value)
        places.append(place)
    return places


def _copy(graph: Graph, call: _Call, places: Sequence[Node]) -> Node:
    left = iter(places)
    env = {operand: _filled(_value(operand), left) for operand in call.operands}
    return graph.node_copy(call.node, env.__getitem__)


def _own(
    results: Sequence[Any], inputs: Sequence[Node], number: int, owner: dict[Node, int]
) -> None:
    """Give a call all nodes that its results need."""
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in inputs:
            continue
        if not isinstance(node, Node) or node.op == "placeholder":
            raise _Dependent
        if owner.get(node, number) != number:
            raise _Dependent
        if node not in owner:
            owner[node] = number
            stack += node.all_input_nodes


# ------------------------------------------------------------------------------------ whole graph


def _assemble(
    gm: GraphModule, calls: Sequence[_Call], sample: _Sample
) -> tuple[Module, Graph, Signature]:
    graph = Graph()
    made: dict[Node, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        made[node] = graph.placeholder(node.name)
        made[node].meta["val"] = _value(node)
    names = [node.name for node in graph.nodes]
    for call in calls:
        if _value(call.node) is not None:  # else it became nothing, as the sample has shown
            made[call.node] = _again(graph, call, sample.pieces[call.key], made)
    results = gm.graph.output_node()
    if not all(isinstance(made[node], Node) for node in results.all_input_nodes):
        raise _Dependent  # a list among the results
    graph.output(map_arg(results.args[0], made.__getitem__))
    return sample.module, graph, Signature(names)


def _again(graph: Graph, call: _Call, piece: _Piece, made: Mapping[Node, Any]) -> Any:
    """Copy a piece for a call; returns the node, or nested nodes, of its value."""
    given = [leaf for operand in call.operands for leaf in _leaves(made[operand])]
    env = dict(zip(piece.inputs, given, strict=True))
    where = {k: call.node.meta.get(k) for k in _ORIGIN}
    for node in piece.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta.update(where)
    for result, value in zip(piece.results, _leaves(_value(call.node)), strict=True):
        if result.op != "placeholder":  # shares memory with what this very call was given
            env[result].meta["val"] = value
    return _filled(_value(call.node), map(env.__getitem__, piece.results))


__all__ = ["Signature", "sampled"]
