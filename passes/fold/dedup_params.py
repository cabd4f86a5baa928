"""Weights with the same values are stored once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from effc.ir import Graph, Op, Weight, no, yes
from effc.ir.graph import same_bits
from effc.ir.op import nbytes
from effc.ir.rewrite import Answer
from effc.passes.analysis.aliases import shown_values
from effc.passes.base import Context, Pass, exact
from effc.passes.common import missed

RULE, TITLE = "ShareEqualWeights", 'weight("a"), weight("b"), bit-equal => weight("a", also=("b",))'
SAMPLE = 64  # elements of a weight that are hashed before whole weights are compared


@dataclass(frozen=True)
class DedupParams(Pass):
    """Make one weight of those that are equal bit for bit: tied embeddings, blocks that share.

    rewrite:
        a: f32[8, 8] = weight("wte"); b: f32[8, 8] = weight("lm_head")
        -->
        a: f32[8, 8] = weight("wte", also=("lm_head",))

    The names that are gone stay with the weight: should a parameter be changed later so that they
    differ, the next call says so instead of computing with one of the two. bytes: smaller weights
    stay apart.
    """

    name, numerics = "dedup-params", exact()
    bytes: int = 0

    def run(self, g: Graph, ctx: Context) -> Graph:
        shown = shown_values(g)
        alike: dict[object, list[Weight]] = defaultdict(list)
        for w in g.weights:
            answer = self.legal(w, shown)
            if answer:
                alike[w.type, _sample(_values(w))].append(w)
            else:
                missed(ctx, RULE, TITLE, g, w, answer)
        new: dict[Op, Op] = {}
        saved = 0
        for weights in alike.values():
            for first, *others in _equal(weights):
                if others:
                    new |= _merged(first, others)
                    saved += sum(int(nbytes(w.type)) for w in others)  # type: ignore[arg-type]
                    ctx.counted(RULE, TITLE, len(others))
        ctx.note(f"{saved} bytes are stored once less" if new else "no two weights are equal")
        return ctx.substitute(g, new)

    def legal(self, w: Weight, shown: frozenset[Op]) -> Answer:
        if w.data is None:
            return no("{} has no values here", w.key, at=w)
        if w in shown:
            return no("{} is given back to the caller, in memory of its own", w.key, at=w)
        size = nbytes(w.type)
        if isinstance(size, int) and size < self.bytes:
            return no("{} has {} bytes, fewer than {}", w.key, size, self.bytes, at=w)
        return yes


def _values(w: Weight) -> torch.Tensor:
    assert w.data is not None
    return w.data


def _sample(t: torch.Tensor) -> bytes:
    """Some of the values: weights that differ do so here, all but never only elsewhere."""
    step = max(1, t.numel() // SAMPLE)
    few = t.detach().reshape(-1)[::step].cpu().resolve_conj().resolve_neg().contiguous()
    return few.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _equal(weights: list[Weight]) -> list[list[Weight]]:
    """Groups of equal weights, each in the order given."""
    groups: list[list[Weight]] = []
    for w in weights:
        for group in groups:
            if same_bits(_values(group[0]), _values(w)):
                group.append(w)
                break
        else:
            groups.append([w])
    return groups


def _merged(first: Weight, others: list[Weight]) -> dict[Op, Op]:
    names = dict.fromkeys((*first.also, *(name for w in others for name in (w.key, *w.also))))
    names.pop(first.key, None)  # a graph may name one weight twice
    one = first.replace(also=tuple(names)).from_(first, *others)
    return dict.fromkeys((first, *others), one)


__all__ = ["DedupParams"]
