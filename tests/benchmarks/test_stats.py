"""Medians, spreads, means of ratios, and rounds in which threads shared a core."""

import pytest

from effc.benchmarks.stats import best_peer, geometric_mean, summarise, usable


def test_summary_has_median_and_quartiles():
    found = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.ms, found.low, found.high, found.samples) == (3.0, 1.5, 4.5, 5)
    assert found.spread == 1.0
    assert found.as_json()["used"] == 5


def test_few_samples_give_their_extremes():
    found = summarise([2.0, 1.0, 4.0])
    assert (found.ms, found.low, found.high) == (2.0, 1.0, 4.0)


def test_no_samples_are_a_mistake():
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_geometric_mean_of_ratios():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([]) is None


def test_rounds_without_a_second_core_are_left_out_where_enough_remain():
    samples, scaling = [1.0, 9.0, 1.0, None, 1.0, 1.0], [2.0, 1.0, 1.9, 2.0, 1.7, 2.0]
    assert usable(samples, scaling, worth=1.6) == ([1.0] * 4, False)


def test_all_rounds_count_and_are_flagged_where_too_few_are_good():
    assert usable([1.0, 9.0, 8.0, 7.0], [2.0, 1.0, 1.0, 1.0], worth=1.6) == ([1, 9, 8, 7], True)


def test_one_thread_needs_no_calibration():
    assert usable([1.0, 2.0], [None, None], worth=1.6) == ([1.0, 2.0], False)


def test_the_best_peer_is_the_fastest_that_is_not_ours():
    ways = {"eager": 3.0, "openvino": 2.0, "effc-high": 1.0}
    entry = {"ways": {n: {"status": "timed", "ms": ms} for n, ms in ways.items()}}
    entry["ways"]["inductor"] = {"status": "failed", "reason": "no"}
    assert best_peer(entry) == ("openvino", 2.0)
    assert best_peer({"ways": {}}) is None
