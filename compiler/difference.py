"""How far two results are apart, and what a pass's numeric contract says about it.

Values only: who runs which graph is the business of `measure` and of the instruments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir.formats import Encoded
from effc.passes.base import Numerics

__all__ = ["SAME", "Difference", "NodeError", "compare", "sample_list", "violation", "worst"]


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference, and the norm of the difference over the norm of the value.

    `output` is the position of the worst result. `eps` is the coarsest float step among them.
    """

    max_abs: float
    relative_l2: float
    output: int = 0
    eps: float = 0.0

    @property
    def equal(self) -> bool:
        return self.max_abs == 0

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        return f"max_abs {self.max_abs:.2g}, relative_l2 {self.relative_l2:.2g}"


SAME = Difference(0.0, 0.0)


@dataclass(frozen=True)
class NodeError:
    """The error at one value that a pass rewrote: the line before, the line after, where from."""

    before: str
    after: str
    where: str
    error: Difference


def compare(before: Sequence[Any], after: Sequence[Any]) -> Difference:
    """The worst difference over two lists of results (tensors, numbers, tuples of these, and
    compressed values, which are compared as the numbers that they stand for).

    NaN against NaN and infinity against the same infinity are equal; NaN against a number is
    infinitely wrong, and so is another shape or element type.
    """
    if len(before) != len(after):
        return Difference(math.inf, math.inf)
    return worst(_compare(a, b, i) for i, (a, b) in enumerate(zip(before, after)))


def worst(differences: Iterable[Difference]) -> Difference:
    """Largest of each measure; `output` is of the largest relative error."""
    found = list(differences)
    if not found:
        return SAME
    top = max(found, key=lambda d: (d.relative_l2, d.max_abs))
    return Difference(
        max(d.max_abs for d in found), top.relative_l2, top.output, max(d.eps for d in found)
    )


def violation(numerics: Numerics, error: Difference) -> str | None:
    """Why the error breaks the contract, or None. Lossy passes promise nothing."""
    if numerics.kind == "lossy":
        return None
    if numerics.kind == "exact" and numerics.value == 0:
        return None if error.equal else f"declared {numerics}, found {error}"
    found = error.max_abs if numerics.metric == "max_abs" else error.relative_l2
    allowed = numerics.value
    if numerics.kind == "exact":  # written for float32; a few roundings of a shorter type are more
        allowed = max(allowed, 4 * error.eps)
    return None if found <= allowed else f"declared {numerics}, found {error}"


def sample_list(inputs: Sequence[Any] | None) -> list[tuple[Any, ...]]:
    """One set of inputs, or a list of sets, as a list of sets."""
    if inputs is None:
        return []
    if inputs and all(isinstance(i, (tuple, list)) for i in inputs):
        return [tuple(i) for i in inputs]
    return [tuple(inputs)]


def _compare(a: Any, b: Any, output: int) -> Difference:
    if isinstance(a, (tuple, list)):
        inner = compare(a, b)
        return Difference(inner.max_abs, inner.relative_l2, output, inner.eps)
    if isinstance(a, Encoded) and isinstance(b, Encoded):
        a, b = a.decode(), b.decode()
    if not isinstance(a, torch.Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(math.inf, math.inf, output)
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    x, y = a.detach().double().flatten(), b.detach().double().flatten()
    same = (x == y) | (x.isnan() & y.isnan())
    if same.all():
        return Difference(0.0, 0.0, output, eps)
    delta = torch.where(same, 0.0, x - y).abs()
    delta = torch.where(delta.isnan(), math.inf, delta)
    size = torch.where(x.isfinite(), x, 0.0).norm().item()
    size = size or torch.where(y.isfinite(), y, 0.0).norm().item() or 1.0
    return Difference(delta.max().item(), delta.norm().item() / size, output, eps)
