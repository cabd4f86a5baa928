"""group_norm with what follows it: moments of each group, then one loop over all elements.

Two ways to walk memory. Where channels lie together (channels-last) a row of the loop is a pixel,
and every channel has its scale and shift; else a row is the elements of one channel. Finding the
moments is the work of effc_moments.h; the loop applies them, computes what follows, and stores.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from effc.ir import DType
from effc.ir.symbols import product

from .kernel import kernel
from .loops import Nest, Numbers, Operand, step
from .pointwise import SHARE, Made
from .program import F32
from .region import Statements, store
from .scalar import register, storage

Body = Callable[[Statements, tuple[str, DType, bool]], Sequence[Any]]


@dataclass(frozen=True)
class Norm:
    """groups: of channels. weight, bias: one element a channel. together: channels lie together."""

    groups: int
    eps: float
    weight: Operand | None
    bias: Operand | None
    together: bool


def group_norm(
    norm: Norm, nest: Nest, leaves: Sequence[Any], outs: int, body: Body, *,
    comment: Iterable[str] = (),
) -> Made:  # fmt: skip
    """The kernel's pointers are results, leaves, weight, bias.

    nest: image, channel, then any others; operands are results, then leaves, of which x is the
    first. Along its pixels x steps evenly; channels lie together in it, or else all of an image.
    body(statements, normalised) gives what to store.
    """
    return _Writer(norm, nest, list(leaves), outs, body).made(tuple(comment))


class _Writer:
    def __init__(
        self, norm: Norm, nest: Nest, leaves: list[Any], outs: int, body: Body
    ) -> None:  # fmt: skip
        self.norm, self.leaves, self.outs, self.body = norm, leaves, outs, body
        self.x = nest.operands[outs]
        self.real = register(self.x.dtype)
        self.numbers = Numbers()
        self.shape, self.pixels = nest.sizes[:2], _part(nest, range(2, nest.rank)).at_least(1)
        self.step = _part(Nest(nest.sizes, (self.x,)), range(2, nest.rank)).at_least(1)
        self.walk = self._walk(nest)

    def _walk(self, nest: Nest) -> Nest:
        """All dimensions, outermost first; images stay apart, and channels too."""
        lead, pixels = _apart(nest, 2), self.pixels
        pairs = list(zip(lead.operands, pixels.operands, strict=True))
        if self.norm.together:
            (image, channel), middle = lead.sizes, pixels.sizes
            steps = [(o.strides[0], *p.strides, o.strides[1]) for o, p in pairs]
            sizes = (image, *middle, channel)
        else:
            steps = [(*o.strides, *p.strides) for o, p in pairs]
            sizes = (*lead.sizes, *pixels.sizes)
        operands = (Operand(o.dtype, s) for (o, _), s in zip(pairs, steps, strict=True))
        return Nest(sizes, tuple(operands))

    def made(self, comment: tuple[str, ...]) -> Made:
        walk, last, numbers = self.walk, self.walk.rank - 1, self.numbers
        sizes = [numbers.add(("size", axis), walk.sizes[axis]) for axis in range(walk.rank)]
        of = self._groups(sizes)
        names = [f"y{i}" for i in range(self.outs)] + [f"x{i}" for i in range(len(self.leaves))]
        operands, places = [], []
        for i, (name, operand) in enumerate(zip(names, walk.operands, strict=True)):
            strides = [numbers.stride(i, axis, walk) for axis in range(walk.rank)]
            row = "".join(step(f"i{axis}", s) for axis, s in enumerate(strides[:-1]))
            text = f"{'const ' if i >= self.outs else ''}{storage(operand.dtype)}"
            half = operand.dtype.name == "f16" and operand.kind(last) == 1
            operands.append({"name": name, "qualified": text, "row": row, "half": half})
            places.append(f"{name}h + k" if half else f"{name}r{step('j', strides[-1])}")
        statements = Statements(numbers)
        lines = self._stores(statements, places)
        rows = list(operands)
        affine = {name: self._parameter(name, operands) for name in ("weight", "bias")}
        made = kernel(
            "group_norm", "group_norm_pixels" if self.norm.together else "group_norm_runs",
            numbers=list(numbers.text.values()), comment=comment,
            operands=operands, rows=rows, of=of, real=self.real, inner=sizes[-1], share=SHARE,
            halves=[o for o in rows if o["half"]],
            outer=[{"index": f"i{a}", "size": sizes[a]} for a in range(last)],
            hoisted=statements.hoisted, body=[*statements.body, *lines],
            work=statements.work + len(operands), **affine,
        )  # fmt: skip
        return Made(made, tuple(numbers.values))

    def _groups(self, sizes: Sequence[str]) -> dict[str, str]:
        """Text of the numbers that say what a group is."""
        add, eps = self.numbers.add, struct.unpack("q", struct.pack("d", self.norm.eps))[0]
        return {
            "images": sizes[0], "channels": sizes[-1 if self.norm.together else 1],
            "pixels": add("pixels", product(self.pixels.sizes)),
            "groups": add("groups", self.norm.groups),
            "eps": f"effc::bit_cast<double>({add('eps', eps)})",
            "image": add("image", self.x.strides[0]),
            "pixel": add("pixel", self.step.operands[0].strides[0]) if self.norm.together else "",
        }  # fmt: skip

    def _parameter(self, name: str, operands: list[dict[str, str]]) -> str:
        """The element of channel c; its pointer joins the operands."""
        operand: Operand | None = getattr(self.norm, name)
        if operand is None:
            return ""
        qualified = f"const {storage(operand.dtype)}"
        operands.append({"name": name, "qualified": qualified})
        way = Nest((self.shape[1],), (operand,))
        kind = way.operands[0].kind(0)
        stride = self.numbers.add((name, "stride"), operand.strides[0]) if kind is None else kind
        return f"effc::cast<double>(effc::load({name}{step('c', str(stride))}))"

    def _stores(self, s: Statements, places: list[str]) -> list[str]:
        """Fill the statements; gives those that store."""
        walk, last = self.walk, self.walk.rank - 1
        operands = list(zip(walk.operands, places, strict=True))
        for leaf, (operand, place) in zip(self.leaves, operands[self.outs :], strict=True):
            s.load(leaf, operand.dtype, place, operand.kind(last) != 0)
        x, _, _ = s.values[self.leaves[0]]
        index = "[j]" if self.norm.together else ""
        normalised = s.let(self.x.dtype, f"{x} * scale{index} + shift{index}", True)
        results = self.body(s, normalised)
        pairs = zip(operands[: self.outs], results, strict=True)
        # A row of half goes through a buffer of float, which is converted as a whole.
        return [
            store(place, F32 if place.endswith("h + k") else operand.dtype, value)
            for (operand, place), value in pairs
        ]


def _part(nest: Nest, axes: Iterable[int]) -> Nest:
    """Some dimensions of the nest, merged where they can be."""
    return nest.collapsed(list(axes))


def _apart(nest: Nest, count: int) -> Nest:
    """The first dimensions, each by itself."""
    operands = (Operand(o.dtype, o.strides[:count]) for o in nest.operands)
    return Nest(nest.sizes[:count], tuple(operands))


__all__ = ["Norm", "group_norm"]
