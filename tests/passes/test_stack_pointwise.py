"""stack-pointwise: RLFN's second fold, against the card's tolerances."""

import pytest

STACK = "stack-pointwise"


def program(*lines, args="x: f32[2, 8, 5, 6]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def w(name, shape, dtype="f32"):
    return f'{name}: {dtype}{shape} = weight("{name}", digest="")'


def chain(w5, w1, first="", second="", dtype="f32"):
    return [
        w("w5", w5, dtype),
        w("w1", w1, dtype),
        w("b5", w5[:1], dtype),
        w("b1", w1[:1], dtype),
        f"c = conv2d(x, w5{first})",
        f"p = conv2d(c, w1{second})",
        "m = mean(p, dims=(1,), keepdim=True)",
        "y = mul(c, m)",
    ]


@pytest.mark.parametrize("first", ["", ", b5"])
@pytest.mark.parametrize("second", ["", ", b1"])
def test_stacks(run, first, second):
    ran = run(program(*chain([8, 8, 1, 1], [4, 8, 1, 1], first, second)), STACK)
    heavy = [n.name for n in ran.after.nodes if n not in ran.after.constants]
    assert heavy == ["conv2d", "slice", "slice", "mean", "mul"]
    assert ran.hits("StackPointwise") == 1


def test_relative_error_in_f64(run):
    lines = chain([8, 8, 1, 1], [4, 8, 1, 1], ", b5", ", b1", "f64")
    ran = run(program(*lines, args="x: f64[2, 8, 5, 6]"), STACK)
    assert max(ran.errors) <= 1e-12  # the card's bound


def test_several_readers_stack_at_once(run):
    lines = [
        w("a", [8, 8, 1, 1]),
        w("b", [4, 8, 1, 1]),
        w("d", [3, 8, 1, 1]),
        "c = conv2d(x, a)",
        "p = conv2d(c, b)",
        "q = conv2d(c, d)",
        "r = cat((p, q), dim=1)",
        "s = exp(c)",
        "y = cat((r, s), dim=1)",
    ]
    ran = run(program(*lines), STACK)
    assert ran.count("conv2d") == 1 and ran.count("slice") == 3


@pytest.mark.parametrize(
    ("lines", "result", "reason"),
    [
        (
            chain([8, 8, 1, 1], [4, 8, 1, 1]),
            "y, c",
            "an output must have memory of its own, not a slice",
        ),
        (chain([2, 8, 1, 1], [64, 2, 1, 1]), "y", "768 more operations a pixel to save 8 bytes"),
        (
            chain([8, 8, 1, 1], [4, 8, 1, 1])[:6],
            "p",
            "nothing else reads the middle value: composing is cheaper",
        ),
    ],
)
def test_refuses(run, lines, result, reason):
    ran = run(program(*lines, result=result), STACK)
    assert ran.unchanged
    assert ran.reasons("StackPointwise") == [reason]


def test_refuses_weights_from_inputs_and_sixteen_bits(run):
    lines = chain([8, 8, 1, 1], [4, 8, 1, 1])[1:]
    ran = run(program(*lines, args="x: f32[2, 8, 5, 6], w5: f32[8, 8, 1, 1]"), STACK)
    assert ran.reasons("StackPointwise") == ["input is computed from inputs"]
    lines = chain([8, 8, 1, 1], [4, 8, 1, 1], dtype="bf16")
    ran = run(program(*lines, args="x: bf16[2, 8, 5, 6]"), STACK)
    assert ran.reasons("StackPointwise") == ["a different order of roundings shows in bf16"]


def test_nothing_to_do_is_the_same_graph(run):
    ran = run(program("y = exp(x)"), STACK)
    assert ran.unchanged and ran.ctx.notes == ["no 1x1 convolution reads a 1x1 convolution"]
