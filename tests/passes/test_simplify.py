"""simplify: exact algebra, bit for bit."""

import pytest
import torch

from effc.ir import parse
from effc.ir.types import DTYPES
from effc.passes.common import holds

SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.5,
        float("inf"),
        float("-inf"),
        float("nan"),
        1e-40,
        -3e-39,
        65504.0,
        3e38,
        7.0,
    ]
)


def program(body, result="y", args="x: f32[12]"):
    lines = "".join(f"    {line.strip()}\n" for line in body.split(";"))
    return f"def graph({args}):\n{lines}    return {result},\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = mul(x, 1)", "return x,"),
        ("y = mul(1.0, x)", "return x,"),
        ("y = div(x, 1)", "return x,"),
        ("y = sub(x, 0)", "return x,"),
        ("y = add(x, -0.0)", "return x,"),
        ("y = pow(x, 1)", "return x,"),
        ("y = mul(x, -1)", "y0: f32[12] = neg(x)\nreturn y0,"),
        ("y = pow(x, 2)", "y0: f32[12] = square(x)\nreturn y0,"),
        ("y = pow(x, 0.5)", "y0: f32[12] = sqrt(x)\nreturn y0,"),
        ("y = div(x, 8)", "y0: f32[12] = mul(x, 0.125)\nreturn y0,"),
        ("a = neg(x); y = neg(a)", "return x,"),
        (
            "a = exp(x); b = neg(x); y = add(a, b)",
            "y0: f32[12] = exp(x)\ny1: f32[12] = sub(y0, x)\nreturn y1,",
        ),
        (
            "a = exp(x); b = neg(x); y = sub(a, b)",
            "y0: f32[12] = exp(x)\ny1: f32[12] = add(y0, x)\nreturn y1,",
        ),
        ("c = gt(x, 0); y = where(c, x, x)", "return x,"),
        (
            "c = full(to=(12,), value=False, dtype_=bool); a = exp(x); y = where(c, a, x)",
            "return x,",
        ),
        ("a = cast(x, dtype_=f64); y = cast(a, dtype_=f32)", "return x,"),
        (
            "a = cast(x, dtype_=f64); y = cast(a, dtype_=bf16)",
            "y0: bf16[12] = cast(x, dtype_=bf16)\nreturn y0,",
        ),
        (
            "a = reshape(x, to=(3, 4)); b = reshape(a, to=(2, 6)); y = reshape(b, to=(12,))",
            "return x,",
        ),
        (
            "a = reshape(x, to=(3, 4)); b = permute(a, dims=(1, 0)); y = permute(b, dims=(1, 0))",
            "y0: f32[3, 4] = reshape(x, to=(3, 4))\nreturn y0,",
        ),
        (
            "a = slice(x, dim=0, start=2, size=8); y = slice(a, dim=-1, start=1, size=3, step=2)",
            "y0: f32[3] = slice(x, dim=-1, start=3, size=3, step=2)\nreturn y0,",
        ),
        ("y = slice(x, dim=0, start=0, size=12)", "return x,"),
        (
            "a = expand(x, to=(1, 12)); y = expand(a, to=(3, 12))",
            "y0: f32[3, 12] = expand(x, to=(3, 12))\nreturn y0,",
        ),
        ("y = pad(x, before=(0,), after=(0,))", "return x,"),
        ("y = cat((x,), dim=0)", "return x,"),
        (
            "a = exp(x); b = cat((x, a), dim=0); y = slice(b, dim=0, start=12, size=12)",
            "y0: f32[12] = exp(x)\nreturn y0,",
        ),
        ("a = copy(x); y = exp(a)", "y0: f32[12] = exp(x)\nreturn y0,"),
        ("a = exp(x); y = copy(a)", "y0: f32[12] = exp(x)\nreturn y0,"),
    ],
)
def test_simplifies(run, before, after):
    ran = run(program(f"{before}; out = tanh(y)", "out"), "simplify", inputs=[SPECIAL])
    *nodes, result = after.splitlines()
    *lines, last, _ = ran.body.splitlines()
    assert lines == nodes
    assert last.endswith(f"tanh({result.removeprefix('return ').rstrip(',')})")


@pytest.mark.parametrize(
    "body",
    [
        "y = mul(x, 1)",
        "y = div(x, 1)",
        "a = neg(x); y = neg(a)",
        "y = cat((x,), dim=0)",
        "y = pad(x, before=(0,), after=(0,))",
        "a = exp(x); b = cat((a, x), dim=0); y = slice(b, dim=0, start=12, size=12)",
        "c = gt(x, 0); y = where(c, x, x)",
        "a = cast(x, dtype_=f64); y = cast(a, dtype_=f32)",
        "y = copy(x)",
    ],
)
def test_a_result_does_not_become_the_input(run, body):
    ran = run(program(body), "simplify", inputs=[SPECIAL])
    assert ran.after.outputs[0] is not ran.after.inputs[0]
    assert any(
        "an output must not share memory with the input" in ran.reasons(rule)
        for rule in ran.ctx.stats
    )


def test_a_view_may_become_the_input(run):
    for body in ("y = reshape(x, to=(12,))", "a = reshape(x, to=(3, 4)); y = reshape(a, to=(12,))"):
        assert run(program(body), "simplify").body == "return x,"


