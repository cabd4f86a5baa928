"""How many blocks of a kernel one unit holds at once, and what keeps it from more.

NVIDIA: the rules of the CUDA occupancy calculator (cuda_occupancy.h). A warp's registers are
rounded up to 256 and come out of one of four partitions; a block's shared memory is rounded up to
128 bytes, with 1 KB that the driver reserves. AMD: LLVM's GCNSubtarget for gfx9. A wave's vector
registers are rounded up to 8 a lane and come out of one SIMD, which holds 8 waves.
"""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Device, Limits
from .resources import Resources


@dataclass(frozen=True)
class Occupancy:
    """blocks: that one unit holds. warps: of them all. limits: blocks that each resource allows."""

    blocks: int
    warps: int
    most: int  # warps that the unit can hold
    limits: dict[str, int]

    @property
    def share(self) -> float:
        return self.warps / self.most

    @property
    def bound(self) -> str:
        """The resource that allows the fewest."""
        return min(self.limits, key=lambda name: self.limits[name])

    def __str__(self) -> str:
        return f"{self.blocks} blocks, {self.warps}/{self.most} warps, by {self.bound}"


def occupancy(r: Resources, device: Device) -> Occupancy:
    """Of a kernel compiled for the device's target; 0 blocks: it does not run there."""
    limits = device.limits
    warps = max(1, -(-r.threads // limits.warp))
    allowed = {
        "registers": _by_registers(r.registers, warps, limits),
        "shared memory": _by_shared(r.shared, limits),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    blocks = min(allowed.values())
    return Occupancy(blocks, blocks * warps, limits.warps, allowed)


def _by_registers(registers: int, warps: int, limits: Limits) -> int:
    if registers > limits.most_registers:
        return 0
    each = _up(max(1, registers) * limits.warp, limits.register_step)
    own = limits.registers // limits.partitions // each
    return own * limits.partitions // warps


def _by_shared(shared: int, limits: Limits) -> int:
    if shared > limits.shared_block:
        return 0
    taken = _up(shared + limits.reserved, limits.shared_step)
    return limits.shared // taken if taken else limits.blocks


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


__all__ = ["Occupancy", "occupancy"]
