"""Tables and pictures of made-up results."""

import pytest

from effc.benchmarks import plots
from effc.benchmarks.archive import Results
from effc.benchmarks.command import with_bounds
from effc.benchmarks.tables import as_parts
from effc.show import as_text

LIMITS = {
    "threads": {"1": {
        "arithmetic": {"fp32 AVX2": {"gflops": 100.0, "median": 99.0}},
        "peak": {p: {"by": "fp32 AVX2", "gflops": 100.0} for p in ("fp32", "bf16")},
        "read": {"L1": {"gbs": 200.0, "median": 1.0, "bytes": 1000}, "L2": {"gbs": 100.0, "median": 1.0, "bytes": 10000},
                 "L3": {"gbs": 50.0, "median": 1.0, "bytes": 100000}, "DRAM": {"gbs": 10.0, "median": 9.0}},
        "copy": {"DRAM": {"gbs": 8.0, "median": 7.0}},
    }}
}  # fmt: skip


def timed(ms, spread=0.01):
    return {"status": "timed", "ms": ms, "low": ms, "high": ms, "spread": spread}


def models():
    found = Results("models", limits=LIMITS)
    ways = [
        {"eager": timed(4.0), "inductor": timed(2.0), "effc": timed(1.0)},
        {"eager": timed(4.0), "inductor": {"status": "wrong", "reason": "relative L2 to eager is 1"}, "effc": timed(8.0, 0.3)},
    ]  # fmt: skip
    for name, w in zip(("one", "two"), ways):
        entry = {"name": name, "precision": "fp32", "threads": 1, "group": "model",
                 "work": {"flops": 10**8, "bytes": 10**6}, "ways": w}  # fmt: skip
        found.put(with_bounds(entry, LIMITS))
    return found


def test_ratios_are_to_the_best_peer_and_reasons_are_kept(golden):
    assert as_text(as_parts(models())) == golden


def test_limits_are_listed(golden):
    assert as_text(as_parts(Results("limits", limits=LIMITS))) == golden


def test_bounds_name_what_limits():
    def bound(flops, size):
        entry = {"name": "x", "precision": "fp32", "threads": 1, "ways": {"eager": timed(1.0)},
                 "work": {"flops": flops, "bytes": size}}  # fmt: skip
        return with_bounds(entry, LIMITS)["bound"]

    assert bound(10**8, 10) == {"ms": 1.0, "by": "compute"}
    assert bound(1, 5000) == {"ms": 5e-05, "by": "L2"}
    assert bound(1, 10**7) == {"ms": 1.0, "by": "DRAM"}


def test_without_limits_there_is_no_fraction():
    (entry, _) = models().entries
    del entry["bound"]
    assert "bound" not in with_bounds({**entry, "threads": 4}, LIMITS)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(models(), tmp_path)
    assert [p.name for p in paths] == ["models.png", "models.svg"]
    assert all(p.stat().st_size > 1000 for p in paths)
    assert plots.draw(Results("models"), tmp_path) == []
