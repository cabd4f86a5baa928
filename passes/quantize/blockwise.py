"""A model block by block: each as a graph of its own, and what enters it on every batch.

Training block by block needs the values of one block at a time, whatever the depth of the model.
Two streams are followed: that of the uncompressed blocks, which is the goal, and that of the blocks
compressed so far, which is what a block will be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Dense, Graph, Input, Op, Tensor, Weight, bind_symbols, interpret
from effc.ir.specialise import specialise
from effc.passes.fold.objective import inputs_for, learning, substituted
from effc.passes.fold.units import Unit, find_units

from .latent import value_of

Values = Sequence[Any]
MEASURED = 16  # batches


@dataclass(frozen=True)
class Block:
    """y = block(x, others). reads: what it is given of the whole graph, x the first. nodes: those
    of the whole graph that it computes, in program order."""

    whole: Graph
    unit: Unit
    reads: tuple[Op, ...]
    nodes: tuple[Op, ...]

    def graph(
        self, new: Mapping[Op, Op], watched: Iterable[Op] = (), more: Sequence[Input] = ()
    ) -> Graph:
        """The block alone: from `reads`, and then `more`, to y, and then `watched`. new: what is
        replaced, and `watched`, are written in nodes of the whole graph."""
        given = inputs_for(self.whole, "read", [r.tensor for r in self.reads])
        part = self.whole.with_outputs((self.unit.y, *watched))
        made = substituted(part, {**new, **dict(zip(self.reads, given))})
        return Graph.of((*given, *more), made.outputs)


def find_blocks(graph: Graph) -> tuple[Block, ...]:
    """The residual blocks of the graph's runs. Raises PassError where it has none."""
    return tuple(_block(graph, unit) for unit in find_units(graph, "block"))


def _block(graph: Graph, unit: Unit) -> Block:
    below = {unit.x}
    for node in graph.nodes:
        if not below.isdisjoint(node.operands):
            below.add(node)
    inside, stack = set[Op](), [unit.y]
    reads: dict[Op, None] = {unit.x: None}
    while stack:
        node = stack.pop()
        if node in inside or node is unit.x:
            continue
        inside.add(node)
        for operand in reversed(node.operands):
            if operand in below:
                stack.append(operand)
            elif operand not in graph.constants:
                reads.setdefault(operand)
    return Block(graph, unit, tuple(reads), tuple(n for n in graph.nodes if n in inside))


class Repeated:
    """A graph that is run again and again on the same batches: their sizes are put into it, and its
    constants are computed, once."""

    def __init__(self, graph: Graph, envs: Sequence[Mapping[Any, Any]]) -> None:
        self.envs = envs
        derived = enumerate(_derived(graph))
        known = {c: Weight.holding(f"constant{i}", value_of(c)) for i, c in derived}
        plain = graph.substitute(known)
        made: dict[Any, Graph] = {}
        self.graphs = []
        for env in envs:
            sizes = tuple(sorted((str(s), n) for s, n in env.items()))
            if sizes not in made:
                made[sizes] = specialise(plain, env)
            self.graphs.append(made[sizes])

    def __call__(self, batch: int, inputs: Values) -> tuple[Any, ...]:
        return interpret(self.graphs[batch], inputs, env=self.envs[batch])


def _derived(graph: Graph) -> Iterator[Op]:
    """Dense constants that are computed, and read by what is no constant."""
    for node in graph.constants:
        dense = isinstance(node.type, Tensor) and node.type.format.__class__ is Dense
        if dense and node.operands and any(u not in graph.constants for u in graph.users[node]):
            yield node


class Stream:
    """What enters the blocks of a graph on every batch.

    new: nodes of it that are replaced; more may be added as blocks are done, and what follows sees
    them.
    """

    def __init__(self, graph: Graph, batches: Sequence[Values], new: Mapping[Op, Op]) -> None:
        self.graph, self.batches, self.new = graph, batches, dict(new)
        self.envs = [bind_symbols(graph, b) for b in batches]
        self._last: tuple[Op, list[Any]] | None = None

    @torch.no_grad()
    def entering(self, block: Block) -> list[list[Any]]:
        """Values of block.reads, for every batch."""
        if self._last is not None and self._last[0] is block.unit.x:
            rest = self._computed(block.reads[1:])
            return [[x, *others] for x, others in zip(self._last[1], rest)]
        return self._computed(block.reads)

    def _computed(self, wanted: Sequence[Op]) -> list[list[Any]]:
        if not wanted:
            return [[] for _ in self.batches]
        run = Repeated(substituted(self.graph.with_outputs(wanted), self.new), self.envs)
        return [[*run(k, b)] for k, b in enumerate(self.batches)]

    def leaving(self, block: Block, entered: Sequence[Values]) -> list[Any]:
        """The block's results on what entered it, for every batch; the next block is given them."""
        ys = [y for y, *_ in self.through(block, entered)]
        self._last = block.unit.y, ys
        return ys

    @torch.no_grad()
    def through(
        self, block: Block, entered: Sequence[Values], watched: Iterable[Op] = ()
    ) -> list[tuple[Any, ...]]:
        """The block's results, and values inside of it, on what entered it, for every batch."""
        run = Repeated(block.graph(self.new, watched), self.envs)
        return [run(k, x) for k, x in enumerate(entered)]


def fitted(
    parameters: list[dict[str, Any]], loss: Callable[[int], torch.Tensor],
    order: Sequence[int], progress: Callable[[Sequence[int]], Iterable[int]],
) -> tuple[float, float]:  # fmt: skip
    """Adam on loss(batch), a step for each batch in the order given; learning rates fall along a
    cosine. parameters: groups as torch.optim takes them.

    Gives the mean loss over the batches (the first of them, if there are many) before and after.
    """
    batches = sorted(set(order))[:MEASURED]
    before = _mean(loss, batches)
    with learning():
        adam = torch.optim.Adam(parameters)
        decay = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / len(order))
        )
        for k in progress(order):
            adam.zero_grad()
            loss(k).backward()
            adam.step()
            decay.step()
    return before, _mean(loss, batches)


def in_turns(steps: int, batches: int) -> list[int]:
    return [step % batches for step in range(steps)]


def shuffled(steps: int, batches: int, seed: int) -> list[int]:
    """All batches in an order of their own, again and again."""
    made = torch.Generator().manual_seed(seed)
    rounds = -(-steps // batches)
    order = [k for _ in range(rounds) for k in torch.randperm(batches, generator=made).tolist()]
    return order[:steps]


@torch.no_grad()
def _mean(loss: Callable[[int], torch.Tensor], batches: Sequence[int]) -> float:
    return sum(float(loss(k)) for k in batches) / len(batches)


__all__ = ["Block", "Repeated", "Stream", "find_blocks", "fitted", "in_turns", "shuffled"]
