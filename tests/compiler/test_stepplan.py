"""Step plans: what is printed parses back, what does not belong together is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effc.ir import StepPlanError
from effc.stepplan import Binding, Step, StepPlan

BOUND = Binding.of("graph text", "simplify")
DECODER = StepPlan(
    "Llama",
    (
        Step("prefill", "prefill{batch=1}", resets=("cache",)),
        Step("decode", "decode{batch=1}", until=("eos", "length")),
    ),
    BOUND,
)
# a sampler with a step cache: a correction for each channel, a longer step where the cache serves
SAMPLER = StepPlan(
    "dit",
    (
        Step("t=1", "full", resets=("residual",), constants={"t": 1.0, "dt": 0.25}),
        Step(
            "t=0.75", "reuse", constants={"t": 0.75, "dt": 0.5, "scale": (0.98, 1.01), "on": True}
        ),
        Step("rest", "full", repeat=2, constants={"t": (0.25, 0.125), "shift": ((-1e-7,), (2,))}),
    ),
    Binding.of("dit", "simplify", (1.0, 0.75, 0.25, 0.125)),
)


def test_text(golden):
    assert str(DECODER) == golden("decoder")
    assert str(SAMPLER) == golden("sampler")


@pytest.mark.parametrize("plan", [DECODER, SAMPLER])
def test_text_and_file_come_back(plan, tmp_path):
    assert StepPlan.parse(str(plan)) == plan
    plan.save(tmp_path / "plan.toml")
    assert StepPlan.load(tmp_path / "plan.toml") == plan


WORDS = st.text(st.characters(codec="utf-8"), min_size=1)
CONSTANTS = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3).map(tuple),
)
STEPS = st.builds(
    Step, WORDS, WORDS, st.none() | st.integers(1), st.lists(WORDS).map(tuple),
    st.lists(WORDS).map(tuple), st.dictionaries(WORDS, CONSTANTS, max_size=3),
)  # fmt: skip


@given(
    st.builds(
        StepPlan, WORDS,
        st.lists(STEPS, min_size=1, max_size=3, unique_by=lambda s: s.name).map(tuple),
        st.builds(Binding, st.text("0a"), st.text("0a"), st.text("0a")),
    )
)  # fmt: skip
def test_every_plan_comes_back(plan):
    assert StepPlan.parse(str(plan)) == plan
    assert [type(v) for s in StepPlan.parse(str(plan)).steps for v in s.constants.values()] == [
        type(v) for s in plan.steps for v in s.constants.values()
    ]


def calls(plan, holds=lambda condition: False):
    return [(step.name, count) for step, count in plan.walk(holds)]


def test_walk_repeats_and_stops():
    assert calls(SAMPLER) == [("t=1", 0), ("t=0.75", 0), ("rest", 0), ("rest", 1)]
    left = iter([False, False, False, True])
    asked = []

    def holds(condition):
        asked.append(condition)
        return condition == "length" and next(left)

    assert calls(DECODER, holds) == [("prefill", 0), *(("decode", i) for i in range(3))]
    assert asked[:2] == ["eos", "length"]


def test_a_condition_that_holds_already_runs_nothing_of_its_step():
    assert calls(DECODER, lambda condition: condition == "eos") == [("prefill", 0)]
    both = StepPlan("p", (Step("a", "x", 3, until=("eos",)), Step("b", "x")))
    assert calls(both) == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    assert calls(both, lambda condition: True) == [("b", 0)]


def test_a_plan_for_something_else_is_refused():
    DECODER.check(BOUND, ["prefill{batch=1}", "decode{batch=1}"])
    DECODER.check(Binding())  # says nothing
    for other, what in [
        (Binding.of("another graph", "simplify"), "another model"),
        (Binding.of("graph text", "raise-ops"), "another pipeline"),
    ]:
        with pytest.raises(StepPlanError, match=what) as caught:
            DECODER.check(other)
        assert BOUND.model in str(caught.value) or BOUND.pipeline in str(caught.value)
    with pytest.raises(StepPlanError, match="another grid"):
        SAMPLER.check(Binding.of("dit", "simplify", (1.0, 0.5)))
    with pytest.raises(StepPlanError, match=r"decode.*not here\n.*prefill"):
        DECODER.check(BOUND, ["prefill{batch=1}", "prefill{batch=2}"])
    with pytest.raises(StepPlanError, match="asks for 'length', which is not here"):
        DECODER.check(BOUND, conditions=["eos", "lenght"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'p'\n[[step]\n", "no step plan"),
        ("name = 'p'\nmodle = 'x'\n[[step]]\nname = 'a'\nrun = 'x'\n", "did you mean 'model'"),
        ("name = 'p'\n[[step]]\nname = 'a'\nruns = 'x'\n", "did you mean 'run'"),
        ("name = 'p'\n[[step]]\nname = 'a'\n", "no executable"),
        ("name = 'p'\n[[step]]\nname = 'a'\nrun = 'x'\nrepeat = true\n", "repeat of step 'a'"),
        ("name = 'p'\n[[step]]\nname = 'a'\nrun = 'x'\nrepeat = 0\n", "0 times"),
        ("name = 'p'\n[[step]]\nname = 'a'\nrun = 'x'\nuntil = 'eos'\n", "until of step 'a'"),
        ("name = 'p'\nstep = [1]\n", "list of tables"),
        ("name = 'p'\n", "no steps"),
        ("[[step]]\nname = 'a'\nrun = 'x'\n", "are text"),
        ("name = 'p'\n" + "[[step]]\nname = 'a'\nrun = 'x'\n" * 2, "two steps named 'a'"),
        (
            "name = 'p'\n[[step]]\nname = 'a'\nrun = 'x'\n[step.constants]\nt = 2026-11-23\n",
            "constant 't' is a date",
        ),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(StepPlanError, match=message):
        StepPlan.parse(text)
