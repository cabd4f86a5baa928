"""The JSON of a run: whole after every case, taken up again by --resume."""

import json

import pytest

from effc.benchmarks.archive import Key, Results, file_of
from effc.ir import OptionError


def entry(name="a", threads=1, ways=("eager", "effc")):
    return {
        "name": name, "precision": "fp32", "threads": threads,
        "ways": {w: {"status": "timed", "ms": 1.0} for w in ways},
    }  # fmt: skip


def test_results_come_back_as_they_were_saved(tmp_path):
    found = Results.here("models", rounds=3)
    found.put(entry())
    found.save(path := file_of(tmp_path / "new", "models"))
    assert Results.load(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["models.json"]


def test_an_entry_replaces_an_older_one_of_the_same_measurement():
    found = Results("models")
    for e in (entry(), entry(threads=2), entry(ways=("eager",))):
        found.put(e)
    assert [(e["threads"], len(e["ways"])) for e in found.entries] == [(1, 1), (2, 2)]


def test_what_is_done_depends_on_the_ways():
    found = Results("models", entries=[entry()])
    key = Key("a", "fp32", 1)
    assert found.done(key, ["eager", "effc"])
    assert not found.done(key, ["eager", "openvino"])
    assert not found.done(Key("a", "bf16", 1), ["eager"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "models.json"
    Results("models").save(path)
    broken = Results("models", settings={"not": object()})
    with pytest.raises(TypeError):
        broken.save(path)
    assert Results.load(path) == Results("models")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": 0, "suite": "models"})])
def test_other_files_are_named_as_such(tmp_path, text):
    path = tmp_path / "models.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"models\.json"):
        Results.load(path)
