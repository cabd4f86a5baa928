"""Plans for GPUs: which Triton kernels compute which node, and how they are launched."""

from . import decode, fused, images, movers, norms  # noqa: F401  (they fill the table)
from .lowering import GPU

__all__ = ["GPU"]
