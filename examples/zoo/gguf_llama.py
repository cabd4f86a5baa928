"""Llama models from GGUF files, as llama.cpp and its friends ship them: read with `gguf`.

Weights of every type that `gguf` can dequantise become float32; the byte-level BPE tokenizer in the
file becomes one of `tokenizers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .files import filled

NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp -> transformers, inside a block."""
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
SPECIAL = 3  # of tokenizer.ggml.token_type: a control token, matched before text is split


def load(path: Path) -> LlamaForCausalLM:
    """The language model in eval mode, float32.

    Raises ValueError for a file of another architecture or with tensors that Llama lacks.
    """
    from gguf import dequantize

    fields, stored = _contents(path)
    config = _config(path, fields)
    state: dict[str, Tensor] = {}
    for t in stored:
        value = torch.tensor(dequantize(t.data, t.tensor_type))
        state[_renamed(t.name)] = _halves(t.name, value, config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied: stored once
    return filled(LlamaForCausalLM(config), state)  # type: ignore[return-value]


def tokenizer(path: Path) -> Any:
    """The file's byte-level BPE as tokenizers.Tokenizer. Raises ValueError for another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields, _ = _contents(path)
    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{path.name} splits text as {kind}; only SmolLM's way is known here")
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


def _contents(path: Path) -> tuple[dict[str, Any], list[Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)


def _config(path: Path, fields: dict[str, Any]) -> LlamaConfig:
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{path.name} holds a {fields['general.architecture']}, not a llama")
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


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    if not stem.startswith("blk."):
        if stem not in OUTER:
            raise ValueError(f"no part of Llama is called {name}")
        return f"{OUTER[stem]}.{last}"
    _, layer, inner = stem.split(".", 2)
    if inner not in NAMES:
        raise ValueError(f"no part of a Llama block is called {name}")
    return f"model.layers.{layer}.{NAMES[inner]}.{last}"


def _halves(name: str, w: Tensor, config: LlamaConfig) -> Tensor:
    """Rows of q and k from RoPE on adjacent pairs (0, 1), (2, 3) to RoPE on halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return w
    return w.reshape(count, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
