"""What is learnt in a block to round its matrices: ranges of codes, factors, a matrix of rank 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, Input, Op, Tensor, Weight
from effc.ir.formats import GroupQuant, quantize
from effc.ir.rewrite import op
from effc.passes.analysis.blocks import weights_below
from effc.passes.analysis.scale_pairs import ScalePair
from effc.passes.fold.objective import inputs_for
from effc.passes.fold.units import renamed

from .blockwise import Block
from .latent import fake_quantized, value_of
from .weights import Layer

OPEN = 4.0  # sigmoid(4) = 0.982 of its range is where the codes of a group reach at first
FIELDS = ("w", "weight")


@dataclass(frozen=True)
class Slot:
    """A constant that changes, read by nodes of a block as their `field`. of: its type as codes,
    None where it stays dense."""

    constant: Op
    nodes: tuple[Any, ...]
    field: str
    key: str
    of: Tensor | None = None

    def tensors(self, value: torch.Tensor, limits: Sequence[torch.Tensor] = ()) -> dict[str, Any]:
        """By key, what a graph keeps of it."""
        if self.of is None:
            return {self.key: value.to(self.constant.dtype.torch)}
        made = quantize(value, self.of, *limits)
        parts = self.of.format.parts(self.of)
        held = {f"{self.key}:{n}": Weight.holding("", made[n], t) for n, t in parts.items()}
        return {key: w.data for key, w in held.items()}

    def made(self, tensors: Mapping[str, torch.Tensor]) -> Op:
        """The constant that such tensors are in a graph."""
        if self.of is None:
            return Weight.holding(self.key, tensors[self.key], self.constant.tensor)
        parts = [
            Weight.holding(f"{self.key}:{n}", tensors[f"{self.key}:{n}"], t)
            for n, t in self.of.format.parts(self.of).items()
        ]
        return op.decode(op.encoded(tuple(parts), self.of), self.constant.dtype)


@dataclass(frozen=True)
class Plan:
    """The constants of a block that change. last: the one that a matrix of rank 1 is added to."""

    block: Block
    slots: tuple[Slot, ...]
    pairs: tuple[ScalePair, ...]
    last: Slot | None

    def replaced(
        self, constants: Sequence[Op], activations: Callable[[Op], Op] | None = None
    ) -> dict[Op, Op]:
        """For Graph.substitute: nodes that read others in place of the slots. activations: what
        layers whose matrix becomes codes read, by what they read before."""
        made: dict[Any, Any] = {}
        for slot, constant in zip(self.slots, constants, strict=True):
            for node in slot.nodes:
                changes = {slot.field: constant}
                if slot.of is not None and activations is not None:
                    changes["x"] = activations(node.x)
                made[node] = made.get(node, node).replace(**changes)
        return made


def plans(
    graph: Graph, blocks: Sequence[Block], taken: Sequence[Layer], pairs: Sequence[ScalePair],
    type_of: Callable[[Sequence[Any]], Tensor], compensated: Sequence[bool],
) -> list[Plan]:  # fmt: skip
    """For each block: what of it is taken and lies in no other. compensated: of each block, whether
    its last projection is."""
    free = [p for p in pairs if p.kind != "q, k" and _apart(graph, p)]
    found = []
    for block, wanted in zip(blocks, compensated, strict=True):
        inside = set(block.nodes)
        here = [x for x in taken if inside.issuperset(x.linears) and not x.lookups]
        own = tuple(p for p in free if here and all(e.node in inside for e in p.ends))
        scaled = {c: (node, field) for c, node, field in _scaled(own)}
        slots: dict[Op, Slot] = {}
        for x in here:  # with factors in it, it no longer stands for the model's weight
            key = renamed("calibrate", x.key) if x.w in scaled else x.key
            slots[x.w] = Slot(x.w, x.linears, "w", key, type_of(x.w.shape))
        for constant, (node, field) in scaled.items():
            key = renamed("calibrate", weights_below([constant])[0].key)
            slots.setdefault(constant, Slot(constant, (node,), field, key))
        ending = [n for n in block.unit.updates[-1].nodes if n.name == "linear" and n.w in slots]
        last = slots[ending[-1].w] if ending and wanted else None
        found.append(Plan(block, tuple(slots.values()), own, last))
    return found


def _scaled(pairs: Sequence[ScalePair]) -> Iterator[tuple[Op, Any, str]]:
    """Constants that factors go into, and where they are read."""
    for end in (e for p in pairs for e in p.ends):
        for field in (*FIELDS, *(("bias",) if end.rows else ())):
            constant = getattr(end.node, field, None)
            if constant is not None:
                yield constant, end.node, field


def _apart(graph: Graph, pair: ScalePair) -> bool:
    """Whether nothing else reads the pair's constants: they can change for it alone."""
    return all(graph.uses(c) == 1 and weights_below([c]) for c, _, _ in _scaled([pair]))


