"""Small passes and graphs, right and wrong on purpose, that the tests of the pipeline share."""

from dataclasses import dataclass

from effc.ir import Graph, Origin, Rule, no, parse, yes
from effc.passes.base import Pass, bounded, exact, lossy

SCALES = """
def graph(x: f32[N, 4]):
    y0 = mul(x, 2)
    y1 = mul(y0, 2)
    y2 = relu(y1)
    y3 = mul(y2, 3)
    y4 = mul(y3, 2)
    y5 = relu(y4)
    y6 = mul(y5, 2)
    y7 = mul(y6, 2)
    return y7
"""


def scales() -> Graph:
    """Three pairs of factors; only the middle one tells a product from a sum."""
    graph = parse(SCALES)
    for i, node in enumerate(graph.nodes):
        node.at(Origin(f"layer{i}", f"model.py:{10 + i}"))
    return graph


class MergeScales(Rule):
    """mul(mul(x, a), b) => mul(x, a * b)"""

    def pattern(self, op, x, a, b):
        return op.mul(op.mul(x, a), b)

    def check(self, m, x, a, b):
        if not isinstance(a, int) or not isinstance(b, int):
            return no("{} and {} are not both numbers", a, b, at=m.root)
        return yes

    def rewrite(self, op, m, x, a, b):
        return op.mul(x, a * b)


class AddScales(MergeScales):
    """mul(mul(x, a), b) => mul(x, a + b)"""

    def rewrite(self, op, m, x, a, b):
        return op.mul(x, a + b)


@dataclass(frozen=True)
class MergeScalesPass(Pass):
    """Multiply neighbouring factors."""

    name, numerics = "merge-scales", exact()

    def run(self, g, ctx):
        return ctx.rewrite(g, [MergeScales()])


@dataclass(frozen=True)
class PlantedBug(Pass):
    """Add neighbouring factors instead: wrong unless both are 2."""

    name, numerics = "planted-bug", exact("rounding")

    def run(self, g, ctx):
        return ctx.rewrite(g, [AddScales()])


@dataclass(frozen=True)
class PlantedLoss(PlantedBug):
    """The same, declared."""

    name, numerics = "planted-loss", lossy("relative_l2")


@dataclass(frozen=True)
class PlantedBound(PlantedBug):
    """The same, promised to be small."""

    name, numerics = "planted-bound", bounded("max_abs", 0.5)


@dataclass(frozen=True)
class Negate(Pass):
    """Negate the first output without any rule: wrong always."""

    name, numerics = "negate-outputs", lossy("relative_l2")

    def run(self, g, ctx):
        from effc.ir.rewrite import op

        ctx.counted("Negate", "y => neg(y)", len(g.outputs))
        return g.with_outputs([op.neg(o) for o in g.outputs])


@dataclass(frozen=True)
class Fail(Pass):
    """Stop with an error of Python's at the first relu."""

    name = "fail-at-relu"

    def run(self, g, ctx):
        for node in g.nodes:
            if node.name == "relu":
                raise ZeroDivisionError("planted")
        return g


@dataclass(frozen=True)
class Interrupt(Pass):
    """Ctrl-C."""

    name = "interrupt"

    def run(self, g, ctx):
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Orphan(Pass):
    """Leave a node out of the list of nodes."""

    name = "drop-first-node"

    def run(self, g, ctx):
        return Graph(g.inputs, g.nodes[1:], g.outputs, g.name)


@dataclass(frozen=True)
class Forgetful(Pass):
    """Return nothing."""

    name = "forget-return"

    def run(self, g, ctx):
        ctx.rewrite(g, [MergeScales()])


@dataclass(frozen=True)
class Narrow(Pass):
    """Give half of an output away."""

    name = "narrow-output"

    def run(self, g, ctx):
        from effc.ir.rewrite import op

        return g.with_outputs([op.slice(o, 1, 0, 2) for o in g.outputs])


@dataclass(frozen=True)
class NeedsPacking(Pass):
    """Want something that no pass gives."""

    name, needs = "need-packing", ("packed weights",)

    def run(self, g, ctx):
        raise AssertionError("must not run")


@dataclass(frozen=True)
class AskSupport(Pass):
    """Note what the target takes."""

    name = "ask-support"

    def run(self, g, ctx):
        for node in g.nodes[:3]:
            ctx.note(f"{node.name}: {ctx.supports(node)}")
        return g
