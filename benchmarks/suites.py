"""What is timed: whole models at benchmark sizes, and single operators.

Every case is a module from tensors to one tensor with the tensors of one call, seeded, so that all
peers are handed the same thing and exporters meet no dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.ir import OptionError, nearest

Built = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One thing to time. `group` orders tables; "memory" ones are limited by bandwidth."""

    name: str
    group: str
    make: Callable[[], Built]

    def build(self) -> Built:
        """The module in eval mode and the tensors of one call; the same each time."""
        torch.manual_seed(0)
        module, args = self.make()
        return module.eval().requires_grad_(False), args


def cases(suite: str, names: Sequence[str] = ()) -> list[Case]:
    """The cases of a suite in order, or those named. Raises OptionError for an unknown name."""
    every = {c.name: c for c in SUITES[suite]()}
    for name in names:
        if name not in every:
            raise OptionError(f"{suite} has no {name!r}", fix=nearest(name, every))
    return [c for c in every.values() if not names or c.name in names]


def case(suite: str, name: str) -> Case:
    return cases(suite, [name])[0]


# ------------------------------------------------------------------ models


class Positional(nn.Module):
    """A model of keyword arguments as one of tensors, and its first tensor as the result."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        from effc.examples.zoo import tensor_of

        return tensor_of(self.model(**dict(zip(self.names, tensors))))


def _models() -> list[Case]:
    from effc.examples.zoo.library import LIBRARY

    return [*(Case(n, "model", _library(n)) for n in LIBRARY), Case(PAPER, "model", _paper)]


def _library(name: str) -> Callable[[], Built]:
    def make() -> Built:
        from effc.examples.zoo.library import LIBRARY

        model, _, kwargs = LIBRARY[name].build(scale="bench")
        return Positional(model, list(kwargs)), tuple(kwargs.values())

    return make


PAPER = "rlfn-52x6-320x180"


def _paper() -> Built:
    """The paper's network on a 320 x 180 image."""
    from effc.examples.rlfn import rlfn

    return rlfn(), (torch.rand(1, 3, 180, 320) * 255,)


# ------------------------------------------------------------------ kernels


class Operator(nn.Module):
    """A function of tensors, some of which are its weights."""

    def __init__(self, fn: Callable[..., Tensor], weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList(nn.Parameter(w) for w in weights)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.fn(*tensors, *self.weights)


def operator(
    name: str,
    group: str,
    fn: Callable[..., Tensor],
    inputs: Sequence[tuple[int, ...]],
    weights: Sequence[tuple[int, ...]] = (),
) -> Case:
    """A case from shapes; values are normal, weights scaled to keep results near 1."""

    def make() -> Built:
        made = [torch.randn(w) / max(1, w[1:].numel()) ** 0.5 for w in map(torch.Size, weights)]
        return Operator(fn, made), tuple(torch.randn(i) for i in inputs)

    return Case(name, group, make)


def convolution(**options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: F.conv2d(x, w, b, **options)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _products() -> list[Case]:
    shapes = {  # rows x inputs x outputs, of transformers at these widths
        "linear-1x1024x4096": (1, 1024, 4096),
        "linear-1x4096x4096": (1, 4096, 4096),  # a step of decoding: the time of reading the weight
        "linear-1x576x49152": (1, 576, 49152),
        "linear-4x4096x4096": (4, 4096, 4096),
        "linear-128x1024x1024": (128, 1024, 1024),
        "linear-128x1024x2816": (128, 1024, 2816),
        "linear-512x512x2048": (512, 512, 2048),
        "linear-512x2048x512": (512, 2048, 512),
    }
    return [
        operator("matmul-1024", "matmul", torch.matmul, [(1024, 1024)] * 2),
        *(
            operator(name, "matmul", F.linear, [(m, k)], [(n, k), (n,)])
            for name, (m, k, n) in shapes.items()
        ),
    ]


def _convolutions() -> list[Case]:
    image = (1, 64, 56, 56)
    return [
        operator(
            "conv3x3-64-64", "convolution", convolution(padding=1), [image],
            [(64, 64, 3, 3), (64,)],
        ),
        operator(
            "conv3x3-52-52-320x180", "convolution", convolution(padding=1), [(1, 52, 180, 320)],
            [(52, 52, 3, 3), (52,)],
        ),
        operator(
            "conv1x1-64-256", "convolution", convolution(), [image], [(256, 64, 1, 1), (256,)]
        ),
        operator(
            "depthwise3x3-256", "convolution", convolution(padding=1, groups=256),
            [(1, 256, 28, 28)], [(256, 1, 3, 3), (256,)],
        ),
    ]  # fmt: skip


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A step of decoding: few heads of keys, which more heads of queries share."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _attentions() -> list[Case]:
    cache = (1, 3, 2048, 64)
    return [
        *(
            operator(f"attention-causal-8x64-{n}", "attention", attention, [(1, 8, n, 64)] * 3)
            for n in (1024, 8192)
        ),
        operator(
            "attention-decode-9of3x64-2048", "attention", one_query, [(1, 9, 1, 64), cache, cache]
        ),
    ]


def _bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x + b)


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def _chain(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """Eight pointwise operators, two tensors in and one out."""
    return torch.tanh(F.relu(x * s + b) - y) * torch.sigmoid(y) + x.clamp(-1, 1)


def _norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def _add_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + y, x.shape[-1:], w, b)


def _memory() -> list[Case]:
    wide = (4096, 1024)  # 16 MiB: beyond the second-level cache of any core
    row = (1024,)
    return [
        operator("layer-norm", "memory", _norm, [wide], [row] * 2),
        operator("rms-norm", "memory", lambda x, w: F.rms_norm(x, row, w), [wide], [row]),
        operator("softmax", "memory", lambda x: F.softmax(x, -1), [wide]),
        operator("gelu", "memory", F.gelu, [wide]),
        operator("bias-gelu", "memory", _bias_gelu, [wide], [row]),
        operator("silu-mul", "memory", _gated, [wide, wide]),
        operator("add-layer-norm", "memory", _add_norm, [wide, wide], [row] * 2),
        operator("pointwise-chain", "memory", _chain, [wide, wide], [row] * 2),
        operator(
            "group-norm-silu", "memory", lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)),
            [(1, 128, 128, 128)], [(128,)] * 2,
        ),
    ]  # fmt: skip


def _kernels() -> list[Case]:
    return [*_products(), *_convolutions(), *_attentions(), *_memory()]


def _gpu() -> list[Case]:
    from .gpu import cases

    return cases()


def _decode() -> list[Case]:
    from .decode import cases

    return cases()


def _perplexity() -> list[Case]:
    from .perplexity import cases

    return cases()


SUITES: dict[str, Callable[[], list[Case]]] = {
    "models": _models, "kernels": _kernels, "decode": _decode, "gpu": _gpu,
    "perplexity": _perplexity,
}  # fmt: skip
