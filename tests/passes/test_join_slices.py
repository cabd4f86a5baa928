"""join-slices: an op on several slices of one value is computed once."""

import pytest

JOIN = "join-slices"


def program(*lines, args, result="y"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"def graph({args}):\n{body}    return {result},\n"


def heads(name, start, size, count, source="x"):
    return [
        f"{name}0 = slice({source}, dim=2, start={start}, size={size})",
        f"{name}1 = reshape({name}0, to=(2, 5, {count}, 8))",
        f"{name}2 = permute({name}1, dims=(0, 2, 1, 3))",
    ]


ROPE = "x: f32[2, 5, 64], c: f32[1, 1, 5, 8], s: f32[1, 1, 5, 8]"


def rotary(second="c, s", start=32):
    return [
        *heads("q", 0, 32, 4),
        *heads("k", start, 16, 2),
        "qr = rope(q2, c, s)",
        f"kr = rope(k2, {second})",
        "y = attention(qr, kr, kr, gqa=True)",
    ]


def test_joins_the_rotary_embedding_of_queries_and_keys(run):
    ran = run(program(*rotary(), args=ROPE), JOIN)
    assert ran.hits("JoinSlices") == 1
    assert ran.count("rope") == 1


def test_rotary_embeddings_by_other_tables_stay_apart(run):
    ran = run(program(*rotary("s, c"), args=ROPE), JOIN)
    assert ran.unchanged


def test_slices_with_a_gap_between_them_stay_apart(run):
    ran = run(program(*rotary(start=40), args=ROPE), JOIN)
    assert ran.unchanged


def test_tables_that_differ_by_head_are_a_reason(run):
    lines = [
        *heads("q", 0, 32, 4),
        *heads("k", 32, 32, 4),
        "a = rope(q2, c, s)",
        "b = rope(k2, c, s)",
        "y = attention(a, b, b)",
    ]
    args = "x: f32[2, 5, 64], c: f32[1, 4, 5, 8], s: f32[1, 1, 5, 8]"
    ran = run(program(*lines, args=args), JOIN)
    assert ran.unchanged and ran.reasons("JoinSlices") == ["input differs from piece to piece"]


UNARY = [
    "a0 = slice(x, dim=1, start=0, size=3)",
    "b0 = slice(x, dim=1, start=3, size=4)",
]


def test_joins_an_activation_that_follows_a_merged_layer(run):
    lines = [*UNARY, "a = silu(a0)", "b = silu(b0)", "y = linear(a, w)", "z = linear(b, v)"]
    args = "x: f32[6, 7], w: f32[5, 3], v: f32[5, 4]"
    ran = run(program(*lines, args=args, result="y, z"), f"{JOIN},simplify")
    assert ran.count("silu") == 1 and ran.count("slice") == 2


def test_an_activation_goes_into_the_loop_that_reads_it(run):
    lines = [
        *UNARY,
        "a = silu(a0)",
        "b = silu(b0)",
        "c = mul(a, 2.0)",
        "y = linear(c, w)",
        "z = linear(b, v)",
    ]
    args = "x: f32[6, 7], w: f32[5, 3], v: f32[5, 4]"
    ran = run(program(*lines, args=args, result="y, z"), JOIN)
    assert ran.unchanged
    assert ran.reasons("JoinSlices") == ["silu is computed where mul reads it"]


def test_outputs_keep_memory_of_their_own(run):
    lines = [*UNARY, "a = exp(a0)", "b = exp(b0)"]
    ran = run(program(*lines, args="x: f32[6, 7]", result="a, b"), JOIN)
    assert ran.unchanged
    assert ran.reasons("JoinSlices") == ["an output must have memory of its own, not a slice"]


@pytest.mark.parametrize("second", ["elu(b0, alpha=0.5)", "elu(b0)", "pow(b0, 3.0)"])
def test_ops_with_other_attributes_stay_apart(run, second):
    first = "elu(a0)" if second != "elu(b0)" else "elu(a0, alpha=0.5)"
    lines = [*UNARY, f"a = {first}", f"b = {second}", "y = linear(a, w)", "z = linear(b, v)"]
    args = "x: f32[6, 7], w: f32[5, 3], v: f32[5, 4]"
    assert run(program(*lines, args=args, result="y, z"), JOIN).unchanged


def test_a_symbolic_batch_joins(run):
    lines = [
        "q = slice(x, dim=1, start=0, size=8)",
        "k = slice(x, dim=1, start=8, size=8)",
        "a = neg(q)",
        "b = neg(k)",
        "y = matmul(a, permute(b, dims=(1, 0)))",
    ]
    lines[-1:] = ["t = permute(b, dims=(1, 0))", "y = matmul(a, t)"]
    ran = run(program(*lines, args="x: f32[N, 16]"), JOIN)
    assert ran.count("neg") == 1
