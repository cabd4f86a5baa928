"""RLFN x4, the paper's model: the network is in examples/rlfn, here with its golden output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..rlfn.model import RLFN, load_rlfn
from .files import tensors


def load(folder: Path) -> RLFN:
    """The published weights."""
    net = load_rlfn(folder / "rlfn_x4.safetensors")
    return net.requires_grad_(False)


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """A 24x32 image and its enlargement, RGB in 0..255."""
    stored = tensors(folder / "rlfn_x4.golden.safetensors")
    return (stored["input"],), {}, stored["output"]
