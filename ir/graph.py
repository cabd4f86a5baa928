"""A graph: inputs, nodes in program order, outputs. Immutable: every change gives a new graph.

Nodes point at their operands, so graphs share all that a pass did not touch and any two stages of
a compilation can be compared. Program order matters only to random ops; it is kept everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

import torch

from . import codes
from .op import Cost, Op, op
from .symbols import dim_text, real_symbol, symbol, symbolic
from .types import Dense, Number, Tensor, Type, type_text

if TYPE_CHECKING:
    import sympy


@op("input")
class Input(Op):
    """A value given by the caller. A `size` or `number` input is the symbol of its own name.

    state: the graph gives its new value back among its last outputs (`Graph.states`); the caller
    keeps it and hands it to the next call. The text of its type is `State[f32[2, C, 64]]`.
    """

    key: str
    of: Type
    state: bool = False

    def infer(self) -> Type:
        if not self.key.isidentifier() or iskeyword(self.key) or self.key in ("inf", "nan"):
            raise self.fail(f"{self.key!r} cannot be the name of an input")
        if self.state and not isinstance(self.of, Tensor):
            raise self.fail(f"{self.key} is {type_text(self.of)}; a state is one tensor")
        return self.of

    @property
    def symbol(self) -> sympy.Symbol:
        integer = isinstance(self.of, Number) and self.of.integer
        return symbol(self.key) if integer else real_symbol(self.key)


@op("weight")
class Weight(Op):
    """A constant of the model: parameter, buffer or literal tensor, by its state-dict name.

    The tensor itself rides along in `data` and is not part of the text: text has the digest.
    Codes (elements of less than 8 bits) are packed there, and `value` unpacks them.
    also: names of other weights of the model whose place it takes, their values being the same.
    """

    key: str
    of: Tensor
    digest: str = ""
    also: tuple[str, ...] = ()

    data = None  # type: torch.Tensor | None

    def infer(self) -> Type:
        return self.of

    @staticmethod
    def holding(key: str, data: torch.Tensor, of: Tensor | None = None) -> Weight:
        """A weight with its values. `of` gives the type where it is not that of the tensor; codes
        may be given a byte each.
        """
        from .types import type_of

        of = of or type_of(data)
        if of.dtype.is_code and (tuple(data.shape), data.dtype) != of.stored:
            data = codes.pack(data, of.dtype)
        node = Weight(key, of)
        object.__setattr__(node, "data", data)
        return node

    @property
    def value(self) -> torch.Tensor:
        """The values, of the shape and type that the weight has in a graph."""
        assert self.data is not None
        return unpacked(self.data, self.of)

    @property
    def content(self) -> str:
        """First 8 hex digits of a hash of the values; what text prints as `digest`."""
        return self.digest if self.data is None else digest(self.data)

    def map_operands(self, fn: Callable[[Op], Op]) -> Op:
        return self

    def replace(self, **changes: object) -> Weight:
        """The same weight with some fields changed; keeps its values and origins."""
        node = super().replace(**changes)
        object.__setattr__(node, "data", self.data)
        return node


def unpacked(data: torch.Tensor, of: Tensor) -> torch.Tensor:
    """What a graph computes with, of what a weight of that type keeps."""
    if not of.dtype.is_code:
        return data
    return codes.unpack(data, of.dtype, of.shape)  # type: ignore[arg-type]  # known sizes


def digest(t: torch.Tensor) -> str:
    """Hash of dtype, shape and values, in logical order."""
    h = hashlib.blake2b(f"{t.dtype}{tuple(t.shape)}".encode(), digest_size=4)
    if t.numel():
        h.update(_raw(t.cpu()).numpy().data)
    return h.hexdigest()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal types, shapes and values, bit for bit: 0.0 is not -0.0, and nan is nan."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return torch.equal(_raw(a), _raw(b))


def _raw(t: torch.Tensor) -> torch.Tensor:
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8) if t.numel() else flat


@op("item")
class Item(Op):
    """One result of an op that has several, or one part of a compressed value."""

    x: Op
    index: int

    view = True

    def infer(self) -> Type:
        found = self.x.type
        if isinstance(found, Tensor) and not isinstance(found.format, Dense):
            found = tuple(found.format.parts(found).values())
        if not isinstance(found, tuple):
            raise self.fail("the operand has one result")
        if not 0 <= self.index < len(found):
            raise self.fail(f"index {self.index} of {len(found)} results")
        return found[self.index]

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

    @property
    def states(self) -> tuple[Input, ...]:
        """Inputs whose new values are the last outputs, in the same order."""
        return tuple(i for i in self.inputs if i.state)

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
        found: set[sympy.Symbol] = set()
        for node in (*self.inputs, *self.nodes):
            found |= node.all_symbols
        return frozenset(found)

    @property
    def free_symbols(self) -> frozenset[sympy.Symbol]:
        """Those that are not inputs of the graph itself."""
        return self.all_symbols - {i.symbol for i in self.inputs if isinstance(i.of, Number)}

    @cached_property
    def constants(self) -> frozenset[Op]:
        """Nodes that need no input: weights, literals and all that is computed from them alone.

        The plan evaluates these once per set of weights, not once per call.
        """
        found: set[Op] = set()
        for node in self.nodes:
            if found.issuperset(node.operands) and not (node.random or node.all_symbols):
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

    def __repr__(self) -> str:
        counts = f"{len(self.inputs)} inputs, {len(self.nodes)} nodes, {len(self.outputs)} outputs"
        return f"<graph {self.name}: {counts}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text, in notebooks and in failing examples of property tests."""
        for i, line in enumerate(self.text.splitlines()):
            if i:
                printer.break_()
            printer.text(line)

    # -------------------------------------------------------------- changing

    def rebuild(self, visit: Callable[[Op], Op], name: str | None = None) -> Graph:
        """New graph where each node, its operands already mapped, is replaced by visit(node).

        Drops what nothing needs any more (random ops stay). Returns self if nothing changed.
        """
        return self._remap(lambda node, mapped, remap: visit(mapped), name)

    def substitute(self, new: Mapping[Op, Op], name: str | None = None) -> Graph:
        """New graph where values are replaced; replacements are written in terms of old nodes.

        A replacement may read the value it replaces: that stays the old value.
        """

        def replace(node: Op, mapped: Op, remap: Callable[[Op], Op]) -> Op:
            return remap(new[node]) if node in new else mapped

        return self._remap(replace, name, self.inputs)

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
        self,
        replace: Callable[[Op, Op, Callable[[Op], Op]], Op],
        name: str | None,
        inputs: Iterable[Op] = (),
    ) -> Graph:
        """inputs: those that may be replaced too."""
        old = {*self.inputs, *self.nodes}
        memo: dict[Op, Op] = {i: i for i in self.inputs}

        def finish(node: Op) -> None:
            mapped = memo[node] = node.map_operands(memo.__getitem__)
            result = memo[node] = replace(node, mapped, remap)
            if not result.origins and result not in old:
                result.from_(node)

        def remap(value: Op) -> Op:
            stack = [value]
            while stack:
                top = stack[-1]
                waiting = [] if top in memo else [o for o in top.operands if o not in memo]
                stack += waiting
                if waiting:
                    continue
                stack.pop()
                if top not in memo and top in old:
                    finish(top)  # a replacement may read values further down
                elif top not in memo:
                    memo[top] = top.map_operands(memo.__getitem__)
            return memo[value]

        for value in inputs:
            finish(value)
        for node in self.nodes:
            remap(node)
        outputs = tuple(memo[o] for o in self.outputs)
        same = all(memo[n] is n for n in old)
        if same and (name is None or name == self.name):
            return self
        keep = [memo[n] for n in (*self.inputs, *self.nodes)]
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
            rows.append(row(node, number))
        return (self.name, tuple(rows), tuple(number[o] for o in self.outputs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self is other or self.signature == other.signature)

    def __hash__(self) -> int:
        return hash(self.signature)


def row(node: Op, number: Mapping[Op, int]) -> tuple[object, ...]:
    """One line of a signature: op, type, attributes and regions; operands by number."""
    values = {f.name: getattr(node, f.name) for f in node.fields}
    if isinstance(node, Weight):
        values["digest"] = node.content
    return (node.name, type_text(node.type), *(_plain(v, number) for v in values.values()))


def _plain(value: object, number: Mapping[Op, int]) -> object:
    """A field as plain data that compares as its text does: 1 is not True, nan is nan."""
    if isinstance(value, Op):
        return ("%", number[value])
    if isinstance(value, tuple):
        return tuple(_plain(v, number) for v in value)
    if isinstance(value, Graph):
        return value.signature[1:]  # the name of a region is for people
    if symbolic(value):
        return ("size", dim_text(value))
    if isinstance(value, (Tensor, Number)):
        return ("type", type_text(value))
    return (type(value).__name__, repr(value))


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
            node = stack.pop()
            if node in done:
                continue
            if not done.issuperset(node.operands):
                stack.append(node)
                stack += [o for o in reversed(node.operands) if o not in done]
                continue
            done.add(node)
            if not isinstance(node, Input):
                order.append(node)
    return order
