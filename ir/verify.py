"""The verifier: what every graph must be, checked after each pass in tests and on request.

1. Inputs are distinct Input nodes with distinct names, none of them the name of a size.
2. Every operand of a node is an input or an earlier node; no node appears twice.
3. Every output is an input or a node of the graph.
4. The type a node carries is what its op infers from its operands.
5. Every symbol in a type or attribute can be read off the inputs (or, in a region, off the graph
   around it).
6. A region's inputs have the types of the operands it is applied to, and it is itself valid.
7. A weight's data, where present, has the shape and element type that the node declares.
8. A graph with s states gives their new values, of the same types and in order, as its last s
   outputs. A region has no states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import OpError, VerifyError
from .graph import Graph, Input, Weight
from .op import Op, _free
from .symbols import symbolic
from .text import node_text
from .types import Number, Tensor, type_text

if TYPE_CHECKING:
    import sympy

WINDOW = 10


def verify(graph: Graph, known: frozenset[sympy.Symbol] = frozenset()) -> Graph:
    """Return the graph, or raise VerifyError with the node, the reason and the lines around it."""
    seen: set[Op] = set()
    keys: set[str] = set()
    for i in graph.inputs:
        if not isinstance(i, Input):
            raise VerifyError(f"{graph.name}: {i!r} stands among the inputs")
        if i.key in keys:
            raise VerifyError(f"{graph.name}: two inputs are called {i.key!r}")
        keys.add(i.key)
        seen.add(i)
    symbols = known | input_symbols(graph)
    for i in graph.inputs:
        if i.key in {s.name for s in graph.free_symbols}:
            raise VerifyError(f"{graph.name}: {i.key!r} names an input and a size")
        if _free(i.of) - symbols:
            given = f"{graph.name}: input {i.key} is {type_text(i.of)}"
            raise VerifyError(given, why=_unread(_free(i.of) - symbols))
    for node in graph.nodes:
        why = _problem(node, seen, symbols)
        if why:
            raise VerifyError(
                f"{graph.name}: invalid {node.name}", node=_line(graph, node), where=node.where,
                why=why, context=window(graph, node),
            )  # fmt: skip
        seen.add(node)
        for region in node.regions:
            verify(region, symbols)
    for o in graph.outputs:
        if o not in seen:
            raise VerifyError(f"{graph.name}: output {o!r} is not computed by the graph")
    _verify_states(graph)
    return graph


def _verify_states(graph: Graph) -> None:
    states = graph.states
    if len(states) > len(graph.outputs):
        given = f"{graph.name}: {len(states)} states and {len(graph.outputs)} outputs"
        raise VerifyError(given, why="the last outputs are the new values of the states")
    first = len(graph.outputs) - len(states)
    for position, (state, new) in enumerate(zip(states, graph.outputs[first:]), first):
        if type_text(state.type) != type_text(new.type):
            raise VerifyError(
                f"{graph.name}: output {position} is {type_text(new.type)}",
                where=new.where, why=f"it is the new value of {state.key}, {type_text(state.type)}",
            )  # fmt: skip


def input_symbols(graph: Graph) -> frozenset[sympy.Symbol]:
    """Symbols that a call binds: sizes that stand alone in an input's shape, and number inputs."""
    found: set[sympy.Symbol] = set()
    for i in graph.inputs:
        if isinstance(i.of, Number):
            found.add(i.symbol)
        elif isinstance(i.of, Tensor):
            found.update(d for d in i.of.shape if symbolic(d) and d.is_Symbol)
    return frozenset(found)


def _problem(node: Op, seen: set[Op], symbols: frozenset[sympy.Symbol]) -> str | None:
    if node in seen:
        return "the node appears twice"
    if isinstance(node, Input):
        return "an input stands among the nodes"
    for operand in node.operands:
        if operand not in seen:
            return f"operand {operand!r} is not computed before it"
    unknown = node.all_symbols - symbols
    if unknown:
        return _unread(unknown)
    try:
        inferred = node.infer()
    except OpError as e:
        return e.what
    if type_text(inferred) != type_text(node.type):
        return f"it carries {type_text(node.type)}, infer says {type_text(inferred)}"
    if isinstance(node, Weight) and node.data is not None:
        data = node.data
        if (tuple(data.shape), data.dtype) != node.of.stored:
            return f"its data is {data.dtype}{list(data.shape)}"
    for region in node.regions:
        want = tuple(type_text(i.type) for i in region.inputs)
        got = tuple(map(type_text, node.region_types))
        if want != got:
            return f"its region takes ({', '.join(want)}), operands are ({', '.join(got)})"
        if region.states:
            return f"its region has a state, {region.states[0].key}"
    return None


def _unread(symbols: frozenset[sympy.Symbol] | set[sympy.Symbol]) -> str:
    return f"size {min(map(str, symbols))} cannot be read off the inputs"


def _line(graph: Graph, node: Op) -> str:
    try:
        return node_text(graph, node)
    except (KeyError, ValueError):  # an operand is missing, which is what we are reporting
        return repr(node)


def window(graph: Graph, node: Op) -> str:
    """The lines either side of a node, the node marked, for error messages."""
    position = graph.nodes.index(node)
    first = max(0, position - WINDOW)
    rows = []
    for other in graph.nodes[first : position + WINDOW + 1]:
        rows.append(f"  {'>' if other is node else ' '} {_line(graph, other)}")
    return "\n".join(rows)
