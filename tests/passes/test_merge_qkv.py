"""merge-qkv: siblings that read one value become one layer."""

import pytest

from effc.ir import no, yes

MERGE = "merge-qkv"


def program(*lines, args="x: f32[3, 5, 8]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def w(name, shape, dtype="f32"):
    return f'{name}: {dtype}{shape} = weight("{name}", digest="")'


def qkv(q=8, kv=4, bias=("", "", "")):
    sizes = {"q": q, "k": kv, "v": kv}
    lines = []
    for (name, size), b in zip(sizes.items(), bias, strict=True):
        lines += [
            w(f"w{name}", [size, 8]),
            w(f"b{name}", [size]),
            f"{name} = linear(x, w{name}{b})",
        ]
    heads = "to=(3, 5, {}, 4)"
    lines += [f"{n}4 = reshape({n}, {heads.format(s // 4)})" for n, s in sizes.items()]
    return [*lines, "kk = add(k4, v4)", "y = mul(q4, kk)"]


@pytest.mark.parametrize("bias", [("", "", ""), (", bq", ", bk", ", bv")])
def test_merges_query_key_and_value(run, bias):
    ran = run(program(*qkv(bias=bias)), MERGE)
    assert ran.count("linear") == 1 and ran.count("slice") == 3
    assert ran.hits("MergeSiblings") == 1


def test_layers_with_and_without_bias_merge_apart(run):
    ran = run(program(*qkv(bias=(", bq", "", ", bv"))), MERGE)
    assert ran.count("linear") == 2 and ran.count("slice") == 2
    assert ran.reasons("MergeSiblings") == ["3 layers that read it differ in bias or geometry"]


def test_merges_pointwise_convolutions(run):
    lines = [
        w("a", [4, 6, 1, 1]),
        w("b", [2, 6, 1, 1]),
        "c = conv2d(x, a)",
        "d = conv2d(x, b)",
        "y = cat((c, d), dim=1)",
    ]
    ran = run(program(*lines, args="x: f32[2, 6, 3, 4]"), MERGE)
    assert ran.count("conv2d") == 1


def test_convolutions_of_other_geometry_stay(run):
    lines = [
        w("a", [4, 6, 1, 1]),
        w("b", [2, 6, 1, 1]),
        "c = conv2d(x, a)",
        "d = conv2d(x, b, stride=(2, 2))",
        "e = mean(c, dims=(2, 3))",
        "f = mean(d, dims=(2, 3))",
        "y = cat((e, f), dim=1)",
    ]
    ran = run(program(*lines, args="x: f32[2, 6, 3, 4]"), MERGE)
    assert ran.unchanged
    assert ran.reasons("MergeSiblings")[0] == "2 layers that read it differ in bias or geometry"


GATED = [
    w("g", [16, 8]),
    w("u", [16, 8]),
    "a = linear(x, g)",
    "b = silu(a)",
    "c = linear(x, u)",
    "y = mul(b, c)",
]


def test_a_gate_stays_where_the_target_fuses_it(run):
    ran = run(program(*GATED), MERGE)
    assert ran.unchanged
    assert ran.reasons("MergeSiblings") == [
        "mul joins its layer instead, which saves 1920 bytes for 480"
    ]
    ran = run(
        program(*GATED), MERGE, supports=lambda n: no("no epilogues") if len(n.xs) > 1 else yes
    )
    assert ran.count("linear") == 1


def test_an_output_is_not_a_slice(run):
    lines = [w("a", [4, 8]), w("b", [4, 8]), "c = linear(x, a)", "y = linear(x, b)", "z = neg(c)"]
    ran = run(program(*lines, result="y, z"), MERGE)
    assert ran.unchanged
    assert ran.reasons("MergeSiblings") == ["an output must have memory of its own, not a slice"]


def test_weights_from_inputs_stay(run):
    lines = [w("a", [8, 8]), "c = linear(x, a)", "d = linear(x, b)", "y = matmul(c, d)"]
    ran = run(program(*lines, args="x: f32[8, 8], b: f32[8, 8]"), MERGE)
    assert ran.reasons("MergeSiblings") == ["input is computed from inputs"]


def test_nothing_to_do_is_the_same_graph(run):
    ran = run(program("y = exp(x)"), MERGE)
    assert ran.unchanged and ran.ctx.notes == ["no linear layer and no convolution"]


def test_layers_followed_by_one_activation_each_merge_with_it(run):
    """The activation then follows the one layer: join-slices."""
    lines = []
    for n in "ab":
        lines += [w(f"w{n}", [64, 8]), w(f"v{n}", [4, 64]), f"{n} = linear(x, w{n})"]
    lines += ["c = silu(a)", "d = silu(b)", "e = linear(c, va)", "f = linear(d, vb)"]
    lines += ["y = mul(e, f)"]
    ran = run(program(*lines), f"{MERGE},join-slices,simplify")
    assert ran.count("silu") == 1 and ran.count("linear") == 3


def test_layers_followed_by_different_activations_stay_apart(run):
    lines = []
    for n in "ab":
        lines += [w(f"w{n}", [64, 8]), w(f"v{n}", [4, 64]), f"{n} = linear(x, w{n})"]
    lines += ["c = silu(a)", "d = gelu(b)", "e = linear(c, va)", "f = linear(d, vb)"]
    lines += ["y = mul(e, f)"]
    assert run(program(*lines), MERGE).unchanged
