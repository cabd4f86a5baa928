"""Repeated structure: runs of equal blocks along a residual stream, and the sums that feed it.

Two blocks are equal where their nodes are, one by one, in op, type, attributes and wiring. The
constants that they read may differ in value, and names of modules play no part. What goes into a
block is the value that the block before gives (the carry), what all blocks of the run read (the
shared values: rotary tables, masks, conditioning), constants, and further values that come from no
block of the run. FoldGPT, arXiv 2407.00928, drops and shares such blocks; rolling, step caches and
KV caches cut models at the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effc.ir import Graph, Op, Weight
from effc.ir.graph import row
from effc.ir.op import nbytes
from effc.ir.symbols import Dim

from . import analysis

TRIES = 64
"""How many values of one look are tried as the one a block before: more than any period seen."""
FAILURES = 3
"""After as many tries in which more than the carry passed from block to block, none will do."""
HOPELESS = 8
"""After as many values of one look for which none did, no value of that look ends a block."""


@dataclass(frozen=True)
class Update:
    """y = x + h(x). nodes: those that compute h from x, in program order; what they read beside x
    (constants, tables, conditioning) does not come from x."""

    x: Op
    y: Op
    h: Op
    nodes: tuple[Op, ...]


@dataclass(frozen=True)
class Block:
    """One of the equal blocks of a run. What has the same place in the `nodes`, `weights`, `given`
    or `emitted` of two blocks has the same part in both.

    index: place in the run. carry: the residual stream entering. result: the stream leaving, the
    last residual sum (or, where norms stand behind sums, the last norm). nodes: in program order,
    constants left out. weights: the constants it reads, computed ones too, that are not the same
    for all blocks. updates: residual sums along the stream, in order: attention, then MLP, in a
    decoder. emitted: values that in some block are read outside of the run (keys and values that
    the model returns, conditioning that the head uses); the last result does not count. given:
    values of its own from outside that are no constants (its slice of a conditioning layer, a
    U-Net's skip connection).
    """

    index: int
    carry: Op
    result: Op
    nodes: tuple[Op, ...]
    weights: tuple[Op, ...]
    updates: tuple[Update, ...]
    emitted: tuple[Op, ...]
    given: tuple[Op, ...]


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row, each entered by the result of the one before.

    shared: values read by every block, in order of first use; none comes from a block. before:
    nodes that the blocks need, constants left out; after: all others.
    """

    blocks: tuple[Block, ...]
    shared: tuple[Op, ...]
    before: tuple[Op, ...]
    after: tuple[Op, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def size(self) -> int:
        """Nodes in all blocks."""
        return len(self) * len(self.blocks[0].nodes)


@analysis
def find_runs(graph: Graph) -> tuple[Run, ...]:
    """The runs of at least two equal blocks, in program order; no node is in two of them.

    Where several divisions are possible, the one that covers most nodes is taken, of those the one
    with most blocks, and of those the one that ends last. A block must read a constant.
    """
    return tuple(_Runs(graph).found())


@analysis
def residual_updates(graph: Graph) -> tuple[Update, ...]:
    """Every y = x + h(x) in program order, nested ones included.

    h(x) holds a layer: x + 0.04 * x**3 is arithmetic.
    """
    facts = _ancestors(graph)
    return tuple(u for y in graph.nodes if (u := _update(graph, facts, y)) is not None)


def weights_below(constants: Iterable[Op]) -> tuple[Weight, ...]:
    """The weights that constants are, or are computed from, in order of first use."""
    found: dict[Op, None] = {}
    stack = list(constants)[::-1]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += node.operands[::-1]
    return tuple(n for n in found if isinstance(n, Weight))


def weight_bytes(constants: Iterable[Op]) -> Dim:
    """Stored bytes of the weights behind constants."""
    return sum((nbytes(w.type) for w in weights_below(constants)), start=0)


# ------------------------------------------------------------------ residual sums


class _Ancestors(NamedTuple):
    """Sets of nodes as bits of one number: `above[n]` are those that n is computed from."""

    bit: dict[Op, int]
    above: dict[Op, int]

    def set(self, nodes: Iterable[Op]) -> int:
        found = 0
        for n in nodes:
            found |= self.bit[n]
        return found


@analysis
def _ancestors(graph: Graph) -> _Ancestors:
    values = (*graph.inputs, *(n for n in graph.nodes if n not in graph.constants))
    bit = {n: 1 << i for i, n in enumerate(values)}
    above: dict[Op, int] = {}
    for node in values:
        found = 0
        for operand in node.operands:
            if operand in bit:
                found |= bit[operand] | above[operand]
        above[node] = found
    return _Ancestors(bit, above)


def _update(graph: Graph, facts: _Ancestors, y: Op) -> Update | None:
    if y.name != "add" or y not in facts.bit:
        return None
    for x, h in ((y.a, y.b), (y.b, y.a)):
        values = x in facts.bit and h in facts.bit  # neither a number nor a constant
        if not values or not facts.above[h] & facts.bit[x] or x.type != y.type:
            continue
        nodes = _between(graph, facts, x, h)
        if any(not (n.pointwise or n.view) for n in nodes):
            return Update(x, y, h, nodes)
    return None


def _between(graph: Graph, facts: _Ancestors, x: Op, h: Op) -> tuple[Op, ...]:
    """Nodes on the ways from x (left out) to h, in program order."""
    found = {h}
    stack = [h]
    while stack:
        for operand in stack.pop().operands:
            if operand not in found and facts.above.get(operand, 0) & facts.bit[x]:
                found.add(operand)
                stack.append(operand)
    return _ordered(graph, found)


def _ordered(graph: Graph, nodes: Iterable[Op]) -> tuple[Op, ...]:
    position = _positions(graph)
    return tuple(sorted(nodes, key=position.__getitem__))


@analysis
def _positions(graph: Graph) -> dict[Op, int]:
    return {n: i for i, n in enumerate(graph.nodes)}


# ------------------------------------------------------------------ runs


class _Pair(NamedTuple):
    """Two equal blocks, the first giving what enters the second. Lists go side by side."""

    carry: Op  # of the first
    nodes: tuple[tuple[Op, ...], tuple[Op, ...]]
    read: tuple[tuple[Op, ...], tuple[Op, ...]]  # from outside, one for each use


class _Chain(NamedTuple):
    """A run as found: the results of its blocks, and what each holds and reads."""

    carry: Op
    results: list[Op]
    nodes: list[tuple[Op, ...]]
    read: list[tuple[Op, ...]]


class _Runs:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.facts = graph, _ancestors(graph)
        self.position = _positions(graph)
        self.failures = 0
        numbers: dict[object, int] = {}
        self.look: dict[Op, int] = {}  # equal for nodes that differ in what they read at most
        for node in graph.nodes:
            if node in self.facts.bit:
                number = {o: i for i, o in enumerate(dict.fromkeys(node.operands))}
                self.look[node] = numbers.setdefault(row(node, number), len(numbers))

    def found(self) -> Iterator[Run]:
        chains = sorted(self.chains(), key=self.worth, reverse=True)
        taken: set[Op] = set()
        kept = []
        for chain in chains:
            nodes = {n for block in chain.nodes for n in block}
            if not nodes & taken:
                taken |= nodes
                kept.append(chain)
        kept.sort(key=lambda c: self.position[c.results[0]])
        return map(self.run, kept)

    def worth(self, chain: _Chain) -> tuple[int, int, int]:
        size = len(chain.results) * len(chain.nodes[0])
        return size, len(chain.results), self.position[chain.results[-1]]

    # -------------------------------------------------------------- which blocks are equal

    def chains(self) -> Iterator[_Chain]:
        """From the last block of each possible run backwards."""
        alike: dict[int, list[Op]] = {}
        for node, look in self.look.items():
            alike.setdefault(look, []).append(node)
        for values in alike.values():
            done: set[Op] = set()
            hopeless = 0
            for at in range(len(values) - 1, 0, -1):
                if values[at] in done or hopeless == HOPELESS:
                    continue
                for chain in self.ending(values[at], values[max(0, at - TRIES) : at]):
                    done.update(chain.results)
                    yield chain
                hopeless = hopeless + 1 if self.failures == FAILURES else 0

    def ending(self, last: Op, earlier: Sequence[Op]) -> Iterator[_Chain]:
        """Runs that end in `last`; the nearest block that is equal to the last sets the period."""
        self.failures = 0
        for first in reversed(earlier):
            if self.failures == FAILURES:
                return
            pair = self.pair(first, last)
            chain = None if pair is None else self.chain(pair, first, last)
            if pair is not None and chain is not None:
                yield chain
                if all(a is b or a in self.graph.constants for a, b in zip(*pair.read)):
                    return

    def chain(self, pair: _Pair, first: Op, last: Op) -> _Chain | None:
        """The run of the blocks that two values end, and of the equal ones before."""
        links, results = [pair], [last, first]
        while (before := self.pair(pair.carry, first)) is not None:
            if (before.nodes[1], before.read[1]) != (pair.nodes[0], pair.read[0]):
                break  # equal to this one in other ways than this one to the next
            links.append(before)
            results.append(pair.carry)
            first, pair = pair.carry, before
        if self.graph.constants.isdisjoint(pair.read[0]):
            return None
        links.reverse()
        return self.legal(
            _Chain(
                pair.carry, results[::-1], [pair.nodes[0], *(p.nodes[1] for p in links)],
                [pair.read[0], *(p.read[1] for p in links)],
            )
        )  # fmt: skip

    def pair(self, first: Op, last: Op) -> _Pair | None:
        """The blocks that end in two values, the first of which enters the second block.

        Where what is computed beside the stream differs, it is left outside of the blocks: as
        little of it as makes them equal.
        """
        if self.look.get(first, -1) != self.look[last]:
            return None
        if not self.facts.above[last] & self.facts.bit[first]:
            return None
        cut: set[Op] = set()  # of the second block: what is read from outside
        while True:
            found = self.walk(first, last, cut)
            if not isinstance(found, Op):
                return found
            if self.facts.above[found] & self.facts.bit[first]:
                return None
            cut.add(found)

    def walk(self, first: Op, last: Op, cut: set[Op]) -> _Pair | Op | None:
        """Walk up from two results side by side, until the second walk meets the first result.

        Gives the value that reads what differs, or None where nothing could make the blocks equal.
        """
        bit, above, constants = self.facts.bit, self.facts.above, self.graph.constants
        before = above[first]
        carry: Op | None = None
        there: dict[Op, Op] = {}  # node of the first block -> of the second
        back: dict[Op, Op] = {}
        read: list[tuple[Op, Op]] = []
        stack = [(first, last, last)]
        while stack:
            a, b, reader = stack.pop()
            if b is first:
                if carry is not a and (carry is not None or not self.may_carry(a, first)):
                    return None
                carry = a
            elif a is b or b in cut or a in constants or b in constants:
                if a.type != b.type or (a in constants) != (b in constants):
                    return reader
                read.append((a, b))
            elif a in there or b in back:
                if there.get(a) is not b or back.get(b) is not a:
                    return reader
            elif self.look.get(a, -1) == self.look.get(b) and not bit[b] & before:
                there[a], back[b] = b, a
                inner = zip(a.operands, b.operands, strict=True)
                stack += reversed([(x, y, b) for x, y in inner])
            elif a.type == b.type and not above[b] & bit[first]:
                read.append((a, b))
            else:
                return reader
        if carry is None or carry in there or above[carry] & self.facts.set(there):
            return None
        reads = tuple(a for a, _ in read), tuple(b for _, b in read)
        outside = {v for side in reads for v in side} - constants - {carry}
        if any((above[v] | bit[v]) & bit[carry] for v in outside):
            self.failures += 1
            return None
        return _Pair(carry, (tuple(there), tuple(back)), reads)

    def may_carry(self, value: Op, result: Op) -> bool:
        return value in self.facts.bit and value.type == result.type

    def legal(self, chain: _Chain) -> _Chain | None:
        """Without the blocks that compute what later ones read from outside."""
        facts, needed = self.facts, 0
        for value in {v for block in chain.read for v in block} - self.graph.constants:
            needed |= facts.bit[value] | facts.above[value]
        giving = [i for i, nodes in enumerate(chain.nodes) if facts.set(nodes) & needed]
        start = giving[-1] + 1 if giving else 0
        if len(chain.results) - start < 2:
            return None
        carry = chain.results[start - 1] if start else chain.carry
        return _Chain(carry, chain.results[start:], chain.nodes[start:], chain.read[start:])

    # -------------------------------------------------------------- what is told of them

    def run(self, chain: _Chain) -> Run:
        order = sorted(range(len(chain.nodes[0])), key=lambda i: self.position[chain.nodes[0][i]])
        nodes = [tuple(block[i] for i in order) for block in chain.nodes]
        columns = dict.fromkeys(zip(*chain.read, strict=True))
        shared = tuple(c[0] for c in columns if len(set(c)) == 1)
        own = [c for c in columns if len(set(c)) > 1]
        constants = self.graph.constants
        weights = list(zip(*(c for c in own if c[0] in constants))) or [()] * len(nodes)
        given = list(zip(*(c for c in own if c[0] not in constants))) or [()] * len(nodes)
        emitted = self.emitted(nodes, chain.results)
        entering = [chain.carry, *chain.results]
        blocks = tuple(
            Block(
                i, entering[i], chain.results[i], nodes[i], weights[i],
                _stream(self.graph, nodes[i]), tuple(nodes[i][k] for k in emitted), given[i],
            )
            for i in range(len(nodes))
        )  # fmt: skip
        inside = {n for block in nodes for n in block}
        needed = 0
        for node in inside:
            needed |= self.facts.above[node]
        outside = [n for n in self.graph.nodes if n in self.facts.bit and n not in inside]
        before = tuple(n for n in outside if self.facts.bit[n] & needed)
        after = tuple(n for n in outside if not self.facts.bit[n] & needed)
        return Run(blocks, shared, before, after)

    def emitted(self, nodes: Sequence[tuple[Op, ...]], results: Sequence[Op]) -> list[int]:
        """Places in a block whose values are, in some block, read by others than they should be:
        its own nodes, and of its result the nodes of the next."""
        found: set[int] = set()
        outputs = set(self.graph.outputs)
        for i, block in enumerate(nodes):
            own = set(block)
            following = own.union(*nodes[i + 1 : i + 2])
            for place, node in enumerate(block):
                readers = following if node is results[i] else own
                last = node is results[-1]
                if not last and (node in outputs or not readers.issuperset(self.graph.users[node])):
                    found.add(place)
        return sorted(found)


def _stream(graph: Graph, nodes: Sequence[Op]) -> tuple[Update, ...]:
    """The residual sums of a block that are not inside of another."""
    inside = set(nodes)
    own = [u for u in residual_updates(graph) if u.y in inside and inside.issuperset(u.nodes)]
    nested = {n for u in own for n in u.nodes}
    return tuple(u for u in own if u.y not in nested)


__all__ = [
    "Block", "Run", "Update", "find_runs", "residual_updates", "weight_bytes", "weights_below",
]  # fmt: skip
