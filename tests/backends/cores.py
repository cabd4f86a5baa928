"""Cores called directly, with an epilogue that stores their sums."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from effc.backends.cpu.features import compile_flags, detect
from effc.backends.cpu.tuning import Problem, storing
from effc.codegen.build import Unit, build_many
from effc.codegen.cpp.kernel import Kernel, unit
from effc.ir.types import f32


@cache
def _functions(kernels: tuple[Kernel, ...], plain: bool) -> list:
    flags = compile_flags("default", ()) if plain else detect().flags()
    libraries = build_many([Unit(unit([k]), k.name) for k in kernels], flags=flags)
    types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return [lib.function(k.name, *types) for lib, k in zip(libraries, kernels, strict=True)]


def call(
    core: Kernel, rows: int, columns: int, reads: Sequence[torch.Tensor], numbers: Sequence[int],
    *, threads: int = 2, plain: bool = False,
) -> torch.Tensor:  # fmt: skip
    """f32[rows, columns]. numbers: what the core takes after the epilogue's address and `rows`.

    plain: built without any extension of the CPU's.
    """
    end, more = storing(Problem("", rows, columns, f32), len(reads))
    function, epilogue = _functions((core, end), plain)
    y = torch.full((rows, columns), float("nan"))
    pointers = np.array([t.data_ptr() for t in (y, *reads)], dtype=np.int64)
    address = ctypes.cast(epilogue, ctypes.c_void_p).value
    told = np.array([address, rows, *numbers, *more], dtype=np.int64)
    function(pointers.ctypes.data, told.ctypes.data, threads)
    return y
