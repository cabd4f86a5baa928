"""Give an op a Triton kernel of your own, from outside effc, and run it without a GPU.

    python examples/write_a_gpu_kernel.py

The op is declared once; the template says how a GPU computes it; a rule finds it in captured
models. On the target `ptx-host` what Triton compiled for a GPU is executed on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import nn

import effc
from effc.backends.gpu.template import template
from effc.codegen.triton.kernel import cdiv
from effc.ir import Op, Rule, Value, no, op, yes
from effc.ir.symbols import product
from effc.passes.base import Context, Pass, exact

KERNEL = """
@triton.jit
def @NAME@({{ parameters }}):
    i = tl.program_id(0) * 512 + tl.arange(0, 512)   # an element of the result
    inside = i < {{ rows }} * {{ half }}
    place = i // {{ half }} * {{ 2 * half }} + i % {{ half }}
    a = tl.load(x + place, mask=inside).to(tl.float32)
    b = tl.load(x + place + {{ half }}, mask=inside).to(tl.float32)
    tl.store(out + i, a * fn.gelu(b), mask=inside)
"""


@op("geglu")
class Geglu(Op):
    """y = a * gelu(b), for the two halves a, b of x's last dimension (Shazeer 2020)."""

    x: Value

    def infer(self):
        return self.x.tensor.with_(shape=(*self.x.shape[:-1], self.x.shape[-1] // 2))

    def reference(self, x):
        a, b = x.chunk(2, -1)
        return a * torch.nn.functional.gelu(b)


template(
    "geglu", KERNEL,
    holes=lambda node: {"rows": product(node.shape[:-1]), "half": node.shape[-1]},
    grid=lambda node: (cdiv(product(node.shape), 512),),
)  # fmt: skip


class GateOfHalves(Rule):
    """mul(slice(x, low half), gelu(slice(x, high half))) => geglu(x)"""

    def pattern(self, op, x):
        return op.mul(op.slice(x).named("a"), op.gelu(op.slice(x).named("b"), approximate="none"))

    def check(self, m, x):
        half = x.shape[-1] // 2
        halves = (m.a.start, m.a.size, m.b.start, m.b.size) == (0, half, half, half)
        return yes if halves else no("the slices are not the halves of {}", x.name, at=m.a)

    def rewrite(self, op, m, x):
        return op.geglu(x)


@dataclass(frozen=True)
class RaiseGeglu(Pass):
    """Find gated GELUs."""

    name, numerics = "raise-geglu", exact()

    def run(self, g, ctx: Context):
        return ctx.rewrite(g, [GateOfHalves()])


class Gate(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return a * nn.functional.gelu(b)


def main() -> None:
    x = torch.randn(7, 2 * 96)
    compiled = effc.compile(
        Gate().eval(), recipe="raise-geglu", example_inputs=(x,), target="ptx-host", strict=True
    )
    print(effc.explain(compiled).records[0].executable.text)
    print(f"largest difference from eager: {(compiled(x) - Gate()(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
