"""Mistakes planted in kernels, and what is said of them."""

import numpy as np
import pytest
import torch

from effc.codegen.ptx import Fault, race
from effc.ir.errors import InputError

from .harness import kernel

EXCHANGE = """
.shared .align 4 .b8 s[256];
mov.u32 %r1, s;
shl.b32 %r2, %t, 2;
add.u32 %r3, %r1, %r2;
st.shared.u32 [%r3], %t;
BARRIER
xor.b32 %r4, %r2, MASK;
add.u32 %r5, %r1, %r4;
ld.shared.u32 %r0, [%r5];
mad.wide.u32 %d0, %t, 4, %q0;
st.global.u32 [%d0], %r0;
"""


def exchange(barrier, mask=128):
    """Each thread reads what thread t ^ (mask / 4) wrote."""
    return kernel(
        EXCHANGE.replace("BARRIER", barrier).replace("MASK", str(mask)), ("u64",), threads=64
    )


def found(k, *args, **kw):
    return race(k, 1, args, **kw)


def test_a_barrier_in_its_place_is_clean():
    report = found(exchange("bar.sync 0;"), np.zeros(64, np.int32))
    assert report.clean and not report
    assert str(report) == "kernel k: nothing found under 6 schedules"
    assert (report.results[0] == np.arange(64) ^ 32).all()


def test_a_missing_barrier_names_both_lines_and_the_element():
    report = found(exchange(""), np.zeros(64, np.int32))
    kinds = {f.kind for f in report.findings}
    assert kinds == {"race", "uninitialised shared memory"}
    first = next(f for f in report.findings if f.kind == "race")
    assert {first.instruction.opcode, first.other.opcode} == {"ld.shared.u32", "st.shared.u32"}
    assert "with no barrier between" in str(first) and "PTX line" in str(first)
    (difference,) = report.differences
    assert difference.argument == 0 and "depends on the schedule" in str(difference)
    with pytest.raises(Fault, match="race on shared memory"):
        report.raise_if_found()


def test_within_a_warp_only_its_own_barrier_orders():
    """Lanes run in lockstep here, so that results agree; the GPU promises no such thing."""
    report = found(exchange("", mask=4), np.zeros(64, np.int32))
    assert [f.kind for f in report.findings].count("race") >= 1 and not report.differences
    assert found(exchange("bar.warp.sync -1;", mask=4), np.zeros(64, np.int32)).clean


ASYNC = """
.shared .align 16 .b8 s[1024];
mov.u32 %r1, s;
mad.lo.u32 %r2, %t, 16, %r1;
mad.wide.u32 %d0, %t, 16, %q1;
cp.async.cg.shared.global [%r2], [%d0], 16;
cp.async.commit_group;
cp.async.ca.shared.global [%r2+512], [%d0+512], 16, 8;
cp.async.commit_group;
cp.async.wait_group WAIT;
bar.sync 0;
ld.shared.v2.u32 {%r4, %r5}, [%r2+READ];
mad.wide.u32 %d1, %t, 8, %q0;
st.global.v2.u32 [%d1], {%r4, %r5};
"""


