"""The next token: greedy, or drawn as transformers' own filters would have it."""

from __future__ import annotations

import pytest
import torch

from effc.ir import OptionError
from effc.token_sampling import Sampler


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.3, 0, 1.0), (1.0, 5, 1.0), (2.0, 5000, 1.0), (1.0, 0, 0.7), (0.7, 9, 0.5)],
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 50) * 3
    logits[0, 7] = logits[0, 3]  # ties
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = Sampler(temperature, top_k, top_p).probabilities(logits)
    torch.testing.assert_close(got, want.softmax(-1))
    assert got.bool().equal(want.softmax(-1).bool())


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    drawn = Sampler(temperature=1.0, seed=1)(logits)
    shares = drawn.bincount(minlength=4) / len(drawn)
    # four standard deviations of a share of 20,000 draws
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=4 * 0.5 / 20_000**0.5)
    assert drawn.equal(Sampler(temperature=1.0, seed=1)(logits))
    assert not drawn.equal(Sampler(temperature=1.0, seed=2)(logits))
    again = Sampler(temperature=1.0, seed=1)
    assert not again(logits).equal(again(logits))  # a draw moves its generator on


def test_greedy_takes_the_first_of_equals_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    assert Sampler()(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])).tolist() == [1, 0]
    assert torch.get_rng_state().equal(before)


def test_the_limits_of_sampling_are_greedy():
    logits = torch.randn(8, 30) * 100
    want = logits.argmax(-1)
    for sampler in (Sampler(1e-30), Sampler(1.0, top_k=1), Sampler(1.0, top_p=1e-6)):
        assert sampler(logits).equal(want)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}],
)
def test_impossible_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Sampler(**options)
