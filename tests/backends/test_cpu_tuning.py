"""Schedules of products: what picks them, what is measured, and what is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effc
from effc.backends import find_backend
from effc.backends.cpu import features
from effc.backends.cpu import tuning as cpu
from effc.backends.cpu.features import CpuFeatures, detect
from effc.backends.cpu.tuning import Database, Problem, Schedule
from effc.backends.plan import tuning
from effc.backends.plan.tuning import Schedules, prune, race
from effc.codegen.cpp.products import F32, core
from effc.doctor import Finding, examine
from effc.ir import Graph, parse

from .conftest import Compiled
from .test_cpu_products import conv_graph

EXAMPLES = int(os.environ.get("EFFC_EXAMPLES", "6"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A database of its own; what is built is the whole run's."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    return tmp_path


def schedule(name: str, cost: float, detail: str = "") -> Schedule:
    return Schedule(name, core("linear"), (1, 2), cost, ((F32, 4),), detail)


PROBLEM = Problem("linear f32 3x4 by 5", 3, 5, F32)
PLAIN, FAST, SLOW = schedule("plain", 2.0), schedule("fast", 1.0, "by 4"), schedule("fast", 9.0)
ALL = (PLAIN, FAST, SLOW)


# ------------------------------------------------------------------ picking


def knowing(**times: float) -> Schedules:
    return Schedules(lambda problem, schedules: {k.replace("_", " "): v for k, v in times.items()})


def test_without_times_the_cost_model_picks() -> None:
    schedules = Schedules()
    assert schedules.pick(PROBLEM, ALL) == (FAST, "fast by 4, by the cost model")
    assert schedules.open == {PROBLEM.text: (PROBLEM, ALL)} and not schedules.used


def test_times_overrule_the_cost_model() -> None:
    schedules = knowing(plain=1e-3, fast_by_4=2e-3, gone=1e-6)
    assert schedules.pick(PROBLEM, ALL) == (PLAIN, "plain: 1 ms measured, fast by 4 2 ms")
    assert schedules.used == {PROBLEM.text: {"plain": 1e-3, "fast by 4": 2e-3}}
    assert not schedules.open


def test_a_difference_within_noise_leaves_the_cost_models_pick() -> None:
    assert knowing(plain=1.00e-3, fast_by_4=1.04e-3).pick(PROBLEM, ALL)[0] is FAST
    assert knowing(plain=1.00e-3, fast_by_4=1.06e-3).pick(PROBLEM, ALL)[0] is PLAIN


def test_the_note_names_the_best_of_every_other_method() -> None:
    several = (*ALL, schedule("other", 3.0))
    times = {"fast by 4": 1e-3, "fast": 3e-3, "plain": 0.25, "other": 12.34e-6}
    _, note = Schedules(lambda *_: times).pick(PROBLEM, several)
    assert note == "other: 0.0123 ms measured, fast by 4 1 ms, plain 250 ms"
    del times["plain"], times["other"]
    _, note = Schedules(lambda *_: times).pick(PROBLEM, several)
    assert note == "fast by 4: 1 ms measured, fast 3 ms"


def test_one_schedule_is_no_choice() -> None:
    schedules = Schedules()
    assert schedules.pick(PROBLEM, [PLAIN]) == (PLAIN, "") and not schedules.open


def test_sizes_that_vary_are_left_to_the_cost_model() -> None:
    graph = parse(DYNAMIC, weights={"w": torch.randn(8, 8, 3, 3)})
    run = find_backend("cpu").compile(graph, {"tune": True})
    (launch,) = run.launches
    assert launch.note.endswith("by the cost model: sizes vary")
    assert tuning.stored()[1] == 0


DYNAMIC = """
def graph(x: f32[1, 8, H, W] @ channels_last):
    w0: f32[8, 8, 3, 3] = weight("w", digest="")
    y0 = conv2d(x, w0, padding=(1, 1))
    return y0,
