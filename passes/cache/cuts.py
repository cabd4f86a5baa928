"""Where a sequence may be cut: masks that are made of positions alone, looked at.

With a cache, what a query sees is what has come up to the end of its own call. A call may end
before position b where no query before b sees a key from b on: anywhere under a causal mask, at the
end of a block under a block-causal one, after the prefix under a prefix mask, and nowhere under a
mask that looks both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from effc.ir import Graph, Input, Number, Op, Weight, interpret
from effc.passes.analysis.index_values import LOW

if TYPE_CHECKING:
    import sympy

LENGTH = 96  # positions that are looked at


def cuts(mask: Op, size: sympy.Symbol) -> tuple[int, ...] | None:
    """Positions 1 .. LENGTH - 1 before which a call may end; None for a mask of other things.

    size: that of the sequence. Other sizes (the batch) are 1.
    """
    needed = Graph.of((), (mask,))
    if any(isinstance(n, (Input, Weight)) or n.random for n in (mask, *needed.nodes)):
        return None
    if any(isinstance(o, Input) for n in needed.nodes for o in n.operands):
        return None
    sizes = sorted(needed.all_symbols, key=str)
    given = [Input(s.name, Number()) for s in sizes]
    if any(i.symbol != s for i, s in zip(given, sizes, strict=True)):
        return None  # a number that is no size
    values = [LENGTH if s == size else 1 for s in sizes]
    (value,) = interpret(Graph.of(given, (mask,)), values)
    sees = value if value.dtype == torch.bool else value > LOW
    if sees.shape[-2:] != (LENGTH, LENGTH):
        return None
    sees = sees.reshape(-1, LENGTH, LENGTH).any(0)
    return tuple(b for b in range(1, LENGTH) if not sees[:b, b:].any())


__all__ = ["LENGTH", "cuts"]
