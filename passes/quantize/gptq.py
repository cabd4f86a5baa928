"""One-shot quantisation that lets later columns make up for the error of earlier ones.

GPTQ (arXiv 2210.17323): columns of W are rounded one by one; the error of each, weighed by the
inverse of H = X^T X, is taken off the columns that are still to come, so that |X W^T - X Q^T| stays
small and not |W - Q|.
"""

from __future__ import annotations

import torch

from effc.ir import PassError, Tensor
from effc.ir.formats import Encoded, GroupQuant, code_range, encode, quantize

BLOCK = 128  # columns after whose rounding the rest of the matrix is corrected


def gptq(
    w: torch.Tensor, h: torch.Tensor, t: Tensor, damping: float = 0.01, by_size: bool = False
) -> Encoded:
    """w [N, K] to codes of type t, whose format is a GroupQuant. h: X^T X of its inputs, [K, K].

    damping: share of the mean of h's diagonal that is added to it. by_size: columns of large inputs
    first; scales are then those of the matrix before any correction, else of each group when its
    turn comes. Raises PassError where h is no Hessian.
    """
    f = t.format
    assert isinstance(f, GroupQuant)
    size = w.shape[1]
    group = f.group or size
    order = h.diagonal().argsort(descending=True, stable=True) if by_size else torch.arange(size)
    inverse = inverse_root(h[order][:, order], damping)
    least, largest = code_range(t.dtype)
    scale, zero = (f.spread(p, size).expand(-1, size).clone() for p in _ranges(w, t))
    codes, w = torch.zeros_like(w), w[:, order]
    block = max(BLOCK // group, 1) * group if group < size else BLOCK
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = torch.zeros(len(w), end - start)
        for i in range(start, end):
            at = int(order[i])
            if at % group == 0 and not by_size:  # what was corrected has ranges of its own
                one = t.with_(shape=tuple(w[:, i : i + group].shape))
                scale[:, i : i + group], zero[:, i : i + group] = _ranges(w[:, i : i + group], one)
            s, z = scale[:, at], zero[:, at]
            code = (torch.round(w[:, i] * (1 / s)) + z).clamp_(least, largest)
            error = (w[:, i] - (code - z) * s) / inverse[i, i]
            w[:, i + 1 : end] -= error[:, None] * inverse[i, i + 1 : end]
            codes[:, at], errors[:, i - start] = code, error
        w[:, end:] -= errors @ inverse[start:end, end:]
    types = f.parts(t)
    found = {"scale": scale[:, ::group], "zero": zero[:, ::group]}
    rest = [found[n].to(of.dtype.torch) for n, of in types.items() if n != "codes"]
    return Encoded(t, (encode(codes.to(t.dtype.torch), types["codes"]), *rest))


def _ranges(w: torch.Tensor, t: Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that cover w, as f32[N, groups], rounded to their types."""
    found = quantize(w.contiguous(), t)
    scale = found["scale"].float()
    has_zero = t.format.zero is not None  # type: ignore[attr-defined]
    return scale, found["zero"].float() if has_zero else torch.zeros_like(scale)


def inverse_root(h: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with U^T U = (h + damping)^-1."""
    h = h.double() if h.shape[0] <= 4096 else h.clone()
    mean = float(h.diagonal().mean())
    h.diagonal().add_(damping * mean if mean > 0 else 1.0)
    h.diagonal()[h.diagonal() == 0] = 1.0
    try:
        return torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
        ).float()
    except torch.linalg.LinAlgError as e:
        raise PassError(
            "the inputs of a layer have no inverse covariance", why=str(e).splitlines()[0],
            fix="more calibration data, or a larger damping",
        ) from e  # fmt: skip


def output_error(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> float:
    """|X W^T - X Q^T| / |X W^T|, from h = X^T X alone."""
    return _energy(w - q, h) / max(_energy(w, h), 1e-30)


def _energy(w: torch.Tensor, h: torch.Tensor) -> float:
    return float(((w @ h) * w).sum(dtype=torch.float64).clamp_min(0).sqrt())


__all__ = ["gptq", "inverse_root", "output_error"]
