"""Write a rule: before => after, with a reason whenever it does not apply.

    python examples/write_a_rule.py

A rule has a pattern written as calls, a check that answers yes or no-with-a-reason, and a rewrite
written as calls. The engine applies it until nothing matches, and keeps the nearest misses.
"""

from effc.ir import Engine, Rule, interpret, no, parse, verify, yes


class AbsOfProductWithConstant(Rule):
    """abs(mul(x, c)) => mul(abs(x), c)    where c >= 0"""

    def pattern(self, op, x, c):
        return op.abs(op.mul(x, c))

    def check(self, m, x, c):
        if not isinstance(c, (int, float)):
            return no("the factor is {}, not a number", c.name, at=c)
        if not c >= 0:
            return no("the factor {} is negative", c)
        return yes

    def rewrite(self, op, m, x, c):
        return op.mul(op.abs(x), c)


PROGRAM = """
def graph(x: f32[8, 16], z: f32[8, 16]):
    y0 = mul(x, 2.0)
    y1 = abs(y0)
    y2 = mul(y1, -3.0)
    y3 = abs(y2)
    y4 = mul(x, z)
    y5 = abs(y4)
    return y3, y5
"""


def main() -> None:
    import torch

    before = verify(parse(PROGRAM))
    engine = Engine([AbsOfProductWithConstant()])
    after = verify(engine.run(before))
    print(after.text)
    (stats,) = engine.stats.values()
    print(f"{stats.title}: {stats.hits} of {stats.attempts} attempts applied")
    for miss in stats.misses:
        print(f"  not at  {miss.node_text}\n  because {miss.reason}")
    inputs = [torch.randn(8, 16), torch.randn(8, 16)]
    pairs = zip(interpret(before, inputs), interpret(after, inputs))
    print("largest difference:", max((a - b).abs().max().item() for a, b in pairs))


if __name__ == "__main__":
    main()
