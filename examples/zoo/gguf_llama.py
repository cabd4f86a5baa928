"""Llama models from GGUF files, as llama.cpp and its friends ship them: read with `gguf`.

Weights of every type that `gguf` can dequantise become float32; the byte-level BPE tokenizer in the
file becomes one of `tokenizers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from effc.interop import load as load_into
from effc.interop import read
from effc.interop.gguf_file import FREQUENCIES, NAMES, OUTER, GgufFile
from effc.ir import InputError

SPECIAL = 3  # of tokenizer.ggml.token_type: a control token, matched before text is split


def load(path: Path) -> LlamaForCausalLM:
    """The language model in eval mode, float32.

    Raises InputError for a file of another architecture or with tensors that Llama lacks.
    """
    net = empty(path)
    load_into(net, read(path, unmapped="dense"))
    return net


def empty(path: Path) -> LlamaForCausalLM:
    """A model of the file's sizes, in eval mode; its weights are random.

    Raises InputError for a file of another architecture, or one whose RoPE is scaled.
    """
    file = GgufFile.open(path)
    if any(t.name == FREQUENCIES for t in file.tensors):
        raise InputError(f"no part of Llama is called {FREQUENCIES}: {path.name} has a scaled RoPE")
    return LlamaForCausalLM(_config(file)).eval().requires_grad_(False)


def tokenizer(path: Path) -> Any:
    """The file's byte-level BPE as tokenizers.Tokenizer. Raises InputError for another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GgufFile.open(path)
    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{path.name} splits text as {kind}; only SmolLM's way is known here")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == SPECIAL]
    )
    return made


def _config(fields: GgufFile) -> LlamaConfig:
    if fields["general.architecture"] != "llama":
        raise InputError(f"{fields.name} holds a {fields['general.architecture']}, not a llama")
    heads = fields["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )


__all__ = ["NAMES", "OUTER", "empty", "load", "tokenizer"]
