"""TAEF2: a tiny image autoencoder (8x down, 32 latent channels) of the FLUX.2 latent space."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import filled, tensors

WIDTH, LATENT = 64, 32


class Block(nn.Module):
    """Three convolutions and a skip; with `pool` a normed bottleneck before them."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        else:
            self.pool = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64, H, W] -> [B, 64, H, W]."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """A soft limit of -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / 3) * 3


def _conv(into: int, out: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, **options)  # type: ignore[arg-type]


def encoder() -> nn.Sequential:
    """RGB in 0..1, sizes multiples of 8 -> latent."""
    down = {"stride": 2, "bias": False}
    return nn.Sequential(
        _conv(3, WIDTH), Block(),
        _conv(WIDTH, WIDTH, **down), Block(), Block(), Block(),
        _conv(WIDTH, WIDTH, **down), Block(), Block(), Block(),
        _conv(WIDTH, WIDTH, **down), Block(True), Block(True), Block(True),
        _conv(WIDTH, LATENT),
    )  # fmt: skip


def decoder() -> nn.Sequential:
    """Latent -> RGB, near 0..1 but not clamped."""

    def up() -> nn.Module:
        return nn.Upsample(scale_factor=2)

    return nn.Sequential(
        Clamp(), _conv(LATENT, WIDTH), nn.ReLU(), Block(True), Block(True), Block(True),
        up(), _conv(WIDTH, WIDTH, bias=False), Block(), Block(), Block(),
        up(), _conv(WIDTH, WIDTH, bias=False), Block(), Block(), Block(),
        up(), _conv(WIDTH, WIDTH, bias=False), Block(), _conv(WIDTH, 3),
    )  # fmt: skip


class TAEF2(nn.Module):
    """Encode and decode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> its reconstruction."""
        return self.decoder(self.encoder(x))


def load(folder: Path) -> TAEF2:
    """The trained autoencoder (stored as float16, used as float32)."""
    state = {}
    for part in ("encoder", "decoder"):
        stored = tensors(folder / f"taef2_{part}.safetensors")
        state |= {f"{part}.{name}": value for name, value in stored.items()}
    return filled(TAEF2(), state)
