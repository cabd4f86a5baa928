"""The triton target: Triton kernels on a GPU. NVIDIA's and AMD's devices, those that torch uses."""

from __future__ import annotations

from ..gpu.backend import GpuBackend


class TritonBackend(GpuBackend):
    """Triton kernels on the GPU that torch uses."""

    name = "triton"


__all__ = ["TritonBackend"]
