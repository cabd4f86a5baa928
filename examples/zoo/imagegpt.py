"""ImageGPT for MNIST and Fashion-MNIST: a small GPT over pixels in 16 grey levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import filled, tensors

WIDTH, HEADS, LAYERS, PIXELS, LEVELS, CLASSES = 16, 2, 8, 784, 16, 10


class Block(nn.Module):
    """The residual of attention is the normalised input, as trained."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, C], causal mask [L, L] -> [B, L, C]."""
        z = self.ln_1(x)
        h = z + self.attn(z, z, z, attn_mask=mask, need_weights=False, is_causal=True)[0]
        return h + self.mlp(self.ln_2(h))


class ImageGPT(nn.Module):
    """Pixels row by row -> logits of each pixel given those before it.

    `clf_head` and `centroids` (grey value of each level) are not used by `forward`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(LEVELS))
        self.sos = nn.Parameter(torch.zeros(WIDTH))
        self.token_embeddings = nn.Embedding(LEVELS, WIDTH)
        self.position_embeddings = nn.Embedding(PIXELS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LEVELS, bias=False)
        self.clf_head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, 16]; logits i predict token i."""
        batch, length = tokens.shape
        first = self.sos.expand(batch, 1, -1)
        h = torch.cat([first, self.token_embeddings(tokens[:, :-1])], 1)
        h = h + self.position_embeddings(torch.arange(length, device=tokens.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for layer in self.layers:
            h = layer(h, mask)
        return self.head(self.ln_f(h))


def load(folder: Path, name: str = "mnist") -> ImageGPT:
    """The network trained on `mnist` or `fmnist`."""
    return filled(ImageGPT(), tensors(folder / f"imagegpt_{name}.safetensors"))


def golden(folder: Path, name: str = "mnist") -> tuple[tuple, dict[str, Any], Tensor]:
    """Two images as tokens and their logits."""
    stored = tensors(folder / f"golden_{name}.safetensors")
    return (stored["tokens"],), {}, stored["logits"]
