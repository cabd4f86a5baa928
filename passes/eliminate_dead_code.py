"""Drop what no output needs."""

from __future__ import annotations

from dataclasses import dataclass

from effc.ir import Graph

from .base import Context, Pass, exact


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Drop nodes that no output and no random op needs.

    rewrite:
        y = exp(x); z = relu(x); return z
        -->
        z = relu(x); return z
    """

    name, numerics = "eliminate-dead-code", exact()

    def run(self, g: Graph, ctx: Context) -> Graph:
        live = g.live()
        dropped = len(g.nodes) - len(live.nodes)
        if dropped:
            ctx.counted("DropDead", "a node that nothing reads =>", dropped)
        else:
            ctx.note("every node is needed by an output or draws random numbers")
        return live
