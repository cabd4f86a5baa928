"""assign-bits: every layer as many bits as it needs, by what each costs on calibration data."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from effc.ir import Graph, Op, PassError, interpret
from effc.ir.formats import Encoded
from effc.passes.base import Context, Pass, lossy
from effc.passes.fold.distil import divergence
from effc.passes.fold.objective import next_token

from .gptq import output_error
from .quantize_weights import FLOAT, RULE, TITLE, QuantizeWeights, hessians, parted
from .weights import FIVE_LEVELS, Layer, encoded_weight, layers, with_weight

TRIED = 0.1  # of a layer's output: an error that shows, and is not so large that all is lost


class Choice(NamedTuple):
    """One way to store a layer. value: None for as it is; error: |X W^T - X Q^T| / |X W^T|; harm:
    what that does to the outputs of the graph."""

    bits: str
    nbytes: int
    error: float
    value: Encoded | None
    harm: float = 0.0


@dataclass(frozen=True)
class AssignBits(Pass):
    """Store the matrices of linear layers as codes, with bits for each layer by a budget.

    rewrite:
        y = linear(x, w)
        -->
        y = linear(x, decode(encoded((codes, scale, zero), ...)))

    budget: bits an element on average, scales included, within which the harm of all layers is made
    small. error: what the outputs of the graph may be off (relative_l2, on calibration data)
    instead: layers go back to more bits, those first that gain most for a byte, until it holds.
    choices: bits to choose from, 16 for a layer as it is. The rest as in quantize-weights.

    Harm is measured for each layer alone, on the first set of calibration data: divergence of a
    language model's next token, else the squared error of the outputs; at other bits it goes with
    the square of the error of the layer's own output.
    """

    name, numerics = "assign-bits", lossy("relative_l2")
    budget: float = 0.0
    error: float = 0.0
    choices: str = "16|8|4|3|2"
    group: int | None = 64
    zero: bool = True
    method: str = "gptq"
    scale: str = "f16"
    head: bool = False
    skip: str = ""
    only: str = ""
    room: int = 1 << 30

    @property
    def calibrated(self) -> bool:
        return True

    def run(self, g: Graph, ctx: Context) -> Graph:
        if (self.budget > 0) == (self.error > 0):
            raise PassError(
                f"budget={self.budget:g}, error={self.error:g}",
                why="one of them says how far to go, and not both", fix="budget=4.5 or error=0.05",
            )  # fmt: skip
        ways = self.ways()
        taken = layers(g, ctx, RULE, TITLE, head=self.head, skip=self.skip, only=self.only)
        if not taken:
            return g
        table = self.measured(g, taken, ways, ctx)
        path = steps([table[layer.key] for layer in taken])
        if self.budget:
            elements = sum(layer.w.tensor.numel for layer in taken)  # type: ignore[misc]
            chosen = _within(path, table, taken, self.budget * elements / 8)  # type: ignore[operator]
        else:
            chosen = self.by_error(g, taken, table, path, ctx)
        return self.stored(g, taken, [table[y.key][c] for y, c in zip(taken, chosen)], ctx)

    def ways(self) -> dict[str, QuantizeWeights | None]:
        """A pass for each of the choices, None for leaving a layer as it is; fewest bits first."""
        found: dict[str, QuantizeWeights | None] = {}
        for text in self.choices.split("|"):
            if text.isdigit() and int(text) >= FLOAT:
                found[text] = None
                continue
            five = text == FIVE_LEVELS
            bits = text if five or not text.isdigit() else int(text)
            p = QuantizeWeights(
                bits, self.group, self.zero and not five, self.method, self.scale, room=self.room
            )
            p.type_of((1, 1), False)
            found[text] = p
        return found

    def measured(
        self, g: Graph, taken: Sequence[Layer], ways: Mapping[str, QuantizeWeights | None],
        ctx: Context,
    ) -> dict[str, list[Choice]]:  # fmt: skip
        """Of each layer, by its key, the choices worth having: fewer bytes for more harm."""
        found: dict[str, list[Choice]] = {}
        for part in parted(taken, self.room):
            given = hessians(g, part, ctx, self)
            for layer in part:
                w, h = layer.value, given.get(layer.w)
                if h is None:
                    h = torch.eye(w.shape[1])
                found[layer.key] = [_choice(layer, w, h, b, p) for b, p in ways.items()]
        harm = _Harm(g, ctx.data(self)[0])
        for layer in ctx.progress(taken, f"what {len(taken)} layers do to the outputs"):
            tried = min(found[layer.key], key=lambda c: abs(c.error - TRIED))
            unit = harm.of(_new([layer], [tried])) / max(tried.error, 1e-12) ** 2
            found[layer.key] = worthwhile(
                [c._replace(harm=unit * c.error**2) for c in found[layer.key]]
            )
        return found

    def by_error(
        self, g: Graph, taken: Sequence[Layer], table: Mapping[str, list[Choice]],
        path: Sequence[Sequence[int]], ctx: Context,
    ) -> Sequence[int]:  # fmt: skip
        """The first step of the way, from fewest bytes on, whose measured error is allowed."""
        batches = ctx.data(self)
        with torch.no_grad():
            wanted = [interpret(g, b) for b in batches]
        seen: dict[int, float] = {}

        def error(at: int) -> float:
            if at not in seen:
                picked = [table[y.key][c] for y, c in zip(taken, path[at])]
                graph = g.substitute(_new(taken, picked))
                with torch.no_grad():
                    seen[at] = max(
                        _relative(interpret(graph, b), want) for b, want in zip(batches, wanted)
                    )
            return seen[at]

        at = bisect.bisect_left(range(len(path)), True, key=lambda i: error(i) <= self.error)
        if at == len(path):
            raise PassError(
                f"error={self.error:g} cannot be held",
                why=f"with the most bits of choices={self.choices} it is {error(at - 1):.3g}",
                fix="add 16 to choices: a layer may then stay as it is",
            )
        back: dict[str, list[str]] = {}
        for layer, first, c in zip(taken, path[0], path[at]):
            if c != first:
                back.setdefault(table[layer.key][c].bits, []).append(layer.key)
        ctx.note(
            f"error {error(at):.3g} of {self.error:g} allowed, {error(0):.3g} with the fewest "
            f"bits; layers that went back to more: {_listed(back)}"
        )
        return path[at]

    def stored(
        self, g: Graph, taken: Sequence[Layer], picked: Sequence[Choice], ctx: Context
    ) -> Graph:
        new = _new(taken, picked)
        made = [c.value for c in picked if c.value is not None]
        counts = {
            b: sum(c.bits == b for c in picked) for b in dict.fromkeys(c.bits for c in picked)
        }
        listed = ", ".join(f"{n} in {b}" for b, n in sorted(counts.items(), key=lambda i: -i[1]))
        after = sum(c.nbytes for c in picked)
        before = sum(y.w.tensor.nbytes for y in taken)  # type: ignore[misc]
        elements = sum(y.w.tensor.numel for y in taken)  # type: ignore[misc]
        ctx.note(
            f"bits of {len(taken)} matrices: {listed}; {8 * after / elements:.3g} an element: "
            f"{after:,} bytes, were {before:,}"
        )
        worst = sorted(zip(taken, picked), key=lambda i: -i[1].error)[:3]
        ctx.note(
            "largest errors of a layer's output: "
            + ", ".join(f"{y.key} ({c.bits} bits) {c.error:.2g}" for y, c in worst)
        )
        ctx.counted(RULE, TITLE, len(made))
        return ctx.substitute(g, new)


def _choice(
    layer: Layer, w: torch.Tensor, h: torch.Tensor, bits: str, p: QuantizeWeights | None
) -> Choice:
    if p is None:
        return Choice(bits, int(layer.w.tensor.nbytes), 0.0, None)  # type: ignore[arg-type]
    value = p.by_inputs(layer, h if p.method == "gptq" else None)
    return Choice(bits, int(value.type.nbytes), output_error(w, value.decode(), h), value)  # type: ignore[arg-type]


class _Harm:
    """What a change does to the outputs of a graph on one set of values, about as its square."""

    def __init__(self, g: Graph, values: Sequence[Any]) -> None:
        self.g, self.values, self.labels = g, values, next_token(g)
        self.wanted = self.outputs(g)

    def of(self, new: Mapping[Op, Op]) -> float:
        made = self.outputs(self.g.substitute(new))
        if self.labels is not None:
            return max(float(divergence(self.labels, made, self.wanted)), 0.0)
        return _relative(made, self.wanted) ** 2

    def outputs(self, g: Graph) -> tuple[Any, ...]:
        with torch.no_grad():
            return interpret(g, self.values)


def worthwhile(choices: Sequence[Choice]) -> list[Choice]:
    """Fewest bytes first; without those that another beats, or a mixture of two others.

    Left is the lower convex hull of (bytes, harm), so that steps along it gain less and less for a
    byte.
    """
    hull: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.nbytes, c.harm)):
        if hull and c.harm >= hull[-1].harm:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def steps(table: Sequence[Sequence[Choice]]) -> list[tuple[int, ...]]:
    """From all layers with fewest bytes to all with most: one layer a step, whose next choice
    takes off most harm for a byte. Each step is the best for its bytes (a Lagrangian)."""
    gains = [
        (-_gain(found[i], found[i + 1]), layer, i + 1)
        for layer, found in enumerate(table)
        for i in range(len(found) - 1)
    ]
    at = [0] * len(table)
    path = [tuple(at)]
    for _, layer, choice in sorted(gains):
        at[layer] = choice
        path.append(tuple(at))
    return path


def _gain(a: Choice, b: Choice) -> float:
    """Harm that b takes off, for each byte more."""
    return (a.harm - b.harm) / max(b.nbytes - a.nbytes, 1)


def _within(
    path: Sequence[Sequence[int]], table: Mapping[str, list[Choice]], taken: Sequence[Layer],
    room: float,
) -> Sequence[int]:  # fmt: skip
    """The last step of the way that fits into so many bytes."""

    def size(step: Sequence[int]) -> int:
        return sum(table[y.key][c].nbytes for y, c in zip(taken, step))

    at = bisect.bisect_right(path, room, key=size) - 1
    if at < 0:
        raise PassError(
            f"{room:,.0f} bytes are too few", why=f"the fewest bits take {size(path[0]):,}",
            fix="a larger budget, or fewer bits among choices",
        )  # fmt: skip
    return path[at]


def _listed(layers: Mapping[str, Sequence[str]]) -> str:
    """Layers by their bits, by name; of the largest group only how many."""
    if not layers:
        return "none"
    most = max(layers, key=lambda b: len(layers[b])) if len(layers) > 1 else None
    return "; ".join(
        f"{len(keys)} to {bits}" if bits == most else f"to {bits}: {', '.join(keys)}"
        for bits, keys in layers.items()
    )


def _new(taken: Sequence[Layer], picked: Sequence[Choice]) -> dict[Op, Op]:
    new: dict[Op, Op] = {}
    for layer, choice in zip(taken, picked):
        if choice.value is not None:
            new |= with_weight(layer, encoded_weight(layer.key, choice.value))
    return new


def _relative(outputs: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest |a - b| / |b| of the outputs; infinite where it is no number."""
    found = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(outputs, wanted)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    largest = max(found, default=0.0)
    return largest if math.isfinite(largest) else math.inf


__all__ = ["AssignBits", "Choice", "steps", "worthwhile"]