"""


def test_only_near_predictions_are_measured_and_every_method_before_a_second_of_one() -> None:
    many = [schedule("a", 1 + i / 100, f"{i}") for i in range(9)]
    found = prune([schedule("far", 2.1), *many, schedule("b", 1.9)])
    assert [s.text for s in found] == ["a 0", "b", "a 1", "a 2", "a 3", "a 4"]


@pytest.mark.parametrize(
    "channels, results, size, kernel, pick",
    [
        (52, 52, 64, 3, "Winograd F(4x4, 3x3) in runs of 12"),  # what a run holds stays near
        (320, 320, 64, 3, "Winograd F(4x4, 3x3) in runs of 96"),  # weights come from afar each run
        (1280, 1280, 8, 3, "Winograd F(4x4, 3x3) in runs of 6"),  # no more tiles than there are
        (512, 512, 4, 3, "direct"),  # four times the weights for a single tile
        (3, 32, 64, 3, "direct"),
        (3, 32, 64, 7, "direct over gathered pixels"),
    ],
)
def test_what_the_cost_model_picks(channels, results, size, kernel, pick) -> None:
    cpu = detect()
    assert isinstance(cpu, CpuFeatures)
    zen3 = replace(cpu, level="avx2", extensions=(), l2=512 << 10, l3=32 << 20)
    with features.planning_for(zen3):
        plan = find_backend("null").compile(convolution(1, size, channels, results, kernel))
    assert picks(plan)[0][1] == f"{pick}, by the cost model"


# ------------------------------------------------------------------ measuring


class Clock:
    """Time that passes only while a run runs: each its own list of durations, the last for ever."""

    def __init__(self, **durations: list[float]) -> None:
        self.now, self.turns, self.durations = 0.0, dict.fromkeys(durations, 0), durations

    def __call__(self) -> float:
        return self.now

    def runs(self) -> dict[str, Callable[[], None]]:
        return {name: lambda name=name: self.run(name) for name in self.durations}

    def run(self, name: str) -> None:
        of = self.durations[name]
        self.now += of[min(self.turns[name], len(of) - 1)]
        self.turns[name] += 1


def raced(seconds: float, **durations: list[float]) -> tuple[Clock, dict[str, float]]:
    clock = Clock(**durations)
    return clock, {k: round(v, 9) for k, v in race(clock.runs(), clock, seconds).items()}


def test_a_race_gives_the_least_time_of_each() -> None:
    _, times = raced(1.0, a=[0.004, 0.002, 0.003], b=[0.0025, 0.0018, 0.0019])
    assert times == {"a": 0.002, "b": 0.0018}


def test_what_is_clearly_slower_takes_no_further_turns() -> None:
    clock, times = raced(1.0, fast=[0.001], near=[0.0011], slow=[0.002], far=[0.01])
    assert clock.turns == {"fast": 12, "near": 12, "slow": 2, "far": 1}
    assert times == {"fast": 0.001, "near": 0.0011, "slow": 0.002, "far": 0.01}


def test_the_second_round_is_always_taken_and_others_while_time_lasts() -> None:
    clock, _ = raced(0.1, a=[1.0], b=[1.05])
    assert clock.turns == {"a": 2, "b": 2}
    clock, _ = raced(0.1, a=[0.01], b=[0.0105])
    assert clock.turns == {"a": 5, "b": 5}


def test_of_slow_ones_only_the_best_predictions_have_a_turn() -> None:
    clock, times = raced(0.1, a=[0.03], b=[0.03], c=[0.03], d=[0.01])
    assert clock.turns["d"] == 0 and set(times) == {"a", "b", "c"}


# ------------------------------------------------------------------ the database


def test_times_come_back(folder) -> None:
    times = {"plain": 0.001, "fast by 4": 0.0005}
    Database(2).add(PROBLEM, ALL, times)
    assert Database(2).times(PROBLEM, ALL) == times
    assert Database(1).times(PROBLEM, ALL) == {}
    assert tuning.stored() == (folder / "v1" / "schedules", 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace("0.001", '"0.001"'),
        lambda text: text.replace("0.001", "-0.001"),
        lambda text: text.replace("0.001", "Infinity"),
        lambda text: text.replace("0.001", "NaN"),
        lambda text: text.replace("0.001", "true"),
        lambda text: text.replace(PROBLEM.text, "another"),
        lambda text: json.dumps({**json.loads(text), "seconds": [0.1]}),
    ],
)
def test_a_damaged_entry_counts_as_absent(folder, damage) -> None:
    Database(1).add(PROBLEM, ALL, {"plain": 0.001, "fast by 4": 0.5})
    (path,) = folder.rglob("*.json")
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    assert Database(1).times(PROBLEM, ALL) == {}
    Database(1).add(PROBLEM, ALL, {"plain": 0.25})
    assert Database(1).times(PROBLEM, ALL) == {"plain": 0.25}


def test_bytes_that_are_no_text_count_as_absent(folder) -> None:
    Database(1).add(PROBLEM, ALL, {"plain": 0.001})
    (path,) = folder.rglob("*.json")
    path.write_bytes(b"\xff\xfe\x00" * 9)
    assert Database(1).times(PROBLEM, ALL) == {}


def test_a_folder_that_cannot_be_written_costs_only_what_is_kept(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path / "file")
    database = Database(1)
    database.add(PROBLEM, ALL, {"plain": 0.001})
    assert database.times(PROBLEM, ALL) == {"plain": 0.001}
    assert Database(1).times(PROBLEM, ALL) == {} and tuning.stored()[1] == 0


def test_all_that_decides_times_is_in_the_key(monkeypatch) -> None:
    here = detect()
    assert isinstance(here, CpuFeatures)

    def key(threads=1, problem=PROBLEM, schedules=ALL, **cpu) -> str:
        with features.planning_for(replace(here, **cpu)):
            return Database(threads).key(problem, schedules)

    other = Schedule("other", core("winograd"), (1,), 1.0, ((F32, 4),))
    keys = [
        key(), key(threads=2), key(problem=replace(PROBLEM, text="another")),
        key(schedules=(*ALL, other)), key(model="another"), key(level="default"),
        key(extensions=("popcnt",)), key(l1d=1 << 14), key(l2=1 << 22), key(l3=1 << 26),
    ]  # fmt: skip
    changed = replace(core("linear"), body=core("linear").body + "\n")
    keys.append(key(schedules=[replace(s, core=changed) for s in ALL]))
    monkeypatch.setattr(cpu, "header_digest", lambda: "another")
    keys.append(key())
    monkeypatch.setattr(cpu, "find_toolchain", lambda: None)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def _write(root: Path, number: int) -> None:
    tuning.cache_dir = lambda: root
    for _ in range(200):
        Database(1).add(PROBLEM, ALL, {"plain": float(number), "fast by 4": float(number)})


def test_processes_that_measure_the_same_at_once_leave_a_whole_entry(folder) -> None:
    context = multiprocessing.get_context("fork")
    Database(1).add(PROBLEM, ALL, {"plain": 1.0, "fast by 4": 1.0})
    writers = [context.Process(target=_write, args=(folder, n)) for n in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        times = Database(1).times(PROBLEM, ALL)  # never absent, never mixed
        seen.add((times["plain"], times["fast by 4"]))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen <= {(n, n) for n in (1.0, 2.0, 3.0)}
    assert len(list(folder.rglob("*"))) == 3  # two folders and the entry; nothing unfinished


# ------------------------------------------------------------------ compiling


def convolution(
    count: int = 1, size: int = 24, channels: int = 16, results: int = 16, kernel: int = 3
) -> Graph:
    """As many equal convolutions in a row."""
    shape = (results, channels, kernel, kernel)
    lines = [f'    w{i}: f32{list(shape)} = weight("w{i}", digest="")' for i in range(count)]
    for i in range(count):
        x, pad = f"y{i - 1}" if i else "x", kernel // 2
        lines.append(f"    y{i} = conv2d({x}, w{i}, padding=({pad}, {pad}))")
    head = f"def graph(x: f32[1, {channels}, {size}, {size}] @ channels_last):"
    text = "\n".join([head, *lines, f"    return y{count - 1},"])
    return parse(text, weights={f"w{i}": torch.randn(shape) / 12 for i in range(count)})


@pytest.fixture
def measured(monkeypatch) -> list[dict[str, float]]:
    """Races that the plain sum wins, and how they went: no real clock decides a test."""
    races: list[dict[str, float]] = []

    def fake(runs: dict[str, Callable[[], None]], clock: object) -> dict[str, float]:
        for run in runs.values():
            run()  # the real core, once
        races.append({name: 0.001 if name == "direct" else 0.002 for name in runs})
        return races[-1]

    monkeypatch.setattr(cpu, "race", fake)
    monkeypatch.setattr(tuning, "FACTOR", 100.0)
    return races


def picks(executable) -> list[tuple[str, str]]:
    return [(e.call, e.note) for e in executable.launches]


DIRECT = "direct: 1 ms measured, Winograd F(4x4, 3x3) in runs of 12 2 ms"


def test_what_is_measured_is_taken_and_kept(measured, compiled) -> None:
    first = "Winograd F(4x4, 3x3) in runs of 12, by the cost model"
    assert picks(compiled(convolution()).executable) == [("effc_winograd", first)]
    assert not measured
    tuned = compiled(convolution(), tune=True)
    tuned(torch.randn(1, 16, 24, 24))
    assert picks(tuned.executable) == [("effc_convolution", DIRECT)] and len(measured) == 1
    assert picks(compiled(convolution()).executable) == picks(tuned.executable)
    compiled(convolution(), tune=True)
    assert len(measured) == 1


def test_equal_products_are_measured_once(measured, compiled) -> None:
    run = compiled(convolution(count=3), tune=True)
    assert picks(run.executable) == [("effc_convolution", DIRECT)] * 3
    assert len(measured) == 1


def test_an_interrupt_keeps_what_was_measured(monkeypatch) -> None:
    done = []

    def interrupted(runs, clock):
        if done:
            raise KeyboardInterrupt
        done.append(runs)
        return dict.fromkeys(runs, 0.5)

    monkeypatch.setattr(cpu, "race", interrupted)
    two = parse(
        """
