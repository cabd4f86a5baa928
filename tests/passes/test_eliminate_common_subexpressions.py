"""eliminate-common-subexpressions: equal values once, except where a caller could tell."""

CSE = "eliminate-common-subexpressions"


def program(*lines, result="y", args="x: f32[4]"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def test_merges_chains(run):
    ran = run(program("a = exp(x)", "b = exp(x)", "c = neg(a)", "d = neg(b)", "y = add(c, d)"), CSE)
    assert ran.body == (
        "y0: f32[4] = exp(x)\ny1: f32[4] = neg(y0)\ny2: f32[4] = add(y1, y1)\nreturn y2,"
    )
    assert ran.hits("MergeEqual") == 2


def test_numbers_that_compare_equal_are_different_operands(run):
    ran = run(program("a = mul(x, 1)", "b = mul(x, 1.0)", "y = div(a, b)", args="x: i64[4]"), CSE)
    assert ran.unchanged


def test_two_outputs_keep_memory_of_their_own(run):
    ran = run(program("a = exp(x)", "b = exp(x)", result="a, b"), CSE)
    assert ran.unchanged
    assert ran.reasons("MergeEqual") == ["eager gives two outputs memory of their own"]


def test_two_outputs_through_views_too(run):
    lines = ("a = exp(x)", "b = exp(x)", "c = reshape(a, to=(2, 2))", "d = reshape(b, to=(2, 2))")
    assert run(program(*lines, result="c, d"), CSE).unchanged


def test_one_output_merges_with_an_inner_value(run):
    ran = run(program("a = exp(x)", "b = exp(x)", "c = neg(b)", result="a, c"), CSE)
    assert ran.ops() == ["exp", "neg"]


def test_a_third_output_is_refused_after_a_merge(run):
    lines = ("a = exp(x)", "b = exp(x)", "c = exp(x)", "d = neg(a)")
    ran = run(program(*lines, result="b, c, d"), CSE)
    assert ran.ops() == ["exp", "exp", "neg"]


def test_random_ops_stay(run):
    lines = (
        "a: f32[4] = aten.rand_like.default(x)",
        "b: f32[4] = aten.rand_like.default(x)",
        "y = sub(a, b)",
        "z = mul(x, 2)",
    )
    ran = run(program(*lines, result="z").replace("y = sub(a, b)", "y = sub(a, b)"), CSE)
    assert ran.unchanged


def test_equal_weights_stay_apart(run):
    lines = (
        'w = weight("a", digest="")',
        'v = weight("a", digest="")',
        "y = add(w, v)",
        "z = add(x, y)",
    )
    text = program(*lines, result="z").replace("w =", "w: f32[4] =").replace("v =", "v: f32[4] =")
    assert run(text, CSE).unchanged
