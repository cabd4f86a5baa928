"""Plans for GPUs: which Triton kernels compute which node, and how they are launched."""

from . import fused, images, movers, norms  # noqa: F401  (they fill the table)
from .lowering import GPU

__all__ = ["GPU"]
