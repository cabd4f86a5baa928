"""choose-layout: channels last through a convolution network, row-major at its edges."""

import pytest

LAYOUT = "choose-layout"


def program(*lines, args="x: f32[2, 4, 9, 8]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def w(name, shape):
    return f'{name}: f32{shape} = weight("{name}", digest="")'


K = [w("k", [4, 4, 3, 3]), w("v", [4])]
C1, C2 = "c = conv2d(x, k, padding=(1, 1))", "d = conv2d(c, k, v, padding=(1, 1))"


def conversions(ran):
    return ran.count("to_layout")


@pytest.mark.parametrize(
    "between",
    [
        "m = relu(c)",
        "m = add(c, x)",
        "m = mul(c, s)",
        "m = max_pool2d(c, kernel=(3, 3), stride=(2, 2))",
        "m = avg_pool2d(c, kernel=(2, 2), stride=(2, 2))",
        "m = interpolate(c, size=(11, 7))",
        "m = batch_norm(c, v, q)",
        "m = group_norm(c, 2, v, v)".replace("c, 2, v, v", "c, groups=2, weight=v, bias=v"),
        "m = pad(c, before=(0, 0, 1, 1), after=(0, 0, 2, 0))",
        "m = slice(c, dim=2, start=1, size=5)",
    ],
)
def test_the_layout_is_kept_between_convolutions(run, between):
    lines = [*K, w("q_var", [4]).replace("q_var:", "q:"), C1, between, "y = conv2d(m, k)"]
    ran = run(
        program(*lines, args="x: f32[2, 4, 9, 8], s: f32[2, 4, 1, 1]"),
        LAYOUT + "{layout=channels_last}",
    )
    assert conversions(ran) == 2, ran.after.text  # one in, one out
    assert ran.after.outputs[0].name == "to_layout"


def test_concatenation(run):
    lines = [*K, w("j", [4, 8, 3, 3]), C1, "e = cat((c, x), dim=1)", "y = conv2d(e, j)"]
    ran = run(program(*lines), LAYOUT + "{layout=channels_last}")
    assert conversions(ran) == 2


def test_ops_that_need_rows_get_rows(run):
    lines = [*K, C1, "f = reshape(c, to=(2, 288))", "y = softmax(f, dim=1)"]
    ran = run(program(*lines), LAYOUT + "{layout=channels_last}")
    assert ran.ops() == ["to_layout", "conv2d", "to_layout", "reshape", "softmax"]


def test_reductions_and_single_pixels_read_either(run):
    lines = [
        *K,
        C1,
        "p = mean(c, dims=(2, 3), keepdim=True)",
        "a = conv2d(x, k, padding=(1, 1))",
        "g = avg_pool2d(a, kernel=(9, 8), stride=(9, 8))",
        "h = add(p, g)",
        "y = reshape(h, to=(2, 4))",
    ]
    ran = run(program(*lines), LAYOUT + "{layout=channels_last}")
    assert conversions(ran) <= 3


def test_auto_changes_where_convolutions_rule(run):
    lines = [
        *K,
        C1,
        "d = relu(c)",
        "e = conv2d(d, k, v, padding=(1, 1))",
        "f = pixel_shuffle(e, factor=2)",
    ]
    ran = run(program(*lines, result="f"), LAYOUT)
    assert ran.hits("ChannelsLast") == 2
    assert ran.ops()[-2:] == ["pixel_shuffle", "to_layout"] and conversions(ran) == 2
    assert ran.ctx.notes == ["2 convolutions channels last, 2 conversions"]


def test_auto_leaves_a_single_patch_embedding(run):
    lines = [
        w("k", [4, 4, 3, 3]),
        "c = conv2d(x, k, stride=(3, 3))",
        "y = reshape(c, to=(2, 4, 6))",
    ]
    ran = run(program(*lines), LAYOUT)
    assert ran.unchanged
    assert ran.reasons("ChannelsLast") == [
        "conversions would move 4992 bytes, convolutions would save 2496"
    ]


def test_symbolic_sizes(run):
    lines = [*K, C1, "d = relu(c)", "y = conv2d(d, k, v, padding=(1, 1))"]
    ran = run(
        program(*lines, args="x: f32[N, 4, H, W]"),
        LAYOUT + "{layout=channels_last}",
        sizes={"H": 6},
    )
    assert conversions(ran) == 2


def test_row_major_changes_nothing(run):
    assert run(program(*K, C1, C2, result="d"), LAYOUT + "{layout=row_major}").unchanged


def test_again_changes_nothing(run):
    ran = run(program(*K, C1, C2, result="d"), f"{LAYOUT}{{layout=channels_last}},{LAYOUT}")
    assert conversions(ran) == 2
    assert ran.ctx.notes[-1] == "no convolution reads row-major memory"


def test_nothing_to_do_is_the_same_graph(run):
    assert run(program("y = exp(x)"), LAYOUT).unchanged


def test_images_turn_into_rows_of_channels_without_moving(run):
    lines = [
        *K,
        w("p", [4, 4]),
        C1,
        "a = reshape(c, to=(2, 4, 72))",
        "b = permute(a, dims=(0, 2, 1))",
        "l = linear(b, p)",
        "e = permute(l, dims=(0, 2, 1))",
        "f = reshape(e, to=(2, 4, 9, 8))",
        "y = conv2d(f, k)",
    ]
    ran = run(program(*lines), LAYOUT)
    assert ran.ops() == [
        "to_layout",
        "conv2d",
        "permute",
        "reshape",
        "linear",
        "reshape",
        "permute",
        "to_layout",
        "conv2d",
        "to_layout",
    ]
    assert ran.ctx.notes == [
        "2 convolutions channels last, 2 conversions"
    ]  # the middle one is free
