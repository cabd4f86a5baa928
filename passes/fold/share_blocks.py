"""Neighbouring blocks keep one set of matrices, and each what tells it apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Graph, Op, PassError, Weight, interpret, no, yes
from effc.ir.rewrite import Answer, op
from effc.passes.analysis.blocks import Block, find_runs, weights_below
from effc.passes.base import Context, Pass, lossy
from effc.passes.common import dense_constants, missed

from .units import renamed

RULE = "ShareLayer"
TITLE = "linear(x, w, b) => c * linear(x, parent's w) + linear(linear(x, A), B, b)"


@dataclass(frozen=True)
class ShareBlocks(Pass):
    """Let the blocks of a group use the matrices of their first, each with low-rank extras.

    rewrite:
        y = linear(x, w, b)
        -->
        y = c * linear(x, parent_w) + linear(linear(x, A), B, b)

    In runs of equal blocks, `group` neighbours at a time. Norms and biases stay each block's own.
    A [rank, k] and B [n, rank] start as what is nearest to all that is missing: the truncated SVD
    of w - c * parent_w; scale adds c [n], the factor of each output that leaves least missing.
    rank=0: no A and B. Full rank gives the model's own values, to rounding.
    """

    name, numerics = "share-blocks", lossy("relative_l2")
    group: int = 2
    rank: int = 16
    scale: bool = False

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.group < 1 or self.rank < 0:
            raise PassError(
                f"group={self.group}, rank={self.rank}", fix="group is at least 1, rank 0"
            )
        new: dict[Op, Op] = {}
        made: dict[tuple[Op, Op], tuple[Op, ...]] = {}
        for child, parent in self.pairs(g):
            for own, theirs in zip(child.nodes, parent.nodes, strict=True):
                if own.name == "linear":
                    answer = legal(g, own, theirs)
                    if answer:
                        new[own] = self.shared(own, theirs.w, made)
                        ctx.counted(RULE, TITLE)
                    else:
                        missed(ctx, RULE, TITLE, g, own, answer)
        if self.group > 1 and not new:
            ctx.note("no two neighbouring blocks have a layer to share")
        return ctx.substitute(g, new)

    def pairs(self, g: Graph) -> Iterator[tuple[Block, Block]]:
        """(child, parent) of every group."""
        for run in find_runs(g):
            for start in range(0, len(run.blocks), self.group):
                parent, *children = run.blocks[start : start + self.group]
                yield from ((child, parent) for child in children)

    def shared(self, layer: Any, w: Op, made: dict[tuple[Op, Op], tuple[Op, ...]]) -> Op:
        """What stands for a layer once its weights are those of another."""
        if (layer.w, w) not in made:
            made[layer.w, w] = self.extras(layer.w, w)
        c, *factors = made[layer.w, w]
        if c is None and not factors:
            return layer.replace(w=w)
        y, rest = layer.replace(w=w, bias=None), layer.bias
        if c is not None:
            y = op.mul(y, c)
        if factors:
            rest = op.linear(op.linear(layer.x, factors[0]), factors[1], layer.bias)
        return y if rest is None else op.add(y, rest)

    def extras(self, own: Op, theirs: Op) -> tuple[Any, ...]:
        """(c or None, A, B), or (c or None,) where nothing is added."""
        key = weights_below([own])[0].key
        wanted, base = value_of(own), value_of(theirs)
        missing, c = wanted - base, None
        if self.scale:
            power = base.square().sum(1)
            factor = torch.where(power > 0, (wanted * base).sum(1) / power, 1)
            stored = factor.to(own.dtype.torch)  # what is missing is missing after its rounding
            c = Weight.holding(renamed("share", f"{key}.scale"), stored)
            missing = wanted - base * stored.double()[:, None]
        rank = min(self.rank, *missing.shape)
        if not rank:
            return (c,)
        a, b = low_rank(missing, rank)
        return (
            c,
            Weight.holding(renamed("share", f"{key}.a"), a.to(own.dtype.torch)),
            Weight.holding(renamed("share", f"{key}.b"), b.to(own.dtype.torch)),
        )


def legal(g: Graph, own: Any, theirs: Any) -> Answer:
    if own.w is theirs.w:
        return no("its weights are the parent's already", at=own)
    answer = dense_constants(g, own.w, theirs.w, own.bias)
    if not answer:
        return answer
    for w in weights_below((own.w, theirs.w)):
        if w.data is None:
            return no("weight {!r} has no values", w.key, at=w)
    return yes if own.w.dtype.is_float else no("its weights are {}", own.w.dtype, at=own)


def low_rank(m: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, k] and B [n, rank] with B A nearest to m [n, k], both of equal strength.

    By the eigenvectors of the smaller of m m^T and m^T m, in float64: a projection onto them, so
    that full rank gives m itself.
    """
    if m.shape[0] > m.shape[1]:
        b, a = low_rank(m.T, rank)
        return a.T.contiguous(), b.T.contiguous()
    m = m.double()
    u = torch.linalg.eigh(m @ m.T).eigenvectors[:, -rank:].flip(1)
    a = u.T @ m
    strength = a.norm(dim=1).sqrt()
    strength = torch.where(strength > 0, strength, 1)
    return a / strength[:, None], u * strength


def value_of(constant: Op) -> torch.Tensor:
    """A constant of the graph in float64."""
    with torch.no_grad():
        return interpret(Graph.of((), (constant,)), ())[0].detach().double()
