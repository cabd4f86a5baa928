"""fuse-regions: loops, anchors with epilogues, and what the target refuses."""

import pytest

from effc.ir import no, parse, yes
from effc.ir.ops.region import Fused

FUSE = "fuse-regions"


def program(*lines, args="x: f32[4, 6]", result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def w(name, shape):
    return f'{name}: f32{shape} = weight("{name}", digest="")'


def bodies(ran):
    return [
        [n.name for n in node.body.nodes] for node in ran.after.nodes if isinstance(node, Fused)
    ]


def refuse(*names):
    def supports(node):
        bad = next((n for n in node.body.nodes if n.name in names), None)
        return yes if bad is None else no("no kernel computes {}", bad.name, at=bad)

    return supports


# ------------------------------------------------------------------ loops


def test_a_chain_is_one_loop(run):
    ran = run(program("a = exp(x)", "b = mul(a, 2.0)", "y = add(b, x)"), FUSE)
    assert ran.after.text.splitlines()[1:-1] == [
        "    def r0(a0: f32[4, 6]):",
        "        y0: f32[4, 6] = exp(a0)",
        "        y1: f32[4, 6] = mul(y0, 2.0)",
        "        y2: f32[4, 6] = add(y1, a0)",
        "        return y2,",
        "    y0: f32[4, 6] = fused((x,), body=r0)",
    ]
    assert ran.hits("FuseLoop") == 1
    assert parse(ran.after.text) == ran.after


def test_broadcast_operands_stay_outside(run):
    lines = (w("b", [6]), "c = exp(b)", "d = exp(s)", "a = add(x, c)", "y = mul(a, d)")
    ran = run(program(*lines, args="x: f32[4, 6], s: f32[4, 1]"), FUSE)
    assert bodies(ran) == [["add", "mul"]]
    assert ran.count("exp") == 2


def test_several_results(run):
    ran = run(program("a = exp(x)", "b = neg(a)", "c = abs(b)", result="a, c"), FUSE)
    assert bodies(ran) == [["exp", "neg", "abs"]]
    assert ran.count("item") == 2


def test_casts_and_comparisons_join(run):
    lines = (
        "c = gt(x, 0.5)",
        "f = cast(x, dtype_=bf16)",
        "z = full(to=(), value=0.0, dtype_=bf16)",
        "y = where(c, f, z)",
    )
    assert bodies(run(program(*lines), FUSE)) == [["gt", "cast", "where"]]


@pytest.mark.parametrize("row", ["softmax(a, dim=-1)", "layer_norm(a, g, b)", "rms_norm(a, g)"])
def test_one_row_op_with_prologue_and_epilogue(run, row):
    lines = (
        w("g", [6]),
        w("b", [6]),
        "a = add(x, 1.0)",
        f"n = {row}",
        "m = mul(n, x)",
        "y = neg(m)",
    )
    ran = run(program(*lines), FUSE)
    assert bodies(ran) == [["add", row.split("(")[0], "mul", "neg"]]


def test_values_along_rows(run):
    lines = (
        "q = square(x)",
        "m = mean(q, dims=(1,), keepdim=True)",
        "e = add(m, 1e-05)",
        "r = rsqrt(e)",
        "y = mul(x, r)",
    )
    assert bodies(run(program(*lines), FUSE)) == [["square", "mean", "add", "rsqrt", "mul"]]


def test_a_second_row_op_begins_another_loop(run):
    lines = (
        "m = mean(x, dims=(1,), keepdim=True)",
        "d = sub(x, m)",
        "q = square(d)",
        "v = mean(q, dims=(1,), keepdim=True)",
        "r = rsqrt(v)",
        "y = mul(d, r)",
    )
    ran = run(program(*lines), FUSE)
    assert bodies(ran) == [["mean", "sub"], ["square", "mean", "rsqrt", "mul"]]


def test_no_path_leaves_a_loop_and_comes_back(run):
    lines = ("a = exp(x)", "c: f32[4, 6] = aten.cumsum.default(a, 1)", "y = add(a, c)")
    ran = run(program(*lines), FUSE)
    assert ran.unchanged
    assert ran.reasons("FuseLoop") == ["an op outside would run between add and what it reads"]


def test_random_ops_keep_their_order(run):
    lines = (
        "a = exp(x)",
        "r: f32[4, 6] = aten.rand_like.default(x)",
        "s: f32[4, 6] = aten.rand_like.default(x)",
        "b = add(a, s)",
        "y = mul(b, 0.0)",
    )
    ran = run(program(*lines), FUSE)
    assert bodies(ran) == [["exp", "add", "mul"]]
    random = [n for n in ran.after.nodes if n.random]
    fused = next(n for n in ran.after.nodes if isinstance(n, Fused))
    assert len(random) == 2 and random[1] in fused.xs


def test_shapes_do_not_mix(run):
    lines = ("a = exp(x)", "b = reshape(a, to=(24,))", "c = neg(b)", "y = abs(c)")
    assert bodies(run(program(*lines), FUSE)) == [["neg", "abs"]]


def test_layouts_do_not_mix(run):
    lines = ("c = to_layout(x, layout=channels_last)", "a = exp(c)", "y = add(a, x)")
    ran = run(program(*lines, args="x: f32[1, 2, 3, 4]"), FUSE)
    assert ran.unchanged


def test_max_operands(run):
    lines = ("a = add(x, p)", "b = add(a, q)", "y = add(b, r)")
    args = "x: f32[4], p: f32[4], q: f32[4], r: f32[4]"
    ran = run(program(*lines, args=args), "fuse-regions{max_operands=3}")
    assert bodies(ran) == [["add", "add"]]
    assert ran.reasons("FuseLoop") == ["4 operands, at most 3"]


def test_a_refused_op_is_left_out(run):
    lines = ("a = exp(x)", "b = tan(a)", "c = neg(b)", "y = abs(c)")
    ran = run(program(*lines), FUSE, supports=refuse("tan"))
    assert bodies(ran) == [["neg", "abs"]]
    assert ran.reasons("FuseLoop") == ["no kernel computes tan"]


def test_a_refusal_without_a_culprit_drops_the_row_op_then_all(run):
    lines = ("a = exp(x)", "b = neg(a)", "s = softmax(b, dim=1)", "c = mul(s, 2.0)", "y = abs(c)")
    ran = run(
        program(*lines), FUSE, supports=lambda n: yes if len(n.body.nodes) < 5 else no("too long")
    )
    assert bodies(ran) == [["exp", "neg"], ["mul", "abs"]]
    ran = run(program(*lines), FUSE, supports=lambda n: no("never"))
    assert ran.unchanged and "never" in ran.reasons("FuseLoop")


def test_equal_regions_share_a_name(run):
    lines = (
        "a = exp(x)",
        "b = neg(a)",
        "t = reshape(b, to=(6, 4))",
        "s = reshape(t, to=(4, 6))",
        "c = exp(s)",
        "y = neg(c)",
    )
    ran = run(program(*lines), FUSE)
    assert [n.body.name for n in ran.after.nodes if isinstance(n, Fused)] == ["r0", "r0"]


def test_symbolic_sizes(run):
    ran = run(program("a = mul(x, N)", "y = add(a, 1)", args="x: f32[N, 6]"), FUSE, sizes={"N": 3})
    assert bodies(ran) == [["mul", "add"]]


def test_again_changes_nothing(run):
    ran = run(program("a = exp(x)", "y = neg(a)"), "fuse-regions,fuse-regions")
    assert bodies(ran) == [["exp", "neg"]]


def test_nothing_to_do_is_the_same_graph(run):
    ran = run(program("y = exp(x)"), FUSE)
    assert ran.unchanged
    assert ran.ctx.notes == ["no two ops can share a loop"]


# ------------------------------------------------------------------ anchors


CONV = (w("k", [8, 3, 3, 3]), w("b", [8]))
IMAGE = "x: f32[1, 3, 8, 8], r: f32[1, 8, 8, 8]"


def test_convolution_takes_its_epilogue(run):
    lines = (*CONV, "c = conv2d(x, k, b, padding=(1, 1))", "a = relu(c)", "y = add(a, r)")
    ran = run(program(*lines, args=IMAGE), FUSE)
    assert bodies(ran) == [["conv2d", "relu", "add"]]
    assert ran.hits("FuseEpilogue") == 1


def test_the_op_before_an_anchor_stays_outside(run):
    lines = (
        *CONV,
        "a = exp(x)",
        "b2 = neg(a)",
        "c = conv2d(b2, k, b, padding=(1, 1))",
        "y = relu(c)",
    )
    ran = run(program(*lines, args="x: f32[1, 3, 8, 8]"), FUSE)
    assert bodies(ran) == [["exp", "neg"], ["conv2d", "relu"]]


def test_a_gate_that_only_the_epilogue_reads_joins(run):
    lines = (*CONV, "c = conv2d(x, k, b, padding=(1, 1))", "s = sigmoid(r)", "y = mul(c, s)")
    assert bodies(run(program(*lines, args=IMAGE), FUSE)) == [["conv2d", "sigmoid", "mul"]]


def test_a_result_used_twice_in_the_epilogue(run):
    lines = (*CONV, "c = conv2d(x, k, b, padding=(1, 1))", "s = sigmoid(c)", "y = mul(c, s)")
    assert bodies(run(program(*lines, args=IMAGE), FUSE)) == [["conv2d", "sigmoid", "mul"]]


def test_a_result_used_outside_keeps_the_anchor_alone(run):
    lines = (
        *CONV,
        "c = conv2d(x, k, b, padding=(1, 1))",
        "s = sigmoid(c)",
        "y = add(s, r)",
        "z = permute(c, dims=(0, 2, 3, 1))",
    )
    ran = run(program(*lines, args=IMAGE, result="y, z"), FUSE)
    assert bodies(ran) == [["sigmoid", "add"]]
    assert ran.reasons("FuseEpilogue") == ["conv2d is also used by permute"]


def test_the_epilogue_ends_where_a_second_result_would_begin(run):
    lines = (
        *CONV,
        "c = conv2d(x, k, b, padding=(1, 1))",
        "a = relu(c)",
        "d = add(a, r)",
        "y = neg(d)",
    )
    ran = run(program(*lines, args=IMAGE, result="d, y"), FUSE)
    assert bodies(ran) == [["conv2d", "relu", "add"]]
    assert ran.ops()[-1] == "neg"


def test_the_later_anchor_takes_a_shared_add(run):
    lines = (
        *CONV,
        "c = conv2d(x, k, b, padding=(1, 1))",
        "d = conv2d(x, k, padding=(1, 1))",
        "y = add(c, d)",
    )
    ran = run(program(*lines, args="x: f32[1, 3, 8, 8]"), FUSE)
    assert bodies(ran) == [["conv2d", "add"]]
    assert ran.ops() == ["conv2d", "fused"]


@pytest.mark.parametrize("call", ["linear(x, k, b)", "matmul(x, m)", "attention(x, x, x)"])
def test_other_anchors(run, call):
    lines = (
        w("k", [6, 6]),
        w("b", [6]),
        w("m", [6, 6]),
        f"h = {call}",
        "g = gelu(h)",
        "y = add(g, x)",
    )
    assert bodies(run(program(*lines), FUSE)) == [[call.split("(")[0], "gelu", "add"]]


def test_norm_before_linear_when_nothing_else_reads_it(run):
    lines = (w("k", [8, 6]), w("g", [6]), "n = rms_norm(x, g)", "y = linear(n, k)")
    assert bodies(run(program(*lines), FUSE)) == [["rms_norm", "linear"]]
    ran = run(program(*lines, result="y, n"), FUSE)
    assert ran.unchanged
    assert ran.reasons("FuseEpilogue") == ["rms_norm is also used elsewhere"]


def test_a_refused_norm_leaves_the_epilogue_and_joins_a_loop(run):
    lines = (
        w("k", [8, 6]),
        w("g", [6]),
        "a = add(x, 1.0)",
        "n = rms_norm(a, g)",
        "h = linear(n, k)",
        "y = silu(h)",
    )

    def supports(node):
        names = [n.name for n in node.body.nodes]
        return no("no norm prologue") if {"rms_norm", "linear"} <= set(names) else yes

    ran = run(program(*lines), FUSE, supports=supports)
    assert bodies(ran) == [["add", "rms_norm"], ["linear", "silu"]]
    assert "no norm prologue" in ran.reasons("FuseEpilogue")


def test_pixel_shuffle_ends_a_convolution(run):
    lines = (
        *CONV,
        "c = conv2d(x, k, b, padding=(1, 1))",
        "a = relu(c)",
        "y = pixel_shuffle(a, factor=2)",
    )
    ran = run(program(*lines, args="x: f32[1, 3, 8, 8]"), FUSE)
    assert bodies(ran) == [["conv2d", "relu", "pixel_shuffle"]]


def test_a_change_of_layout_ends_a_convolution(run):
    lines = (
        *CONV,
        "l = to_layout(x, layout=channels_last)",
        "c = conv2d(l, k, b)",
        "s = pixel_shuffle(c, factor=2)",
        "y = to_layout(s, layout=row_major)",
    )
    ran = run(program(*lines, args="x: f32[1, 3, 8, 8]"), FUSE, supports=nothing_before)
    assert bodies(ran) == [["conv2d", "pixel_shuffle", "to_layout"]]
    assert "to_layout before a convolution" in ran.reasons("FuseEpilogue")


def nothing_before(node):
    first = node.body.nodes[0]
    return yes if first.name == "conv2d" else no("{} before a convolution", first.name)


@pytest.mark.parametrize(
    "before",
    ["to_layout(x, layout=channels_last)", "max_pool2d(x, kernel=(3, 3), stride=(1, 1))",
     "avg_pool2d(x, kernel=(3, 3), stride=(1, 1))"],
)  # fmt: skip
def test_what_a_picture_is_read_through_joins_the_convolution(run, before):
    lines = (*CONV, f"p = {before}", "c = conv2d(p, k, b)", "y = relu(c)")
    args, name = "x: f32[1, 3, 8, 8]", before.partition("(")[0]
    assert bodies(run(program(*lines, args=args), FUSE)) == [[name, "conv2d", "relu"]]
    ran = run(program(*lines, args=args), FUSE, supports=nothing_before)
    assert bodies(ran) == [["conv2d", "relu"]] and ran.count(name) == 1
    ran = run(program(*lines, args=args, result="y, p"), FUSE)
    assert bodies(ran) == [["conv2d", "relu"]]


POINT = (*CONV, w("p", [4, 8, 1, 1]), "c = conv2d(x, k, b, padding=(1, 1))", "a = relu(c)",
         "s = add(a, r)", "d = conv2d(s, p)", "y = sigmoid(d)")  # fmt: skip


def one_convolution(node):
    names = [n.name for n in node.body.nodes]
    return no("two convolutions") if names.count("conv2d") > 1 else yes


def test_a_1x1_convolution_joins_the_one_before_it(run):
    whole = ["conv2d", "relu", "add", "conv2d", "sigmoid"]
    assert bodies(run(program(*POINT, args=IMAGE), FUSE)) == [whole]
    apart = [["conv2d", "relu", "add"], ["conv2d", "sigmoid"]]
    ran = run(program(*POINT, args=IMAGE), FUSE, supports=one_convolution)
    assert bodies(ran) == apart and "two convolutions" in ran.reasons("FuseEpilogue")
    assert bodies(run(program(*POINT, args=IMAGE, result="y, s"), FUSE)) == apart
    wide = [line.replace("[4, 8, 1, 1]", "[4, 8, 3, 3]") for line in POINT]
    assert bodies(run(program(*wide, args=IMAGE), FUSE)) == apart


ENLARGED = "x: f32[1, 3, 8, 8], q: f32[1, 8, 3, 3]"
SUM = (
    *CONV, "c = conv2d(x, k, b, padding=(1, 1))", "u = interpolate(q, size=(8, 8))", "s = add(c, u)",
    "y = sigmoid(s)",
)  # fmt: skip


def test_an_enlarged_picture_that_only_the_epilogue_reads_joins(run):
    assert bodies(run(program(*SUM, args=ENLARGED), FUSE)) == [
        ["conv2d", "interpolate", "add", "sigmoid"]
    ]
    ran = run(program(*SUM, args=ENLARGED), FUSE, supports=refuse("interpolate"))
    assert bodies(ran) == [["conv2d", "add", "sigmoid"]] and ran.count("interpolate") == 1
    assert "no kernel computes interpolate" in ran.reasons("FuseEpilogue")
    ran = run(program(*SUM, args=ENLARGED, result="y, u"), FUSE)
    assert bodies(ran) == [["conv2d", "add", "sigmoid"]]


def test_an_enlarged_picture_that_waits_for_the_convolution_stays_outside(run):
    lines = (
        *CONV, "c = conv2d(x, k, b, padding=(1, 1))", "m = max_pool2d(c, kernel=(2, 2), stride=(2, 2))",
        "u = interpolate(m, size=(8, 8))", "y = add(c, u)",
    )  # fmt: skip
    ran = run(program(*lines, args="x: f32[1, 3, 8, 8]"), FUSE)
    assert ran.unchanged


def test_a_refused_epilogue_shrinks(run):
    lines = (
        *CONV,
        "c = conv2d(x, k, b, padding=(1, 1))",
        "a = relu(c)",
        "t = tan(a)",
        "y = add(t, r)",
    )
    ran = run(program(*lines, args=IMAGE), FUSE, supports=refuse("tan"))
    assert bodies(ran) == [["conv2d", "relu"]]
    assert ran.reasons("FuseEpilogue") == ["no kernel computes tan"]


def test_anchors_can_be_left_alone(run):
    lines = (*CONV, "c = conv2d(x, k, b, padding=(1, 1))", "a = relu(c)", "y = add(a, r)")
    ran = run(program(*lines, args=IMAGE), "fuse-regions{anchors=False}")
    assert bodies(ran) == [["relu", "add"]]


def test_rows_first_gives_the_add_to_the_norm(run):
    lines = (
        w("k", [6, 6]),
        w("g", [6]),
        "h = linear(x, k)",
        "a = add(h, x)",
        "n = rms_norm(a, g)",
        "y = linear(n, k)",
    )
    ran = run(
        program(*lines, result="y, a"), "fuse-regions{rows_first=True}", supports=no_norm_prologue
    )
    assert bodies(ran) == [["add", "rms_norm"]]
    ran = run(program(*lines, result="y, a"), FUSE, supports=no_norm_prologue)
    assert bodies(ran) == [["linear", "add"]]


def no_norm_prologue(node):
    names = [n.name for n in node.body.nodes]
    return no("no norm prologue") if {"rms_norm", "linear"} <= set(names) else yes


def test_group_norm_takes_its_activation(run):
    lines = (w("g", [4]), "n = group_norm(x, groups=2, weight=g, bias=g)", "y = silu(n)")
    assert bodies(run(program(*lines, args="x: f32[2, 4, 3, 5]"), FUSE)) == [["group_norm", "silu"]]


def test_no_operands_allowed_means_no_regions(run):
    lines = (*CONV, "c = conv2d(x, k, b, padding=(1, 1))", "a = relu(c)", "y = add(a, r)")
    assert run(program(*lines, args=IMAGE), "fuse-regions{max_operands=0}").unchanged


# ------------------------------------------------------------------ more around a product

GATED = (
    w("k", [8, 6]),
    w("u", [8, 6]),
    "g = linear(x, k)",
    "s = silu(g)",
    "h = linear(x, u)",
    "y = mul(s, h)",
)


def one_product(node):
    names = [n.name for n in node.body.nodes]
    if names.count("linear") > 1:
        return no("two products")
    before = names[: names.index("linear")] if "linear" in names else []
    return no("{} before a product", before[0]) if before else yes


def test_two_linear_layers_of_one_value_join(run):
    assert bodies(run(program(*GATED), FUSE)) == [["linear", "silu", "linear", "mul"]]


def test_refused_they_go_their_own_ways(run):
    ran = run(program(*GATED), FUSE, supports=one_product)
    assert bodies(ran) == [["linear", "silu", "mul"]] and ran.count("linear") == 1
    assert "two products" in ran.reasons("FuseEpilogue")


def test_layers_with_nothing_that_joins_them_stay_apart(run):
    lines = (*GATED[:5], "t = tanh(h)")
    assert bodies(run(program(*lines, result="s, t"), FUSE)) == [
        ["linear", "silu"],
        ["linear", "tanh"],
    ]
    ran = run(program(*GATED, result="y, s"), FUSE)  # a result of its own: no pair
    assert bodies(ran) == [["linear", "silu"], ["linear", "mul"]]


def test_pointwise_ops_before_a_product(run):
    lines = (w("k", [8, 6]), "a = exp(x)", "b = neg(a)", "h = linear(b, k)", "y = relu(h)")
    assert bodies(run(program(*lines), FUSE)) == [["exp", "neg", "linear", "relu"]]
    ran = run(program(*lines), FUSE, supports=one_product)
    assert bodies(ran) == [["exp", "neg"], ["linear", "relu"]]
    assert "exp before a product" in ran.reasons("FuseEpilogue")
    assert bodies(run(program(*lines, result="y, b"), FUSE)) == [["exp", "neg"], ["linear", "relu"]]


def test_what_follows_a_product_is_not_before_the_next(run):
    lines = (w("k", [6, 6]), "h = linear(x, k)", "a = gelu(h)", "y = linear(a, k)")
    assert bodies(run(program(*lines), FUSE)) == [["linear", "gelu"]]
