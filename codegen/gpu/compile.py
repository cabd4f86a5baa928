"""Kernels of either language, compiled for a GPU that need not be here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cuda import compile as cuda
from ..cuda.kernel import CudaKernel
from ..triton import compile as triton
from ..triton.compile import Target
from ..triton.kernel import TritonKernel

AnyKernel = TritonKernel | CudaKernel
AnyCompiled = triton.Compiled | cuda.Compiled


def compile_kernels(kernels: Iterable[Any], to: Target) -> list[AnyCompiled]:
    """Those of a GPU among the kernels, each compiled, or taken from the cache.

    Raises UnsupportedError where a compiler is not installed, OptionError where the target is not
    one of a language's, EffcError where a kernel does not compile.
    """
    given = list(kernels)
    ours = triton.compile_kernels([k for k in given if isinstance(k, TritonKernel)], to)
    theirs = [k for k in given if isinstance(k, CudaKernel)]
    return [*ours, *(cuda.compile_kernels(theirs, to) if theirs else ())]


def is_portable(compiled: AnyCompiled) -> bool:
    """Whether devices after the target run it too: no feature of that one architecture is used.

    PTX says so: ".target sm_90a" is for sm_90 alone (PTX ISA, "PTX Module Directives: .target").
    """
    if compiled.target.backend != "cuda":
        return False
    arch = compiled.assembly.partition(".target")[2].split(maxsplit=1)[:1]
    return bool(arch) and arch[0].rstrip(",").removeprefix("sm_").isdecimal()


__all__ = ["AnyCompiled", "AnyKernel", "compile_kernels", "is_portable"]
