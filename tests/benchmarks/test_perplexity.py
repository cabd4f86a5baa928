"""`effc bench perplexity`: windows in turns, and what they come to."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effc.benchmarks import perplexity, suites
from effc.benchmarks.archive import Results
from effc.benchmarks.command import with_bounds
from effc.benchmarks.suites import Case
from effc.benchmarks.tables import as_parts
from effc.show import as_text
from examples.zoo import text

from .test_tables import LIMITS, timed

COUNT, LENGTH, VOCABULARY = 3, 16, 32


class Pairs(nn.Module):
    """Each token foretells the next by itself."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


def build():
    return perplexity.Logits(Pairs()), (torch.zeros(1, LENGTH, dtype=torch.long),)


def test_every_way_sees_every_window_once(monkeypatch):
    ids = torch.randint(VOCABULARY, (COUNT, LENGTH))
    monkeypatch.setitem(suites.SUITES, "perplexity", lambda: [Case("pairs", "perplexity", build)])
    monkeypatch.setattr(perplexity, "windows", lambda count: ids[:count])
    job = {
        "name": "pairs",
        "precision": "fp32",
        "threads": 1,
        "rounds": COUNT,
        "peers": [],
        "skip": {},
    }
    entry = perplexity.run(job, lambda *_, **__: None)
    model, _ = suites.case("perplexity", "pairs").build()
    want = text.perplexity(model, ids[:, None])
    assert list(entry["ways"]) == ["eager", "effc"] and entry["windows"] == COUNT
    for way in entry["ways"].values():
        assert way["perplexity"] == pytest.approx(want, abs=1e-4)
        assert len(way["samples"]) == COUNT
    assert entry["work"]["flops"] > 0


def test_without_the_text_it_says_what_it_needs(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(perplexity, "TEXT", tmp_path / "wikitext2_test.txt.gz")
    with pytest.raises(FileNotFoundError, match=r"shared/data/text/wikitext2_test\.txt\.gz"):
        perplexity.windows(1)


def test_table_of_made_up_results(golden):
    ways = {
        "eager": {**timed(4000.0), "perplexity": 25.62},
        "effc": {**timed(2000.0), "perplexity": 25.6204},
    }
    entry = {"name": "one", "precision": "fp32", "threads": 1, "group": "perplexity", "tokens": 512,
             "windows": 40, "work": {"flops": 10**11, "bytes": 10**9}, "ways": ways}  # fmt: skip
    found = Results("perplexity", limits=LIMITS, entries=[with_bounds(entry, LIMITS)])
    assert as_text(as_parts(found)) == golden
