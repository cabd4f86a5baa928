"""Occupancy against the published rules, with the arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from effc.codegen.gpu import DEVICES, Resources, device, occupancy
from effc.codegen.triton.compile import target
from effc.ir import OptionError

BASE = Resources("k", target("cuda:sm_80"), 128, 32, 0, 0, 0, 0, {})


def of(on: str, threads: int, registers: int, shared: int = 0):
    return occupancy(replace(BASE, threads=threads, registers=registers, shared=shared), device(on))


def test_registers_of_warps_come_in_units_of_256() -> None:
    # 32 registers: 32 * 32 = 1024 a warp; 65536 / 1024 = 64 warps, all that an SM holds.
    full = of("A100 SXM 80GB", 1024, 32)
    assert (full.blocks, full.warps, full.share) == (2, 64, 1.0)
    # 33: 1056, rounded up to 1280. A partition's 16384 hold 12 warps, the SM 48: one block of 32.
    half = of("A100 SXM 80GB", 1024, 33)
    assert (half.blocks, half.share, half.bound) == (1, 0.5, "registers")


def test_every_resource_can_be_the_one_that_bounds() -> None:
    # 168 registers: 5376 a warp; a partition holds 3 warps (16128 of 16384), the SM 12 = 3 blocks.
    # 48 KB: with 1 KB reserved 49 KB a block; 164 KB hold 3. 64 warps hold 16 blocks of 4.
    found = of("A100 SXM 80GB", 128, 168, 48 << 10)
    assert found.limits == {"registers": 3, "shared memory": 3, "warps": 16, "blocks": 32}
    assert (found.blocks, found.warps) == (3, 12)
    # 255 registers: 8160, rounded up to 8192: 2 warps a partition, one block of 8 warps.
    assert of("H100 SXM", 256, 255).limits["registers"] == 1
    # Ada: 48 warps hold 24 blocks of 2 warps, and an SM holds 24 blocks; 1 KB each of 100 KB.
    found = of("RTX 4090", 64, 32)
    assert found.limits == {"registers": 32, "shared memory": 100, "warps": 24, "blocks": 24}
    # 20.5 KB with the reserved 1 KB are 22016 bytes: 102400 / 22016 = 4.65.
    found = of("RTX 4090", 128, 32, 20992)
    assert (found.blocks, found.bound) == (4, "shared memory")
    assert str(found) == "4 blocks, 16/48 warps, by shared memory"


def test_waves_of_a_cu() -> None:
    # 128 registers of 512 a lane: 4 waves on each of 4 SIMDs = 4 blocks of 4 waves; 64 KB of LDS
    # hold two blocks of 32 KB.
    found = of("MI300X", 256, 128, 32 << 10)
    assert found.limits == {"registers": 4, "shared memory": 2, "warps": 8, "blocks": 16}
    assert (found.warps, found.share) == (8, 0.25)
    # 129 are given as 136: 512 / 136 = 3.76.
    assert of("MI300X", 256, 129).limits["registers"] == 3


def test_what_does_not_fit_does_not_run() -> None:
    assert of("RTX 4090", 128, 64, 100 << 10).blocks == 0
    assert of("H100 SXM", 128, 64, 227 << 10).blocks == 1
    assert of("H100 SXM", 128, 64, (227 << 10) + 1).blocks == 0
    assert of("A100 SXM 40GB", 128, 256).blocks == 0


@pytest.mark.parametrize("name", DEVICES)
def test_peaks_follow_from_units_and_clocks(name) -> None:
    """A data sheet's peak of vector units is two operations a lane and cycle, on 64 or 128 lanes."""
    d = DEVICES[name]
    lanes = d.peak["f32"] / (2 * d.units * d.clock)
    nominal = {"A100": 64, "MI30": 128}.get(name[:4], 128)  # a CU issues two a cycle on each of 64
    assert lanes == pytest.approx(nominal, rel=0.03) or name.startswith("MI300X")
    if name.startswith("MI300X"):
        assert lanes == pytest.approx(128, rel=0.03)
    assert d.source and d.limits.warp == (64 if d.target.startswith("hip") else 32)


def test_devices_are_found_by_name_and_target() -> None:
    assert device("cuda:sm_90").name == "H100 SXM"
    assert device("hip:gfx942").memory == 192 * 10**9
    with pytest.raises(OptionError, match="did you mean 'H100 SXM'"):
        device("H100 SMX")
