"""What a compressed block is judged by: its result, and where its attention looks.

(ABQ-LLM, section 2.6: distribution correction, attention-aware KL; squared error as in its code.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir import Op
from effc.passes.fold.objective import distance

LEAST = 1e-9  # of a probability or cosine whose logarithm is taken


@dataclass(frozen=True)
class Weights:
    """How much each loss counts. double_softmax: of attention maps, as in the paper's code."""

    dlc: float = 1.0
    akl: float = 1.0
    mse: float = 1.0
    double_softmax: bool = False


def block_loss(
    y: torch.Tensor, maps: Sequence[torch.Tensor], goals: Sequence[torch.Tensor],
    wanted_maps: Sequence[torch.Tensor], weights: Weights,
) -> torch.Tensor:  # fmt: skip
    """goals: results of the float block, on the float stream and on what this block was given.

    dlc: -log|cos(y, goal)|, the mean cosine over tokens. mse: |y - goal|^2 / |goal|^2. akl:
    KL(P || P') + KL(P' || P) in nats a query, the mean over attentions.
    """
    total = torch.zeros(())
    for goal in goals:
        if weights.dlc:
            cosine = torch.cosine_similarity(y.float(), goal.float(), dim=-1).mean()
            total = total - weights.dlc * cosine.abs().clamp_min(LEAST).log()
        if weights.mse:
            total = total + weights.mse * distance([y], [goal])
    if weights.akl and maps:
        pairs = list(zip(maps, wanted_maps, strict=True))
        if weights.double_softmax:
            pairs = [(p.softmax(-1), q.softmax(-1)) for p, q in pairs]
        each = [divergence(p, q) + divergence(q, p) for p, q in pairs]
        total = total + weights.akl * torch.stack(each).mean()
    return total


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions along the last dimension, the mean over the others."""
    return (p * (p.clamp_min(LEAST).log() - q.clamp_min(LEAST).log())).sum(-1).mean()


# ------------------------------------------------------------------ attention maps


def attentions(nodes: Iterable[Op]) -> list[Any]:
    """Those whose maps can be computed from their operands: without a cache."""
    return [n for n in nodes if n.name == "attention" and n.past is None]  # type: ignore[attr-defined]


def map_operands(attention: Any) -> tuple[Op, ...]:
    """What `attention_map` reads."""
    mask = () if attention.mask is None else (attention.mask,)
    return (attention.q, attention.k, *mask)


def attention_map(
    attention: Any, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale q k^T + mask), the mean over heads: [*, n, m]. Its op's meaning, without v."""
    if attention.gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    scores = (q.float() @ k.float().mT) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if attention.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    found = scores.softmax(-1)
    return found.mean(-3) if found.dim() > 2 else found


def attention_maps(found: Sequence[Any], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of attentions, from the values of the operands of each in a row."""
    maps, at = [], 0
    for attention in found:
        count = len(map_operands(attention))
        maps.append(attention_map(attention, *values[at : at + count]))
        at += count
    return maps


__all__ = [
    "Weights", "attention_map", "attention_maps", "attentions", "block_loss", "divergence",
    "map_operands",
]  # fmt: skip
