"""Library routines chosen on purpose: convolutions, matrix products, attention.

Dense products that nothing specialises go to oneDNN and MKL through ATen; those libraries are kept
better than we could.
"""

from __future__ import annotations

from .builder import Builder
from .host import fallback
from .lowering import lowers


@lowers("conv1d", "conv2d", "conv3d", "linear", "matmul", "attention", native=False)
def _plain(b: Builder, node: object) -> None:
    fallback(b, node, None)  # type: ignore[arg-type]