@pytest.mark.parametrize(
    ("before", "rule", "reason"),
    [
        ("y = add(x, 0)", "DropAddZero", "x + 0 turns -0.0 into 0.0"),
        ("y = sub(x, -0.0)", "DropNeutralNumber", "x - (-0.0) turns -0.0 into 0.0"),
        ("y = div(x, 3)", "DivToMul", "1 / 3 is not exact"),
        ("y = div(x, 1048576)", "DivToMul", "1048576 or its reciprocal may not be a normal number"),
        (
            "a = cast(x, dtype_=f16); y = cast(a, dtype_=f32)",
            "CastOfCast",
            "f16 does not hold every f32",
        ),
        ("y = copy(x)", "DropCopy", "an output must not share memory with the input"),
        (
            "e = exp(x); a = reshape(e, to=(3, 4)); b = permute(a, dims=(1, 0)); y = copy(b)",
            "DropCopy",
            "an output must have packed memory of its own, x is a view",
        ),
        (
            "c = full(to=(12,), value=True, dtype_=bool); y = where(c, 1.0, x)",
            "WhereConstant",
            "1.0 is a number",
        ),
    ],
)
def test_refuses(run, before, rule, reason):
    ran = run(program(before), "simplify", inputs=[SPECIAL])
    assert ran.unchanged
    assert reason in ran.reasons(rule)


def test_copy_of_an_output_stays_apart_from_it(run):
    ran = run(program("a = exp(x); y = copy(a)", "a, y"), "simplify")
    assert ran.unchanged
    assert ran.reasons("DropCopy") == ["x is also an output, and the two must not share memory"]


def test_two_outputs_do_not_become_one(run):
    lines = "a = exp(x); b = neg(a); y = neg(b); c = neg(a); z = neg(c)"
    ran = run(program(lines, "y, z"), "simplify")
    assert ran.after.outputs[0] is not ran.after.outputs[1]
    assert ran.hits("DoubleNeg") == 1


def test_refuses_a_change_of_type(run):
    ran = run(program("y = mul(x, 1.0)", args="x: i64[4]"), "simplify")
    assert ran.unchanged
    assert ran.reasons("DropNeutralNumber") == ["the short form is i64[4], not f32[4]"]


def test_neg_of_unsigned_stays(run):
    ran = run(program("n = neg(b); y = add(a, n)", args="a: i32[3], b: u8[3]"), "simplify")
    assert ran.unchanged and ran.reasons("AddNegToSub") == ["neg wraps in u8"]


def test_expand_under_a_broadcasting_op_goes(run):
    ran = run(
        program("b = expand(a, to=(4, 6)); y = mul(x, b)", args="x: f32[4, 6], a: f32[4, 1]"),
        "simplify",
    )
    assert ran.body == "y0: f32[4, 6] = mul(x, a)\nreturn y0,"


def test_expand_of_a_scalar_tensor_keeps_the_element_type(run):
    args = "x: bf16[4], a: f32[()]".replace("[()]", "[1]")
    ran = run(
        program("b = reshape(a, to=()); c = expand(b, to=(4,)); y = gt(x, c)", args=args),
        "simplify",
    )
    assert ran.unchanged
    assert ran.reasons("DropExpand") == ["a 0-d operand computes in bf16"]


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize(
    "body", ["y = pow(x, 2)", "y = pow(x, 0.5)", "y = div(x, 16)", "y = mul(x, -1)"]
)
def test_bit_equal_on_special_values(run, dtype, body):
    x = SPECIAL.to(DTYPES[dtype].torch)
    x = torch.cat([x, torch.randn(4096).mul(100).to(x.dtype)])
    ran = run(program(body, args=f"x: {dtype}[{len(x)}]"), "simplify", inputs=[x])
    assert ran.unchanged == ("0.5" in body and "16" in dtype)


def test_holds_is_true_only_where_every_value_survives():
    kinds = [
        d
        for d in DTYPES.values()
        if d.torch is not None
        and d.name in ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")
    ]
    for narrow in kinds:
        if narrow.bits > 16 and narrow.kind == "int":
            values = torch.tensor([2**24 + 1, -(2**24) - 1, 2 ** (narrow.bits - 1) - 1]).to(
                narrow.torch
            )
        elif narrow.name == "bool":
            values = torch.tensor([False, True])
        elif narrow.bits <= 16:
            bits = torch.arange(2 ** min(narrow.bits, 16))
            view = {8: torch.uint8, 16: torch.int16}[narrow.bits]
            values = (bits if narrow.bits == 8 else bits - 2**15).to(view).view(narrow.torch)
        else:
            values = torch.tensor([1 + 2**-20, 3e38, 1e-40]).to(narrow.torch)
        for wide in kinds:
            back = values.to(wide.torch).to(narrow.torch)
            same = torch.equal(back.nan_to_num(), values.nan_to_num())
            if holds(wide, narrow):
                assert same, (wide, narrow)


def test_nothing_to_do_is_the_same_graph(run):
    ran = run(program("y = exp(x)"), "simplify")
    assert ran.unchanged


def test_layouts_are_kept(run):
    there, back = "a = to_layout(x, layout=channels_last)", "b = to_layout(a, layout=row_major)"
    ran = run(program(f"{there}; {back}; y = exp(b)", args="x: f32[1, 2, 3, 4]"), "simplify")
    assert ran.body == "y0: f32[1, 2, 3, 4] = exp(x)\nreturn y0,"
    ran = run(program("y = to_layout(x, layout=row_major)", args="x: f32[1, 2]"), "simplify")
    assert ran.unchanged  # torch's contiguous(): a caller may write into it
    assert ran.reasons("DropIdentity") == ["an output must not share memory with the input"]


def test_parse_of_the_result(run):
    ran = run(program("y = div(x, 8)"), "simplify")
    assert parse(ran.after.text) == ran.after