@pytest.mark.parametrize(
    ("wait", "read", "clean"), [(1, 0, True), (0, 512, True), (1, 512, False), (2, 0, False)]
)
def test_async_copies_must_be_waited_for(wait, read, clean):
    k = kernel(ASYNC.replace("WAIT", str(wait)).replace("READ", str(read)))
    x = np.arange(256, dtype=np.int32)
    out = np.zeros((32, 2), np.int32)
    report = found(k, out, x)
    assert report.clean == clean
    if clean:
        assert (report.results[0] == x.reshape(64, 4)[read // 16 :][:32, :2]).all()
    else:
        assert report.findings[0].kind == "weak async wait"
        assert report.findings[0].other.opcode.startswith("cp.async")
        assert report.differences  # lazy copies leave the poison


def test_async_copies_of_one_place_wait_for_each_other():
    """PTX keeps no order among copies that are under way, of one thread's either."""
    copy = "cp.async.cg.shared.global [%r2], [%d0], 16;\ncp.async.commit_group;\n"
    text = ASYNC.replace(copy, f"{copy}BETWEEN\n{copy}").replace("WAIT", "0").replace("READ", "0")
    x, out = np.arange(256, dtype=np.int32), np.zeros((32, 2), np.int32)
    assert found(kernel(text.replace("BETWEEN", "cp.async.wait_group 0;")), out, x).clean
    report = found(kernel(text.replace("BETWEEN", "")), out, x)
    assert {f.kind for f in report.findings} == {"weak async wait"}


def test_a_wait_and_a_barrier_of_a_warp_can_be_left_out():
    k = kernel(ASYNC.replace("WAIT", "0").replace("READ", "0"))
    wait, barrier = k.barriers
    args = [np.zeros((32, 2), np.int32), np.arange(256, dtype=np.int32)]
    assert wait.name == "cp" and race(k, 1, args, without=wait).findings
    assert race(k, 1, args, without=barrier).clean, "each thread reads what it copied itself"
    k = exchange("bar.warp.sync -1;", mask=4)
    assert race(k, 1, [np.zeros(64, np.int32)], without=k.barriers[0]).findings


def test_async_copies_fill_with_zeros():
    k = kernel(ASYNC.replace("WAIT", "0").replace("READ", "520"))
    out = np.full((32, 2), 9, np.int32)
    k.launch(1, [out, np.ones(256, np.int32)])
    assert (out == 0).all()


def test_out_of_bounds_names_the_array():
    k = kernel("mad.wide.u32 %d0, %t, 4, %q0;\nst.global.u32 [%d0+8], %t;", ("u64",))
    with pytest.raises(Fault) as fault:
        k.launch(1, [np.zeros(32, np.int32)], check=True)
    said = str(fault.value)
    assert "out of bounds: block (0, 0, 0), thread (30, 0, 0) writes 4 bytes" in said
    assert "byte 128 of array argument 0, which has 128" in said
    assert fault.value.findings[0].count == 2


@pytest.mark.parametrize("array", [np.zeros, torch.zeros])
def test_what_lies_past_the_end_is_no_other_array(array):
    """Small arrays lie side by side in memory, where one would be read for the other."""
    k = kernel("mad.wide.u32 %d0, %t, 4, %q1;\nld.global.u32 %r1, [%d0+128];\n"
               "mad.wide.u32 %d0, %t, 4, %q0;\nst.global.u32 [%d0], %r1;")  # fmt: skip
    dtype = np.int32 if array is np.zeros else torch.int32
    many = [array(32, dtype=dtype) for _ in range(16)]
    (finding,) = found(k, *many[7:9]).findings
    assert finding.kind == "out of bounds" and "of array argument 1, which has 128" in str(finding)


def test_misaligned_and_shared_bounds():
    k = kernel(".shared .align 4 .b8 s[128];\nmov.u32 %r1, s;\nmad.lo.u32 %r2, %t, 4, %r1;\n"
               "st.shared.u32 [%r2+4], %t;\nst.shared.b32 [s+2], %t;", ("u64",))  # fmt: skip
    with pytest.raises(Fault) as fault:
        k.launch(1, [None], check=True)
    kinds = {f.kind: f for f in fault.value.findings}
    assert kinds["out of bounds"].address == 128 and kinds["out of bounds"].thread == (31, 0, 0)
    assert kinds["misaligned"].address == 2


def test_a_barrier_that_some_threads_miss():
    """Within a warp it is a divergent barrier; between warps a deadlock. Both end, in any mode."""
    within = kernel(
        "setp.lt.u32 %p0, %t, 7;\n@%p0 bra E;\nbar.sync 0;\nmov.u32 %r0, 1;\nE:\nbar.sync 1;",
        ("u64",),
    )
    with pytest.raises(Fault, match="divergent barrier"):
        within.launch(1, [None])
    between = kernel(
        "setp.lt.u32 %p0, %t, 32;\n@%p0 bra E;\nbar.sync 0;\nE:\nbar.sync 1;", ("u64",), threads=64
    )
    with pytest.raises(
        Fault, match=r"deadlock: block \(0, 0, 0\), thread \(\d+, 0, 0\) waits at barrier \d at"
    ):
        between.launch(1, [None])


def test_blocks_that_write_one_element():
    k = kernel("mov.u32 %r1, %ctaid.x;\nst.global.u32 [%q0], %r1;", ("u64",))
    report = race(k, 2, [np.zeros(1, np.int32)])
    assert report.findings[0].kind == "race" and "global memory" in str(report.findings[0])
    same = kernel("st.global.u32 [%q0], 5;", ("u64",))
    assert race(same, 2, [np.zeros(1, np.int32)]).clean


def test_tolerance_for_atomics():
    k = kernel("cvt.rn.f32.u32 %r1, %t;\nadd.f32 %r1, %r1, 0f3DCCCCCD;\nex2.approx.f32 %r1, %r1;\n"
               "red.global.add.f32 [%q0], %r1;", ("u64",), threads=64)  # fmt: skip
    assert found(k, np.zeros(1, np.float32)).differences
    assert found(k, np.zeros(1, np.float32), rtol=1e-5).clean


def test_a_barrier_can_be_left_out_without_another_build():
    k = exchange("bar.sync 0;")
    (barrier,) = k.barriers
    report = race(k, 1, [np.zeros(64, np.int32)], without=barrier)
    assert "race" in {f.kind for f in report.findings}
    with pytest.raises(InputError, match="has no barrier"):
        race(k, 1, [np.zeros(64, np.int32)], without=k.unit.places[0])
