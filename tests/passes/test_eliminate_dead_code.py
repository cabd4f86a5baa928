"""eliminate-dead-code: what no output needs goes, random ops stay."""

DEAD = """
def graph(x: f32[4]):
    a = exp(x)
    b = relu(x)
    r: f32[4] = aten.rand_like.default(x)
    return b,
"""


def test_drops_the_dead_and_keeps_the_random(run):
    ran = run(DEAD, "eliminate-dead-code")
    assert ran.ops() == ["relu", "aten"]
    assert ran.hits("DropDead") == 1


def test_nothing_to_do_is_the_same_graph(run):
    ran = run("def graph(x: f32[4]):\n    y = exp(x)\n    return y,\n", "eliminate-dead-code")
    assert ran.unchanged
    assert ran.ctx.notes == ["every node is needed by an output or draws random numbers"]
