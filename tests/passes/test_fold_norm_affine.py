"""fold-norm-affine: scale and shift of a norm move into the linear layers after it."""

import pytest

FOLD = "fold-norm-affine"


def program(*lines, args="x: f32[3, 5, 8]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


WEIGHTS = [
    f'{n}: f32{s} = weight("{n}", digest="")'
    for n, s in (("gamma", [8]), ("b", [8]), ("w1", [6, 8]), ("c1", [6]), ("w2", [6, 8]))
]
TWO = ["p = linear(n, w1, c1)", "q = linear(n, w2)", "y = add(p, q)"]


@pytest.mark.parametrize(
    "norm", ["layer_norm(x, gamma, b)", "layer_norm(x, gamma)", "rms_norm(x, gamma)"]
)
def test_folds(run, norm):
    ran = run(program(*WEIGHTS, f"n = {norm}", *TWO), FOLD)
    assert ran.hits("NormAffineIntoLinear") == 1
    node = next(n for n in ran.after.nodes if n.name == norm.split("(")[0])
    assert node.weight is None and getattr(node, "bias", None) is None


@pytest.mark.parametrize(
    ("lines", "result", "reason"),
    [
        (["n = rms_norm(x, gamma)", *TWO, "z = neg(n)"], "y, z", "neg reads the norm, too"),
        (["n = rms_norm(x, gamma)", *TWO], "y, n", "the norm is an output"),
        (["n = rms_norm(x)", *TWO], "y", "the norm has neither weight nor bias"),
    ],
)
def test_refuses(run, lines, result, reason):
    ran = run(program(*WEIGHTS, *lines, result=result), FOLD)
    assert ran.unchanged
    assert ran.reasons("NormAffineIntoLinear") == [reason]


def test_nothing_to_do_is_the_same_graph(run):
    assert run(program("y = exp(x)"), FOLD).unchanged
