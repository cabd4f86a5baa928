"""Runs a kernel text both ways on the CPU: by its PTX, and by a C++ compiler."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from effc.codegen.build import build
from effc.codegen.cuda.compile import compile_kernels, target
from effc.codegen.cuda.host import plan_function
from effc.codegen.cuda.kernel import CudaKernel, Pointer, Schedule
from effc.codegen.ptx import load

SM80 = target("cuda:sm_80")


def text(name: str, body: str, *types: str, warps: int = 1, shared: int = 0) -> CudaKernel:
    """A kernel of pointers y, x0, x1 ...; the first is written. body: its statements."""
    pointers = tuple(
        Pointer(f"x{i - 1}" if i else "y", f"{'const ' if i else ''}{t}* __restrict__")
        for i, t in enumerate(types)
    )
    parameters = ", ".join(f"{p.type} {p.name}" for p in pointers)
    full = (
        '#include "effc_cuda.h"\n#include "effc_reduce.h"\n'
        f'extern "C" __global__ void __launch_bounds__({32 * warps})\n@NAME@({parameters}) {{\n'
        f"  const int l = threadIdx.x;\n{body}\n}}\n"
    )
    return CudaKernel(name, full, pointers, (), Schedule(warps, 1), shared)


def by_ptx(kernel: CudaKernel, grid: int, args: list[Any], numbers: tuple[int, ...] = ()) -> None:
    """Every access looked at: bounds, races, waits."""
    (made,) = compile_kernels([kernel], SM80)
    entry = load(made.assembly)[kernel.name]
    entry.launch(grid, [*args, *numbers], block=made.threads, shared=made.shared, check=True)


def by_host(kernel: CudaKernel, grid: int, args: list[Any], numbers: tuple[int, ...] = ()) -> None:
    library = build(plan_function(kernel), flags=("-O1", "-mavx2", "-mf16c"))
    function = library.function(kernel.name, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a.data_ptr() for a in args]
    p = (ctypes.c_void_p * len(args))(*addresses)
    n = (ctypes.c_int64 * (3 + len(numbers)))(grid, 1, 1, *numbers)
    function(p, n, 1)


def both(kernel: CudaKernel, out: np.ndarray, *args: np.ndarray, grid: int = 1) -> np.ndarray:
    """What the kernel writes, the same to the bit either way."""
    ours, theirs = out.copy(), out.copy()
    by_ptx(kernel, grid, [ours, *args])
    by_host(kernel, grid, [theirs, *args])
    np.testing.assert_array_equal(ours, theirs)
    return ours
