"""fold-constants: constants meet, within rounding."""

import pytest

FOLD = "fold-constants"


def program(*lines, args="x: f32[2, 3]"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return y,\n"


def w(name, shape, dtype="f32"):
    return f'{name}: {dtype}{shape} = weight("{name}", digest="")'


def test_multiplied_constants_meet(run):
    ran = run(program(w("a", [3]), w("b", [2, 1]), "t = mul(x, a)", "y = mul(t, b)"), FOLD)
    assert ran.unchanged  # [2, 3] is more than either
    assert ran.reasons("MulConstants")[0] == ("the combined constant f32[2, 3] is larger than both")
    ran = run(program(w("a", [3]), w("b", [3]), "t = mul(x, a)", "y = mul(b, t)"), FOLD)
    assert ran.body.splitlines()[-3:] == [
        "y0: f32[3] = mul(w0, w1)",
        "y1: f32[2, 3] = mul(x, y0)",
        "return y1,",
    ]
    assert ran.ctx.notes == ["computed once, when weights are bound: 1 mul"]


def test_numbers_meet(run):
    ran = run(program("a = mul(x, 0.3)", "b = mul(a, 5)", "c = add(b, 1)", "y = add(c, 0.5)"), FOLD)
    assert ran.body == "y0: f32[2, 3] = mul(x, 1.5)\ny1: f32[2, 3] = add(y0, 1.5)\nreturn y1,"


def test_number_and_weight_meet(run):
    ran = run(program(w("a", [3]), "t = mul(x, a)", "y = mul(t, 0.125)"), FOLD)
    assert "mul(w0, 0.125)" in ran.body


@pytest.mark.parametrize(
    ("lines", "rule", "reason"),
    [
        (
            ("a = add(x, 8388608.0)", "y = add(a, -8388608.0)"),
            "AddConstants",
            "8388608.0 and -8388608.0 nearly cancel: the first sum rounds on purpose",
        ),
        (
            ("a = mul(x, 1e-20)", "y = mul(a, 1e-20)"),
            "MulConstants",
            "1e-20 * 1e-20 leaves the range of f32",
        ),
        (("a = mul(x, x)", "y = mul(a, 2.0)"), "MulConstants", "input is not a constant"),
    ],
)
def test_refuses(run, lines, rule, reason):
    ran = run(program(*lines), FOLD)
    assert ran.unchanged
    assert any(reason.split(" is ")[-1] in r for r in ran.reasons(rule))


def test_sixteen_bits_keep_their_roundings(run):
    ran = run(program("a = mul(x, 0.3)", "y = mul(a, 5)", args="x: bf16[4]"), FOLD)
    assert ran.unchanged
    assert ran.reasons("MulConstants")[0] == "a different order of roundings shows in bf16"


def test_nothing_to_do_is_the_same_graph(run):
    ran = run(program("y = exp(x)"), FOLD)
    assert ran.unchanged
    assert ran.ctx.notes == ["nothing but the weights themselves is constant"]


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("factor", ["0.3", "c"])
def test_a_scale_goes_into_the_layer(run, bias, factor):
    lines = (
        w("k", [4, 3]),
        w("b", [4]),
        w("c", [4]),
        f"t = linear(x, k{bias})",
        f"y = mul(t, {factor})",
    )
    ran = run(program(*lines), FOLD)
    assert [n.name for n in ran.after.nodes if n not in ran.after.constants] == ["linear"]
    lines = (
        w("k", [4, 3, 1, 1]),
        w("b", [4]),
        w("c", [4, 1, 1]),
        f"t = conv2d(x, k{bias})",
        f"y = mul(t, {factor})",
    )
    ran = run(program(*lines, args="x: f32[2, 3, 5, 6]"), FOLD)
    assert ran.hits("ScaleIntoLayer") == 1


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            (w("c", [2, 1]), "t = linear(x, k)", "y = mul(t, c)"),
            "f32[2, 1] is not one value an output feature",
        ),
        (("t = linear(x, k)", "y = mul(t, 0.0)"), "0.0 is not a normal number"),
        (("t = linear(x, k)", "u = mul(t, 2.0)", "y = add(t, u)"), "linear is also used by add"),
    ],
)
def test_near_misses_of_scales(run, lines, reason):
    ran = run(program(w("k", [4, 3]), *lines), FOLD)
    assert ran.unchanged and ran.reasons("ScaleIntoLayer")[0] == reason


# ------------------------------------------------------------------ offsets into biases

ADALN = [
    'w: f32[12, 8] = weight("w", digest="")',
    'b: f32[12] = weight("b", digest="")',
    "m = linear(x, w, b)",
    "s0 = slice(m, dim=1, start=4, size=4)",
    "s1 = reshape(s0, to=(3, 1, 4))",
    "s2 = add(s1, 1)",
    "t0 = slice(m, dim=1, start=0, size=4)",
    "t1 = reshape(t0, to=(3, 1, 4))",
]


def adaln(*more, lines=ADALN, result="y"):
    body = "".join(f"    {line}\n" for line in (*lines, *more))
    return f"def graph(x: f32[3, 8], z: f32[3, 5, 4]):\n{body}    return {result},\n"


def test_the_offset_of_a_modulation_joins_the_bias(run):
    ran = run(adaln("p = mul(z, s2)", "y = add(p, t1)"), "fold-constants")
    assert ran.hits("OffsetIntoBias") == 1
    live = [n for n in ran.after.nodes if n.name == "add" and n not in ran.after.constants]
    assert len(live) == 1 and max(ran.errors) < 1e-6


def test_two_offsets_of_one_layer_join_its_bias(run):
    lines = [*ADALN[:-1], "t1 = reshape(t0, to=(3, 1, 4))", "t2 = add(t1, 0.5)"]
    ran = run(adaln("p = mul(z, s2)", "y = add(p, t2)", lines=lines), "fold-constants")
    assert ran.hits("OffsetIntoBias") == 2 and max(ran.errors) < 1e-6


def test_a_slice_also_read_without_the_offset_keeps_it(run):
    ran = run(adaln("p = mul(z, s2)", "y = add(p, s1)"), "fold-constants")
    assert ran.reasons("OffsetIntoBias") == ["reshape is also used without the offset"]


def test_a_layer_read_as_a_whole_keeps_its_bias(run):
    ran = run(adaln("p = mul(z, s2)", "y = add(p, t1)", result="y, m"), "fold-constants")
    assert ran.reasons("OffsetIntoBias") == ["linear is an output"]


def test_overlapping_slices_keep_the_bias(run):
    lines = [*ADALN[:-2], "t0 = slice(m, dim=1, start=2, size=4)", ADALN[-1]]
    ran = run(adaln("p = mul(z, s2)", "y = add(p, t1)", lines=lines), "fold-constants")
    assert ran.reasons("OffsetIntoBias") == ["slice reads the same features without the offset"]


def test_a_layer_without_bias_gets_none(run):
    lines = [ADALN[0], "m = linear(x, w)", *ADALN[3:]]
    ran = run(adaln("p = mul(z, s2)", "y = add(p, t1)", lines=lines), "fold-constants")
    assert ran.reasons("OffsetIntoBias") == ["the layer has no bias"]
