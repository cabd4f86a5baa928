"""alias_roots and shown_values: whose memory an output may show."""

from effc.ir import parse
from effc.passes.analysis.aliases import alias_roots, shown_values

PROGRAM = """
def graph(x: f32[4, 6]):
    a = exp(x)
    b = reshape(a, to=(24,))
    c = slice(b, dim=0, start=2, size=3)
    d = neg(b)
    s: (f32[2, 6], f32[2, 6]) = aten.split.Tensor(x, 2)
    e: f32[2, 6] = item(s, index=1)
    return c, d, e, x,
"""

TWO_RESULTS = """
def graph(x: f32[4]):
    def r0(a0: f32[4]):
        y0 = exp(a0)
        y1 = neg(y0)
        return y0, y1
    f = fused((x,), body=r0)
    a = item(f, index=0)
    b = item(f, index=1)
    return a, b,
"""


def test_roots_follow_views_to_the_value_that_owns_the_memory():
    g = parse(PROGRAM)
    exp, d = g.nodes[0], g.nodes[3]
    assert alias_roots(g) == (exp, d, g.inputs[0], g.inputs[0])
    assert alias_roots(g) is alias_roots(g)  # kept with the graph


def test_shown_values_are_the_chains_of_views():
    g = parse(PROGRAM)
    exp, b, c, d, s, e = g.nodes
    assert shown_values(g) == {exp, b, c, d, s, e, g.inputs[0]}


def test_results_of_one_op_have_memory_of_their_own():
    g = parse(TWO_RESULTS)
    _, a, b = g.nodes
    assert alias_roots(g) == (a, b)
