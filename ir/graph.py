"""A graph: inputs, nodes in program order, outputs. Immutable: every change gives a new graph.

Nodes point at their operands, so graphs share all that a pass did not touch and any two stages of
a compilation can be compared. Program order matters only to random ops; it is kept everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from .op import Cost, Op, op
from .symbols import real_symbol, symbol
from .types import Number, Tensor, Type, type_text


@op("input")
class Input(Op):
    """A value given by the caller. A `size` or `number` input is the symbol of its own name."""

    key: str
    of: Type

    def infer(self) -> Type:
        return self.of

    @property
    def symbol(self) -> sympy.Symbol:
        integer = isinstance(self.of, Number) and self.of.integer
        return symbol(self.key) if integer else real_symbol(self.key)


@op("weight")
class Weight(Op):
    """A constant of the model: parameter, buffer or literal tensor, by its state-dict name.

    The tensor itself rides along in `data` and is not part of the text: text has the digest.
    """

    key: str
    of: Tensor
    digest: str = ""

    data = None  # type: torch.Tensor | None

    def infer(self) -> Type:
        return self.of

    @staticmethod
    def holding(key: str, data: torch.Tensor, of: Tensor | None = None) -> Weight:
        """A weight with its values. `of` gives the type where it is not the dense one."""
        from .types import type_of

        node = Weight(key, of or type_of(data))
        object.__setattr__(node, "data", data)
        return node

    @property
    def content(self) -> str:
        """First 8 hex digits of a hash of the values; what text prints as `digest`."""
        return self.digest if self.data is None else digest(self.data)

    def map_operands(self, fn: Callable[[Op], Op]) -> Op:
        return self


def digest(t: torch.Tensor) -> str:
    """Hash of dtype, shape and values, in logical order."""
    h = hashlib.blake2b(f"{t.dtype}{tuple(t.shape)}".encode(), digest_size=4)
    if t.numel():
        flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()


@op("item")
class Item(Op):
    """One result of an op that has several."""

    x: Op
    index: int

    view = True

    def infer(self) -> Type:
        if not isinstance(self.x.type, tuple):
            raise self.fail("the operand has one result")
        if not 0 <= self.index < len(self.x.type):
            raise self.fail(f"index {self.index} of {len(self.x.type)} results")
        return self.x.type[self.index]

    def reference(self, x: Any) -> Any:
        return x[self.index]

    def cost(self) -> Cost:
        return Cost(0, 0)


@dataclass(frozen=True, eq=False)
class Graph:
    """inputs -> outputs. Equal when structure, types, attributes and weight digests are equal."""

    inputs: tuple[Input, ...]
    nodes: tuple[Op, ...]  # all but inputs, operands first
    outputs: tuple[Op, ...]
    name: str = "graph"

    @staticmethod
    def of(inputs: Iterable[Input], outputs: Iterable[Op], name: str = "graph") -> Graph:
        """Graph of everything the outputs need, in depth-first order."""
        inputs, outputs = tuple(inputs), tuple(outputs)
        return Graph(inputs, tuple(_ordered(outputs, (), inputs)), outputs, name)

    # -------------------------------------------------------------- reading

    @cached_property
    def users(self) -> dict[Op, tuple[Op, ...]]:
        """Users of each value, once per use, in program order; outputs are not counted here."""
        found: dict[Op, list[Op]] = {n: [] for n in (*self.inputs, *self.nodes)}
        for node in self.nodes:
            for operand in node.operands:
                found[operand].append(node)
        return {n: tuple(u) for n, u in found.items()}

    def uses(self, value: Op) -> int:
        """How often a value is read, as an operand or as an output of the graph."""
        return len(self.users[value]) + sum(o is value for o in self.outputs)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Weight))

    @cached_property
    def all_symbols(self) -> frozenset[sympy.Symbol]:
        """Every symbol in types and attributes, regions included."""
        from .op import _free

        found: set[sympy.Symbol] = set()
        for node in (*self.inputs, *self.nodes):
            found |= node.symbols | _free(node.type)
        return frozenset(found)

    @cached_property
    def constants(self) -> frozenset[Op]:
        """Nodes that need no input: weights, literals and all that is computed from them alone.

        The plan evaluates these once per set of weights, not once per call.
        """
        from .op import _free

        found: set[Op] = set()
        for node in self.nodes:
            free = node.random or node.symbols or _free(node.type)
            if not free and all(o in found for o in node.operands):
                found.add(node)
        return frozenset(found)

    def cost(self) -> Cost:
        """Sum over nodes; constants are paid once and do not count."""
        total = Cost(0, 0)
        for node in self.nodes:
            if node not in self.constants:
                total = total + node.cost()
        return total

    @property
    def text(self) -> str:
        from .text import text

        return text(self)

    def __str__(self) -> str:
        return self.text

    # -------------------------------------------------------------- changing

    def rebuild(self, visit: Callable[[Op], Op], name: str | None = None) -> Graph:
        """New graph where each node, its operands already mapped, is replaced by visit(node).

        Drops what nothing needs any more (random ops stay). Returns self if nothing changed.
        """
        return self._remap(lambda node, mapped, remap: visit(mapped), name)

    def substitute(self, new: Mapping[Op, Op], name: str | None = None) -> Graph:
        """New graph where values are replaced; replacements are written in terms of old nodes."""

        def replace(node: Op, mapped: Op, remap: Callable[[Op], Op]) -> Op:
            if node not in new:
                return mapped
            if not new[node].origins:
                new[node].from_(node)
            return remap(new[node])

        return self._remap(replace, name)

    def live(self) -> Graph:
        """The graph without nodes that no output and no random op needs."""
        nodes = tuple(_ordered(self.outputs, self.nodes, self.inputs))
        return self if len(nodes) == len(self.nodes) else Graph(
            self.inputs, nodes, self.outputs, self.name
        )  # fmt: skip

    def with_nodes(self, order: Iterable[Op]) -> Graph:
        """The same values in the given program order; random nodes listed here are kept."""
        nodes = tuple(_ordered(self.outputs, order, self.inputs))
        return Graph(self.inputs, nodes, self.outputs, self.name)

    def with_outputs(self, outputs: Iterable[Op]) -> Graph:
        outputs = tuple(outputs)
        return Graph(
            self.inputs, tuple(_ordered(outputs, self.nodes, self.inputs)), outputs, self.name
        )

    def _remap(
        self, replace: Callable[[Op, Op, Callable[[Op], Op]], Op], name: str | None
    ) -> Graph:
        memo: dict[Op, Op] = {i: i for i in self.inputs}

        def remap(value: Op) -> Op:
            if value in memo:
                return memo[value]
            stack = [value]
            while stack:
                top = stack[-1]
                waiting = [o for o in top.operands if o not in memo]
                if waiting:
                    stack += waiting
                else:
                    memo.setdefault(top, top.map_operands(memo.__getitem__))
                    stack.pop()
            return memo[value]

        for node in self.nodes:
            mapped = memo[node] = node.map_operands(remap)
            result = memo[node] = replace(node, mapped, remap)
            if not result.origins:
                result.from_(node)
        outputs = tuple(memo[o] for o in self.outputs)
        same = all(memo[n] is n for n in self.nodes)
        if same and (name is None or name == self.name):
            return self
        keep = [memo[n] for n in self.nodes]
        nodes = tuple(_ordered(outputs, keep, self.inputs))
        return Graph(self.inputs, nodes, outputs, name or self.name)

    # -------------------------------------------------------------- equality

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Structure as nested tuples: equal signatures, equal graphs."""
        number: dict[Op, int] = {}
        rows: list[object] = []
        for node in (*self.inputs, *self.nodes):
            number[node] = len(number)
            rows.append(_row(node, number))
        return (self.name, tuple(rows), tuple(number[o] for o in self.outputs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self is other or self.signature == other.signature)

    def __hash__(self) -> int:
        return hash(self.signature)


def _row(node: Op, number: Mapping[Op, int]) -> tuple[object, ...]:
    from .op import map_values

    values: list[object] = []
    for f in node.fields:
        value = getattr(node, f.name)
        if f.kind == "operand":
            values.append(map_values(value, lambda o: ("%", number[o])))
        elif f.kind == "region":
            values.append(value.signature)
        elif isinstance(node, Weight) and f.name == "digest":
            values.append(node.content)
        else:
            values.append((type(value).__name__, repr(value)))  # repr: 1 and True, nan and nan
    return (node.name, type_text(node.type), *values)


def _ordered(outputs: Iterable[Op], hint: Iterable[Op], inputs: Iterable[Op]) -> list[Op]:
    """Nodes that outputs or random ops need, operands first, otherwise in the order of `hint`."""
    hint = list(hint)
    roots = [*outputs, *(n for n in hint if n.random)]
    needed: set[Op] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.operands
    done: set[Op] = set(inputs)
    order: list[Op] = []
    for root in (*(n for n in hint if n in needed), *roots):
        stack = [root]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            waiting = [o for o in node.operands if o not in done]
            if waiting:
                stack += reversed(waiting)
            else:
                done.add(node)
                stack.pop()
                if not isinstance(node, Input):
                    order.append(node)
    return order
