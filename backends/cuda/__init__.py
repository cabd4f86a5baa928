"""Targets with CUDA C++ kernels in a GPU's plan: `cuda` on NVIDIA's, `cuda-host` on the CPU.

`linear` and `matmul` in half and bf16, and rows, are kernels of codegen/cuda, with a reason where
they are not (lowering.py); everything else is Triton's. On the CPU the PTX of both is executed, as
in target ptx-host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.cuda.compile import compiler
from effc.codegen.cuda.toolchain import MissingCuda, find_cuda
from effc.codegen.triton.compile import Target
from effc.ir import Graph, No, OptionError, no

from ..base import Options
from ..gpu.backend import GpuBackend
from ..gpu.program import GpuExecutable
from ..ptx_host import PtxHostBackend
from . import codes, fused, products, rows  # noqa: F401  (they fill the table)
from .lowering import CUDA


class CudaBackend(GpuBackend):
    """CUDA C++ kernels for products and rows, Triton's for the rest, on an NVIDIA GPU."""

    name, lowerings = "cuda", CUDA

    def compilers(self) -> dict[str, str]:
        return {**super().compilers(), "cuda": compiler().identity}

    def cross_compile(
        self, graph: Graph, targets: Sequence[Target], options: Any = None
    ) -> GpuExecutable:
        for to in targets:
            _check(to)
        return super().cross_compile(graph, targets, options)

    def _cannot_build(self, options: Options) -> No | None:
        without = super()._cannot_build(options)
        return _no_compiler() if without is None else without


def _check(to: Target) -> None:
    if to.backend != "cuda" or not isinstance(to.arch, int) or to.arch < 80:
        raise OptionError(
            f"CUDA C++ kernels are for sm_80 and newer, not {to}",
            fix="target 'triton' has kernels for it",
        )


class CudaHostBackend(PtxHostBackend):
    """The plan of target cuda with its kernels executed on CPU tensors."""

    name, target = "cuda-host", CUDA

    def _cannot_build(self, options: Options) -> No | None:
        without = _no_compiler()
        return super()._cannot_build(options) if without is None else without


def _no_compiler() -> No | None:
    found = find_cuda()
    return no("no CUDA compiler: {}", found) if isinstance(found, MissingCuda) else None


__all__ = ["CUDA", "CudaBackend", "CudaHostBackend"]
