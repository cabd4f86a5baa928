"""Add an op with a kernel of its own, from outside effc.

    python examples/add_an_op.py

An op is declared once: fields, the type of its result, its meaning in plain torch. A kernel says
how the CPU computes it. A rule finds it in captured models. Nothing of effc is edited; put the
file in a package and name it in the entry-point group `effc.passes`.
"""

from dataclasses import dataclass

import torch
from torch import nn

import effc
from effc.backends.cpu.pointwise import kernel
from effc.ir import Graph, Rule, Value, op
from effc.ir.ops.pointwise import Pointwise
from effc.passes.base import Context, Pass, exact


@op("squared_relu")
class SquaredRelu(Pointwise):
    """y = max(x, 0)^2, the activation of Primer (So et al. 2021)."""

    x: Value

    def reference(self, x):
        return torch.relu(x).square()


# `x` is an element in the C++ type of the node; effc.h has the runtime's functions.
kernel("squared_relu", lambda node, dtype, x: f"effc::square(effc::relu({x}))")


class SquareOfRelu(Rule):
    """square(relu(x)) => squared_relu(x)"""

    def pattern(self, op, x):
        return op.square(op.relu(x))

    def rewrite(self, op, m, x):
        return op.squared_relu(x)


@dataclass(frozen=True)
class RaiseSquaredRelu(Pass):
    """Find squared ReLUs."""

    name, numerics = "raise-squared-relu", exact()

    def run(self, g: Graph, ctx: Context) -> Graph:
        return ctx.rewrite(g, [SquareOfRelu()])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)) ** 2)


def main() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(32, 64)
    pipeline = "simplify,raise-squared-relu,fuse-regions"
    compiled = torch.compile(model, backend="effc", options={"pipeline": pipeline, "strict": True})
    with torch.no_grad():
        got, want = compiled(x), model(x)
    record = effc.explain(compiled).records[0]
    print(record.stages[-1].text)
    print(*(f"{launch}" for launch in record.executable.launches), sep="\n")
    print(f"relative error against eager: {((got - want).norm() / want.norm()).item():.1e}")
    assert "squared_relu" in record.stages[-1].text


if __name__ == "__main__":
    main()
