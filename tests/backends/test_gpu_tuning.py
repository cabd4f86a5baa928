"""Schedules measured on a device: what is raced, what is kept, and what fails on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from effc.backends.base import find_backend
from effc.backends.cuda.lowering import CUDA
from effc.backends.gpu import tuning as gpu_tuning
from effc.backends.gpu.tuning import Bench, Database
from effc.backends.plan import tuning
from effc.codegen.triton.schedules import SM_90
from effc.ir import OptionError, interpret, parse

from .host_gpu import HostBackend

LINEAR = """
def graph(x: f16[48, 64], w: f16[40, 64], b: f16[40]):
    def body(x: f16[48, 64], w: f16[40, 64], b: f16[40]):
        y0 = linear(x, w, b)
        y1 = relu(y0)
        return y1
    y = fused((x, w, b), body=body)
    return y
"""
SHAPES = ((48, 64), (40, 64), (40,))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A database of its own; what is built is the whole run's."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tuning, "MOST", 2)
    return tmp_path


@pytest.fixture
def races(monkeypatch):
    """Races that the last candidate wins: no real clock decides a test."""
    found = []

    def fake(runs, clock, timed=None):
        for run in runs.values():
            assert timed(run) > 0
        found.append({name: 1e-3 / (i + 1) ** 2 for i, name in enumerate(runs)})
        return found[-1]

    monkeypatch.setattr(gpu_tuning, "race", fake)
    return found


def data(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def check(executable, graph, inputs, tolerance: float = 2e-2) -> None:
    for got, want in zip(executable.bind()(inputs), interpret(graph, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_what_is_measured_is_taken_and_kept(races, folder):
    graph, backend = parse(LINEAR), HostBackend()
    plain = backend.compile(graph)
    assert not races and "bound by" in plain.launches[0].note
    tuned = backend.compile(graph, {"tune": True})
    ((other, best),) = races
    assert tuning.stored() == (folder / "v1" / "schedules", 1)
    assert tuned.launches[0].note.startswith(f"{best}: 0.25 ms measured, {other} 1 ms")
    assert tuned.launches[0].call != plain.launches[0].call
    check(tuned, graph, data(*SHAPES))
    again = backend.compile(graph)
    assert again.text == tuned.text and len(races) == 1
    assert backend.compile(graph, {"tune": True}).text == tuned.text and len(races) == 1


def test_what_measuring_loaded_is_given_back(races):
    graph, backend = parse(LINEAR), HostBackend()
    backend.compile(graph, {"tune": True})
    gone, kept = backend.driver.unloaded, set(backend.driver.loaded)
    assert len(gone) == 3, "two schedules, of which one joins the parts of its sums"
    assert {(0, f"{name} cuda:sm_80") for name in gone[1:]} == kept, "the plan's, loaded again"


def test_what_follows_a_product_is_part_of_the_problem(races):
    backend = HostBackend()
    backend.compile(parse(LINEAR), {"tune": True})
    backend.compile(parse(LINEAR.replace("relu", "gelu")), {"tune": True})
    assert len(races) == 2
    two = LINEAR.replace("    return y\n", "    z = relu(y)\n    return y, z\n")
    assert backend.compile(parse(two)).launches[0].note.count("measured") == 1


def test_sizes_that_vary_are_measured_at_what_is_guessed(races):
    text = LINEAR.replace("f16[48, 64]", "f16[N, 64]")
    graph, backend = parse(text), HostBackend()
    tuned = backend.compile(graph, {"tune": True})
    assert races and "measured" in tuned.launches[0].note
    for rows in (16, 130):
        check(tuned, graph, data((rows, 64), *SHAPES[1:]))


def test_attention_is_measured_with_its_parts_of_keys(races):
    graph = parse("""
def graph(q: f16[1, 2, 1, 32], k: f16[1, 2, 300, 32], v: f16[1, 2, 300, 32]):
    y = attention(q, k, v)
    return y
