"""Fixtures of the pass tests: a small program, a pipeline string, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import effc.passes  # noqa: F401  registers the passes
from effc.ir import Graph, Weight, bind_symbols, interpret, parse, verify
from effc.ir.interpret import random_input
from effc.ir.types import Number
from effc.passes.base import Context, Pipeline


@dataclass
class Ran:
    before: Graph
    after: Graph
    ctx: Context
    errors: list[float] = field(default_factory=list)

    @property
    def body(self) -> str:
        """The text of the graph without its first line, digests and indentation."""
        lines = [line.strip() for line in self.after.text.splitlines()[1:]]
        return "\n".join(
            line.split(", digest=")[0] + ")" if "digest=" in line else line for line in lines
        )

    @property
    def unchanged(self) -> bool:
        return self.after is self.before

    def ops(self) -> list[str]:
        return [n.name for n in self.after.nodes if not isinstance(n, Weight)]

    def count(self, name: str) -> int:
        return self.ops().count(name)

    def reasons(self, rule: str) -> list[str]:
        return [m.reason for m in self.ctx.stats[rule].misses]

    def hits(self, rule: str) -> int:
        return self.ctx.stats[rule].hits if rule in self.ctx.stats else 0


def fill(graph: Graph, seed: int = 0) -> Graph:
    """Give every weight of a parsed graph small random values."""
    generator = torch.Generator().manual_seed(seed)
    for w in graph.weights:
        if w.data is not None:
            continue
        shape, dtype = w.of.shape, w.of.dtype.torch
        if w.of.dtype.is_float:
            data = torch.randn(shape, generator=generator) * 0.3
            if "var" in w.key:
                data = data.abs() + 0.5
            if "gamma" in w.key:
                data = data + 1
        else:
            data = torch.randint(0, 2, shape, generator=generator)
        object.__setattr__(w, "data", data.to(dtype))
    return graph


def example(graph: Graph, sizes: dict[str, int] | None = None) -> list:
    """Inputs for a graph; symbols by name from `sizes`, others 5."""
    env = {s: (sizes or {}).get(s.name, 5) for s in graph.all_symbols}
    values = []
    for seed, node in enumerate(graph.inputs):
        if isinstance(node.of, Number):
            values.append(env.get(node.symbol, 5))
        else:
            values.append(random_input(node.of, env, seed))
    return values


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture
def run():
    """run(program, pipeline) -> Ran; verifies the result and checks the declared numerics."""

    def run(
        program, pipeline, *, supports=None, rates=None, inputs=None, sizes=None, bits=False
    ) -> Ran:
        before = fill(parse(program)) if isinstance(program, str) else fill(program)
        ctx = Context() if supports is None else Context(supports=supports)
        ctx.rates = rates or ctx.rates
        after, allowed = before, 0.0
        for p in Pipeline.parse(pipeline):
            after = p.run(after, ctx)
            verify(after)
            assert p.numerics.kind == "exact"
            allowed = max(allowed, 0.0 if bits else p.numerics.value)
        ran = Ran(before, after, ctx)
        inputs = example(before, sizes) if inputs is None else inputs
        bind_symbols(before, inputs)
        for got, want in zip(interpret(after, inputs), interpret(before, inputs), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            if allowed == 0.0:
                same = (
                    torch.equal(got, want)
                    if not want.dtype.is_floating_point
                    else bool(
                        ((got == want) | (got.isnan() & want.isnan())).all()
                        and (got.signbit() == want.signbit())[~want.isnan()].all()
                    )
                )
                assert same, f"not bit-equal: {got} {want}"
            elif want.dtype.is_floating_point:
                ran.errors.append(relative(got, want))
                assert ran.errors[-1] <= allowed
            else:
                assert torch.equal(got, want)
        return ran

    return run


@pytest.fixture
def captured():
    """captured(fn_or_module, *inputs) -> Graph, as torch.compile hands it to us."""
    import effc.aten  # noqa: F401  registers the converters
    from effc.capture import capture_exported
    from effc.importer import import_captured

    def captured(fn, *inputs) -> Graph:
        module = fn if isinstance(fn, torch.nn.Module) else Function(fn)
        with torch.no_grad():
            program = torch.export.export(module.eval(), inputs, strict=False)
            return import_captured(capture_exported(program)).graph

    return captured


class Function(torch.nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)
