"""Building and calling: the scheduler's library, and the structures shared with it."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..build import Library, build

HERE = Path(__file__).parent
FINDINGS = 64  # different ones that a launch reports

u32, u64, i32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


class CFinding(ctypes.Structure):
    _fields_ = (
        ("kind", i32), ("pc", i32), ("other_pc", i32), ("space", i32), ("block", u32 * 3),
        ("thread", u32), ("other_thread", u32), ("access", u32), ("other_access", u32),
        ("size", u32), ("address", u64), ("count", u64),
    )  # fmt: skip


class CRegion(ctypes.Structure):
    _fields_ = (("base", u64), ("bytes", u64), ("granule", u32), ("writable", u32))


EVENT = np.dtype([(n, "i4" if n in ("kind", "pc") else "u4")
                  for n in ("kind", "pc", "block", "thread", "address", "size")])  # fmt: skip


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p), ("params", ctypes.c_char_p), ("grid", u32 * 3),
        ("block", u32 * 3), ("shared_bytes", u32), ("barriers", u32), ("local_bytes", u64),
        ("stack_bytes", u64), ("threads", u32), ("check", u32), ("order", u32), ("lazy", u32),
        ("seed", u64), ("regions", ctypes.POINTER(CRegion)), ("regions_count", u32),
        ("findings_room", u32), ("findings", ctypes.POINTER(CFinding)), ("findings_count", u32),
        ("across_blocks", u32), ("events", ctypes.c_void_p), ("events_room", u64),
        ("events_count", u64), ("left_out", i32), ("unused", i32),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def header() -> str:
    """effc_simt.h with what it includes of ours, in one piece: a kernel's key covers all of it."""
    text = (HERE / "effc_simt.h").read_text()
    return re.sub(
        r'#include "(effc_simt_\w+\.h)"',
        lambda m: (HERE / m[1]).read_text().replace("#pragma once\n", ""),
        text.replace("#pragma once\n", ""),
    )


@functools.lru_cache(maxsize=1)
def flags() -> tuple[str, ...]:
    """PTX says where multiply and add are fused. Lanes are vectors as wide as torch may use."""
    level = {"AVX2": "-march=x86-64-v3", "AVX512": "-march=x86-64-v4"}.get(
        torch.backends.cpu.get_cpu_capability()
    )
    return (
        "-O1", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-ffp-contract=off",
        "-fno-strict-aliasing", "-fno-exceptions", "-w", *([level] if level else []),
    )  # fmt: skip


def build_kernel(source: str, name: str, *, check: bool) -> Library:
    extra = ("-DSIMT_CHECK",) if check else ()
    return build(f"{header()}\n{source}", flags=(*flags(), *extra), name=f"ptx_{name}")


@functools.lru_cache(maxsize=2)
def scheduler(portable: bool = False) -> Callable[..., int]:
    """The C function that runs a grid. portable: with ucontext instead of our own switch."""
    source = f"{header()}\n{(HERE / 'effc_simt.cpp').read_text()}"
    extra = ("-DSIMT_UCONTEXT",) if portable else ()
    library = build(source, flags=(*flags(), *extra), name="ptx_scheduler")
    function = library.function("effc_simt_launch", ctypes.POINTER(CLaunch), restype=ctypes.c_int)
    function.library = library  # type: ignore[attr-defined]  # kept as long as the function is
    return function
