"""Pooling and interpolation of [N, C, H, W]: a thread computes some elements of the result.

Elements go in the order in which the result lies, so that neighbours in it are neighbouring threads
whichever of channels and columns lie together; windows overlap in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.codegen.cpp.loops import Operand
from effc.ir.symbols import Dim, product

from .kernel import Made, Schedule, cdiv, indent, kernel
from .numbers import Numbers, is_wide
from .scalar import register
from .tile import Axis, Tile, decoded, pointer

BLOCK = 512  # elements of a program, four for each of its threads
UNROLLED = 32  # elements of a window that is not looped over
PLACES = ("image", "channel", "oh", "ow")


@dataclass(frozen=True)
class Image:
    """sizes: of the result; height, width: of the operand. last: channels lie together."""

    sizes: tuple[Dim, ...]
    height: Dim
    width: Dim
    y: Operand
    x: Operand
    last: bool
    offsets: Sequence[Dim] = (0, 0)


@dataclass(frozen=True)
class Window:
    """Of pooling. divisor: what a mean divides by, where it is not how many elements there are."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    maximum: bool = True
    divisor: int | None = None
    include_pad: bool = False

    def within(self, axis: int, count: Dim, size: Dim) -> bool:
        """Whether all of `count` windows along an axis are known to lie inside of a picture."""
        last = (count - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis]
        return self.padding[axis] == 0 and isinstance(last, int) and last < size


class _Writer:
    def __init__(self, image: Image) -> None:
        self.image = image
        self.tile = Tile(Numbers())
        self.real = register(image.y.dtype)
        order = (0, 2, 3, 1) if image.last else (0, 1, 2, 3)
        text, sizes = self.tile.numbers.text, [image.sizes[d] for d in order]
        total = product(image.sizes)
        wide = ".to(tl.int64)" if is_wide(total) else ""
        self.grid = cdiv(total, BLOCK)
        self.say(
            f"i = tl.program_id(0){wide} * BLOCK + tl.arange(0, BLOCK)",
            f"inside = i < {' * '.join(map(text, image.sizes))}",
            *decoded([*map(text, sizes)], "i", [PLACES[d] for d in order]),
        )

    def say(self, *lines: str) -> None:
        self.tile.lines += lines

    def pixel(self, h: str, w: str, inside: str = "inside", other: str = "") -> str:
        """The expression of the operand's element at h, w of this channel, as a register."""
        n, c, *_ = self.image.sizes
        axes = [Axis("image", n, inside), Axis("channel", c, inside),
                Axis(h, self.image.height, inside), Axis(w, self.image.width, inside)]  # fmt: skip
        return self.tile.read("x0", self.image.x, axes, other)

    def made(self, kind: str, value: str, comment: Iterable[str]) -> Made:
        image = self.image
        axes = [Axis(n, s, "inside") for n, s in zip(PLACES, image.sizes, strict=True)]
        self.tile.store("y0", image.y, axes, (value, image.y.dtype))
        pointers = [pointer(n, o.dtype, s) for n, o, s in
                    zip(("y0", "x0"), (image.y, image.x), image.offsets, strict=True)]  # fmt: skip
        return kernel(
            kind, "image", pointers=pointers, numbers=self.tile.numbers, grid=[self.grid],
            schedule=Schedule(4, 2, (("BLOCK", BLOCK),)), comment=comment,
            body=indent(self.tile.lines, 4),
        )  # fmt: skip


def pool(image: Image, window: Window, comment: Iterable[str] = ()) -> Made:
    """The largest value, or the mean, of each window; dilation is of the largest alone."""
    w = _Writer(image)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
        window.kernel, window.stride, window.padding, window.dilation)  # fmt: skip
    text = w.tile.numbers.text
    height, width = text(image.height), text(image.width)
    start = 'float("-inf")' if window.maximum else "0.0"
    w.say(f"top, left = oh * {sh} - {ph}, ow * {sw} - {pw}")
    w.say(f"v = tl.full((BLOCK,), {start}, {w.real})")
    loop = "tl.static_range" if kh * kw <= UNROLLED else "range"
    w.say(f"for r in {loop}({kh}):", f"    for s in {loop}({kw}):")
    within = f"inside & (h >= 0) & (h < {height}) & (w >= 0) & (w < {width})"
    joined = "fn.maximum(v, x)" if window.maximum else "v + x"
    w.say(*(f"        {line}" for line in (
        f"h, w = top + r * {dh}, left + s * {dw}",
        f"there = {within}",
        f"x = {w.pixel('h', 'w', 'there', start)}",
        f"v = {joined}",
    )))  # fmt: skip
    if not window.maximum:
        count = f"{window.divisor}.0"
        if window.divisor is None:
            w.say(*_counted("rows", "top", kh, height, ph, window.include_pad),
                  *_counted("columns", "left", kw, width, pw, window.include_pad))  # fmt: skip
            count = f"(rows * columns).to({w.real})"
        w.say(f"v = fn.div(v, {count})")
    return w.made("pool", "v", comment)


