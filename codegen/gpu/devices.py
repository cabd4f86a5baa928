"""GPUs as data: what their makers publish. Peaks are of dense products, without sparsity.

Limits of one unit (an SM or a CU) are those of the CUDA C++ Programming Guide, table "Technical
Specifications per Compute Capability", and of LLVM's "User Guide for AMDGPU Backend" with AMD's
"CDNA3 Instruction Set Architecture".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from effc.ir import OptionError, nearest

KB, MB, GB = 1 << 10, 1 << 20, 10**9
TERA = 10**12


@dataclass(frozen=True)
class Limits:
    """What one unit holds, and in which steps it is given out.

    registers: 32-bit ones of the unit. partitions: of the unit, each with its part of registers and
    warps. register_step: registers of a warp are rounded up to it. most_registers: of a thread.
    reserved: bytes of shared memory that every block takes besides its own.
    """

    warp: int
    warps: int
    blocks: int
    registers: int
    register_step: int
    most_registers: int
    shared: int
    shared_block: int
    shared_step: int
    reserved: int = 0
    partitions: int = 4


# blocks of gfx9: barriers of a CU; its registers: 4 SIMDs x 512 x 64 lanes, AGPRs among them.
SM_80 = Limits(32, 64, 32, 65536, 256, 255, 164 * KB, 163 * KB, 128, KB)
SM_89 = Limits(32, 48, 24, 65536, 256, 255, 100 * KB, 99 * KB, 128, KB)
SM_90 = Limits(32, 64, 32, 65536, 256, 255, 228 * KB, 227 * KB, 128, KB)
SM_100 = Limits(32, 64, 32, 65536, 256, 255, 228 * KB, 227 * KB, 128, KB)
GFX942 = Limits(64, 32, 16, 131072, 512, 512, 64 * KB, 64 * KB, 512)


@dataclass(frozen=True)
class Device:
    """units: SMs or CUs. clock: Hz, boost. peak: FLOP/s (or integer operations/s) by element type
    of the factors, sums in float32 or int32; "f32" is that of vector units. bandwidth: bytes/s of
    memory. l2, memory: bytes. l2_bandwidth: bytes/s, about what microbenchmarks read, as makers do
    not publish it. source: where the other figures are published."""

    name: str
    target: str
    units: int
    clock: float
    peak: Mapping[str, float] = field(hash=False)
    bandwidth: float
    l2: int
    l2_bandwidth: float
    memory: int
    limits: Limits
    source: str


def _peak(**tera: float) -> dict[str, float]:
    return {kind: value * TERA for kind, value in tera.items()}


_A100 = _peak(f64=19.5, f32=19.5, tf32=156, f16=312, bf16=312, i8=624, i4=1248, i1=4992)
_H100 = _peak(f64=66.9, f32=66.9, tf32=494.7, f16=989.4, bf16=989.4, f8=1978.9, i8=1978.9)
_A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet (2021), A100 architecture whitepaper"
_H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet (2023), H100 architecture whitepaper"

DEVICES = {
    d.name: d
    for d in (
        Device("A100 SXM 80GB", "cuda:sm_80", 108, 1.41e9, _A100, 2039 * GB, 40 * MB, 5000 * GB,
               80 * GB, SM_80, _A100_SHEET),
        Device("A100 SXM 40GB", "cuda:sm_80", 108, 1.41e9, _A100, 1555 * GB, 40 * MB, 5000 * GB,
               40 * GB, SM_80, _A100_SHEET),
        Device("H100 SXM", "cuda:sm_90", 132, 1.98e9, _H100, 3350 * GB, 50 * MB, 8000 * GB,
               80 * GB, SM_90, _H100_SHEET),
        Device("H200 SXM", "cuda:sm_90", 132, 1.98e9, _H100, 4800 * GB, 50 * MB, 8000 * GB,
               141 * GB, SM_90, "NVIDIA H200 Tensor Core GPU data sheet (2024)"),
        Device("RTX 4090", "cuda:sm_89", 128, 2.52e9,
               _peak(f64=1.29, f32=82.6, tf32=82.6, f16=165.2, bf16=165.2, f8=330.3, i8=660.6,
                     i4=1321.2),
               1008 * GB, 72 * MB, 5000 * GB, 24 * GB, SM_89,
               "NVIDIA Ada GPU architecture whitepaper (2022)"),
        Device("B200", "cuda:sm_100", 148, 1.965e9,
               _peak(f64=37, f32=75, tf32=1100, f16=2250, bf16=2250, f8=4500, i8=4500),
               8000 * GB, 126 * MB, 14000 * GB, 180 * GB, SM_100,
               "NVIDIA DGX B200 data sheet (2024), a GPU of it; units, L2: the CUDA runtime"),
        Device("MI300X", "hip:gfx942", 304, 2.1e9,
               _peak(f64=163.4, f32=163.4, tf32=653.7, f16=1307.4, bf16=1307.4, f8=2614.9,
                     i8=2614.9),
               5300 * GB, 32 * MB, 10000 * GB, 192 * GB, GFX942,
               "AMD Instinct MI300X data sheet (2023)"),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """By its name, or the first one of a target such as "cuda:sm_80".

    Raises OptionError for anything else.
    """
    for d in DEVICES.values():
        if name in (d.name, d.target):
            return d
    known = [*DEVICES, *dict.fromkeys(d.target for d in DEVICES.values())]
    raise OptionError(f"nothing is known of a GPU {name!r}",
                      fix=nearest(name, known) or f"say one of {', '.join(known)}")  # fmt: skip


# What devices of which nothing is known are like: of one generation, or of its graphics cards.
LIKE = {
    "cuda:sm_86": "RTX 4090", "cuda:sm_87": "RTX 4090", "cuda:sm_103": "B200",
    "cuda:sm_110": "RTX 4090", "cuda:sm_120": "RTX 4090", "cuda:sm_121": "RTX 4090",
    "cuda": "A100 SXM 80GB", "hip": "MI300X",
}  # fmt: skip


def device_like(
    target: str, name: str, units: int, memory: int, l2: int = 0, shared_block: int = 0
) -> Device:
    """The sheet of a device that is here, by what its driver says of it; without a name the first
    one of the target.

    A device that the table does not have is one of its kin with as many units, and rates in
    proportion: enough to order schedules, no more.
    """
    alike = [d for d in DEVICES.values() if d.target == target]
    named = [d for d in alike if d.name.split()[0] in name and (d.units == units or not units)]
    if alike and not name:
        return alike[0]
    if named:
        return min(named, key=lambda d: abs(d.memory - memory))
    kin = alike[0] if alike else DEVICES[LIKE.get(target) or LIKE[target.partition(":")[0]]]
    part = units / kin.units if units else 1.0
    limits = kin.limits
    if shared_block:
        room = max(limits.shared - limits.shared_block, 0)
        limits = replace(limits, shared_block=shared_block, shared=shared_block + room)
    return replace(
        kin, name=name, target=target, units=units or kin.units, memory=memory or kin.memory,
        peak={kind: rate * part for kind, rate in kin.peak.items()}, limits=limits,
        bandwidth=kin.bandwidth * part, l2_bandwidth=kin.l2_bandwidth * part, l2=l2 or kin.l2,
        source=f"{kin.source}, in proportion to its units",
    )  # fmt: skip


__all__ = ["DEVICES", "Device", "Limits", "device", "device_like"]
