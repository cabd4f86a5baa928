"""Images for super-resolution: files, MATLAB-style bicubic resizing, Y-PSNR, free photographs.

An image is a float32 tensor [1, 3, H, W], RGB in 0..255.  The photographs are those inside the
scikit-image, scikit-learn and matplotlib wheels; nothing is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def load_image(path: str | Path) -> Tensor:
    """Read an image file as RGB [1, 3, H, W], 0..255; grey is repeated, alpha is dropped."""
    with Image.open(path) as im:
        pixels = np.array(im.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()[None].contiguous()


def save_image(image: Tensor, path: str | Path) -> None:
    """Write [1, 3, H, W] or [3, H, W] in 0..255 as an 8-bit file, rounded and clamped."""
    pixels = to_8bit(image).reshape(-1, *image.shape[-2:])
    if pixels.shape[0] != 3:
        raise ValueError(f"save_image takes one RGB image, got shape {list(image.shape)}")
    Image.fromarray(pixels.permute(1, 2, 0).byte().cpu().numpy()).save(path)


def to_8bit(image: Tensor) -> Tensor:
    """Round to whole grey levels within 0..255; the dtype stays float."""
    return image.detach().float().add(0.5).floor().clamp(0, 255)  # MATLAB rounds halves up


def resize_bicubic(image: Tensor, size: tuple[int, int], *, eight_bit: bool = False) -> Tensor:
    """MATLAB's `imresize(image, size, 'bicubic')` of [..., H, W].

    Cubic kernel with a = -0.5, stretched by the reduction factor when shrinking (antialiasing),
    mirrored borders, rows before columns.  `eight_bit` rounds after each of the two, as MATLAB
    does with uint8 images; the benchmarks' low-resolution images were made so.
    """
    for dim, n_out in zip((-2, -1), size, strict=True):
        index, weight = _taps(image.shape[dim], n_out)
        shape = (-1, 1) if dim == -2 else (-1,)
        total = torch.zeros((), dtype=image.dtype)
        for k in range(index.shape[1]):
            column = weight[:, k].to(image.dtype).reshape(shape)
            total = total + image.index_select(dim, index[:, k]) * column
        image = to_8bit(total) if eight_bit else total
    return image


def downscale(image: Tensor, factor: int = 4) -> Tensor:
    """The benchmark's low-resolution image: `image` bicubically shrunk, rounded to 8 bit."""
    h, w = image.shape[-2:]
    if h % factor or w % factor:
        raise ValueError(f"image of {h}x{w} is no multiple of {factor}; call modcrop first")
    return resize_bicubic(image, (h // factor, w // factor), eight_bit=True)


def upscale(image: Tensor, factor: int = 4) -> Tensor:
    """Bicubic enlargement, rounded to 8 bit: what super-resolution is compared with."""
    h, w = image.shape[-2:]
    return resize_bicubic(image, (h * factor, w * factor), eight_bit=True)


def modcrop(image: Tensor, factor: int = 4) -> Tensor:
    """Cut the bottom and right so that both sizes are multiples of `factor`."""
    h, w = (n - n % factor for n in image.shape[-2:])
    return image[..., :h, :w]


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 YCbCr, 16..235, from RGB [..., 3, H, W] in 0..255; [..., H, W] in float64."""
    rgb = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255
    return 16 + torch.einsum("...chw,c->...hw", image.double(), rgb.to(image.device))


def y_psnr(image: Tensor, reference: Tensor, border: int = 4) -> float:
    """Peak signal-to-noise ratio of the luma in dB, both rounded to 8 bit, borders cut off."""
    if image.shape != reference.shape:
        raise ValueError(f"shapes differ: {list(image.shape)} and {list(reference.shape)}")
    diff = luma(to_8bit(image)) - luma(to_8bit(reference))
    h, w = diff.shape[-2:]
    error = diff[..., border : h - border, border : w - border].square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@dataclass(frozen=True)
class Photograph:
    """A photograph inside an installed package; `file` is relative to the package's folder.

    detail: how often training looks at it, relative to its size (textures and microscopy less).
    """

    name: str
    package: str
    file: str
    licence: str
    detail: float = 1.0

    @property
    def path(self) -> Path:
        """Where the file is in this Python installation."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"photograph {self.name} comes with the package {self.package}, "
                "which is not installed"
            )
        path = Path(spec.origin).parent / self.file
        if not path.is_file():
            raise FileNotFoundError(f"this {self.package} does not ship {self.file}")
        return path

    def load(self) -> Tensor:
        """The image, [1, 3, H, W], sizes cut to multiples of 4."""
        return modcrop(load_image(self.path))


def _photo(name: str, package: str, file: str, licence: str, detail: float = 1.0) -> Photograph:
    folder = {
        "skimage": "data",
        "sklearn": "datasets/images",
        "matplotlib": "mpl-data/sample_data",
    }[package]
    return Photograph(name, package, f"{folder}/{file}", licence, detail)


HELD_OUT: tuple[Photograph, ...] = (
    _photo("astronaut", "skimage", "astronaut.png", "public domain (NASA)"),
    _photo("chelsea", "skimage", "chelsea.png", "CC0 (Stefan van der Walt)"),
    _photo("coffee", "skimage", "coffee.png", "CC0 (Rachel Michetti)"),
)
"""Never trained on: a portrait, an animal, a still life; scikit-image's lossless colour photographs
but for the stereo pair, so that no JPEG artefacts are in the truth they are compared with."""

TRAINING: tuple[Photograph, ...] = (
    _photo(
        "motorcycle_left", "skimage", "motorcycle_left.png", "Middlebury stereo 2014, none stated"
    ),
    _photo(
        "motorcycle_right", "skimage", "motorcycle_right.png", "Middlebury stereo 2014, none stated"
    ),
    _photo("china", "sklearn", "china.jpg", "CC BY 2.0 (danielbuechele)"),
    _photo("flower", "sklearn", "flower.jpg", "CC BY 2.0 (vultilion)"),
    _photo("grace_hopper", "matplotlib", "grace_hopper.jpg", "public domain (US Navy)"),
    _photo("rocket", "skimage", "rocket.jpg", "public domain (SpaceX)"),
    _photo("camera", "skimage", "camera.png", "CC0 (Lav Varshney)"),
    _photo("brick", "skimage", "brick.png", "CC0 (CC0Textures)"),
    _photo("coins", "skimage", "coins.png", "no known restrictions (Brooklyn Museum)"),
    _photo("gravel", "skimage", "gravel.png", "CC0 (CC0Textures)", 0.4),
    _photo("grass", "skimage", "grass.png", "CC0 (linolafett)", 0.3),
    _photo("hubble", "skimage", "hubble_deep_field.jpg", "public domain (NASA)", 0.3),
    _photo("retina", "skimage", "retina.jpg", "CC0 (Mikael Häggström)", 0.2),
    _photo("ihc", "skimage", "ihc.png", "no known restrictions (CMMI)", 0.4),
)
"""Trained on."""

DEMO = HELD_OUT[0]
"""The photograph that demonstrations enlarge: a held-out one."""


def _taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Source indices and weights [n_out, taps] of a 1-D cubic resize (MATLAB's contributions)."""
    scale = n_out / n_in
    shrink = min(scale, 1.0)
    width = 4 / shrink
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) / scale - 0.5
    first = torch.floor(centre - width / 2)
    taps = torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    position = first[:, None] + taps
    weight = shrink * _cubic(shrink * (centre[:, None] - position))
    weight = weight / weight.sum(1, keepdim=True)
    used = weight.abs().amax(0) > 0
    index = position[:, used].long().remainder(2 * n_in)
    return torch.where(index < n_in, index, 2 * n_in - 1 - index), weight[:, used]


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = x.abs()
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, torch.zeros_like(x)))
