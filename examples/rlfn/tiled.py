"""Super-resolution of images of any size: equal tiles with feathered overlaps, padding if tiny.

All tiles of an image have one shape, so a compiled network needs one specialisation.  Far from
tile edges the result is the network's own up to the gates: those pool over a grid that spans the
tile, so they see slightly other neighbourhoods than in one pass, and the overlaps are blended.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import MIN_SIZE


def super_resolve(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: int | None = 256,
    overlap: int = 32,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Enlarge `image` [B, 3, H, W] (0..255) by `net`; returns [B, 3, s*H, s*W], not clamped.

    tile: height and width of a tile in input pixels; an image that fits, or None, runs in one
    pass and gives exactly `net(image)`.  overlap: least number of pixels that neighbours share.
    on_tile: called with (tiles done, tiles in all).
    """
    if image.dim() != 4:
        raise ValueError(f"super_resolve takes [B, 3, H, W], got shape {list(image.shape)}")
    if tile is not None and (tile < MIN_SIZE or not 0 <= overlap < tile):
        raise ValueError(
            f"tile={tile}, overlap={overlap}: a tile needs at least {MIN_SIZE} pixels "
            "and the overlap must be smaller than the tile"
        )
    height, width = image.shape[-2:]
    image = pad_to_minimum(image)
    with torch.inference_mode():
        out = _blend(net, image, tile, overlap, on_tile)
    scale = out.shape[-1] // image.shape[-1]
    return out[..., : height * scale, : width * scale]


def pad_to_minimum(image: Tensor, size: int = MIN_SIZE) -> Tensor:
    """Pad bottom and right to at least `size` pixels: mirrored, or repeated if too small for it."""
    down, right = (max(0, size - n) for n in image.shape[-2:])
    # Mirroring needs more pixels than it adds; the two sides are independent of each other.
    for pad, n in (((0, 0, 0, down), image.shape[-2]), ((0, right, 0, 0), image.shape[-1])):
        if any(pad):
            image = F.pad(image, pad, mode="reflect" if max(pad) < n else "replicate")
    return image


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the fewest tiles that cover `length` with at least `overlap` shared."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_weights(length: int, tile: int, overlap: int, scale: int) -> list[Tensor]:
    """Each tile's share [scale*tile] of every output pixel along one side; they sum to 1.

    A tile's outermost quarter of the overlap counts nothing (zero padding distorts it), then its
    share rises linearly.  The image's own borders are not tile edges.
    """
    starts = tile_starts(length, tile, overlap)
    size, margin = scale * tile, scale * (overlap // 4)
    ramp = max(scale * overlap - 2 * margin, 1)
    position = torch.arange(size, dtype=torch.float64) + 0.5
    total = torch.zeros(scale * length, dtype=torch.float64)
    shares = []
    for start in starts:
        rise = (position - margin) / ramp if start > 0 else torch.ones(size)
        fall = (size - position - margin) / ramp if start + tile < length else torch.ones(size)
        share = torch.minimum(rise, fall).clamp(0, 1).double()
        total[scale * start : scale * start + size] += share
        shares.append(share)
    return [s / total[scale * a : scale * a + size] for s, a in zip(shares, starts, strict=True)]


def _blend(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: int | None,
    overlap: int,
    on_tile: Callable[[int, int], None] | None,
) -> Tensor:
    height, width = image.shape[-2:]
    th, tw = (n if tile is None else min(tile, n) for n in (height, width))
    places = [
        (i, y, j, x)
        for i, y in enumerate(tile_starts(height, th, min(overlap, th - 1)))
        for j, x in enumerate(tile_starts(width, tw, min(overlap, tw - 1)))
    ]
    out: Tensor | None = None
    for done, (i, y, j, x) in enumerate(places, 1):
        part = net(image[..., y : y + th, x : x + tw].contiguous())
        if on_tile is not None:
            on_tile(done, len(places))
        if len(places) == 1:
            return part
        if out is None:
            scale = part.shape[-1] // tw
            out = part.new_zeros(*part.shape[:2], scale * height, scale * width)
            rows = [w.to(part) for w in blend_weights(height, th, min(overlap, th - 1), scale)]
            columns = [w.to(part) for w in blend_weights(width, tw, min(overlap, tw - 1), scale)]
        y, x = scale * y, scale * x
        here = out[..., y : y + scale * th, x : x + scale * tw]
        here += part * (rows[i][:, None] * columns[j])
    assert out is not None
    return out