def graph(x: f32[1, 16, 24, 24] @ channels_last):
    w0: f32[16, 16, 3, 3] = weight("v", digest="")
    w1: f32[24, 16, 3, 3] = weight("w", digest="")
    y0 = conv2d(x, w0, padding=(1, 1))
    y1 = conv2d(y0, w1, padding=(1, 1))
    return y1,
""",
        weights={"v": torch.randn(16, 16, 3, 3), "w": torch.randn(24, 16, 3, 3)},
    )
    with pytest.raises(KeyboardInterrupt):
        find_backend("cpu").compile(two, {"tune": True})
    assert tuning.stored()[1] == 1
    (_, first), (_, second) = picks(find_backend("cpu").compile(two))
    assert "measured" in first and second.endswith("by the cost model")


def test_nothing_is_said_where_there_is_no_terminal(compiled, capfd) -> None:
    compiled(convolution(size=8), tune=True)
    assert tuning.stored()[1] == 1
    assert capfd.readouterr() == ("", "")


def test_real_times_decide_too(compiled) -> None:
    run = compiled(convolution(size=8), tune=True)
    ((_, note),) = picks(run.executable)
    assert "ms measured" in note
    run(torch.randn(1, 16, 8, 8))


@pytest.fixture
def tuned_model(measured) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    model = torch.nn.Conv2d(16, 16, 3, padding=1).eval().requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(1, 16, 24, 24).contiguous(memory_format=torch.channels_last)
    yield effc.compile(model, example_inputs=(x,), tune=True), x


def test_an_artefact_has_its_plan_without_the_database(tuned_model, tmp_path, monkeypatch) -> None:
    compiled, x = tuned_model
    path = tmp_path / "tuned.effc"
    compiled.save(path)
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path / "elsewhere")
    loaded = effc.load(path)
    text = compiled._effc_records[0].executable.text
    assert "effc_convolution" in text and "ms measured" in text
    assert loaded._effc_records[0].executable.text == text
    torch.testing.assert_close(loaded(x), compiled(x), rtol=0, atol=0)


def test_an_artefact_of_the_cost_model_ignores_the_database(measured, tmp_path) -> None:
    plain = find_backend("cpu").compile(convolution())
    Compiled(convolution(), tune=True)
    machine = json.loads(json.dumps(dict(plain.machine)))
    loaded = find_backend("cpu").load(plain.graph, plain.objects, machine)
    assert loaded.text == plain.text and "effc_winograd" in loaded.text
    assert "effc_convolution" in find_backend("cpu").compile(convolution()).text


def test_doctor_says_where_the_times_are(folder) -> None:
    Database(1).add(PROBLEM, ALL, {"plain": 0.001})
    (found,) = (f for f in examine() if f.name == "schedules")
    assert found == Finding("schedules", "ok", f"{folder}/v1/schedules, problems timed: 1")


def test_the_report_says_what_was_picked_and_why(tuned_model) -> None:
    compiled, _ = tuned_model
    assert "direct: 1 ms measured, Winograd" in str(effc.explain(compiled))


# ------------------------------------------------------------------ every schedule is right


def every(graph: Graph, inputs: list[torch.Tensor]) -> int:
    """Run the graph with each schedule that its convolution has; how many there were."""
    found: list[tuple[Schedule, ...]] = []

    def note(self: Database, problem: Problem, schedules: tuple[Schedule, ...]) -> dict:
        found.append(tuple(schedules))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "times", note)
        Compiled(graph)(*inputs)
        for s in found[0] if found else ():
            patch.setattr(Database, "times", lambda *_, only=s.text: {only: 1.0})
            run = Compiled(graph)
            assert run.executable.launches[0].call == s.core.name
            run(*inputs)
    return len(found[0]) if found else 1


def test_a_convolution_over_nothing(compiled) -> None:
    graph = parse(
        """
