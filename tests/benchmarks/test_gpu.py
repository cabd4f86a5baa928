"""`effc bench gpu` without a GPU: what it says, what it would run, and made-up results."""

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from effc.benchmarks import command, gpu, plots, worker
from effc.benchmarks.archive import Results
from effc.benchmarks.peers import Unable
from effc.benchmarks.suites import cases
from effc.benchmarks.tables import as_parts
from effc.benchmarks.timing import Way
from effc.cli import cli
from effc.codegen.gpu import device
from effc.show import as_text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    done = CliRunner().invoke(cli, ["bench", "gpu", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output.startswith("effc bench gpu needs a GPU that torch uses: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_it_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "effc.benchmarks.gpu"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "needs a GPU" in done.stdout


def test_cases_have_names_of_their_own_and_jobs_cover_them():
    names = [c.name for c in cases("gpu")]
    assert len(set(names)) == len(names) and {"matmul-4096", "llama", "gpt2"} <= set(names)
    jobs = gpu.jobs(names[:2], ["bf16", "tf32"], 5, ["effc"])
    assert [(j["name"], j["precision"]) for j in jobs] == [
        (n, p) for n in names[:2] for p in ("tf32", "bf16")
    ]
    assert all(j["device"] == "cuda" and j["rounds"] == 5 for j in jobs)


def test_every_precision_is_beside_its_own_eager():
    for precision in gpu.PRECISIONS:
        ways = [p.name for p in gpu.peers(precision)]
        assert ways[0] == "eager" and ways[-1] == "effc" and len(set(ways)) == len(ways)
        assert (f"eager-{precision}" in ways) == (precision != "fp32")
        allowed = {p.matmul for p in gpu.peers(precision) if p.name != "eager"}
        assert allowed == {"high" if precision == "tf32" else "highest"}


def test_libraries_take_what_is_theirs_alone():
    by_name = {c.name: c for c in cases("gpu", ["matmul-1024", "softmax-16384x4096"])}
    ways = {p.name: p for p in gpu.peers("bf16")}
    model, args = by_name["matmul-1024"].build()
    got = ways["cublas"].prepare(model, args, "bf16", 1)()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, args[0].bfloat16() @ args[1].bfloat16())
    with pytest.raises(Unable, match="one attention"):
        ways["sdpa-math"].prepare(model, args, "bf16", 1)
    with pytest.raises(Unable, match="one product"):
        ways["cublas"].prepare(torch.nn.Softmax(-1), (torch.ones(2),), "fp32", 1)


def test_a_way_is_timed_by_its_own_clock():
    asked = []

    def clock(call, times=1):
        asked.append(times)
        return times * 1e-3

    way = Way(lambda: None, clock=clock)
    way.settle()
    assert way.sample() == pytest.approx(1.0) and asked[-1] == way.burst == 20


@pytest.mark.parametrize(
    ("name", "memory", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "A100 SXM 80GB"),
        ("AMD Instinct MI300X", 206e9, "MI300X"),
        ("NVIDIA H100 PCIe", 85e9, None),
        ("NVIDIA L40S", 48e9, None),
    ],
)
def test_a_device_has_its_own_sheet_or_none(name, memory, sheet):
    found = gpu.sheet_of(name, int(memory))
    assert (found.name if found else None) == sheet


def timed(ms):
    return {"status": "timed", "ms": ms, "low": ms * 0.99, "high": ms * 1.01, "spread": 0.02}


@pytest.fixture
def made_up():
    h100 = device("H100 SXM")
    found = Results("gpu", date="2000-01-01", machine={"gpu": {"name": "Example H100"}})
    flops, size = 2 * 4096**3, 3 * 4 * 4096**2
    for precision, ms in (("fp32", 3.0), ("bf16", 0.2)):
        ways = {"eager": timed(4.0), "cublas": timed(ms), "effc": timed(ms * 1.25),
                "sdpa-flash": {"status": "unable", "reason": "it is more than one attention"}}  # fmt: skip
        entry = {"name": "matmul-4096", "precision": precision, "threads": 1, "group": "matmul",
                 "device": "cuda", "work": {"flops": flops, "bytes": size}, "ways": ways}  # fmt: skip
        found.put(gpu.with_roofline(entry, h100))
    return found


def test_parts_of_the_roofline_are_those_of_the_sheet(made_up):
    fp32, bf16 = made_up.entries
    assert fp32["bound"]["by"] == bf16["bound"]["by"] == "products"
    assert fp32["ways"]["cublas"]["fraction"] == pytest.approx(2 * 4096**3 / 66.9e12 / 3e-3, 1e-3)
    assert bf16["ways"]["effc"]["fraction"] == pytest.approx(
        2 * 4096**3 / 989.4e12 / 0.25e-3, rel=1e-3
    )
    assert bf16["ways"]["eager"]["fraction"] == pytest.approx(
        2 * 4096**3 / 66.9e12 / 4e-3, rel=1e-3
    ), "eager runs in float32"
    other = gpu.with_roofline({"work": {"flops": 1, "bytes": 1}, "ways": {}}, None)
    assert "bound" not in other


def test_tables_and_picture_of_made_up_results(made_up, tmp_path, golden):
    assert as_text(as_parts(made_up)) == golden
    pytest.importorskip("matplotlib")
    assert [p.name for p in plots.draw(made_up, tmp_path)] == ["gpu.png", "gpu.svg"]


def test_results_are_kept_after_every_job(tmp_path, monkeypatch):
    """The command with a device that is not there, and workers that answer at once."""
    from effc.backends.gpu import driver

    monkeypatch.setattr(driver, "find_driver", lambda: object())
    monkeypatch.setattr(gpu, "describe", lambda: {"name": "NVIDIA H100 80GB HBM3", "memory": 85e9})

    def run(job, tell, patience):
        return {
            "name": job["name"], "precision": job["precision"], "threads": 1, "group": "matmul",
            "device": "cuda", "work": {"flops": 10**9, "bytes": 10**6},
            "ways": {"eager": timed(1.0), "effc": timed(0.5)},
        }  # fmt: skip

    monkeypatch.setattr(command, "run_job", run)
    arguments = ["bench", "gpu", "--only", "matmul-1024", "--peers", "effc", "--out", tmp_path]
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = Results.load(tmp_path / "gpu.json")
    assert [e["precision"] for e in found.entries] == list(gpu.PRECISIONS)
    assert found.entries[0]["ways"]["effc"]["fraction"] > 0
    assert "per cent of the data sheet's roofline" in done.output


def test_every_precision_has_a_tolerance_and_a_peak():
    assert set(gpu.PRECISIONS) <= worker.TOLERANCE.keys()
    for name in ("A100 SXM 80GB", "H100 SXM", "B200", "MI300X", "RTX 4090"):
        assert all(kind in device(name).peak for kind in gpu.KINDS.values())
