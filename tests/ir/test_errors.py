"""Errors: four things in order, text only."""

from __future__ import annotations

import copy
import pickle

import pytest

from effc.ir import errors
from effc.ir.errors import EffcError, InputError, OpError, ParseError, VerifyError, nearest

FULL = OpError(
    "relu: x must be a value",
    node="y0 = relu(3)",
    where="model.py:41",
    why="3 is a number",
    fix="use full()",
    context="  > y0 = relu(3)",
)
FULL_TEXT = """\
relu: x must be a value
  where model.py:41
  node  y0 = relu(3)
  why   3 is a number
  fix   use full()
  > y0 = relu(3)"""


def test_the_users_line_comes_first_then_ours_then_the_ir_around() -> None:
    assert str(FULL) == FULL_TEXT


def test_lines_that_nobody_knows_are_left_out() -> None:
    assert str(EffcError("it failed")) == "it failed"
    assert str(EffcError("it failed", why="", fix="try again")) == "it failed\n  fix   try again"


@pytest.mark.parametrize(
    "trip", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_errors_travel_whole(trip) -> None:
    again = trip(FULL)
    assert type(again) is OpError and str(again) == FULL_TEXT and again.args == FULL.args


def test_all_are_effc_errors_and_the_callers_mistakes_are_value_errors() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) > 8 and all(issubclass(c, EffcError) and c.__doc__ for c in classes)
    assert issubclass(OpError, ValueError) and issubclass(ParseError, ValueError)
    assert issubclass(InputError, ValueError) and not issubclass(VerifyError, ValueError)


def test_nearest_names_one_word_or_all() -> None:
    assert nearest("conv2", ["relu", "conv2d"]) == "did you mean 'conv2d'?"
    assert nearest("xyz", ["relu", "conv2d"]) == "known: conv2d, relu"
