"""Reading stored weights: safetensors files, and integers back to float32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn


def tensors(*paths: Path) -> dict[str, Tensor]:
    """The tensors of one or several files by name, float16 as float32."""
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                value = file.get_tensor(name)
                found[name] = value.float() if value.dtype is torch.float16 else value
    return found


def metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def dequantised_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<name>.qweight` int8 [n, k] and `.scale` [n] or [n, k / group] -> `<name>.weight`."""
    found = {}
    for name, value in state.items():
        stem, _, last = name.rpartition(".")
        if last == "qweight" and value.dtype is torch.int8:
            scale = state[f"{stem}.scale"].reshape(len(value), -1, 1)
            groups = value.float().reshape(len(value), scale.shape[1], -1)
            found[f"{stem}.weight"] = (groups * scale).reshape(value.shape)
        elif last == "qweight" or (last in ("scale", "zero") and f"{stem}.qweight" in state):
            continue
        else:
            found[name] = value
    return found


def dequantised_nibbles(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`<name>.qweight` uint8 [n, k / 2], low nibble first, and `.scale`, `.zero` [n, k / group]."""
    found = {}
    for name, value in state.items():
        stem, _, last = name.rpartition(".")
        if last == "qweight" and value.dtype is torch.uint8:
            scale, zero = state[f"{stem}.scale"], state[f"{stem}.zero"]
            q = torch.stack([value & 15, value >> 4], -1).reshape(*scale.shape, -1).float()
            w = q * scale[..., None] + zero[..., None]
            found[f"{stem}.weight"] = w.reshape(len(value), -1)
    return found


def filled(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The network with these weights, every key matched, in eval mode and without gradients."""
    net.load_state_dict(state, strict=True)
    return net.eval().requires_grad_(False)
