"""The loops that measure the machine: they build, and give positive numbers."""

import pytest

from effc.backends.cpu.features import CpuFeatures, detect
from effc.benchmarks import limits
from effc.codegen.toolchain import Toolchain, find_toolchain


@pytest.fixture
def here():
    cpu, toolchain = detect(), find_toolchain()
    if not isinstance(cpu, CpuFeatures) or not isinstance(toolchain, Toolchain):
        pytest.skip("needs an x86-64 CPU and a C++ compiler")
    return cpu, toolchain


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_positive(monkeypatch, here, threads):
    monkeypatch.setattr(limits, "SAMPLE", 1e-4)
    sizes = {"L1": 1 << 13, "L2": 1 << 15, "L3": 1 << 17, "DRAM": 1 << 19}
    monkeypatch.setattr(limits, "levels", lambda cpu, threads: sizes)
    found = limits.measure(*here, threads, samples=2)
    assert all(best > 0 and median > 0 for _, _, best, median in limits.rows(found))
    assert found["arithmetic"]["fp32 SSE2"]
    assert set(found["peak"]) == {"fp32", "bf16"}


def test_the_fastest_arithmetic_is_the_peak():
    rates = {
        "fp32 AVX2": {"gflops": 2.0},
        "bf16 AVX512": {"gflops": 1.0},
        "int8 AMX": {"gflops": 9.0},
    }
    assert limits.peaks(rates) == {p: {"by": "fp32 AVX2", "gflops": 2.0} for p in ("fp32", "bf16")}


def test_working_sets_lie_in_their_level(here):
    cpu, _ = here
    for threads in (1, 2, 8):
        sizes = limits.levels(cpu, threads)
        assert sizes["L1"] < cpu.l1d < sizes["L2"] < cpu.l2 < sizes["L3"]
        assert sizes["DRAM"] * threads > cpu.l2