# ------------------------------------------------------------------ what is learnt


class Learnt:
    """Parameters for the slots of a plan, and what the slots are with them."""

    def __init__(self, plan: Plan, factors: Mapping[ScalePair, torch.Tensor]) -> None:
        """factors: where those of each pair start."""
        self.plan = plan
        self.first = [value_of(s.constant).detach().float() for s in plan.slots]
        self.balance = {p: factors[p].log().requires_grad_() for p in plan.pairs}
        self.limits: dict[Slot, tuple[torch.Tensor, torch.Tensor]] = {}
        for slot in plan.slots:
            if slot.of is not None:
                each = slot.of.format.parts(slot.of)["scale"].shape
                low, high = (torch.full(each, OPEN).requires_grad_() for _ in range(2))  # type: ignore[arg-type]
                self.limits[slot] = low, high
        self.added: tuple[torch.Tensor, ...] = ()
        if plan.last is not None:
            n, k = plan.last.constant.shape
            self.added = torch.zeros(n, 1).requires_grad_(), torch.ones(1, k).requires_grad_()

    def groups(self, clip: float, balance: float, compensation: float) -> list[dict[str, Any]]:
        """For torch.optim, with these learning rates."""
        limits = [x for pair in self.limits.values() for x in pair]
        given = [(limits, clip), ([*self.balance.values()], balance), ([*self.added], compensation)]
        return [{"params": p, "lr": lr} for p, lr in given if p and lr]

    def numbers(self) -> Iterator[tuple[Slot, torch.Tensor, tuple[torch.Tensor, ...]]]:
        """Each slot's numbers before they are rounded, f32, and the range of their codes."""
        for slot, w in zip(self.plan.slots, self.first):
            if slot is self.plan.last:
                a, b = self.added
                w = w + a * b * w.square().mean().sqrt()  # a in sizes of an element
            for node, rows, s in self._factors():
                if node in slot.nodes and rows:
                    w = w * (s[:, None] if w.dim() == 2 else s)
                elif node in slot.nodes and slot.field == "w":
                    w = w * s
            yield slot, w, self._range(slot, w)

    def _factors(self) -> Iterator[tuple[Any, bool, torch.Tensor]]:
        for pair, logarithm in self.balance.items():
            for end in pair.ends:
                sign = -1 if end is pair.producer else 1
                yield end.node, end.rows, end.factors((sign * logarithm).exp())

    def _range(self, slot: Slot, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if slot.of is None:
            return ()
        assert isinstance(slot.of.format, GroupQuant)
        by_group = slot.of.format.grouped(w)
        low, high = self.limits[slot]
        return low.sigmoid() * by_group.amin(-1), high.sigmoid() * by_group.amax(-1)

    def values(self) -> list[torch.Tensor]:
        """What the block computes with, in the order of the slots."""
        return [
            (w if slot.of is None else fake_quantized(w, slot.of, *limits)).to(
                slot.constant.dtype.torch
            )
            for slot, w, limits in self.numbers()
        ]

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """By key, what a graph keeps of all slots."""
        found: dict[str, torch.Tensor] = {}
        for slot, w, limits in self.numbers():
            found |= slot.tensors(w, limits)
        return found


def slot_inputs(graph: Graph, plan: Plan) -> list[Input]:
    return inputs_for(graph, "learnt", [s.constant.tensor for s in plan.slots])


__all__ = ["Learnt", "Plan", "Slot", "plans", "slot_inputs"]
