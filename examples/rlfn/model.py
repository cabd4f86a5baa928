"""The Residual Local Feature Network (RLFN) in plain PyTorch, and its checkpoint reader.

Kong et al., "Residual Local Feature Network for Efficient Super-Resolution", arXiv 2205.07514.
State-dict keys equal those of the released checkpoints, so those load strictly.  Images go in and
come out as RGB in 0..255, not 0..1.  Training is in train.py, large and tiny images in tiled.py.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIZE = 15
"""Smallest height and width: the gate's stride-2 convolution must leave 7 pixels to pool."""

SLOPE = 0.05
"""Slope of every leaky ReLU (the released code's value; the paper's figure shows plain ReLU)."""


class ESA(nn.Module):
    """Enhanced spatial attention: c * sigmoid(conv4(upsampled coarse features + conv_f(p)))."""

    def __init__(self, channels: int, esa_channels: int = 16) -> None:
        super().__init__()
        f = esa_channels
        self.conv1 = nn.Conv2d(channels, f, 1)
        self.conv_f = nn.Conv2d(f, f, 1)
        self.conv2 = nn.Conv2d(f, f, 3, stride=2, padding=0)
        self.conv3 = nn.Conv2d(f, f, 3, padding=1)
        self.conv4 = nn.Conv2d(f, channels, 1)

    def forward(self, c: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        p = self.conv1(c)
        q = self.conv3(F.max_pool2d(self.conv2(p), kernel_size=7, stride=3))
        u = F.interpolate(q, size=c.shape[2:], mode="bilinear", align_corners=False)
        return c * torch.sigmoid(self.conv4(u + self.conv_f(p)))


class RLFB(nn.Module):
    """Residual local feature block: three activated 3x3 convolutions, a skip, a 1x1, the gate."""

    def __init__(self, channels: int, mid_channels: int, esa_channels: int = 16) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(channels, mid_channels, 3, padding=1)
        self.c2_r = nn.Conv2d(mid_channels, mid_channels, 3, padding=1)
        self.c3_r = nn.Conv2d(mid_channels, channels, 3, padding=1)
        self.c5 = nn.Conv2d(channels, channels, 1)
        self.esa = ESA(channels, esa_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W].  The skip is added after the third activation."""
        a = F.leaky_relu(self.c1_r(x), SLOPE)
        a = F.leaky_relu(self.c2_r(a), SLOPE)
        a = F.leaky_relu(self.c3_r(a), SLOPE)
        return self.esa(self.c5(a + x))


class RLFN(nn.Module):
    """RLFN with `blocks` blocks of `channels` trunk and `mid_channels` inner channels.

    The defaults are the paper's x4 model (543,740 parameters).
    """

    def __init__(
        self,
        channels: int = 52,
        mid_channels: int | None = None,
        blocks: int = 6,
        upscale: int = 4,
        esa_channels: int = 16,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "blocks": blocks, "upscale": upscale}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"RLFN: {name}={value}; it must be at least 1")
        self.channels = channels
        self.mid_channels = mid_channels or channels
        self.blocks = blocks
        self.upscale = upscale
        self.esa_channels = esa_channels
        self.conv_1 = nn.Conv2d(3, channels, 3, padding=1)
        for i in range(1, blocks + 1):
            self.add_module(f"block_{i}", RLFB(channels, self.mid_channels, esa_channels))
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(channels, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..255 -> RGB [B, 3, s*H, s*W], not clamped; H, W >= 15."""
        height, width = x.shape[-2], x.shape[-1]
        # Only for real sizes: a traced check would be one more guard on dynamic shapes.
        if not torch.compiler.is_compiling() and isinstance(height, int):
            check_size(height, width)
        f0 = self.conv_1(x)
        f = f0
        for i in range(1, self.blocks + 1):
            f = self.get_submodule(f"block_{i}")(f)
        return self.upsampler(self.conv_2(f) + f0)

    def extra_repr(self) -> str:
        """The variant, for `print(net)`."""
        return (
            f"channels={self.channels}, mid_channels={self.mid_channels}, "
            f"blocks={self.blocks}, upscale={self.upscale}"
        )


def rlfn(upscale: int = 4) -> RLFN:
    """The paper's model: 6 blocks of 52 channels."""
    return RLFN(52, 52, 6, upscale)


def rlfn_s(upscale: int = 4) -> RLFN:
    """RLFN-S: 6 blocks of 48 channels."""
    return RLFN(48, 48, 6, upscale)


def rlfn_prune(upscale: int = 4) -> RLFN:
    """RLFN-Prune, the NTIRE 2022 entry: 4 blocks, trunk 46, inner 48 channels."""
    return RLFN(46, 48, 4, upscale)


def check_size(height: int, width: int) -> None:
    """Raise ValueError for an image that is too small for the gate (sizes in pixels)."""
    if height < MIN_SIZE or width < MIN_SIZE:
        raise ValueError(
            f"RLFN needs images of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}; "
            "pad the image, or call examples.rlfn.tiled.super_resolve, which does"
        )


def load_rlfn(path: str | Path) -> RLFN:
    """Read a checkpoint (.safetensors, or .pth with tensors only) into a network of its variant.

    The variant (channels, inner channels, blocks, scale) is inferred from the tensor shapes.
    The result is in eval mode, float32 whatever the file stores.
    """
    path = Path(path)
    state = read_state(path)
    net = RLFN(**infer_variant(state, str(path)))
    want = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in state.items()}
    problems = [f"missing {k} {list(want[k])}" for k in want if k not in have]
    problems += [f"unknown {k} {list(have[k])}" for k in have if k not in want]
    problems += [
        f"{k} has shape {list(have[k])}, expected {list(want[k])}"
        for k in want
        if k in have and have[k] != want[k]
    ]
    if problems:
        raise ValueError(f"{path} does not fit {_describe(net)}:\n" + _bullets(problems))
    net.load_state_dict({k: v.float() for k, v in state.items()}, strict=True)
    return net.eval()


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth/.pt file, by name; no code in the file is run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path} is not a readable safetensors file: {e}") from e
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: unknown kind of weights file; have .safetensors, .pth, .pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise ValueError(f"{path} is not a readable file of tensors: {e}") from e
    if isinstance(state, Mapping) and isinstance(state.get("params"), Mapping):
        state = state["params"]  # the layout of BasicSR's files
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no flat dictionary of tensors")
    return dict(state)


