"""Peers: who is chosen, why one cannot, and what makes a result wrong."""

import pytest
import torch
from torch import nn

from effc.benchmarks import peers
from effc.benchmarks.peers import Eager, OnnxRuntime, Unable, as_tensor, chosen, relative_l2

LINEAR, X = nn.Linear(4, 3).eval(), torch.randn(2, 4)


def names(*arguments):
    return [p.name for p in chosen(*arguments)]


def test_eager_in_float32_comes_first_in_every_precision():
    assert names("fp32")[0] == names("bf16")[0] == names("bf16", ["effc"])[0] == "eager"


def test_peers_are_chosen_by_name_or_family():
    assert names("bf16", ["effc"]) == ["eager", "effc-high", "effc-medium"]
    assert names("bf16", ["effc-high"]) == ["eager", "effc-high"]
    assert names("fp32", ["inductor"]) == ["eager", "inductor"]


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert OnnxRuntime("onnxruntime").available() == (
        'onnxruntime is not installed: pip install "effc[bench]"'
    )
    assert Eager("eager").available() is None


def test_channels_last_says_that_there_is_nothing_to_move():
    with pytest.raises(Unable, match="no 2-d convolution"):
        Eager("eager-channels-last", channels_last=True).prepare(LINEAR, (X,), "fp32", 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_runs_on_a_copy_in_its_precision(precision):
    with torch.no_grad():
        call = Eager("eager").prepare(LINEAR, (X,), precision, 1)
        assert relative_l2(as_tensor(call()), as_tensor(LINEAR(X))) < 0.02
    assert LINEAR.weight.dtype == torch.float32


def test_ways_of_effc_do_not_share_compiled_code(monkeypatch):
    import effc

    made = []
    monkeypatch.setattr(effc, "dynamo_backend", lambda gm, _: made.append(1) or gm.forward)
    with torch.no_grad():
        for peer in (p for p in chosen("bf16", ["effc"]) if p.family == "effc"):
            peer.prepare(LINEAR, (X,), "bf16", 1)()
    assert len(made) == 2


@pytest.mark.parametrize("got", [torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_what_is_not_comparable_is_infinitely_wrong(got):
    assert relative_l2(got, torch.ones(2)) == float("inf")


def test_relative_l2():
    assert relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert as_tensor(X.numpy()).dtype == torch.float64
