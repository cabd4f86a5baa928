"""DDPM U-Net for MNIST: residual convolutions, a fixed time table, predicts the noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import filled, tensors

CHANNELS, SIZES = (1, 10, 20, 40, 80), (28, 14, 7, 3)
STEPS, TIME = 1000, 128


class Block(nn.Module):
    """Norm over the whole image, two convolutions, a skip."""

    def __init__(self, into: int, out: int, size: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm((into, size, size))
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.residual_conv = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, H] -> [B, D, H, H]."""
        h = self.conv2(F.relu(self.conv1(self.ln(x))))
        return F.relu(h + self.residual_conv(x))


def _stage(into: int, out: int, size: int) -> nn.Sequential:
    return nn.Sequential(Block(into, out, size), Block(out, out, size))


class TimeTable(nn.Module):
    """Step -> its stored sinusoidal vector."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(STEPS, TIME)

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, 128]."""
        return self.embedding(t)


class MnistUNet(nn.Module):
    """Noisy digits (data range 0..1) and step 0..999 -> noise."""

    def __init__(self) -> None:
        super().__init__()
        levels = range(3)
        up = [c for c in reversed(CHANNELS[1:])]  # 80, 40, 20, 10
        self.pe = TimeTable()
        self.pe_linears_en = nn.ModuleList(
            nn.Sequential(nn.Linear(TIME, c), nn.ReLU(), nn.Linear(c, c)) for c in CHANNELS[:3]
        )
        self.encoders = nn.ModuleList(
            _stage(CHANNELS[i], CHANNELS[i + 1], SIZES[i]) for i in levels
        )
        self.downs = nn.ModuleList(nn.Conv2d(c, c, 2, stride=2) for c in CHANNELS[1:4])
        self.pe_mid = nn.Linear(TIME, CHANNELS[3])
        self.mid = _stage(CHANNELS[3], CHANNELS[4], SIZES[3])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(up[i], up[i + 1], 2, stride=2) for i in levels)
        self.pe_linears_de = nn.ModuleList(nn.Linear(TIME, up[i]) for i in levels)
        self.decoders = nn.ModuleList(_stage(up[i], up[i + 1], SIZES[2 - i]) for i in levels)
        self.conv_out = nn.Conv2d(CHANNELS[1], 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 1, 28, 28], [B] -> [B, 1, 28, 28]."""
        e = self.pe(t)
        kept = []
        for time, stage, down in zip(self.pe_linears_en, self.encoders, self.downs):
            x = stage(x + time(e)[:, :, None, None])
            kept.append(x)
            x = down(x)
        x = self.mid(x + self.pe_mid(e)[:, :, None, None])
        for time, stage, up in zip(self.pe_linears_de, self.decoders, self.ups):
            skip, x = kept.pop(), up(x)
            missing = skip.shape[-1] - x.shape[-1]
            x = F.pad(x, (0, missing, 0, missing))
            x = stage(torch.cat([skip, x], 1) + time(e)[:, :, None, None])
        return self.conv_out(x)


def load(folder: Path) -> MnistUNet:
    """The trained network."""
    return filled(MnistUNet(), tensors(folder / "ddpm_unet_mnist.safetensors"))


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """Four noisy digits and their predicted noise."""
    stored = tensors(folder / "golden.safetensors")
    return (stored["x"], stored["t"]), {}, stored["eps"]
