"""stories260K: transformers' Llama with the weights of a 0.26 M parameter llama2.c model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .files import filled, tensors

HEADS, KEY_HEADS = 8, 4
BOS, FIRST = 1, 259  # the first token that is no byte and no sign of its own
NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""llama2.c -> transformers, inside a layer."""


def load(folder: Path) -> LlamaForCausalLM:
    """The language model; the head shares the embedding's weight."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    state = {}
    for name, value in tensors(folder / "stories260k.safetensors").items():
        state[_renamed(name)] = _halves(name, value)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return filled(LlamaForCausalLM(config), state)


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """The first 64 tokens of a story and the logits after each."""
    stored = tensors(folder / "golden.safetensors")
    kwargs = {"input_ids": stored["ids"][None, :64], "use_cache": False}
    return (), kwargs, stored["logits_first64"][None]


def tokenizer(folder: Path) -> Any:
    """Its tokenizer, a tokenizers.Tokenizer; a text begins with BOS, which it does not put there.

    llama2.c merges the pair whose joined token scores best: a byte-pair encoding whose merges are
    ranked by the token that they make.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    raw, at = (folder / "tok512.bin").read_bytes(), 4
    scores: dict[str, float] = {}
    while at < len(raw):
        score, size = struct.unpack_from("fi", raw, at)
        scores[raw[at + 8 : at + 8 + size].decode()] = score
        at += 8 + size
    ids = {token: i for i, token in enumerate(scores)}
    merges = []
    for token in sorted(scores, key=lambda t: (-scores[t], ids[t])):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(a, b) for a, b in halves if a in ids and b in ids and ids[token] >= FIRST]
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def stories(folder: Path) -> list[str]:
    """67 stories of the kind it was trained on."""
    return json.loads((folder / "tinystories_sample.json").read_text(encoding="utf-8"))


def _renamed(name: str) -> str:
    if not name.startswith("layers."):
        return "model." + name.replace("tok_embeddings", "embed_tokens")
    _, layer, inner = name.split(".", 2)
    inner, _, last = inner.rpartition(".")
    return f"model.layers.{layer}.{NAMES[inner]}.{last}"


def _halves(name: str, w: Tensor) -> Tensor:
    """Rows of q and k from RoPE on adjacent pairs (0, 1), (2, 3) to RoPE on halves."""
    heads = {"attention.wq": HEADS, "attention.wk": KEY_HEADS}.get(name[9:-7])
    if heads is None:
        return w
    return w.reshape(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
