"""Flow-matching transformer for MNIST: a plain encoder, predicts the clean image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import filled, tensors

PATCH, WIDTH, HEADS, LAYERS, LABELS = 7, 64, 4, 4, 11
TOKENS = 16
NO_LABEL = 10


class MnistVitFlow(nn.Module):
    """Noisy digits, time 0..1 and label 0..10 (10: none) -> clean digits in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.y_encoder = nn.Embedding(LABELS, 2 * WIDTH)
        self.transformer = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True
            )
            for _ in range(LAYERS)
        )
        self.unpatch = nn.ConvTranspose2d(WIDTH, 1, PATCH, stride=PATCH)
        frequency = torch.exp(torch.arange(WIDTH) * (-math.log(1e4) / (WIDTH - 1)))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """[B, 1, 28, 28], [B], [B] -> [B, 1, 28, 28]."""
        h = self.patch_embed(x)
        grid = h.shape[2:]
        h = h.flatten(2).transpose(1, 2) + self.pos_embed
        angle = t[:, None] * self.frequency
        time = torch.cat([angle.sin(), angle.cos()], -1).view(-1, 2, WIDTH)
        label = self.y_encoder(y).view(-1, 2, WIDTH)
        h = torch.cat([h, time, label], 1)
        for layer in self.transformer:
            h = layer(h)
        return self.unpatch(h[:, :-4].transpose(1, 2).unflatten(2, grid))


def load(folder: Path) -> MnistVitFlow:
    """The trained network."""
    return filled(MnistVitFlow(), tensors(folder / "vitflow_mnist.safetensors"))


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """Four noisy digits and their predicted clean images."""
    stored = tensors(folder / "golden.safetensors")
    return (stored["x"], stored["t"], stored["y"]), {}, stored["x0"]
