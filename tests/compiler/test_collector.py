"""The collector of cycles is off inside, and after it as it was before, whatever happens."""

from __future__ import annotations

import gc

import pytest

from effc.collector import collector_paused


@pytest.fixture(autouse=True)
def restored():
    yield
    gc.enable()


def test_off_inside_and_on_after():
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_again_after_an_error():
    with pytest.raises(ValueError, match="wrong"), collector_paused():
        raise ValueError("wrong")
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
