"""Plans for GPUs: which Triton kernels compute which node, and how they are launched."""

from . import anchored, attention, fused, images, movers, norms, pointwise  # noqa: F401  (lowerings)
from .lowering import GPU

__all__ = ["GPU"]
