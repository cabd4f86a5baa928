"""Neighbouring blocks keep one set of matrices, and each what tells it apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
FITS = ("weights", "outputs")
UNSEEN = 1e-3
"""Of the mean square of what a layer reads: what it may read where calibration data showed none."""


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
    fit: nearest in the weights, or in the outputs of the layer on calibration data (the SVD of
    (w - c * parent_w) L, with L L^T the second moments of x), which low ranks need: what layers
    read lies in few directions. rank=0: no A and B. Full rank gives the model's own values, to
    rounding.

    Matrices of blocks that were trained apart have nothing in common (in SmolLM2 the cosine of
    neighbours' is 0.00): without a scale the parent's are noise to the child. With it they are
    left out where they do not help, and repair decides what to make of them.
    """

    name, numerics = "share-blocks", lossy("relative_l2")
    group: int = 2
    rank: int = 16
    scale: bool = False
    fit: str = "weights"

    @property
    def calibrated(self) -> bool:
        return self.fit == "outputs"

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.group < 1 or self.rank < 0:
            raise PassError(
                f"group={self.group}, rank={self.rank}", fix="group is at least 1, rank 0"
            )
        if self.fit not in FITS:
            raise PassError(f"fit={self.fit}", fix=f"use {' or '.join(FITS)}")
        new: dict[Op, Op] = {}
        made: dict[tuple[Op, Op], tuple[Op, ...]] = {}
        seen = self.moments(g, ctx)
        for child, parent in self.pairs(g):
            for own, theirs in zip(child.nodes, parent.nodes, strict=True):
                if own.name == "linear":
                    answer = legal(g, own, theirs)
                    if answer:
                        new[own] = self.shared(own, theirs.w, made, seen.get(own.w))
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

    def moments(self, g: Graph, ctx: Context) -> dict[Op, torch.Tensor]:
        """Of what children's matrices read: sums of x x^T [k, k], in float64."""
        layers = [n for child, _ in self.pairs(g) for n in child.nodes if n.name == "linear"]
        if not self.calibrated or not layers:
            return {}
        return second_moments(g, layers, ctx.data(self))

    def shared(
        self,
        layer: Any,
        w: Op,
        made: dict[tuple[Op, Op], tuple[Op, ...]],
        moments: torch.Tensor | None,
    ) -> Op:
        """What stands for a layer once its weights are those of another."""
        if (layer.w, w) not in made:
            made[layer.w, w] = self.extras(layer.w, w, moments)
        c, *factors = made[layer.w, w]
        if c is None and not factors:
            return layer.replace(w=w)
        y, rest = layer.replace(w=w, bias=None), layer.bias
        if c is not None:
            y = op.mul(y, c)
        if factors:
            rest = op.linear(op.linear(layer.x, factors[0]), factors[1], layer.bias)
        return y if rest is None else op.add(y, rest)

    def extras(self, own: Op, theirs: Op, moments: torch.Tensor | None) -> tuple[Any, ...]:
        """(c or None, A, B), or (c or None,) where nothing is added."""
        key = weights_below([own])[0].key
        wanted, base = value_of(own), value_of(theirs)
        root = torch.eye(0) if moments is None else root_of(moments)
        if moments is not None:
            wanted, base = wanted @ root, base @ root
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
        if moments is not None:
            a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
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


def second_moments(
    g: Graph, layers: Sequence[Any], batches: Sequence[Sequence[Any]]
) -> dict[Op, torch.Tensor]:
    """For the matrix of each layer: the sum of x x^T [k, k] over all that it reads, float64."""
    readers: dict[Op, set[Op]] = {}
    for layer in layers:
        readers.setdefault(layer.x, set()).add(layer.w)
    sums: dict[Op, Any] = dict.fromkeys((layer.w for layer in layers), 0)

    def observe(node: Op, value: Any) -> None:
        if node in readers:
            x = value.reshape(-1, value.shape[-1]).double()
            for w in readers[node]:
                sums[w] = sums[w] + x.T @ x

    with torch.no_grad():
        for batch in batches:
            for node, value in zip(g.inputs, batch):
                observe(node, value)
            interpret(g, batch, observe=observe)
    return sums


def root_of(moments: torch.Tensor) -> torch.Tensor:
    """L, lower triangular with L L^T = moments [k, k]; a direction that was never seen counts a
    little, so that L has an inverse."""
    mean = moments.diagonal().mean().clamp_min(1e-30)
    return torch.linalg.cholesky(moments + UNSEEN * mean * torch.eye(len(moments)).double())


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
