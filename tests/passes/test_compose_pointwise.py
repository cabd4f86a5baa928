"""compose-pointwise: linear maps in a row become one where that is less work."""

import pytest

from effc.ir import Rates, no, yes

COMPOSE = "compose-pointwise"


def program(*lines, args="x: f32[2, 8, 5, 6]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def w(name, shape, dtype="f32"):
    return f'{name}: {dtype}{shape} = weight("{name}", digest="")'


def heavy(ran):
    return [n.name for n in ran.after.nodes if n not in ran.after.constants]


@pytest.mark.parametrize("first", ["", ", b1"])
@pytest.mark.parametrize("second", ["", ", b2"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_composes_convolutions(run, first, second, kernel):
    lines = [
        w("w1", [8, 8, kernel, kernel]),
        w("w2", [4, 8, 1, 1]),
        w("b1", [8]),
        w("b2", [4]),
        f"c = conv2d(x, w1{first}, padding=(1, 1), stride=(2, 1))",
        f"y = conv2d(c, w2{second})",
    ]
    ran = run(program(*lines), COMPOSE)
    assert heavy(ran) == ["conv2d"]


@pytest.mark.parametrize("bias", ["", ", b1"])
def test_composes_linears(run, bias):
    lines = [
        w("w1", [8, 6]),
        w("w2", [5, 8]),
        w("b1", [8]),
        f"c = linear(x, w1{bias})",
        "y = linear(c, w2)",
    ]
    ran = run(program(*lines, args="x: f32[3, 4, 6]"), COMPOSE)
    assert heavy(ran) == ["linear"]


def test_refuses_a_bottleneck(run):
    lines = [w("w1", [2, 256]), w("w2", [256, 2]), "c = linear(x, w1)", "y = linear(c, w2)"]
    ran = run(program(*lines, args="x: f32[3, 256]"), COMPOSE)
    assert ran.unchanged
    assert ran.reasons("ComposeLinear")[0] == "129024 more operations to save 16 bytes, each time"
    assert heavy(run(program(*lines, args="x: f32[3, 256]"), "compose-pointwise{force=True}")) == [
        "linear"
    ]


def test_refuses_a_wide_second_kernel_and_other_users(run):
    lines = [w("w1", [8, 8, 1, 1]), w("w2", [4, 8, 3, 3]), "c = conv2d(x, w1)", "y = conv2d(c, w2)"]
    ran = run(program(*lines), COMPOSE)
    assert ran.reasons("ComposeConv")[0] == "the second convolution is not 1x1"
    lines = [
        w("w1", [8, 8, 1, 1]),
        w("w2", [8, 8, 1, 1]),
        "c = conv2d(x, w1)",
        "d = conv2d(c, w2)",
        "y = add(c, d)",
    ]
    assert run(program(*lines), COMPOSE).reasons("ComposeConv")[0] == "conv2d is also used by add"


GATE = [
    w("wf", [16, 16, 1, 1]),
    w("w4", [46, 16, 1, 1]),
    w("bf", [16]),
    w("b4", [46]),
    "v = conv2d(p, wf, bf)",
    "s = add(u, v)",
    "g = conv2d(s, w4, b4)",
    "y = sigmoid(g)",
]


def test_the_gate_of_rlfn_is_left_unless_forced(run):
    args = "u: f32[1, 16, 9, 7], p: f32[1, 16, 9, 7]"
    ran = run(program(*GATE, args=args), COMPOSE)
    assert ran.unchanged
    assert ran.reasons("ComposeSum")[0] == "1006 more operations to save -112 bytes, each time"
    ran = run(program(*GATE, args=args), "compose-pointwise{force=True}")
    assert heavy(ran) == ["conv2d", "conv2d", "add", "sigmoid"]


ESA = [
    w("wf", [16, 16, 1, 1]), w("w4", [52, 16, 1, 1]), w("w3", [16, 16, 3, 3]), w("bf", [16]),
    w("b4", [52]), "q = conv2d(e, w3, padding=(1, 1))", "u = interpolate(q, size=(36, 64))",
    "v = conv2d(p, wf, bf)", "s = add(u, v)", "g = conv2d(s, w4, b4)", "y = sigmoid(g)",
]  # fmt: skip
ESA_ARGS = "e: f32[1, 16, 6, 11], p: f32[1, 16, 36, 64]"


def never(node):
    return no("no kernel computes {}", node.body.nodes[0].name)


def test_a_sum_with_an_enlarged_picture_is_taken_apart_where_a_kernel_reads_both(run):
    ran = run(program(*ESA, args=ESA_ARGS), COMPOSE, supports=never)
    assert ran.unchanged
    asked = []
    ran = run(program(*ESA, args=ESA_ARGS), COMPOSE, supports=lambda n: asked.append(n) or yes)
    assert heavy(ran) == ["conv2d", "conv2d", "interpolate", "conv2d", "add", "sigmoid"]
    assert ran.hits("ComposeSum") == 1 and ran.hits("ConvBeforeInterpolate") == 1
    assert {tuple(n.name for n in a.body.nodes) for a in asked} == {
        ("conv2d", "interpolate", "add")
    }


def test_an_enlarged_picture_that_is_read_elsewhere_is_not_taken_apart(run):
    ran = run(program(*ESA, args=ESA_ARGS, result="y, u"), COMPOSE)
    assert ran.unchanged


def test_a_launch_less_is_worth_its_time(run):
    """On the small picture the two convolutions before the interpolation take no time as one."""
    launch = Rates(launch=4e6)
    ran = run(program(*ESA, args=ESA_ARGS), COMPOSE, rates=launch)
    assert heavy(ran) == ["conv2d", "interpolate", "conv2d", "add", "sigmoid"]
    # but weights of 2048 x 2048 instead of 2 x 16 x 2048 take longer to read
    lines = [w("w1", [16, 2048]), w("w2", [2048, 16]), "c = linear(x, w1)", "y = linear(c, w2)"]
    assert run(program(*lines, args="x: f32[1, 2048]"), COMPOSE, rates=launch).unchanged


def test_nothing_to_do_is_the_same_graph(run):
    assert run(program("y = exp(x)"), COMPOSE).unchanged


def test_relative_error_in_f64(run):
    lines = [w("w1", [8, 8, 3, 3], "f64"), w("w2", [4, 8, 1, 1], "f64"), w("b1", [8], "f64")]
    lines += ["c = conv2d(x, w1, b1)", "y = conv2d(c, w2)"]
    ran = run(program(*lines, args="x: f64[2, 8, 5, 6]"), COMPOSE)
    assert ran.hits("ComposeConv") == 1 and max(ran.errors) <= 1e-12  # the card's bound


# ------------------------------------------------------------------ pictures that grow


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("bias", ["", ", b1"])
def test_a_convolution_is_taken_before_the_picture_grows(run, mode, bias):
    lines = [
        w("w1", [4, 8, 1, 1]),
        w("b1", [4]),
        f'u = interpolate(x, size=(11, 17), mode="{mode}")',
        f"y = conv2d(u, w1{bias})",
    ]
    ran = run(program(*lines), COMPOSE)
    assert heavy(ran) == ["conv2d", "interpolate"]
    assert ran.hits("ConvBeforeInterpolate") == 1


def test_it_then_composes_with_the_convolution_before(run):
    lines = [
        w("w0", [8, 8, 3, 3]),
        w("w1", [4, 8, 1, 1]),
        "c = conv2d(x, w0, padding=(1, 1))",
        "u = interpolate(c, size=(20, 24))",
        "y = conv2d(u, w1)",
    ]
    ran = run(program(*lines), COMPOSE)
    assert heavy(ran) == ["conv2d", "interpolate"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["u = interpolate(x, size=(3, 3))", "y = conv2d(u, w1)"], "the picture does not grow: 30 pixels become 9"),
        (["u = interpolate(x, size=(9, 9))", "v = conv2d(u, w1)", "s = sum(u, dims=(1,), keepdim=True)", "y = add(v, s)"],
         "interpolate is also used by sum"),
        (["u = interpolate(x, size=(9, 9))", "y = conv2d(u, w3)"], "the convolution is not 1x1"),
    ],
)  # fmt: skip
def test_a_convolution_stays_after_the_interpolation(run, lines, why):
    ran = run(program(w("w1", [4, 8, 1, 1]), w("w3", [4, 8, 3, 3]), *lines), COMPOSE)
    assert ran.unchanged and ran.reasons("ConvBeforeInterpolate") == [why]
