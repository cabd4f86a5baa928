"""Fixtures of the backend tests: run a graph on the cpu backend and compare with the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from effc.backends import find_backend
from effc.ir import Graph, interpret, parse

CLOSE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    # one rounding apart: the interpreter rounds after every op, kernels once
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def close(got: torch.Tensor, want: torch.Tensor, what: str = "", **tolerance: float) -> None:
    """Same type, shape and values; NaN equals NaN."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    tolerance = tolerance or CLOSE.get(want.dtype, {"rtol": 0, "atol": 0})
    torch.testing.assert_close(got, want, equal_nan=True, msg=lambda m: f"{what}: {m}", **tolerance)


class Compiled:
    """A graph on a backend; calling it compares with the interpreter."""

    def __init__(
        self, graph: Graph | str, kernels: bool = True, backend: str = "cpu", **options: Any
    ) -> None:
        self.graph = parse(graph) if isinstance(graph, str) else graph
        self.executable = find_backend(backend).compile(self.graph, options)
        self.bound = self.executable.bind()
        if kernels:
            reasons = [f"{n.name}: {why}" for n, why in self.executable.fallbacks]
            assert not reasons, "\n".join(reasons)

    def __call__(self, *inputs: Any, **tolerance: float) -> tuple[Any, ...]:
        got, want = self.bound(inputs), interpret(self.graph, inputs)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            close(g, w, f"output {i} ({self.graph.outputs[i].name})", **tolerance)
        return got


@pytest.fixture
def compiled(recwarn: pytest.WarningsRecorder) -> Callable[..., Compiled]:
    def make(graph: Graph | str, **options: Any) -> Compiled:
        made = Compiled(graph, **options)
        built = [str(w.message) for w in recwarn.list if "failed" in str(w.message)]
        assert not built, "\n".join(built)
        return made

    return make


@pytest.fixture
def inputs_like() -> Callable[[Sequence[int], torch.dtype], torch.Tensor]:
    return special


def special(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers with NaN, infinities, zeros of both signs, large and small ones among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        t = torch.randint(max(info.min, -50), 50, shape, generator=generator).to(dtype)
        edges = [info.min, info.max, 0, 1]
    else:
        t = (torch.randn(shape, generator=generator) * 3).to(dtype)
        edges = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-6, 88.0, -88.0, 1.0, -1.0]
    flat = t.view(-1)
    flat[: len(edges)] = torch.tensor(edges, dtype=dtype)[: flat.numel()]
    return flat[torch.randperm(flat.numel(), generator=generator)].view(shape)
