"""The cuda-host target: a GPU's plan with CUDA C++ kernels in it, executed on the CPU.

`linear` and `matmul` in half and bf16, and rows, are kernels of codegen/cuda; everything else is
Triton's. The PTX of both runs on the CPU as in target ptx-host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effc.codegen.cuda.compile import compile_kernels
from effc.codegen.cuda.kernel import CudaKernel
from effc.codegen.cuda.toolchain import MissingCuda, find_cuda
from effc.ir import No, no

from ..base import Options
from ..ptx_host import ARCH, PtxHostBackend
from . import fused, products, rows  # noqa: F401  (lowerings)
from .lowering import CUDA


class CudaHostBackend(PtxHostBackend):
    """ptx-host with our CUDA C++ kernels for products and rows, Triton's for the rest."""

    name, target = "cuda-host", CUDA

    def compiled(self, kernels: Mapping[str, Any]) -> list[Any]:
        ours = [k for k in kernels.values() if isinstance(k, CudaKernel)]
        return [*super().compiled(kernels), *compile_kernels(ours, ARCH)]

    def _cannot_build(self, options: Options) -> No | None:
        found = find_cuda()
        if isinstance(found, MissingCuda):
            return no("no CUDA compiler: {}", found)
        return super()._cannot_build(options)


__all__ = ["CUDA", "CudaHostBackend"]