""")
    tuned = HostBackend().compile(graph, {"tune": True})
    assert {name.partition(" rows=")[0] for name in races[0]} >= {"parts of keys"}
    check(tuned, graph, data((1, 2, 1, 32), (1, 2, 300, 32), (1, 2, 300, 32)))


# ------------------------------------------------------------------ what fails on the way


def test_a_candidate_that_does_not_fit_into_memory_is_left_out(races, monkeypatch):
    graph, backend = parse(LINEAR), HostBackend()
    real, asked = gpu_tuning.Memory.of, []

    def of(self, root, numbers):
        asked.append(root)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return real(self, root, numbers)

    monkeypatch.setattr(gpu_tuning.Memory, "of", of)
    with pytest.warns(RuntimeWarning, match="of 2 schedules 1 could not be measured on Example"):
        tuned = backend.compile(graph, {"tune": True})
    assert len(races[0]) == 1
    check(tuned, graph, data(*SHAPES))


def test_where_nothing_fits_the_cost_model_decides(races, monkeypatch):
    graph, backend = parse(LINEAR), HostBackend()

    def of(self, root, numbers):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu_tuning.Memory, "of", of)
    with pytest.warns(RuntimeWarning, match="of 2 schedules 2 could not .* CUDA out of memory"):
        tuned = backend.compile(graph, {"tune": True})
    assert not races and tuned.text == backend.compile(graph).text
    check(tuned, graph, data(*SHAPES))


def test_a_race_that_runs_out_of_memory_frees_and_leaves_the_model(monkeypatch):
    graph, backend = parse(LINEAR), HostBackend()
    freed = []
    real = gpu_tuning.Memory.free
    monkeypatch.setattr(gpu_tuning.Memory, "free", lambda self: (freed.append(1), real(self)))

    def race(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu_tuning, "race", race)
    with pytest.warns(RuntimeWarning, match="of 2 schedules 2 could not"):
        tuned = backend.compile(graph, {"tune": True})
    assert freed and "bound by" in tuned.launches[0].note


def test_a_kernel_that_no_launch_takes_is_left_out(races):
    graph, backend = parse(LINEAR), HostBackend()
    backend.driver.broken = {backend.compile(graph).launches[0].call}
    backend.driver.loaded.clear()
    with pytest.warns(RuntimeWarning, match="a launch fails: too many resources"):
        tuned = backend.compile(graph, {"tune": True})
    assert tuned.launches[0].call not in backend.driver.broken
    check(tuned, graph, data(*SHAPES))


def test_more_shared_memory_than_a_block_has_is_left_out(races):
    graph, backend = parse(LINEAR), HostBackend()
    sizes = sorted({c.shared for c in _candidates(backend, graph)})
    assert len(sizes) > 1
    backend.shared = sizes[-1] - 1
    with pytest.warns(RuntimeWarning, match=f"{sizes[-1]} bytes of shared memory, a block has"):
        backend.compile(graph, {"tune": True})


def _candidates(backend, graph):
    """Everything that tuning compiles."""
    compiled, real = [], gpu_tuning.compile_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gpu_tuning, "compile_kernels",
            lambda *a: (made := real(*a), compiled.extend(made))[0],
        )  # fmt: skip
        patch.setattr(Database, "add", lambda *_: None)
        backend.compile(graph, {"tune": True})
    return compiled


def test_an_interrupt_gives_back_what_was_loaded(monkeypatch):
    backend = HostBackend()

    def race(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_tuning, "race", race)
    with pytest.raises(KeyboardInterrupt):
        backend.compile(parse(LINEAR), {"tune": True})
    assert not backend.driver.loaded and tuning.stored()[1] == 0


# ------------------------------------------------------------------ what decides, and where it is kept


def test_all_that_decides_times_is_in_the_key(monkeypatch):
    gpu = HostBackend().gpu()
    problem = tuning_problem("a product")

    def key(problem=problem, version="3.9", **facts):
        here = replace(gpu, facts={**gpu.facts, **facts})
        return Database(here, lambda: {"triton": version}).key(problem, ())

    keys = [
        key(), key(gpu="Example 2000"), key(target="cuda:sm_90"), key(driver=2),
        key(clock=1), key(problem=tuning_problem("another")), key(version="3.10"),
    ]  # fmt: skip
    monkeypatch.setattr(gpu_tuning, "_code", lambda: "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def tuning_problem(text: str):
    return gpu_tuning.Problem(text, None, 1)  # type: ignore[arg-type]


def test_an_artefact_has_its_plan_without_the_database(races, tmp_path, monkeypatch):
    graph, backend = parse(LINEAR), HostBackend()
    tuned = backend.compile(graph, {"tune": True})
    machine = json.loads(json.dumps(tuned.machine))
    assert machine["schedules"]["cuda:sm_80"] and machine["devices"]["cuda:sm_80"]
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path / "elsewhere")
    backend.model = SM_90  # what this machine would make plans for is not asked either
    loaded = backend.load(graph, tuned.objects, machine)
    assert loaded.text == tuned.text
    check(loaded, graph, data(*SHAPES))


def test_both_languages_are_raced_where_both_compute_a_node(races):
    text = LINEAR.replace("f16", "bf16")
    graph, backend = parse(text), HostBackend(CUDA)
    plain = backend.compile(graph)
    assert "__global__" in plain.kernels[plain.launches[0].call]
    tuned = backend.compile(graph, {"tune": True})
    ours, theirs, outer = races
    assert list(outer) == ["CUDA C++", "Triton"] and len(ours) == len(theirs) == 2
    assert all(name.startswith("mma.sync BM=") for name in ours)
    assert "Triton: 0.25 ms measured, CUDA C++" in tuned.launches[0].note
    assert "tiles of split depth" in tuned.launches[0].note, "Triton's best schedule was raced"
    assert "@triton.jit" in tuned.kernels[tuned.launches[0].call]
    check(tuned, graph, data(*SHAPES, dtype=torch.bfloat16), 5e-2)


def test_real_times_decide_too():
    graph, backend = parse(LINEAR), HostBackend()
    tuned = backend.compile(graph, {"tune": True})
    assert "measured" in tuned.launches[0].note
    check(tuned, graph, data(*SHAPES))


def test_what_runs_gpu_kernels_on_the_cpu_takes_no_times():
    with pytest.raises(OptionError, match="'ptx-host' takes no tune=True"):
        find_backend("ptx-host").compile(parse(LINEAR), {"tune": True})


def test_memory_of_indices_is_of_an_index_that_there_is():
    """Kernels that gather must not leave their operands while they are measured."""
    bench = Bench(HostBackend().gpu(), None)  # type: ignore[arg-type]
    from effc.backends.plan.memory import Root
    from effc.backends.plan.sizes import Numbers, Sizes
    from effc.ir.types import DTYPES

    memory = gpu_tuning.Memory(bench.gpu)
    root = Root("input", None, DTYPES["i64"], (5,), (1,))
    assert memory.of(root, Numbers(Sizes(), {})) == memory.held[root].data_ptr()
    assert not memory.held[root].any()
