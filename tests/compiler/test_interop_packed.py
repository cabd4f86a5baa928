"""GPTQ, AWQ and compressed-tensors: folders written bit by bit, and what they decode to."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effc
from effc.interop import load, read
from effc.interop.packed import from_awq, from_compressed, from_gptq
from effc.ir import InputError, OptionError
from effc.ir.formats import Encoded, bits_per_element

from .checkpoints import (
    awq_tensors,
    codes_of,
    compressed_tensors,
    gptq_tensors,
    meant,
    tiny_llama,
    write_folder,
)

GROUP = 32
UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(1, 13)[None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def scheme(bits=4, **more):
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, **more}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


# ------------------------------------------------------------------ matrices


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.integers(1, 3),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_gptq_is_scale_times_code_minus_zero(bits, v2, zero, rows, groups, seed):
    shape = torch.empty(32 * rows, GROUP * groups)
    codes, scales, zeros = codes_of(shape, bits, GROUP, zero, seed)
    order = torch.arange(shape.shape[1]) // GROUP
    t = gptq_tensors(codes, scales, zeros, bits, v2, order)
    value = from_gptq(t["qweight"], t["qzeros"], t["scales"], bits, GROUP, v2)
    assert torch.equal(value.decode(), meant(codes, scales, zeros, GROUP))
    assert ("zero" in value.type.format.parts(value.type)) == zero


def test_version_1_of_gptq_has_room_for_a_zero_above_all_codes():
    """It stores zeros less 1, so 15 of 4 bits means 16, which uint4 lacks."""
    codes, scales, zeros = codes_of(torch.empty(32, 64), 4, GROUP)
    zeros[0, 0] = 16
    t = gptq_tensors(codes, scales, zeros, 4, False, torch.arange(64) // GROUP)
    value = from_gptq(t["qweight"], t["qzeros"], t["scales"], 4, GROUP, False)
    assert str(value.type.format.zero) == "u8"
    assert torch.equal(value.decode(), meant(codes, scales, zeros, GROUP))


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_awq_is_scale_times_code_minus_zero(zero, rows, groups, seed):
    codes, scales, zeros = codes_of(torch.empty(8 * rows, GROUP * groups), 4, GROUP, zero, seed)
    t = awq_tensors(codes, scales, zeros)
    value = from_awq(t["qweight"], t["qzeros"], t["scales"], GROUP)
    assert torch.equal(value.decode(), meant(codes, scales, zeros, GROUP))
    assert str(value.type.dtype) == ("uint4" if zero else "int4")


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 11), st.integers(1, 70),
    st.integers(0, 99),
)  # fmt: skip
def test_compressed_tensors_of_ragged_shapes(bits, zero, rows, columns, seed):
    codes, scales, zeros = codes_of(torch.empty(rows, columns), bits, GROUP, zero, seed)
    t = compressed_tensors(codes, scales, zeros if zero else None, bits)
    value = from_compressed(
        t["weight_packed"], t["weight_scale"], t.get("weight_zero_point"), (rows, columns), bits,
        GROUP,
    )  # fmt: skip
    assert torch.equal(value.decode(), meant(codes, scales, zeros, GROUP))


def test_what_is_symmetric_needs_no_zeros():
    """4-bit codes and a scale of 16 bits for every 32."""
    codes, scales, zeros = codes_of(torch.empty(64, 64), 4, GROUP, zero=False)
    t = awq_tensors(codes, scales, zeros)
    value = from_awq(t["qweight"], t["qzeros"], t["scales"], GROUP)
    assert bits_per_element(value.type) == 4.5


# ------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def net():
    return tiny_llama(tie_word_embeddings=False)


def packer(tensors, bits=4, zero=True, seen=None):
    def pack(stem, w):
        codes, scales, zeros = codes_of(w, bits, GROUP, zero, seed=len(stem) + w.shape[0])
        if seen is not None:
            seen[f"{stem}.weight"] = meant(codes, scales, zeros, GROUP)
        return tensors(codes, scales, zeros)

    return pack


def folders(v2=False):
    order = lambda codes: torch.arange(codes.shape[1]) // GROUP  # noqa: E731
    return {
        "gptq": (GPTQ, lambda c, s, z: gptq_tensors(c, s, z, 4, False, order(c))),
        "gptq_v2": (
            {**GPTQ, "checkpoint_format": "gptq_v2"},
            lambda c, s, z: gptq_tensors(c, s, z, 4, True, order(c)),
        ),
        "awq": (AWQ, awq_tensors),
        "compressed-tensors": (
            scheme(symmetric=False), lambda c, s, z: compressed_tensors(c, s, z, 4)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("method", sorted(folders()))
def test_a_folder_is_loaded_into_a_model(net, method, tmp_path):
    told, tensors = folders()[method]
    seen = {}
    path = write_folder(tmp_path / "folder", net, told, packer(tensors, seen=seen))
    other = tiny_llama(seed=1, tie_word_embeddings=False)
    load(other, path)
    for key, want in seen.items():
        assert torch.equal(other.get_parameter(key), want)
    assert torch.equal(other.lm_head.weight, net.lm_head.weight)


def test_a_folder_takes_the_place_of_weights(net, tmp_path):
    told, tensors = folders()["compressed-tensors"]
    path = write_folder(tmp_path / "folder", net, told, packer(tensors))
    other = tiny_llama(seed=1, tie_word_embeddings=False)
    made = effc.compile(
        other, weights=path, target="reference", example_inputs=(),
        example_kwargs={"input_ids": IDS, "use_cache": False},
    )  # fmt: skip
    got = made(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, other(IDS).logits, rtol=0, atol=1e-5)
    graph = made._effc_records[0].stages[0].graph
    assert sum(n.name == "encoded" for n in graph.nodes) == 14  # 7 matrices a layer


def test_biases_of_zeros_for_layers_without_are_nothing(net, tmp_path):
    """AutoGPTQ writes them; transformers once wrote the frequencies of RoPE."""
    told, tensors = folders()["gptq"]
    pack, bias = packer(tensors), torch.zeros(96)

    def more(stem, w):
        found = pack(stem, w)
        if stem in UP:
            found |= {"bias": bias, "rotary_emb.inv_freq": torch.ones(8)}
        return found

    load(tiny_llama(tie_word_embeddings=False), write_folder(tmp_path / "zeros", net, told, more))
    bias[3] = 1
    with pytest.raises(InputError, match=r"has no place for .*up_proj\.bias"):
        load(tiny_llama(tie_word_embeddings=False), write_folder(tmp_path / "one", net, told, more))


def test_another_order_of_columns(net, tmp_path):
    """act-order: refused by name; as dense numbers it is what GPTQ's own formula says."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // GROUP

    def pack(stem, w):
        codes, scales, zeros = codes_of(w, 4, GROUP)
        plain = torch.arange(w.shape[1]) // GROUP
        return gptq_tensors(codes, scales, zeros, 4, False, order if stem in UP else plain)

    path = write_folder(tmp_path / "folder", net, {**GPTQ, "desc_act": True}, pack)
    with pytest.raises(InputError, match="another order of columns") as refused:
        load(tiny_llama(tie_word_embeddings=False), path)
    assert UP.removesuffix(".weight") in str(refused.value)
    codes, scales, zeros = codes_of(torch.empty(96, 64), 4, GROUP)
    want = (codes - zeros[:, order]).float() * scales.float()[:, order]
    assert torch.equal(read(path, unmapped="dense")[UP], want)


