"""The container: damaged, cut and foreign files are refused in a sentence, whatever was done."""

import json
import random
import zipfile

import pytest
import torch
from torch import nn

import effc
from effc.artefact_file import is_artefact, read_file, work_folder, write_file
from effc.ir import ArtefactError

FACTS = {"name": "Net"}
MEMBERS = {"graph.py": b"def graph():\n", "kernels/a.so": b"\x7fELF" * 100, "module.json": b"{}"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.effc"


def written(path, members=MEMBERS, facts=FACTS):
    with work_folder(path) as folder:
        write_file(folder, path, facts, members)
    return path


def refusal(path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_file(path)
    assert path.name in str(caught.value) and caught.value.fix
    return str(caught.value)


def test_what_is_written_is_read(path, tmp_path):
    (tmp_path / "values").write_bytes(b"\0" * 1000)
    written(path, {**MEMBERS, "weights.safetensors": tmp_path / "values"})
    found = read_file(path)
    assert found.members == {**MEMBERS, "weights.safetensors": b"\0" * 1000}
    assert found.facts == {"format": 1, "name": "Net"}
    assert json.loads(found.manifest)["members"]["module.json"][0] == 2
    assert is_artefact(path) and not is_artefact(tmp_path / "values") and not is_artefact(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.effc", "values"]


def test_it_is_a_zip_that_others_read_and_the_same_bytes_every_time(path, tmp_path):
    written(path)
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None and "manifest.json" in z.namelist()
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
    assert path.read_bytes() == written(tmp_path / "again.effc").read_bytes()


# ------------------------------------------------------------------ damage


def flip(r, data):
    at = r.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1 :]


def cut(r, data):
    return data[: r.randrange(len(data))]


def insert(r, data):
    at = r.randrange(len(data) + 1)
    return data[:at] + r.randbytes(r.randint(1, 40)) + data[at:]


def drop(r, data):
    at = r.randrange(len(data))
    return data[:at] + data[at + r.randint(1, 200) :]


def zero(r, data):
    at = r.randrange(len(data))
    n = min(r.randint(1, 300), len(data) - at)
    return data[:at] + bytes(n) + data[at + n :]


def swap(r, data):
    """Two stretches of one length change places."""
    n = r.randint(1, 400)
    a, b = sorted(r.sample(range(0, len(data) - n, n), 2))
    return data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]


def test_200_random_corruptions_are_all_refused(path):
    r, kinds = random.Random(0), (flip, flip, cut, insert, drop, zero, swap)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8)).eval()
    effc.compile(model, example_inputs=(torch.randn(2, 6),), measure=False).save(path)
    good, tried = path.read_bytes(), 0
    while tried < 200:
        bad = kinds[tried % len(kinds)](r, good)
        if bad == good:
            continue
        tried += 1
        path.write_bytes(bad)
        with pytest.raises(ArtefactError) as caught:
            effc.load(path)
        assert path.name in str(caught.value) and caught.value.fix
    path.write_bytes(good)
    effc.load(path)


@pytest.mark.parametrize("position", [0, 4, 14, 30, -1, -64, -86, -100, -112])
def test_every_part_of_the_zip_is_covered(path, position):
    """The headers of members, the directory, the end record and the seal itself."""
    data = bytearray(written(path).read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    refusal(path)


def test_the_damaged_member_is_named(path):
    data = written(path).read_bytes()
    path.write_bytes(data.replace(b"def graph", b"def grape"))
    said = refusal(path)
    assert "model.effc is damaged" in said and "graph.py is not as it was written" in said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is not an artefact of effc"),
        (b"hello", "is not an artefact of effc"),
        (b"PK\x03\x04 and no more", "its end is missing"),
        (b"PK\x03\x04effc artefact 0001 sha256 " + b"0" * 64, "is damaged"),
        (b"PK\x03\x04effc artefact 0002 sha256 " + b"0" * 64, "has format 2"),
    ],
)
def test_other_files(path, data, said):
    path.write_bytes(data)
    assert said in refusal(path)


def test_a_zip_of_somebody_else(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("graph.py", "def graph(): ...")
    assert "it is cut off, or no artefact" in refusal(path)


# ------------------------------------------------------------------ made to harm


def zipped(path, *members, compression=zipfile.ZIP_STORED, seal=b"0" * 64):
    """A zip with the end of an artefact; the seal does not hold."""
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in members:
            z.writestr(name, content)
        z.comment = b"effc artefact 0001 sha256 " + seal
    return path


@pytest.mark.parametrize(
    "name",
    ["../graph.py", "/etc/graph.py", "kernels/../../a.so", "a/b.py", "kernels/a.sh", "code.pkl",
     "kernels/.so/a.so", "kernels\\a.so", "graph.py/"],
)  # fmt: skip
def test_names_that_no_artefact_has(path, name):
    assert "no artefact has a member called" in refusal(zipped(path, (name, b"x")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_there_twice(path):
    assert "twice" in refusal(zipped(path, ("graph.py", b"a"), ("graph.py", b"b")))


def test_compressed_members_are_refused_before_they_grow(path):
    bomb = zipped(path, ("graph.py", bytes(1 << 20)), compression=zipfile.ZIP_DEFLATED)
    assert "graph.py is compressed" in refusal(bomb)


def test_long_texts_are_refused(path, monkeypatch):
    written(path, {"graph.py": b"1" * 13})
    monkeypatch.setattr("effc.artefact_file.TEXT", 10)
    assert "bytes, and 10 at most are allowed" in refusal(path)
    with pytest.raises(ArtefactError, match="cannot be saved"):
        written(path, {"graph.py": b"1" * 13})


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"[]", "no manifest"),
        (b"{", "no manifest"),
        (b'{"members": {}}', "no manifest"),
        (b"[" * 100_000, "no manifest"),
        (b'{"members": {"graph.py": [1, "00"]}}', "its manifest and its graph.py do not agree"),
        (b'{"members": {"other.py": [1, "00"]}}', "do not agree"),
    ],
)
def test_manifests_that_make_no_sense(path, monkeypatch, manifest, said):
    monkeypatch.setattr("effc.artefact_file._manifest", lambda facts, listed: manifest)
    assert said in refusal(written(path, {"graph.py": b"x"}))
