"""The reference interpreter: each node by its op's own `reference`, in program order.

It is the living definition of a graph. It is slow and does not try to be anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError
from .graph import Graph, Weight
from .op import Op, map_values
from .symbols import dim_text, evaluate, symbolic
from .types import Number, Tensor, Type

if TYPE_CHECKING:
    import sympy

Observer = Callable[[Op, Any], None]
_INT, _FLOAT = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)


def interpret(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    observe: Observer | None = None,
    env: Mapping[sympy.Symbol, int | float] | None = None,
) -> tuple[Any, ...]:
    """Run the graph on tensors (and numbers for `size` inputs).

    observe: called with every node and its value. env: symbols already known (regions).
    Raises InputError when inputs do not fit the graph's types, ValueError for a weight without
    data. A value is dropped after its last use.
    """
    env = bind_symbols(graph, inputs, env)
    values: dict[Op, Any] = dict(zip(graph.inputs, inputs, strict=True))
    last_use = _last_uses(graph)
    for position, node in enumerate(graph.nodes):
        values[node] = run_node(node, values, env)
        if observe is not None:
            observe(node, values[node])
        for dead in last_use.get(position, ()):
            del values[dead]
    return tuple(values[o] for o in graph.outputs)


def run_node(node: Op, values: Mapping[Op, Any], env: Mapping[sympy.Symbol, int | float]) -> Any:
    """One node on the values of its operands."""
    if isinstance(node, Weight):
        if node.data is None:
            raise ValueError(f"weight {node.key!r} has no values; pass weights= to parse()")
        return node.value
    bound = node.bind(env)
    swap = dict(zip(map(id, bound.operands), node.operands, strict=True))
    args = [
        map_values(getattr(bound, f.name), lambda o: values[swap[id(o)]])
        for f in node.fields
        if f.kind == "operand"
    ]
    if node.regions:
        return bound.run_region(env, *args)  # type: ignore[attr-defined]
    return bound.reference(*args)


def bind_symbols(
    graph: Graph,
    inputs: Sequence[Any],
    env: Mapping[sympy.Symbol, int | float] | None = None,
) -> dict[sympy.Symbol, int | float]:
    """Numbers behind the graph's symbols, read off the inputs. Raises InputError on a misfit."""
    if len(inputs) != len(graph.inputs):
        raise InputError(f"{graph.name} takes {len(graph.inputs)} inputs, got {len(inputs)}")
    found: dict[sympy.Symbol, Any] = dict(env or {})
    for node, value in zip(graph.inputs, inputs, strict=True):
        t = node.of
        if isinstance(t, Number):
            if isinstance(value, bool) or not isinstance(value, _INT if t.integer else _FLOAT):
                raise InputError(f"input {node.key} must be a {t}, got {value!r}")
            found[node.symbol] = value
        elif isinstance(t, Tensor):
            if not isinstance(value, torch.Tensor) or len(value.shape) != t.rank:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                raise InputError(f"input {node.key} must be {t}, got {got}")
            if t.dtype.torch != value.dtype:
                raise InputError(
                    f"input {node.key} must be {t}, got {value.dtype}",
                    fix=f"cast it: {node.key}.to({t.dtype.torch})",
                )
            for want, got in zip(t.shape, value.shape, strict=True):
                if symbolic(want) and want.is_Symbol:
                    found.setdefault(want, got)
    for node, value in zip(graph.inputs, inputs, strict=True):
        if isinstance(node.of, Tensor):
            _check_shape(node.key, node.of, tuple(value.shape), found)
    return found


def _check_shape(key: str, t: Tensor, got: tuple[int, ...], env: Mapping[Any, Any]) -> None:
    for axis, (want, size) in enumerate(zip(t.shape, got, strict=True)):
        expected = want if isinstance(want, int) else evaluate(want, env)
        if expected != size:
            named = "" if isinstance(want, int) else f" ({dim_text(want)} = {expected})"
            raise InputError(f"input {key} must be {t}{named}, got size {size} in dimension {axis}")


def _last_uses(graph: Graph) -> dict[int, list[Op]]:
    last: dict[Op, int] = {}
    for position, node in enumerate(graph.nodes):
        last[node] = position
        for operand in node.operands:
            last[operand] = position
    kept = set(graph.outputs)
    dead: dict[int, list[Op]] = {}
    for value, position in last.items():
        if value not in kept:
            dead.setdefault(position, []).append(value)
    return dead


def random_input(t: Type, env: Mapping[sympy.Symbol, int | float], seed: int = 0) -> Any:
    """A value of the type: normal floats, small non-negative ints."""
    if isinstance(t, Number):
        raise ValueError("a number input has no random value; it is a symbol in env")
    if isinstance(t, tuple):
        return tuple(random_input(x, env, seed) for x in t)
    shape: Any = evaluate(t.shape, env)
    generator = torch.Generator().manual_seed(seed)
    if t.dtype.torch is None:
        raise ValueError(f"torch has no {t.dtype}")
    if t.dtype.kind in ("float", "complex"):
        return torch.randn(shape, generator=generator).to(t.dtype.torch)
    return torch.randint(0, 2, shape, generator=generator).to(t.dtype.torch)
