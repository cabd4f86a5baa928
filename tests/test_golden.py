"""The `golden` fixture of conftest.py."""

from __future__ import annotations

import pytest


def test_equal_text_passes(golden) -> None:
    assert "a graph\nof two lines\n" == golden
    assert golden == "a graph\nof two lines"


def test_a_second_text_has_its_own_file(golden) -> None:
    assert "before" == golden("before")
    assert "after" == golden("after")


@pytest.mark.parametrize("x", [1, "a/b c"])
def test_parameters_are_in_the_name(golden, x) -> None:
    assert f"x is {x}" == golden


def test_other_text_shows_a_diff(golden, request) -> None:
    if request.config.getoption("update_golden"):
        pytest.skip("--update-golden accepts any text")
    kept = golden("kept")
    with pytest.raises(AssertionError) as failure:
        assert "one\n2\nthree" == kept
    message = str(failure.value)
    assert "-two" in message and "+2" in message and "--update-golden" in message


def test_missing_text_names_the_flag(golden, request) -> None:
    if request.config.getoption("update_golden"):
        pytest.skip("--update-golden would write it")
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        assert "anything" == golden