def graph(x: f32[0, 8, 6, 6] @ channels_last):
    w0: f32[8, 8, 3, 3] = weight("w", digest="")
    y0 = conv2d(x, w0, padding=(1, 1))
    return y0,
""",
        weights={"w": torch.randn(8, 8, 3, 3)},
    )
    compiled(graph, tune=True)(torch.randn(0, 8, 6, 6))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(2, 40), st.integers(3, 40),
    st.integers(3, 40), st.sampled_from([3, 3, 5]), st.integers(1, 2), st.integers(0, 2),
)  # fmt: skip
def test_every_schedule_gives_the_reference(n, c, k, h, w, kernel, stride, padding) -> None:
    h, w = max(h, kernel + 2), max(w, kernel + 2)  # more than one pixel of results
    every(*conv_graph(n, c, k, h, w, kernel, stride, padding))


@pytest.mark.parametrize(
    "sizes, count",
    [
        (dict(n=1, c=8, k=9, h=61, w=70, kernel=3), 8),
        (dict(n=1, c=7, k=8, h=9, w=8, kernel=3), 2),
        (dict(n=1, c=64, k=64, h=12, w=12, kernel=3), 2),
    ],
    ids=str,
)
def test_how_many_schedules_there_are(sizes, count, monkeypatch) -> None:
    monkeypatch.setenv("EFFC_CPU", "avx2")
    if detect().level != "avx2":
        pytest.skip("this CPU has no avx2")
    assert every(*conv_graph(**sizes)) == count
