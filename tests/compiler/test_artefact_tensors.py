"""Tensors of an artefact: values, element types, strides and sharing come back."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from effc.artefact_tensors import read_tensors, write_tensors
from effc.ir import ArtefactError
from effc.ir.types import DTYPES


def flat(t):
    return t.reshape(-1).contiguous().view(torch.uint8)


def round_trip(tmp_path, tensors):
    file = tmp_path / "weights.safetensors"
    table = write_tensors(file, tensors)
    found = read_tensors(file.read_bytes(), table)
    assert list(found) == list(tensors)
    for name, want in tensors.items():
        got = found[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(flat(got), flat(want))
    return found


BYTES = [d.torch for d in DTYPES.values() if d.torch and d.bits >= 8]


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_element_types(tmp_path, dtype):
    values = torch.randint(0, 255, (4, 16 * 3), dtype=torch.uint8)
    if dtype is torch.bool:
        values %= 2
    t = values.view(dtype)
    assert round_trip(tmp_path, {"a.b": t, "empty": t[:0]})["a.b"].stride() == t.stride()


def test_plain_weights_are_stored_under_their_names(tmp_path):
    weights = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.randn(3), "one": torch.tensor(2)}
    write_tensors(tmp_path / "w", weights)
    found = load_file(tmp_path / "w")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], weights[k]) for k in weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 4).T,
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(8, 6)[:, 1:4],
        lambda: torch.randn(3, 1).expand(3, 5),
        lambda: torch.randn(3, 7)[1],
    ],
    ids=["transposed", "channels-last", "columns", "expanded", "row"],
)
def test_strides_are_kept(tmp_path, make):
    t = make()
    assert round_trip(tmp_path, {"w": t})["w"].stride() == t.stride()


def test_a_few_elements_of_much_memory_are_packed(tmp_path):
    t = torch.randn(1000, 1000)[::100, ::100]
    found = round_trip(tmp_path, {"w": t})["w"]
    assert found.is_contiguous() and (tmp_path / "weights.safetensors").stat().st_size < 1000


def test_one_row_of_much_memory_is_stored_alone(tmp_path):
    round_trip(tmp_path, {"w": torch.randn(1000, 100)[500]})
    assert (tmp_path / "weights.safetensors").stat().st_size < 1000


def test_shared_memory_is_shared_again(tmp_path):
    base = torch.randn(9, 8)
    tensors = {
        "tied.a": base, "tied.b": base, "rows": base[3:7], "turned": base.T,
        "bytes": base.view(torch.uint8)[1], "other": torch.randn(9, 8),
    }  # fmt: skip
    found = round_trip(tmp_path, tensors)
    assert found["tied.a"] is found["tied.b"]
    homes = {n: t.untyped_storage().data_ptr() for n, t in found.items()}
    assert len(set(homes.values())) == 2 and homes["other"] != homes["rows"]
    found["rows"].zero_()
    assert not found["tied.a"][3:7].any() and not found["turned"][:, 3:7].any()


def test_parameters_come_back_as_such(tmp_path):
    p = nn.Parameter(torch.randn(3))
    found = round_trip(tmp_path, {"p": p, "q": p, "b": torch.randn(3)})
    assert isinstance(found["p"], nn.Parameter) and not found["p"].requires_grad
    assert found["q"] is found["p"] and not isinstance(found["b"], nn.Parameter)


def test_memory_is_aligned_for_vectors(tmp_path):
    tensors = {f"w{i}": torch.randn(i) for i in range(1, 9)}
    assert all(t.data_ptr() % 64 == 0 for t in round_trip(tmp_path, tensors).values())


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
     (lambda: torch.empty(3, device="meta"), "meta")],
)  # fmt: skip
def test_what_is_not_plain_memory(tmp_path, make, said):
    with pytest.raises(ArtefactError, match="weight 'w' cannot be saved") as caught:
        write_tensors(tmp_path / "w", {"w": make()})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [99]}, {"offset": 1}, {"stride": [5]}, {"dtype": "f64"}, {"dtype": "f1"},
        {"in": "v"}, {"offset": -1}, {"shape": [-1]}, {"stride": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_tables_that_do_not_fit(tmp_path, change):
    table = write_tensors(tmp_path / "w", {"w": torch.randn(3)})
    table["w"].update(change)
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        read_tensors((tmp_path / "w").read_bytes(), table)
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(b"not safetensors", {})
