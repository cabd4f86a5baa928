"""HiT-SRF x4: super-resolution by spatial and channel correlation in growing windows.

Zhang et al., "HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution", 2024,
arXiv 2407.05878.  There is no softmax, so the cost of a window is linear in its pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import filled, tensors

WIDTH, HEADS, LAYERS, HIDDEN = 60, 6, 4, 120
WINDOWS = (4, 8, 16, 32, 48, 64)
BASE = 8
MEAN = (0.4488, 0.4371, 0.4040)


class GatedConv(nn.Module):
    """conv(x) * linear(x), what queries and values are made of."""

    def __init__(self) -> None:
        super().__init__()
        narrow = WIDTH // 5
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, narrow, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(narrow, WIDTH, 1),
        )
        self.linear = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x.permute(0, 3, 1, 2)
        return (self.conv(x) * self.linear(x)).permute(0, 2, 3, 1)


class PositionBias(nn.Module):
    """Relative (dy, dx) -> one value a head."""

    def __init__(self) -> None:
        super().__init__()
        narrow = WIDTH // 2 // 10
        self.pos_proj = nn.Linear(2, narrow)
        self.pos1 = nn.Sequential(nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, narrow))
        self.pos2 = nn.Sequential(nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, narrow))
        self.pos3 = nn.Sequential(nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, HEADS))

    def forward(self, offsets: Tensor) -> Tensor:
        """[..., 2] -> [..., heads]."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class Correlation(nn.Module):
    """Spatial and channel correlation of windows; keys are the values themselves."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.base = window, min(window, BASE)
        self.cell = window // self.base
        self.qv = GatedConv()
        self.spatial_linear = nn.Linear(self.cell**2, 1)
        self.pos = PositionBias()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def position_bias(self) -> Tensor:
        """[heads, L, M]: the bias between a pixel and a cell, a mean over the cell's pixels."""
        w, r, m = self.window, self.cell, self.base
        steps = torch.arange(1 - w, w, device=self.proj.weight.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        table = self.pos(offsets.to(self.proj.weight.dtype)).permute(2, 0, 1)
        # Means over all r x r squares of offsets; that of cell c and pixel p ends at p - c r.
        table = F.avg_pool2d(table, r, stride=1)
        pixel = torch.arange(w, device=steps.device)
        at = pixel[:, None] - r * torch.arange(m, device=steps.device) + (w - r)
        row, column = at[:, None, :, None], at[None, :, None, :]
        return table[:, row, column].reshape(HEADS, w * w, m * m)

    def pooled(self, v: Tensor) -> Tensor:
        """[N, heads, L, D] -> [N, heads, M, D]: each cell by a learned weighting of its pixels."""
        n, heads, _, d = v.shape
        m, r = self.base, self.cell
        cells = v.reshape(n, heads, m, r, m, r, d).permute(0, 1, 2, 4, 6, 3, 5)
        return self.spatial_linear(cells.reshape(n, heads, m * m, d, r * r)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C], H and W whole windows."""
        batch, height, width, channels = x.shape
        w, half = self.window, channels // 2
        grid = (height // w, w, width // w, w)
        qv = self.qv(x).reshape(batch, *grid, channels)
        qv = qv.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)
        q, v = qv.split(half, -1)

        qh, vh = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, v))
        vh = self.pooled(vh)
        space = qh @ vh.transpose(-2, -1) / (half // HEADS) + self.position_bias()
        spatial = (space @ vh).transpose(1, 2).flatten(2)

        channel = (q.transpose(1, 2) @ v / (w * w)) @ v.transpose(1, 2)
        y = torch.cat([spatial, channel.transpose(1, 2)], -1)
        y = y.reshape(batch, grid[0], grid[2], w, w, channels).permute(0, 1, 3, 2, 4, 5)
        return self.proj(y.reshape(x.shape))


class DepthwiseConv(nn.Module):
    """GELU of a 5x5 depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(HIDDEN, HIDDEN, 5, padding=2, groups=HIDDEN)
        self.depthwise_conv = nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        return self.depthwise_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Two linear layers with a depthwise convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.dwconv = DepthwiseConv()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = F.gelu(self.fc1(x))
        return self.fc2(h + self.dwconv(h))


class Block(nn.Module):
    """Correlation in windows of one size and an MLP, each normed after."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.correlation, self.mlp = Correlation(window), Mlp()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        height, width = x.shape[1:3]
        whole = self.correlation(_whole_windows(x, self.window))
        x = x + self.norm1(whole[:, :height, :width])
        return x + self.norm2(self.mlp(x))


def _whole_windows(x: Tensor, window: int) -> Tensor:
    """Reflect-pad right and bottom; an image smaller than its padding is reflected repeatedly."""
    x = x.permute(0, 3, 1, 2)
    missing = [-size % window for size in x.shape[2:]]
    while any(missing):
        step = [min(m, size - 1) for m, size in zip(missing, x.shape[2:])]
        x = F.pad(x, (0, step[1], 0, step[0]), mode="reflect")
        missing = [m - s for m, s in zip(missing, step)]
    return x.permute(0, 2, 3, 1)


class Blocks(nn.Module):
    """A block for each window size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(window) for window in WINDOWS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        for block in self.blocks:
            x = block(x)
        return x


class Layer(nn.Module):
    """Blocks, a convolution, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.residual_group = Blocks()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = self.residual_group(x).permute(0, 3, 1, 2)
        return x + self.conv(h).permute(0, 2, 3, 1)


class Embedding(nn.Module):
    """A norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H, W, C]."""
        return self.norm(x.permute(0, 2, 3, 1))


class HiTSRF(nn.Module):
    """RGB in 0..1 -> RGB four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.patch_embed = Embedding()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.conv_after_body = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(WIDTH, 48, 3, padding=1), nn.PixelShuffle(4))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, 4 H, 4 W]."""
        first = self.conv_first(x - self.mean)
        h = self.patch_embed(first)
        for layer in self.layers:
            h = layer(h)
        h = self.conv_after_body(self.norm(h).permute(0, 3, 1, 2)) + first
        return self.upsample(h) + self.mean


def load(folder: Path) -> HiTSRF:
    """The trained network (stored as float16, used as float32)."""
    return filled(HiTSRF(), tensors(folder / "hit_srf_x4.safetensors"))


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """A 32x40 image and its enlargement."""
    stored = tensors(folder / "golden.safetensors")
    return (stored["input"],), {}, stored["output"]
