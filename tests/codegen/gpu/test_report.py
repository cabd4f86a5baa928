"""Reports over kernels: rows, estimates that say they are estimates, and the table."""

from __future__ import annotations

import pytest
import sympy

from effc.codegen.gpu import Work, device, estimate, report, table
from effc.ir import OptionError
from effc.ir.op import Cost

from .test_resources import COPY, PRODUCT


def test_the_roofline_is_the_larger_of_two_times() -> None:
    on = device("A100 SXM 80GB")
    found = estimate(Cost(312 * 10**9, 10**6), "f16", on)
    assert found is not None
    # 312 GFLOP at 312 TFLOP/s are 1 ms; 1 MB at 2039 GB/s is half a microsecond.
    assert (found.bound, found.seconds) == ("products", pytest.approx(1e-3))
    assert str(found) == "estimate: at least 1 ms, bound by products"
    found = estimate(Cost(10**6, 2039 * 10**6), "f32", on)
    assert found is not None
    assert (found.bound, found.seconds) == ("memory", pytest.approx(1e-3))
    assert found.intensity == pytest.approx(1 / 2039)


def test_sizes_that_vary_have_no_estimate() -> None:
    assert estimate(Cost(sympy.Symbol("N"), 4), "f32", device("H100 SXM")) is None


def test_a_kind_without_a_peak_is_refused() -> None:
    with pytest.raises(OptionError, match="no peak of RTX 4090 for i2"):
        estimate(Cost(1, 1), "i2", device("RTX 4090"))


def test_a_row_for_every_kernel_and_target() -> None:
    works = [Work(PRODUCT, "y0", Cost(2 * 64 * 64 * 32, 4 * 8192), "f16"), COPY]
    rows = report(works, ["H200 SXM", "hip:gfx942", "cuda:sm_87"])
    assert [(r.work.kernel.name, r.device) for r in rows] == [
        (name, on) for on in ("H200 SXM", "MI300X", "") for name in ("product", "copy")
    ]
    first, copy = rows[:2]
    assert first.occupancy is not None and first.occupancy.blocks > 1
    assert first.estimate is not None and first.estimate.bound == "memory"
    assert copy.estimate is None and copy.resources.count("stores") == 1
    assert rows[4].occupancy is None, "nothing is known of a device of sm_87"

    text = table(rows)
    head, *lines = text.splitlines()
    assert "time (estimate)" in head and len(lines) == 6
    assert lines[0].startswith("product  y0    H200 SXM") and ">= 0.00683 us, memory" in lines[0]
    assert lines[4].split()[2] == "cuda:sm_87"


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing is known of a GPU 'H300'"):
        report([COPY], ["H300"])
