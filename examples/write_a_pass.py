"""Write a pass: a frozen dataclass with a name, options as fields, and `run`.

    python examples/write_a_pass.py

Defining the class registers it under its name, so it works in every pipeline from then on:
torch.compile(model, backend="effc", options={"pipeline": "clip-activations{limit=4}"}).
From a package of your own, name the module in your pyproject.toml, and effc imports it:

    [project.entry-points."effc.passes"]
    clip-activations = "your_package.clip_activations"
"""

from dataclasses import dataclass

import torch
from torch import nn

import effc
from effc.ir import Graph
from effc.ir.rewrite import op
from effc.passes.base import Context, Pass, lossy


@dataclass(frozen=True)
class ClipActivations(Pass):
    """Bound every ReLU from above, as ReLU6 does: a first step towards fixed-point arithmetic.

    rewrite:
        y = relu(x)
        -->
        y = clamp(x, 0, limit)
    """

    name, numerics = "clip-activations", lossy("relative_l2")
    limit: float = 6.0

    def run(self, g: Graph, ctx: Context) -> Graph:
        relus = [node for node in g.nodes if node.name == "relu"]
        ctx.counted("ReluToClamp", "relu(x) => clamp(x, 0, limit)", len(relus))
        return ctx.substitute(g, {node: op.clamp(node.x, 0.0, self.limit) for node in relus})


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(16, 32)
    for limit in (6.0, 1.0):
        compiled = effc.compile(
            model, recipe=f"clip-activations{{limit={limit}}}", example_inputs=(x,)
        )
        with torch.no_grad():
            compiled(x)
        stage = effc.explain(compiled).records[0].stages[1]
        print(f"{stage.name}: {stage.rewrites} rewrites, {stage.error}")
    print(effc.explain(compiled))


if __name__ == "__main__":
    main()
