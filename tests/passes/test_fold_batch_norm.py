"""fold-batch-norm: into the layer before, the convolution after, or a multiply-add."""

import pytest

FOLD = "fold-batch-norm"


def weights(channels, gamma=True, dtype="f32"):
    names = ("mean", "var", *(("gamma", "beta") if gamma else ()))
    return [f'{n}: {dtype}[{channels}] = weight("bn.{n}", digest="")' for n in names]


def program(*lines, args):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return y,\n"


def w(name, shape, dtype="f32"):
    return f'{name}: {dtype}{shape} = weight("{name}", digest="")'


BN = "y = batch_norm(c, mean, var, gamma, beta, eps=0.001)"
PLAIN = "y = batch_norm(c, mean, var)"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gamma", [True, False])
def test_into_the_convolution_before(run, bias, gamma):
    lines = [w("k", [4, 1, 3, 3]), w("b", [4]), *weights(4, gamma)]
    lines.append(f"c = conv2d(x, k{', b' if bias else ''}, padding=(1, 1), groups=2)")
    ran = run(program(*lines, BN if gamma else PLAIN, args="x: f32[2, 2, 7, 5]"), FOLD)
    assert ran.hits("BatchNormIntoConv") == 1
    assert ran.count("batch_norm") == 0
    heavy = [n for n in ran.after.nodes if n not in ran.after.constants]
    assert [n.name for n in heavy] == ["conv2d"]


def test_into_conv1d_and_linear(run):
    conv = [w("k", [4, 2, 3]), *weights(4), "c = conv1d(x, k)", BN]
    assert run(program(*conv, args="x: f32[2, 2, 9]"), FOLD).hits("BatchNormIntoConv") == 1
    linear = [w("k", [4, 6]), *weights(4), "c = linear(x, k)", BN]
    assert run(program(*linear, args="x: f32[5, 6]"), FOLD).hits("BatchNormIntoLinear") == 1


def test_refuses_a_norm_over_positions(run):
    lines = [w("k", [8, 6]), *weights(4), "c = linear(x, k)", BN]
    ran = run(program(*lines, args="x: f32[2, 4, 6]"), FOLD)
    assert ran.reasons("BatchNormIntoLinear") == ["dimension 1 of f32[2, 4, 8] is not the features"]
    assert ran.hits("BatchNormToMulAdd") == 1  # and still becomes cheap


@pytest.mark.parametrize("groups", [1, 2])
def test_into_the_convolution_after(run, groups):
    lines = [w("k", [6, 4 // groups, 3, 3]), w("b", [6]), *weights(4)]
    lines += ["c = batch_norm(x, mean, var, gamma, beta)", f"y = conv2d(c, k, b, groups={groups})"]
    ran = run(program(*lines, args="x: f32[2, 4, 7, 5]"), FOLD)
    assert ran.hits("BatchNormIntoNextConv") == 1


def test_refuses_the_convolution_after_when_it_pads(run):
    lines = [w("k", [6, 4, 3, 3]), *weights(4), "c = batch_norm(x, mean, var, gamma, beta)"]
    ran = run(program(*lines, "y = conv2d(c, k, padding=(1, 1))", args="x: f32[2, 4, 7, 5]"), FOLD)
    assert ran.reasons("BatchNormIntoNextConv") == [
        "padding (1, 1) adds zeros that the norm does not see"
    ]


def test_alone_it_is_a_multiply_add(run):
    ran = run(program(*weights(4), BN.replace("(c", "(x"), args="x: f32[2, 4, 7, 5]"), FOLD)
    assert [n.name for n in ran.after.nodes if n not in ran.after.constants] == ["mul", "add"]


def test_bf16_keeps_its_convolution_and_one_rounding(run):
    lines = [w("k", [4, 2, 3, 3], "bf16"), *weights(4), "c = conv2d(x, k)", BN]
    ran = run(program(*lines, args="x: bf16[2, 2, 7, 5]"), FOLD)
    assert ran.reasons("BatchNormIntoConv") == ["a different order of roundings shows in bf16"]
    assert ran.hits("BatchNormToMulAdd") == 1 and ran.ops()[-1] == "cast"


def test_refuses_statistics_from_inputs_and_shared_results(run):
    lines = [w("k", [4, 2, 3, 3]), *weights(4)[1:], "c = conv2d(x, k)", BN]
    ran = run(program(*lines, args="x: f32[2, 2, 7, 5], mean: f32[4]"), FOLD)
    assert ran.unchanged
    assert ran.reasons("BatchNormIntoConv") == ["input is computed from inputs"]
    lines = [
        w("k", [4, 2, 3, 3]),
        *weights(4),
        "c = conv2d(x, k)",
        BN.replace("y =", "n ="),
        "y = add(c, n)",
    ]
    ran = run(program(*lines, args="x: f32[2, 2, 7, 5]"), FOLD)
    assert ran.reasons("BatchNormIntoConv") == ["conv2d is also used by add"]


def test_nothing_to_do_is_the_same_graph(run):
    assert run(program("y = exp(x)", args="x: f32[2, 3]"), FOLD).unchanged
