"""The templates by themselves: every schedule, every access looked at, and by a C++ compiler."""

from __future__ import annotations

import pytest
import torch

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cuda.product import SCHEDULES, Matrix, product, schedule, shared_bytes
from effc.codegen.cuda.rows import row_kernel
from effc.ir.types import DTYPES
from tests.codegen.cuda.running import by_host, by_ptx

BF16, F32 = DTYPES["bf16"], DTYPES["f32"]


def bias_and_relu(s, total):
    y = s.let(BF16, f"{total[0]} + {s.values['bias'][0]}", True)
    return s.let(BF16, f"effc::relu({y[0]})", True)


def linear(m, n, k, by, turned=False, padded=0):
    """The kernel, and its operands: y, a, b, bias. padded: elements between the rows of a and b."""
    walked = (Operand(BF16, (n, 1)), Operand(BF16, (0, 1)))
    right = Matrix(BF16, (n if turned else k) + padded, turned=turned)
    made = product(Nest((m, n), walked), k, Matrix(BF16, k + padded), right, ["bias"],
                   bias_and_relu, by=by)  # fmt: skip
    a = torch.randn(m, k + padded).bfloat16()
    b = torch.randn((k, n + padded) if turned else (n, k + padded)).bfloat16()
    return made, [torch.full((m, n), float("nan")).bfloat16(), a, b, torch.randn(n).bfloat16()]


def expected(args, m, n, k, turned):
    _, a, b, bias = (x.double() for x in args)
    right = b[:, :n] if turned else b[:, :k].T
    return (a[:, :k] @ right + bias).relu()


def assert_right(args, *sizes_and_turned):
    want = expected(args, *sizes_and_turned)
    torch.testing.assert_close(args[0].double(), want, rtol=2**-7, atol=2**-6)


def run(how, made, args):
    x, y, z = made.numbers[:3]
    assert (y, z) == (1, 1)
    how(made.kernel, x, args)


# Sizes that end inside a tile in all three directions; vectors of 8, 4, 2 and 1 elements.
CASES = [
    (SCHEDULES[0], False, 150, 136, 72, 0), (SCHEDULES[1], True, 130, 72, 40, 4),
    (SCHEDULES[2], False, 70, 65, 130, 2), (SCHEDULES[3], True, 33, 67, 65, 1),
    (SCHEDULES[4], False, 17, 64, 257, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    "by, turned, m, n, k, padded",
    [CASES[2], *(pytest.param(*c, marks=pytest.mark.slow) for i, c in enumerate(CASES) if i != 2)],
)
def test_each_schedule_without_a_race_or_a_wrong_address(by, turned, m, n, k, padded):
    made, args = linear(m, n, k, by, turned, padded)
    run(by_ptx, made, args)
    assert_right(args, m, n, k, turned)


def test_a_product_by_a_cpp_compiler():
    by, turned, m, n, k, padded = CASES[3]
    made, args = linear(m, n, k, by, turned, padded)
    run(by_host, made, args)
    assert_right(args, m, n, k, turned)


def test_a_missing_wait_shows_in_the_values():
    """What the host's late copies are for: one stage fewer waited for, and operands are NaN."""
    made, args = linear(64, 64, 192, SCHEDULES[2])
    from effc.codegen.cuda import host

    text = host.plan_function(made.kernel)
    weak = text.replace("cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();")
    assert weak != text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.codegen.cuda.running.plan_function", lambda kernel: weak)
        run(by_host, made, args)
    assert args[0].isnan().any() or not torch.allclose(
        args[0].double(), expected(args, 64, 64, 192, False), rtol=2**-6, atol=2**-5
    )


def test_the_schedule_follows_the_sizes():
    def tile(m, n):
        blocks = dict(schedule(m, n).blocks)
        return blocks["BM"], blocks["BN"]

    assert tile(4096, 4096) == (128, 128)
    assert tile(1024, 1024) == (128, 64)  # 64 of the largest would leave half of the GPU idle
    assert tile(512, 512) == (32, 64)
    assert tile(1, 4096) == tile(8, 4096) == (16, 64)
    assert tile(24, 64) == (32, 64)
    assert all(shared_bytes(s) <= 99 * 1024 for s in SCHEDULES)


def softmax(rows, n):
    def body(p):
        x = p.nodes["x"]
        top = p.reduce("amax", x, F32)
        power = p.let(F32, "effc::exp({0} - {1})", x, top, work=12)
        return [p.let(F32, "{0} / {1}", power, p.reduce("sum", power, F32))]

    walked = (Operand(F32, (n, 1)), Operand(F32, (n, 1)))
    return row_kernel(Nest((rows, n), walked), [("x", True)], 1, (1,), (0, 1), body)


@pytest.mark.parametrize("how", [by_ptx, by_host])
@pytest.mark.parametrize("n", [24, 517, 4100])
def test_rows_either_way(how, n):
    x = torch.randn(5, n)
    y = torch.full((5, n), float("nan"))
    run(how, softmax(5, n), [y, x])
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-7)


def test_a_row_belongs_to_a_warp_or_to_a_block():
    def spread(n):
        made = softmax(8, n)
        return made.kernel.threads, made.numbers[0], dict(made.kernel.schedule.blocks)["VECTOR"]

    assert spread(64) == (128, 2, 4)  # four rows a block
    assert spread(63) == (128, 8, 1) or spread(63) == (128, 2, 1)
    assert spread(4096) == (512, 8, 4)
    assert spread(1 << 20)[0] == 1024
