"""DiT for MNIST: adaLN-Zero blocks, class-conditional, predicts the noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import filled, tensors

SIZE, PATCH, WIDTH, HEADS, HEAD, BLOCKS, LABELS = 28, 4, 64, 4, 64, 3, 10
GRID = SIZE // PATCH
TOKENS = GRID * GRID


class TimeEmbedding(nn.Module):
    """t -> cat(sin(t f), cos(t f)); the frequencies are stored with the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("half_emb", torch.zeros(width // 2))

    def forward(self, t: Tensor) -> Tensor:
        """[B] steps -> [B, C]."""
        angle = t[:, None] * self.half_emb
        return torch.cat([angle.sin(), angle.cos()], -1)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gamma1", "beta1", "alpha1", "gamma2", "beta2", "alpha2"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wq = nn.Linear(WIDTH, HEADS * HEAD)
        self.wk = nn.Linear(WIDTH, HEADS * HEAD)
        self.wv = nn.Linear(WIDTH, HEADS * HEAD)
        self.lv = nn.Linear(HEADS * HEAD, WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def attention(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = (w(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for w in self.qkv)
        # As trained: the scale is the root of the number of tokens, not of the head's width.
        out = F.scaled_dot_product_attention(q, k, v, scale=TOKENS**-0.5)
        return self.lv(out.transpose(1, 2).flatten(2))

    @property
    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The three projections."""
        return self.wq, self.wk, self.wv

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens [B, L, C] and condition [B, 1, C]."""
        h = self.ln1(x) * (1 + self.gamma1(c)) + self.beta1(c)
        x = x + self.alpha1(c) * self.attention(h)
        h = self.ln2(x) * (1 + self.gamma2(c)) + self.beta2(c)
        return x + self.alpha2(c) * self.ff(h)


class MnistDiT(nn.Module):
    """Noisy digits in -1..1, step 0..999 and label 0..9 -> noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, PATCH * PATCH, PATCH, stride=PATCH)
        self.patch_emb = nn.Linear(PATCH * PATCH, WIDTH)
        self.patch_pos_emb = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.label_emb = nn.Embedding(LABELS, WIDTH)
        self.time_emb = nn.Sequential(
            TimeEmbedding(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.dits = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.ln = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """[B, 1, 28, 28], [B], [B] -> [B, 1, 28, 28]."""
        c = (self.label_emb(y) + self.time_emb(t))[:, None]
        h = self.conv(x).flatten(2).transpose(1, 2)
        h = self.patch_emb(h) + self.patch_pos_emb
        for block in self.dits:
            h = block(h, c)
        h = self.linear(self.ln(h)).view(-1, GRID, GRID, PATCH, PATCH)
        return h.transpose(2, 3).reshape(-1, 1, SIZE, SIZE)


def load(folder: Path) -> MnistDiT:
    """The trained network."""
    return filled(MnistDiT(), tensors(folder / "dit_mnist.safetensors"))


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """Four noisy digits and their predicted noise."""
    stored = tensors(folder / "golden.safetensors")
    return (stored["x"], stored["t"], stored["y"]), {}, stored["eps"]
