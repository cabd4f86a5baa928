"""calibrate-blocks: matrices as codes, with ranges and factors learnt block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from effc.ir import Graph, Op, PassError, Tensor
from effc.ir.formats import quantize
from effc.ir.rewrite import op
from effc.passes.analysis.scale_pairs import find_scale_pairs
from effc.passes.base import Context, Pass, lossy
from effc.passes.fold.objective import Objective, learning

from .block_losses import Weights, attention_maps, attentions, block_loss, map_operands
from .block_parts import BlockParts, of_data, of_graph
from .block_plan import Learnt, Plan, plans, slot_inputs
from .blockwise import Repeated, Stream, find_blocks, fitted, shuffled
from .fold_scales import balance
from .latent import StraightThrough, through_activations
from .quantize_activations import QuantizeActivations
from .quantize_weights import FLOAT
from .weights import (
    FIVE_LEVELS,
    Layer,
    code_type,
    encoded_weight,
    layers,
    stored_bits,
    weight_type,
    with_weight,
)

RULE = "CalibrateBlock"
TITLE = "linear(x, w) => linear(x, decode(encoded(codes, scale, zero))), ranges and factors learnt"
COMPENSATION = ("edges", "all", "none")
FIRST, LAST = 3, 4  # blocks at the edges


@dataclass(frozen=True)
class CalibrateBlocks(Pass):
    """Quantise the linear layers of residual blocks, learning how on calibration data.

    rewrite:
        y = linear(x, w)
        -->
        y = linear(decode(quantize(x)), decode(encoded((codes, scale, zero), of=...)))

    For each block by itself, Adam finds: how far the codes of each group reach, as shares of its
    smallest and largest element (clip_lr); a factor for each channel between the constants of a
    pair, as fold-scales moves them, from alpha on (balance_lr; analysis/scale_pairs.py); and in the
    last projection of edge blocks, or of all, a matrix of rank 1 that is added before rounding
    (compensation, compensation_lr). All of it is gone afterwards: codes and scales remain. Losses
    are those of block_losses.py, on what the blocks that are done give. (ABQ-LLM, section 2.)

    bits, group, zero, scale, skip, only: as of quantize-weights; by default there is a zero point
    where bits is not 2b. acts: bits of what these layers read, 16 and more for floats. Layers
    outside of blocks are rounded as they are.

    checkpoint: a folder that gets each block when it is done. A run that was stopped goes on from
    there; the folder of a finished one stands for calibration data, on any machine.
    """

    name, numerics = "calibrate-blocks", lossy("relative_l2")
    bits: int | str = 2
    acts: int = 8
    group: int | None = None
    zero: bool | None = None
    steps: int = 200
    balance: bool = True
    compensation: str = "edges"
    alpha: float = 0.5
    clip_lr: float = 5e-2
    balance_lr: float = 2e-2
    compensation_lr: float = 2e-2
    dlc: float = 1.0
    akl: float = 1.0
    mse: float = 1.0
    double_softmax: bool = False
    seed: int = 0
    scale: str = "f16"
    skip: str = ""
    only: str = ""
    checkpoint: str = ""

    @property
    def calibrated(self) -> bool:
        return self.steps > 0

    @property
    def remembers(self) -> bool:
        return bool(self.checkpoint) and BlockParts.finished(self.checkpoint)

    def check(self) -> None:
        """Raises PassError for options that make no sense, or not together."""
        if not isinstance(self.bits, int) or self.bits < FLOAT:
            self.type_of((1, 1))
        if self.acts < FLOAT:
            code_type(self.acts, False)
        if self.compensation not in COMPENSATION:
            raise PassError(
                f"compensation={self.compensation}", fix=f"use {', '.join(COMPENSATION)}"
            )
        rates = (self.clip_lr, self.balance_lr, self.compensation_lr)
        if min(self.steps, *rates, self.dlc, self.akl, self.mse) < 0:
            raise PassError(f"{self}", why="something is negative", fix="0 leaves it out")
        if self.steps and not any((self.dlc, self.akl, self.mse)):
            raise PassError("dlc=0, akl=0 and mse=0 leave no loss", fix="give one of them a weight")
        if not 0 <= self.alpha <= 1:
            raise PassError(f"alpha={self.alpha:g} is no share", fix="0 <= alpha <= 1")

    def type_of(self, shape: Sequence[int]) -> Tensor:
        zero = self.bits != FIVE_LEVELS if self.zero is None else self.zero
        return weight_type(shape, self.bits, self.group, zero, self.scale)

    def run(self, g: Graph, ctx: Context) -> Graph:
        self.check()
        if isinstance(self.bits, int) and self.bits >= FLOAT:
            ctx.note(f"bits={self.bits}: weights stay as they are")
            return g
        taken = layers(g, ctx, RULE, TITLE, skip=self.skip, only=self.only)
        new: dict[Any, Any] = {}
        if self.steps:
            with learning():
                for nodes in self.blocks(g, self.plans(g, taken), ctx):
                    new |= nodes
        for layer in taken:
            if layer.linears[0] not in new:
                value = quantize(layer.value, self.type_of(layer.w.shape))
                new |= with_weight(layer, encoded_weight(layer.key, value))
        if self.acts < FLOAT:
            read: dict[Op, Op] = {}
            for n in (n for layer in taken for n in layer.linears):
                new[n] = new[n].replace(x=read.setdefault(n.x, self.read(n.x)))
        ctx.counted(RULE, TITLE, len(taken))
        made = [n.w.x for n in new.values() if n.name == "linear" and n.w.name == "decode"]
        ctx.note(f"{len(taken)} matrices at {stored_bits(made):.3g} bits an element")
        return ctx.substitute(g, new)

    def read(self, x: Op) -> Op:
        """What a layer reads whose activations are codes."""
        if x.name == "decode":
            return x  # they are already
        rule = QuantizeActivations(self.acts)
        codes = code_type(self.acts, rule.zero)
        return op.decode(op.quantize(x, codes, rule.format(x, codes)), x.dtype)

    def rounded(self, x: Op) -> Op:
        """The same while gradients are wanted."""
        held = self.read(x)
        return x if held is x else StraightThrough(x, held)

    def plans(self, g: Graph, taken: Sequence[Layer]) -> list[Plan]:
        blocks = find_blocks(g)
        pairs = find_scale_pairs(g) if self.balance else ()
        last = [self.compensated(i, len(blocks)) for i in range(len(blocks))]
        return plans(g, blocks, taken, pairs, self.type_of, last)

    def compensated(self, block: int, blocks: int) -> bool:
        edge = block < FIRST or block >= blocks - LAST
        return bool(self.compensation_lr) and (
            self.compensation == "all" or (self.compensation == "edges" and edge)
        )

    # -------------------------------------------------------------- block by block

    def blocks(self, g: Graph, todo: Sequence[Plan], ctx: Context) -> list[dict[Op, Op]]:
        """What replaces the nodes of each block."""
        folder = self.folder(g, len(todo), ctx)
        known = [folder.read(i) if folder else None for i in range(len(todo))]
        done = [k for k in known if k is not None]
        if done:
            ctx.note(f"{len(done)} of {len(todo)} blocks are those of {self.checkpoint}")
        if len(done) == len(todo):
            return [plan.replaced(constants(plan, k)) for plan, k in zip(todo, done)]
        batches = Objective(g, ctx.data(self)).batches
        pairs = [p for plan in todo for p in plan.pairs]
        factors = balance(g, pairs, batches, self.alpha, ctx.progress) if pairs else {}
        goal, given = Stream(g, batches, {}), Stream(g, batches, {})
        found, gone = [], []
        for i, plan in enumerate(todo):
            entered, tensors = given.entering(plan.block), known[i]
            goals = goal.entering(plan.block)
            if tensors is None:
                state = Learnt(plan, factors)
                title = f"calibrating block {i + 1} of {len(todo)}"
                lesson = self.lesson(g, state, given, entered, goals)
                order = shuffled(self.steps, len(batches), 1000 * self.seed + i)
                rates = state.groups(self.clip_lr, self.balance_lr, self.compensation_lr)
                if rates:
                    gone.append(fitted(rates, lesson, order, lambda s: ctx.progress(s, title)))  # noqa: B023
                tensors = state.tensors()
                if folder is not None:
                    folder.write(i, tensors)
            learnt = constants(plan, tensors)
            found.append(plan.replaced(learnt))
            given.new |= plan.replaced(learnt, self.read if self.acts < FLOAT else None)
            given.leaving(plan.block, entered)
            goal.leaving(plan.block, goals)
        before, after = (sum(side) / max(len(gone), 1) for side in zip(*gone, (0.0, 0.0)))
        ctx.note(f"loss of a block: {before:.4g}, then {after:.4g}, the mean of {len(gone)} blocks")
        return found

    def lesson(
        self, g: Graph, state: Learnt, given: Stream, entered: Sequence[Any], goals: Sequence[Any]
    ) -> Lesson:
        """The losses of a block. goals: what enters it in the float stream."""
        block = state.plan.block
        seen = attentions(block.nodes) if self.akl else []
        watched = [o for a in seen for o in map_operands(a)]
        floats = Stream(g, given.batches, {})
        free = floats.through(block, goals, watched)
        ahead = floats.through(block, entered)
        inputs = slot_inputs(g, state.plan)
        new = state.plan.replaced(inputs, self.rounded if self.acts < FLOAT else None)
        graph = block.graph({**through_activations(g), **given.new, **new}, watched, inputs)
        return Lesson(
            Repeated(graph, given.envs), state, seen, entered,
            [(y, z) for (y, *_), (z,) in zip(free, ahead)],
            [attention_maps(seen, values) for _, *values in free],
            Weights(self.dlc, self.akl, self.mse, self.double_softmax),
        )  # fmt: skip

    def folder(self, g: Graph, blocks: int, ctx: Context) -> BlockParts | None:
        if not self.checkpoint:
            return None
        identity = {
            "pass": str(replace(self, checkpoint="")),
            "graph": of_graph(g),
            "data": of_data(ctx.calibration) if ctx.calibration else "",
            "blocks": str(blocks),
        }
        return BlockParts.open(self.checkpoint, identity)


def constants(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> list[Op]:
    return [slot.made(tensors) for slot in plan.slots]


@dataclass(frozen=True)
class Lesson:
    """The loss of a block on batch k."""

    block: Repeated
    state: Learnt
    seen: Sequence[Any]
    entered: Sequence[Sequence[Any]]
    goals: Sequence[tuple[torch.Tensor, torch.Tensor]]
    maps: Sequence[Sequence[torch.Tensor]]
    weights: Weights

    def __call__(self, k: int) -> torch.Tensor:
        y, *values = self.block(k, [*self.entered[k], *self.state.values()])
        maps = attention_maps(self.seen, values)
        return block_loss(y, maps, self.goals[k], self.maps[k], self.weights)