def test_rows_and_whole_tensors_of_compressed_tensors(net, tmp_path):
    """strategy channel: a scale a row; int-quantized: codes a byte each."""
    codes = torch.randint(-8, 8, (96, 64), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(96, 1)
    found = {"weight": codes.to(torch.int8), "weight_scale": scale}
    told = {**scheme(strategy="channel", group_size=None), "format": "int-quantized"}
    pack = lambda stem, w: found if stem in UP else {"weight": w}  # noqa: E731
    value = read(write_folder(tmp_path / "rows", net, told, pack))[UP]
    assert isinstance(value, Encoded) and value.type.format.group is None
    assert torch.equal(value.decode(), codes * scale)
    found["weight_scale"] = torch.tensor([0.5])
    told = {**scheme(strategy="tensor", group_size=None), "format": "int-quantized"}
    value = read(write_folder(tmp_path / "whole", net, told, pack))[UP]
    assert torch.equal(value.decode(), codes * 0.5)


def test_a_folder_of_floats_is_a_checkpoint_too(net, tmp_path):
    net.save_pretrained(tmp_path / "floats")
    other = tiny_llama(seed=1, tie_word_embeddings=False)
    load(other, tmp_path / "floats")
    assert torch.equal(other(IDS).logits, net(IDS).logits)


def test_tied_tables_are_one_entry(tmp_path):
    tied = tiny_llama()
    tied.save_pretrained(tmp_path / "tied")
    other = tiny_llama(seed=1)
    load(other, tmp_path / "tied")
    assert torch.equal(other(IDS).logits, tied(IDS).logits)


REFUSED = {
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "made for one kernel"),
    "5 bits": ({**GPTQ, "bits": 5}, "gptq has 2, 3, 4, 8 here"),
    "gemv": ({**AWQ, "version": "gemv"}, "have gemm"),
    "fp8": ({**scheme(), "format": "float-quantized"}, "codes are integers"),
    "block": (scheme(strategy="block"), "int codes by group"),
    "nf4": ({"quant_method": "bitsandbytes"}, "levels come from a table"),
    "later": ({"quant_method": "later"}, "have gptq, awq, compressed-tensors and GGUF"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_map_is_refused_with_the_reason(net, name, tmp_path):
    told, why = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read(write_folder(tmp_path / "folder", net, told, lambda stem, w: {"weight": w}))
    assert why in str(refused.value)


def test_layers_quantised_in_different_ways_are_refused(net, tmp_path):
    told = scheme()
    told["config_groups"]["group_1"] = scheme(bits=8)["config_groups"]["group_0"]
    with pytest.raises(InputError, match="folder cannot be read"):
        read(write_folder(tmp_path / "folder", net, told, lambda stem, w: {"weight": w}))


def test_mistakes(net, tmp_path):
    with pytest.raises(OptionError, match="unmapped is 'densely'"):
        read(tmp_path, unmapped="densely")
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        read(tmp_path)
    (tmp_path / "model.safetensors").write_text("no")
    with pytest.raises(InputError, match=r"model\.safetensors is no file of safetensors"):
        read(tmp_path)
    path = write_folder(tmp_path / "folder", net, GPTQ, lambda stem, w: {"weight": w})
    with pytest.raises(InputError, match=r"has no model\.layers\.1\.mlp\.up_prj") as e:
        read(path)["model.layers.1.mlp.up_prj.weight"]
    assert UP in str(e.value)


def test_settings_of_autogptq_lie_in_a_file_of_their_own(net, tmp_path):
    pack = packer(folders()["gptq"][1])
    path = write_folder(tmp_path / "folder", net, {}, pack)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    own = {"bits": 4, "group_size": GROUP, "desc_act": False}
    (path / "quantize_config.json").write_text(json.dumps(own))
    assert isinstance(read(path)[UP], Encoded)
