"""Ways in turns: who is called when. Nothing here asserts a time."""

import time

from effc.benchmarks import timing
from effc.benchmarks.timing import Way, interleave, worth


def counting(names):
    calls = []
    return calls, {
        n: Way(lambda n=n: calls.append(n), lambda n=n: calls.append(f"before {n}")) for n in names
    }


def test_every_way_is_sampled_in_every_round(monkeypatch):
    monkeypatch.setattr(timing, "BURST", 0.0)
    calls, ways = counting("ab")
    told = []
    assert interleave(ways, rounds=3, threads=1, tell=told.append) == [None] * 3
    assert told == [1, 2, 3]
    assert all(len(w.samples) == 3 and None not in w.samples for w in ways.values())
    assert all(before == f"before {call}" for before, call in zip(calls[-12::2], calls[-11::2]))


def test_short_calls_are_repeated_after_one_that_is_not_counted(monkeypatch):
    monkeypatch.setattr(timing, "BURST", 0.001)
    calls, ways = counting("a")
    interleave(ways, rounds=1, threads=1)
    way = ways["a"]
    assert way.burst > 1
    assert calls[-way.burst - 2 :] == ["before a", *["a"] * (way.burst + 1)]


def test_a_slow_way_sits_rounds_out(monkeypatch):
    monkeypatch.setattr(timing, "LONG", ((0.001, 3),))
    ways = {"slow": Way(lambda: time.sleep(0.003)), "fast": Way(lambda: None)}
    interleave(ways, rounds=4, threads=1)
    assert [s is None for s in ways["slow"].samples] == [False, True, True, False]
    assert None not in ways["fast"].samples


def test_threads_are_calibrated_before_each_round(monkeypatch):
    monkeypatch.setattr(timing, "BURST", 0.0)
    _, ways = counting("a")
    scaling = interleave(ways, rounds=2, threads=2)
    assert len(scaling) == 2 and all(s > 0 for s in scaling)


def test_calibration_puts_the_number_of_threads_back():
    import torch

    before = torch.get_num_threads()
    assert worth(2, size=64) > 0
    assert torch.get_num_threads() == before