def _counted(name: str, start: str, kernel: int, size: str, pad: int, all: bool) -> list[str]:
    """Elements that a window counts along one dimension: with those of the padding, or without."""
    lines = [f"end = tl.minimum({start} + {kernel}, {size} + {pad})"]
    if all:
        return [*lines, f"{name} = end - {start}"]
    return [*lines, f"{name} = tl.minimum(end, {size}) - tl.maximum({start}, 0)"]


@dataclass(frozen=True)
class Sampling:
    """Where an enlarged picture lies in the one that it is made of, of height x width pixels.

    steps: rows and columns of that one for one of the enlarged; a float, or known at a call.
    """

    height: Dim
    width: Dim
    steps: tuple[Any, Any]
    linear: bool
    corners: bool = False
    exact: bool = False


def interpolate(image: Image, how: Sampling, comment: Iterable[str] = ()) -> Made:
    w = _Writer(image)
    places(w.tile, how, ("oh", "ow"), w.real)
    w.say(*sampled(how, w.pixel))
    return w.made("interpolate", "v", comment)


def places(tile: Tile, how: Sampling, at: tuple[str, str], real: str, stem: str = "") -> None:
    """Emits what `sampled` reads at: h and w, and for linear sampling the next row and column, h1
    and w1, with their shares hs and ws. at: variables of the pixel in the enlarged picture."""
    for name, out, size, step in zip("hw", at, (how.height, how.width), how.steps, strict=True):
        tile.lines += _place(tile, f"{stem}{name}", out, size, step, how, real)


def sampled(
    how: Sampling, pixel: Callable[[str, str], str], to: str = "v", stem: str = "", suffix: str = ""
) -> list[str]:  # fmt: skip
    """Statements that put the sample into `to`. pixel(row, column): the expression of an element.

    suffix: gives what `places` emitted the shape of elements.
    """
    h, w = f"{stem}h", f"{stem}w"
    if not how.linear:
        return [f"{to} = {pixel(h, w)}"]
    down, across = f"{h}s{suffix}", f"{w}s{suffix}"
    lines = [
        f"{to}{side} = (1 - {down}) * {pixel(h, column)} + {down} * {pixel(h + '1', column)}"
        for side, column in (("_left", w), ("_right", f"{w}1"))
    ]
    return [*lines, f"{to} = (1 - {across}) * {to}_left + {across} * {to}_right"]


def _place(
    tile: Tile, name: str, out: str, size: Dim, step: Any, how: Sampling, real: str
) -> list[str]:
    """`name` is the row or column that is read, `name`1 the next, `name`s its share."""
    known = isinstance(step, float)
    text = repr(step) if known else f"({tile.numbers.scalar(step)}).to({real})"
    at = f"{out}.to({real})"
    if how.linear and not how.corners:
        source = f"fn.maximum({text} * ({at} + 0.5) - 0.5, 0.0)"
    elif how.exact:
        source = f"({at} + 0.5) * {text}"
    else:
        source = f"{at} * {text}"
    last = tile.numbers.text(size)
    lines = [f"{name}p = {source}",
             f"{name} = tl.minimum(fn.floor({name}p).to(tl.int32), {last} - 1)"]  # fmt: skip
    if how.linear:
        lines += [f"{name}1 = tl.minimum({name} + 1, {last} - 1)",
                  f"{name}s = fn.minimum(fn.maximum({name}p - {name}, 0.0), 1.0)"]  # fmt: skip
    return lines


__all__ = ["Image", "Sampling", "Window", "interpolate", "places", "pool", "sampled"]