def infer_variant(state: Mapping[str, Tensor], where: str = "weights") -> dict[str, int]:
    """RLFN's constructor arguments from tensor shapes; `where` names the source in errors."""
    needed = {
        "conv_1.weight": 4,
        "block_1.c1_r.weight": 4,
        "block_1.esa.conv1.weight": 4,
        "upsampler.0.weight": 4,
    }
    problems = [f"missing {k}" for k in needed if k not in state]
    problems += [
        f"{k} has shape {list(state[k].shape)}, expected a convolution's"
        for k, rank in needed.items()
        if k in state and state[k].dim() != rank
    ]
    if problems:
        raise ValueError(f"{where} holds no RLFN:\n" + _bullets(problems))
    outputs = state["upsampler.0.weight"].shape[0]
    upscale = round((outputs / 3) ** 0.5)
    if upscale < 1 or 3 * upscale**2 != outputs:
        raise ValueError(
            f"{where}: upsampler.0.weight has {outputs} outputs, "
            "which is no 3 * scale**2 (12 for x2, 48 for x4)"
        )
    found = [re.match(r"block_(\d+)\.", k) for k in state]
    return {
        "channels": state["conv_1.weight"].shape[0],
        "mid_channels": state["block_1.c1_r.weight"].shape[0],
        "blocks": max(int(m[1]) for m in found if m),
        "upscale": upscale,
        "esa_channels": state["block_1.esa.conv1.weight"].shape[0],
    }


def count_parameters(net: nn.Module) -> int:
    """The number of weights and biases."""
    return sum(p.numel() for p in net.parameters())


def _describe(net: RLFN) -> str:
    return f"RLFN x{net.upscale} with {net.blocks} blocks of {net.channels} channels"


def _bullets(lines: list[str], most: int = 8) -> str:
    shown = [f"  {line}" for line in lines[:most]]
    return "\n".join(shown + [f"  and {len(lines) - most} more"] * (len(lines) > most))
