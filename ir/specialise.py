"""A graph with some of its sizes replaced: by numbers, or by other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .graph import Graph, Input
from .op import Op, map_values
from .symbols import Dim, dim, symbol, symbolic
from .types import Tensor

if TYPE_CHECKING:
    import sympy


def specialise(graph: Graph, sizes: Mapping[Any, Dim]) -> Graph:
    """The graph in which the given sizes (by symbol or name) stand everywhere, regions included.

    Types are inferred again; OpError where a node is impossible at the new sizes.
    """
    return _specialised(
        graph, {symbol(s) if isinstance(s, str) else s: d for s, d in sizes.items()}
    )


def _specialised(graph: Graph, env: Mapping[sympy.Symbol, Dim]) -> Graph:
    new: dict[Op, Op] = {}
    for node in (*graph.inputs, *graph.nodes):
        new[node] = resized(node, env, new)
    inputs: Any = tuple(new[i] for i in graph.inputs)
    nodes = tuple(new[n] for n in graph.nodes)
    return Graph(inputs, nodes, tuple(new[o] for o in graph.outputs), graph.name)


def resized(node: Op, env: Mapping[sympy.Symbol, Dim], new: Mapping[Op, Op]) -> Op:
    """The node on other operands, with sizes replaced in its attributes, type and regions."""
    if isinstance(node, Input):
        of = replaced(node.of, env)
        return node if of == node.of else node.replace(of=of)
    if not env.keys() & node.symbols and not any(f.kind == "type" for f in node.fields):
        return node.map_operands(new.__getitem__)
    if not node.operands and not env.keys() & node.all_symbols:
        return node
    values = {f.name: map_values(getattr(node, f.name), new.__getitem__) for f in node.fields}
    return type(node)(**{k: replaced(v, env) for k, v in values.items()}).from_(node)


def replaced(value: Any, env: Mapping[sympy.Symbol, Dim]) -> Any:
    """A field of a node, or a size, with sizes replaced."""
    if isinstance(value, Op):
        return value
    if isinstance(value, Graph):
        return _specialised(value, env)
    if isinstance(value, Tensor):
        return value.with_(shape=replaced(value.shape, env))
    if isinstance(value, tuple):
        return tuple(replaced(v, env) for v in value)
    if not symbolic(value):
        return value
    result: Any = value.subs(env)
    return dim(result) if result.is_integer else result


__all__ = ["replaced", "resized", "specialise"]
