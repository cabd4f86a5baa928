"""What compiling costs does not grow with the number of equal blocks: kernels, builds, traces."""

from __future__ import annotations

import pytest
import torch

import effc
import effc.ir.graph
from effc import instruments
from effc.backends import find_backend
from effc.codegen.cpp.kernel import unit

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def llama(layers: int):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def compiled(layers: int, **options):
    options = {"target": "reference", **options}
    fast = torch.compile(llama(layers), backend="effc", options=options)
    fast(torch.arange(6)[None], use_cache=False)
    [record] = effc.explain(fast).records
    return record


def test_kernels_are_those_of_one_block(monkeypatch):
    monkeypatch.setattr(type(find_backend("reference")), "supports", find_backend("cpu").supports)
    graphs = [compiled(layers).stages[-1].graph for layers in (2, 6)]
    few, many = (find_backend("cpu").plan(g).plan for g in graphs)
    assert len(many.steps) > 2 * len(few.steps)
    # not only the names: the sources that are built, which decide what the cache holds
    few_built, many_built = (unit(list(p.kernels.values())) for p in (few, many))
    assert sorted(few_built.splitlines()) == sorted(many_built.splitlines())


def test_a_compilation_without_samples_verifies_and_hashes_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(effc.ir.graph, "digest", lambda t: calls.append("digest") or "0" * 8)
    monkeypatch.setattr(instruments, "verify", lambda g: calls.append("verify"))
    compiled(2)
    assert calls == []


def test_verifying_looks_at_each_changed_stage_once(monkeypatch):
    calls = []
    real = instruments.verify
    monkeypatch.setattr(instruments, "verify", lambda g: calls.append(g) or real(g))
    record = compiled(2, verify=True)
    assert len(calls) == 1 + sum(stage.changed for stage in record.stages)
