"""Small causal models and their decoders, compiled once for all tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import effc

VOCABULARY, WINDOW = 61, 5


class Plain(nn.Module):
    """Two layers by hand: no cache, no mask, positions from a table."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 32), nn.Embedding(300, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids):
        batch, length = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(length))
        for norm, qkv in zip(self.norms, self.qkv):
            q, k, v = qkv(norm(x)).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).reshape(batch, length, 32)
        return self.head(x), x


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes()))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_sizes()))


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_sizes(), sliding_window=WINDOW))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=300, n_embd=32, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _sizes():
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 300, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


MODELS = {"plain": Plain, "llama": llama, "gpt2": gpt2, "qwen3": qwen3, "mistral": mistral}
_made: dict = {}


def made(name, target="cpu"):
    """Model and decoder, compiled once."""
    if (name, target) not in _made:
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        for p in model.parameters():  # norms of 1 and biases of 0 would hide errors
            p.add_(torch.randn_like(p) * 0.1)
        _made[name, target] = model, effc.decoder(model, target=target)
    return _made[name, target]


def whole(model, ids, **kwargs):
    """Logits of the whole sequence at once, in eager mode."""
    result = model(ids, **kwargs)
    return result[0] if isinstance(result, tuple) else result.logits


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def some(*shape):
    return torch.randint(3, VOCABULARY, shape)
