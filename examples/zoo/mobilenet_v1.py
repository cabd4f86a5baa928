"""MobileNet-v1 1.0 224 with its 8-bit weights as float32; batch norms are folded already."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .files import filled, tensors

WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
DOWN = {2, 4, 6, 12}
"""Depthwise layers with stride 2."""
CLASSES = 1001


class SameConv2d(nn.Conv2d):
    """A 3x3 convolution with TensorFlow's SAME padding: at stride 2 only right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], H and W even at stride 2."""
        before = 2 - self.stride[0]
        return super().forward(F.pad(x, (before, 1, before, 1)))


class MobileNetV1(nn.Module):
    """RGB 224x224 in -1..1 -> logits of 1001 classes (0: background)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = SameConv2d(3, WIDTHS[0], 3, stride=2)
        for i, (into, out) in enumerate(pairwise(WIDTHS), 1):
            stride = 2 if i in DOWN else 1
            self.add_module(f"dw{i}", SameConv2d(into, into, 3, stride=stride, groups=into))
            self.add_module(f"pw{i}", nn.Conv2d(into, out, 1))
        self.fc = nn.Conv2d(WIDTHS[-1], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 1001]."""
        x = F.relu6(self.conv0(x))
        for i in range(1, len(WIDTHS)):
            x = F.relu6(self.get_submodule(f"dw{i}")(x))
            x = F.relu6(self.get_submodule(f"pw{i}")(x))
        return self.fc(x.mean((2, 3), keepdim=True)).flatten(1)


def load(folder: Path) -> MobileNetV1:
    """The trained network; scales and zero points of activations are not used."""
    stored = tensors(folder / "mobilenet_v1_1.0_224_uint8.safetensors")
    state = {}
    for name, value in stored.items():
        layer, _, last = name.partition(".")
        if last == "weight_q":
            q = value.float() - stored[f"{layer}.zero_point"]
            state[f"{layer}.weight"] = q * stored[f"{layer}.scale"]
        elif last == "bias":
            state[name] = value
    return filled(MobileNetV1(), state)


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """A parrot and its logits."""
    stored = tensors(folder / "golden.safetensors")
    return (stored["input"],), {}, stored["logits"]
