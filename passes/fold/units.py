"""What folding removes as a whole: a block of a run of equal ones, or one residual update of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effc.ir import Graph, Op, PassError, Weight
from effc.ir.rewrite import op
from effc.passes.analysis.blocks import Block, Update, find_runs, weight_bytes, weights_below

UNITS = ("block", "update")


@dataclass(frozen=True)
class Unit:
    """A part of the residual stream: x enters, y leaves; `updates` are its sums, in order."""

    x: Op
    y: Op
    updates: tuple[Update, ...]
    weights: tuple[Weight, ...]  # its own: no other unit reads them
    label: str

    @property
    def bytes(self) -> int:
        """Of its own weights: what removing it saves."""
        return int(weight_bytes(self.weights))  # type: ignore[arg-type]


def find_units(graph: Graph, kind: str) -> tuple[Unit, ...]:
    """Blocks of the graph's runs of equal blocks, or their residual updates, in program order.

    A block counts where all that leaves it is the residual stream, as a chain of updates. Raises
    PassError for another kind, and where the graph has no such block.
    """
    if kind not in UNITS:
        raise PassError(f"unit={kind} is unknown", fix=f"use {' or '.join(UNITS)}")
    blocks = [b for run in find_runs(graph) for b in run.blocks if _residual(b)]
    if not blocks:
        raise PassError(
            "the graph has no run of equal residual blocks",
            why="blocks are found in layers that were recognised, before they are folded or joined",
            fix='put the pass behind "raised", and before "default"',
        )
    parts: list[tuple[str, tuple[Update, ...]]] = []
    for number, b in enumerate(blocks):
        if kind == "block":
            parts.append((f"block {number}", b.updates))
        else:
            parts += [(f"update {i} of block {number}", (u,)) for i, u in enumerate(b.updates)]
    owned = _owned(graph, [p for _, p in parts])
    return tuple(
        Unit(p[0].x, p[-1].y, p, weights, label) for (label, p), weights in zip(parts, owned)
    )


def _residual(block: Block) -> bool:
    chain = [block.carry, *(u.y for u in block.updates)]
    entered = [u.x for u in block.updates]
    return bool(block.updates) and chain == [*entered, block.result]


def _owned(graph: Graph, parts: Sequence[tuple[Update, ...]]) -> list[tuple[Weight, ...]]:
    read = [
        weights_below(o for u in part for n in u.nodes for o in n.operands if o in graph.constants)
        for part in parts
    ]
    readers = Counter(w for weights in read for w in weights)
    return [tuple(w for w in weights if readers[w] == 1) for weights in read]


def without(units: Iterable[Unit]) -> dict[Op, Op]:
    """For Graph.substitute: these units left out, y = x + h(x) replaced by x."""
    return {u.y: u.x for u in units}


def with_gates(units: Sequence[Unit], gates: Sequence[Op]) -> dict[Op, Op]:
    """For Graph.substitute: y = x + g * h(x), for each unit its own gate, a value without shape.

    Inside a gated block, later updates still read the stream that is not gated: the gate is around
    the block, y = x + g * (block(x) - x). That is written as x + g * h1 + g * h2, so that a gate
    of 1 gives the block's own result bit for bit, and one of 0 gives x.
    """
    new: dict[Op, Op] = {}
    for unit, gate in zip(units, gates, strict=True):
        y = unit.x
        for update in unit.updates:
            g = gate if gate.dtype == update.h.dtype else op.cast(gate, update.h.dtype)
            y = op.add(y, op.mul(update.h, g))
        new[unit.y] = y
    return new


def renamed(pass_name: str, key: str) -> str:
    """The key of a weight that a pass made of another: never one of the model's own."""
    return f"{pass_name}.{key}"
