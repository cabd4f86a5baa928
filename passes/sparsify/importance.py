"""Which groups of a matrix matter least, and what their loss can be made up with.

A group is `group` neighbours in a row of W [N, K]. Hessians are H = X^T X of the layer's inputs.
(GQSA, section 2.1; SparseGPT, arXiv 2301.00774, for the forms with a Hessian.)
"""

from __future__ import annotations

import torch

from effc.ir import Tensor
from effc.ir.formats import Encoded, GroupQuant, code_range, encode, quantize
from effc.passes.quantize.gptq import inverse_root

SCORES = ("hessian", "obs", "magnitude")
BUDGETS = ("row", "layer")


def group_scores(
    w: torch.Tensor, group: int, score: str, h: torch.Tensor | None, damping: float = 0.01
) -> torch.Tensor:
    """The mean over each group of what leaving out its elements costs, f32[N, K / group].

    magnitude: w^2. obs: w^2 / [H^-1]_jj, the error when all other columns make up for column j.
    hessian: w^2 / U_jj^2 with U^T U = H^-1, U upper triangular: when those to the right of j do,
    which is what a sweep over the columns can still correct.
    """
    cost = w.float().square()
    if score != "magnitude":
        assert h is not None
        root = inverse_root(h, damping)
        if score == "obs":
            cost = cost / root.square().sum(0)  # the diagonal of U^T U
        else:
            cost = cost / root.diagonal().square()
    return cost.unflatten(-1, (-1, group)).mean(-1)


def keep(scores: torch.Tensor, rate: float, budget: str) -> torch.Tensor:
    """Which groups stay, bool like scores: the share 1 - rate with the highest, in every row by
    itself, or of the matrix. Of equal ones the first stay."""
    rows, groups = scores.shape
    ranked = scores if budget == "row" else scores.reshape(1, -1)
    count = round((1 - rate) * ranked.shape[1])
    order = torch.argsort(ranked, dim=-1, descending=True, stable=True)[:, :count]
    found = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, True)
    return found.reshape(rows, groups)


def corrected(
    w: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, group: int, t: Tensor, damping: float
) -> Encoded:
    """w as codes of type t, which has a scale for each group, where the columns to the right make
    up for the error of each column: of rounding it, or of leaving it out where mask does."""
    root, (least, largest) = inverse_root(h, damping), code_range(t.dtype)
    f = t.format
    assert isinstance(f, GroupQuant)
    w, codes = w.clone(), torch.zeros_like(w)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in list(f.parts(t))[1:]}
    for c in range(w.shape[1] // group):
        start, end = c * group, (c + 1) * group
        own = quantize(w[:, start:end].contiguous(), t.with_(shape=(len(w), group)))
        for name, values in found.items():
            values.append(own[name])
        s = own["scale"].float()[:, 0]
        z = own["zero"].float()[:, 0] if f.zero is not None else torch.zeros_like(s)
        errors = torch.zeros(len(w), group)
        for i in range(start, end):
            codes[:, i] = (torch.round(w[:, i] * (1 / s)) + z).clamp(least, largest)
            made = torch.where(mask[:, c], (codes[:, i] - z) * s, 0)
            error = (w[:, i] - made) / root[i, i]
            w[:, i + 1 : end] -= error[:, None] * root[i, i + 1 : end]
            errors[:, i - start] = error
        w[:, end:] -= errors @ root[start:end, end:]
    held = encode(codes.to(t.dtype.torch), f.parts(t)["codes"])
    return Encoded(t, (held, *(torch.cat(values, 1) for values in found.values())))


__all__ = ["BUDGETS", "SCORES", "corrected", "group_scores", "keep"]
