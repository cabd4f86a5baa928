"""Sizes as plain numbers, for rules that weigh work against memory traffic."""

from __future__ import annotations

from effc.ir import Dim
from effc.ir.symbols import symbolic

TYPICAL = 64  # stands for a size that only a call knows; rules compare, so only ratios matter


def estimate(size: Dim | float) -> float:
    """The number behind a size, symbols taken as a typical one."""
    if not symbolic(size):
        return float(size)
    return float(size.subs({s: TYPICAL for s in size.free_symbols}))
