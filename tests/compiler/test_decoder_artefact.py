"""Decoders with a recipe, and decoders as files."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch

import effc
from effc.ir import ArtefactError, InputError
from tests.compiler.decoders import Plain, close, made, some, whole

# ------------------------------------------------------------------ recipes

DROP = "drop-blocks{rate=0.5,by=influence}"
SHARE = "share-blocks{rank=2}"


@pytest.mark.parametrize(("passes", "states"), [(DROP, 2), (SHARE, 4)], ids=["drop", "share"])
def test_what_is_decoded_is_the_model_that_the_recipe_made(passes, states, tmp_path):
    torch.manual_seed(0)
    model = Plain().eval().requires_grad_(False)
    recipe = f"raised,{passes}"
    data = [some(2, 20) for _ in range(3)] if "influence" in passes else None
    options = {"verify": True, "dump": str(tmp_path / "out")}
    decoder = effc.decoder(model, recipe, calibrate=data, target="reference", **options)
    ids = some(1, 30)
    free = {"ids": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)}
    whole_ones = effc.compile(
        model, recipe, calibrate=data, example_inputs=None if data else (some(2, 30),),
        dynamic_shapes=free, measure=False, target="reference",
    )  # fmt: skip
    want = whole_ones(ids)[0]
    assert not torch.allclose(want, whole(model, ids), rtol=0.01)
    s = decoder.sequence()
    got = [s.append(ids[:, :20], every=True), s.append(ids[:, 20:], every=True)]
    close(torch.cat(got, 1), want)
    assert len(s._rows.states) == states
    assert (tmp_path / "out" / "graph_decode_batch_1" / "000_capture.py").exists()
    decoder.save(tmp_path / "x.effc")
    again = effc.load(tmp_path / "x.effc").sequence()
    assert torch.equal(again.append(ids[:, :20]), decoder.sequence().append(ids[:, :20]))


# ------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A decoder of a model that is told of padding, and its file."""
    decoder = made("llama")[1]
    prompts = [[5, 6, 7], [8, 9]]
    want = decoder.generate([5, 6, 7], 12, eos=()), decoder.generate(prompts, 5, eos=())
    path = tmp_path_factory.mktemp("saved") / "llama.effc"
    effc.save(decoder, path)
    return path, want


ALONE = """
import json, sys
import effc
from effc.codegen.toolchain import MissingToolchain
import effc.backends.cpu as cpu

cpu.build_units = None  # nothing may be built
decoder = effc.load(sys.argv[1])
one = decoder.generate([5, 6, 7], 12, eos=())
two = decoder.generate([[5, 6, 7], [8, 9]], 5, eos=())
names = sorted(m for m in sys.modules if m.partition(".")[0] == "transformers")
print(json.dumps([one, two, len(names), decoder.eos, str(effc.explain(decoder))[:200]]))
"""


def test_a_file_decodes_without_the_model_and_without_a_compiler(saved):
    path, want = saved
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True, check=True
    )
    one, two, modules, eos, shown = json.loads(ran.stdout)
    assert (one, two) == want
    assert modules == 0 and eos == [2] and "decode" in shown


def test_a_loaded_decoder_is_one(saved, tmp_path):
    path, (one, _) = saved
    decoder = effc.load(path)
    model = made("llama")[0]
    ids = some(3, 12)  # of a batch for which nothing was saved
    s = decoder.sequence(3)
    close(s.append(ids, every=True), whole(model, ids))
    assert decoder.binding == made("llama")[1].binding
    with pytest.raises(InputError, match="was loaded without its model"):
        decoder.hf
    decoder.save(tmp_path / "again.effc")
    assert effc.load(tmp_path / "again.effc").generate([5, 6, 7], 12, eos=()) == one


def test_weights_of_a_loaded_decoder_may_change(saved):
    decoder = effc.load(saved[0])
    ids = some(1, 9)
    before = decoder.sequence().append(ids)
    (head,) = [w for w in decoder.graph.weights if w.name.endswith("lm_head.weight")]
    with torch.no_grad():
        head.tensor.mul_(2)
    close(decoder.sequence().append(ids), 2 * before)


def changed(path, to, member, change):
    """A file whose hashes hold, with other contents in one member."""
    from effc.artefact_file import read_file, work_folder, write_file

    contents = read_file(path)
    members = dict(contents.members)
    members[member] = json.dumps(change(json.loads(members[member]))).encode()
    with work_folder(to) as folder:
        write_file(folder, to, contents.facts, members)
    return to


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {**m, "graphs": []},
        lambda m: {**m, "graphs": [{**m["graphs"][0], "batch": "not a size"}]},
        lambda m: {**m, "graphs": [{**m["graphs"][0], "plans": {"decode{batch=2}": {}}}]},
        lambda m: {**m, "eos": ["x"]},
        lambda m: {**m, "passes": "no-such-pass"},
        lambda m: {k: v for k, v in m.items() if k != "tensors"},
    ],
)
def test_what_somebody_else_wrote_is_refused_with_a_sentence(saved, tmp_path, change):
    path = changed(saved[0], tmp_path / "x.effc", "module.json", change)
    with pytest.raises(ArtefactError, match=r"x\.effc cannot be loaded"):
        effc.load(path)


def test_a_cut_file_is_refused(saved, tmp_path):
    data = saved[0].read_bytes()
    path = tmp_path / "x.effc"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtefactError):
        effc.load(path)
    assert zipfile.is_zipfile(saved[0])
