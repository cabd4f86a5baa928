"""The limits of this machine, measured: arithmetic per instruction set, bandwidth per memory level.

The loops are in limits.cpp and are built like every kernel of effc. Limits are the best of several
samples, because a limit is what the machine can do; the median beside it says how steady it was.
"""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effc.backends.cpu.features import LEVELS, CpuFeatures, compile_flags
from effc.codegen.build import Library, build
from effc.codegen.toolchain import Toolchain

SOURCE = Path(__file__).with_name("limits.cpp")
LANES = {"default": 4, "avx2": 8, "avx512": 16}
CHAINS = 12  # as in limits.cpp
AMX_ROWS, AMX_BYTES = 16, 64
SAMPLE = 0.05  # seconds
LARGEST = 1 << 30  # bytes; a virtual machine may report an L3 larger than its share of memory

# A loop run by one of several threads for so many repeats.
Loop = Callable[[int, int], object]


def measure(
    cpu: CpuFeatures,
    toolchain: Toolchain,
    threads: int,
    samples: int = 9,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All limits for so many threads, as JSON: `arithmetic`, `read`, `copy`, and `peak`.

    `tell` is called with the name of what is measured next.
    """
    arithmetic = {}
    for name, (loop, operations) in _arithmetic(cpu, toolchain).items():
        tell(name)
        arithmetic[name] = _rate(loop, threads, operations, samples, "gflops")
    library = _library(cpu.level, cpu.extensions, toolchain)
    read, copy = {}, {}
    for level, size in levels(cpu, threads).items():
        tell(f"{level} bandwidth")
        buffers = [_buffer(size) for _ in range(threads)]
        read[level] = _rate(_reader(library, buffers), threads, size, samples, "gbs")
        if level != "DRAM":
            read[level]["bytes"] = {"L1": cpu.l1d, "L2": cpu.l2, "L3": cpu.l3}[level]
        halves = [(b[: len(b) // 2], b[len(b) // 2 :]) for b in buffers]
        copy[level] = _rate(_copier(library, halves), threads, size, samples, "gbs")
    found = {"arithmetic": arithmetic, "read": read, "copy": copy}
    return {**found, "peak": peaks(arithmetic)}


def peaks(arithmetic: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The fastest arithmetic of each precision: bfloat16 may have none faster than float32's."""
    names: dict[str, list[str]] = {"fp32": [], "bf16": []}
    for name in arithmetic:
        if name.startswith("fp32"):
            names["fp32"].append(name)
        if name.startswith(("fp32", "bf16")):
            names["bf16"].append(name)
    best = {p: max(of, key=lambda n: arithmetic[n]["gflops"]) for p, of in names.items()}
    return {p: {"by": n, "gflops": arithmetic[n]["gflops"]} for p, n in best.items()}


def levels(cpu: CpuFeatures, threads: int) -> dict[str, int]:
    """Bytes for each thread to work on, so that they lie in that level and in none before it."""
    beyond = min(max(4 * cpu.l3, 256 << 20), LARGEST)
    shared = max(2 * cpu.l2, min(cpu.l3 // 4, 8 << 20) // threads)
    return {
        "L1": cpu.l1d // 2,
        "L2": cpu.l2 // 2,
        "L3": shared,
        "DRAM": beyond // threads,
    }


# ------------------------------------------------------------------ loops


def _library(level: str, extensions: tuple[str, ...], toolchain: Toolchain) -> Library:
    flags = toolchain.supported(compile_flags(level, extensions))
    return build(
        SOURCE.read_text(), flags=(*flags, f"-DLANES={LANES[level]}"), toolchain=toolchain,
        name=f"limits-{level}",
    )  # fmt: skip


def _arithmetic(cpu: CpuFeatures, toolchain: Toolchain) -> dict[str, tuple[Loop, int]]:
    """Name -> (loop, operations a repeat) of everything this CPU has."""
    found: dict[str, tuple[Loop, int]] = {}
    for level in LEVELS[: LEVELS.index(cpu.level) + 1]:
        library = _library(level, cpu.extensions if level == cpu.level else (), toolchain)
        name = "fp32 SSE2" if level == "default" else f"fp32 {level.upper()}"
        found[name] = (_counted(library, "effc_fma"), 2 * LANES[level] * CHAINS)
    library = _library(cpu.level, cpu.extensions, toolchain)
    product = 4 * 2 * AMX_ROWS * AMX_ROWS * AMX_BYTES
    for name, symbol, operations in (
        ("bf16 AVX512", "effc_bf16", 4 * 16 * CHAINS),
        ("bf16 AMX", "effc_amx_bf16", product // 2),
        ("int8 AMX", "effc_amx_int8", product),
    ):
        if hasattr(library.cdll, symbol):  # compiled in where the CPU's flags allow it
            found[name] = (_counted(library, symbol), operations)
    return found


def _counted(library: Library, symbol: str) -> Loop:
    call = library.function(symbol, ctypes.c_int64, ctypes.c_float, restype=ctypes.c_float)
    return lambda _thread, repeats: call(repeats, 1.0)


def _reader(library: Library, buffers: list[np.ndarray]) -> Loop:
    types = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    call = library.function("effc_read", *types, restype=ctypes.c_float)
    return lambda thread, repeats: call(buffers[thread].ctypes.data, buffers[thread].size, repeats)


def _copier(library: Library, halves: list[tuple[np.ndarray, np.ndarray]]) -> Loop:
    types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    call = library.function("effc_copy", *types, restype=ctypes.c_float)

    def loop(thread: int, repeats: int) -> object:
        to, source = halves[thread]
        return call(to.ctypes.data, source.ctypes.data, source.size, repeats)

    return loop


def _buffer(size: int) -> np.ndarray:
    """Floats on pages that are really there, whole multiples of what a loop takes at a time."""
    floats = max(512, size // 4 // 512 * 512)
    return np.ones(floats, np.float32)


# ------------------------------------------------------------------ rates


def _rate(loop: Loop, threads: int, amount: int, samples: int, unit: str) -> dict[str, Any]:
    """`amount` (operations or bytes) a repeat and thread, as 1e9 a second of all threads."""
    repeats = _repeats(loop)
    found = [threads * amount * repeats / _together(loop, threads, repeats) / 1e9
             for _ in range(samples)]  # fmt: skip
    return {
        unit: round(max(found), 2), "median": round(statistics.median(found), 2),
        "samples": samples,
    }  # fmt: skip


def _repeats(loop: Loop) -> int:
    """So many that a sample takes about SAMPLE seconds."""
    repeats = 1
    while True:
        start = time.perf_counter()
        loop(0, repeats)
        took = time.perf_counter() - start
        if took > SAMPLE / 4:
            return max(1, round(repeats * SAMPLE / took))
        repeats *= 4


def _together(loop: Loop, threads: int, repeats: int) -> float:
    """Seconds from the common start to the last thread's end. The loops run without the GIL."""
    gate = threading.Barrier(threads + 1)
    ends = [0.0] * threads

    def run(thread: int) -> None:
        gate.wait()
        loop(thread, repeats)
        ends[thread] = time.perf_counter()

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in running:
        thread.join()
    return max(ends) - start


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(what, unit, best, median) of one thread count, in the order measured."""
    for name, rate in found["arithmetic"].items():
        yield (
            name,
            "GFLOP/s" if not name.startswith("int8") else "GOP/s",
            rate["gflops"],
            rate["median"],
        )
    for kind in ("read", "copy"):
        for level, rate in found[kind].items():
            yield f"{kind} {level}", "GB/s", rate["gbs"], rate["median"]
