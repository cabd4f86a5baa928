"""Lanes that part, meet, shuffle and wait; blocks that wait for each other."""

import threading

import numpy as np
import pytest
import torch

from effc.codegen.ptx import Fault, load
from effc.ir.errors import InputError

from .harness import entry, kernel

LANE = np.arange(32)
OUT = "mad.wide.u32 %d0, %t, 4, %q0;\nst.global.b32 [%d0], %r0;"


def values(body, *args, threads=32, grid=1, **kw):
    out = np.zeros(grid * threads, np.int32)
    kernel(body + OUT, ("u64",), threads=threads).launch(grid, [out, *args], **kw)
    return out


SHUFFLES = {
    "shfl.sync.up.b32 %r0|%p0, %t, 3, 0, -1": np.where(LANE >= 3, LANE - 3, LANE),
    "shfl.sync.down.b32 %r0, %t, 5, 31, -1": np.where(LANE < 27, LANE + 5, LANE),
    "shfl.sync.bfly.b32 %r0, %t, 6, 31, -1": LANE ^ 6,
    "shfl.sync.idx.b32 %r0, %t, 9, 31, -1": np.full(32, 9),
    "shfl.sync.idx.b32 %r0, %t, 1, 0x181f, -1": LANE // 8 * 8 + 1,  # segments of 8
    "shfl.sync.down.b32 %r0, %t, 2, 0x1c1f, -1": np.where(LANE % 4 < 2, LANE + 2, LANE),  # of 4
    "redux.sync.add.s32 %r0, %t, -1": np.full(32, 496),
    "redux.sync.xor.b32 %r0, %t, -1": np.full(32, 0),
    "activemask.b32 %r0": np.full(32, -1),
    "mov.u32 %r0, %lanemask_lt": (1 << LANE) - 1,
    "setp.lt.u32 %p0, %t, 5;\nvote.sync.ballot.b32 %r0, %p0, -1": np.full(32, 31),
    "and.b32 %r1, %t, 3;\nmatch.any.sync.b32 %r0, %r1, -1": np.int64(0x11111111) << LANE % 4,
    "shr.u32 %r1, %t, 5;\nmatch.all.sync.b32 %r0|%p0, %r1, -1": np.full(32, -1),
}


def test_exchange_between_lanes():
    body = "".join(
        f"{text};\nmad.wide.u32 %d0, %t, 4, %q0;\nst.global.b32 [%d0+{128 * i}], %r0;\n"
        for i, text in enumerate(SHUFFLES)
    )
    out = np.zeros((len(SHUFFLES), 32), np.int32)
    kernel(body, ("u64",)).launch(1, [out])
    for got, (text, want) in zip(out, SHUFFLES.items()):
        assert (got == want.astype(np.int64).astype(np.uint32).view(np.int32)).all(), text


def test_lanes_part_and_meet():
    """A loop whose count differs by lane, with a shuffle after it that needs all of them."""
    got = values("""
mov.u32 %r0, 0;
mov.u32 %r1, 0;
LOOP:
setp.ge.u32 %p0, %r1, %t;
@%p0 bra DONE;
add.u32 %r0, %r0, %r1;
add.u32 %r1, %r1, 1;
and.b32 %r2, %r1, 1;
setp.eq.u32 %p1, %r2, 0;
@%p1 bra LOOP;
add.u32 %r0, %r0, 100;
bra LOOP;
DONE:
shfl.sync.idx.b32 %r0, %r0, %t, 31, -1;
""")  # fmt: skip
    assert (got == LANE * (LANE - 1) // 2 + 100 * ((LANE + 1) // 2)).all()


def test_indirect_branch_by_lane():
    got = values("""
and.b32 %r1, %t, 3;
TS: .branchtargets A, B, C, A;
brx.idx %r1, TS;
A: mov.u32 %r0, 10; bra E;
B: mov.u32 %r0, 20; bra E;
C: mov.u32 %r0, 30;
E:
""")  # fmt: skip
    assert (got == np.array([10, 20, 30, 10])[LANE % 4]).all()


def test_some_lanes_return_early():
    out = np.full(32, -1, np.int32)
    kernel("setp.gt.u32 %p0, %t, 19;\n@%p0 bra END;\nvote.sync.ballot.b32 %r0, 1, -1;\n" + OUT + "\nEND:",
           ("u64",)).launch(1, [out])  # fmt: skip
    assert (out[:20] == (1 << 20) - 1).all() and (out[20:] == -1).all()


def test_partial_warp_and_three_dimensions():
    text = "mov.u32 %r0, %tid.y;\nmov.u32 %r1, %tid.z;\nmad.lo.u32 %r0, %r1, 100, %r0;\nmov.u32 %r2, %tid.x;\nmad.lo.u32 %r0, %r2, 10000, %r0;\nmov.u32 %r3, %tid.y;\nmov.u32 %r4, %tid.z;\nmad.lo.u32 %r5, %r4, 3, %r3;\nmad.lo.u32 %t, %r5, 7, %r2;\n"
    out = np.zeros((2, 3, 7), np.int32)
    k = load(entry(text + OUT, ("u64",)).replace(".reqntid 32", ""))["k"]
    k.launch(1, [out], block=(7, 3, 2))
    z, y, x = np.meshgrid(range(2), range(3), range(7), indexing="ij")
    assert (out == x * 10000 + z * 100 + y).all()


def test_named_barriers_hand_over_between_warps():
    """Warp 0 writes, arrives and goes on; warp 1 waits for 64 threads at barrier 1."""
    got = values("""
.shared .align 4 .b8 s[128];
and.b32 %r1, %t, 31;
shl.b32 %r2, %r1, 2;
mov.u32 %r3, s;
add.u32 %r2, %r2, %r3;
setp.ge.u32 %p0, %t, 32;
@%p0 bra READER;
st.shared.u32 [%r2], %t;
bar.arrive 1, 64;
mov.u32 %r0, 0;
bra END;
READER:
bar.sync 1, 64;
ld.shared.u32 %r0, [%r2];
END:
""", threads=64, check=True)  # fmt: skip
    assert (got == np.concatenate([np.zeros(32), LANE])).all()


def test_barrier_reduction():
    got = values("setp.lt.u32 %p0, %t, 50;\nbar.red.popc.u32 %r0, 0, %p0;\nbar.red.and.pred %p1, 0, %p0;\n"
                 "@%p1 add.u32 %r0, %r0, 1000;\n", threads=96)  # fmt: skip
    assert (got == 50).all()


ATOMICS = {
    "atom.global.add.u32": (5, 3, 8), "atom.global.max.s32": (-1, 3, 3), "atom.global.exch.b32": (5, 3, 3),
    "atom.global.inc.u32": (3, 3, 0), "atom.global.dec.u32": (0, 7, 7), "atom.global.xor.b32": (5, 3, 6),
}  # fmt: skip


def test_atomics():
    body = "setp.ne.u32 %p0, %t, 0;\n@%p0 bra E;\n"
    for i, (name, (_, operand, _)) in enumerate(ATOMICS.items()):
        body += f"mov.u32 %r1, {operand};\n{name} %r0, [%q1+{4 * i}], %r1;\nst.global.b32 [%q0+{4 * i}], %r0;\n"
    before, _, after = np.array(list(ATOMICS.values()), np.int32).T
    cells, old = before.copy(), np.zeros_like(before)
    kernel(body + "E:").launch(1, [old, cells])
    assert (old == before).all() and (cells == after).all()


def test_atomics_of_all_lanes_add_up():
    cells = np.zeros(4, np.float32)
    kernel("and.b32 %r1, %t, 3;\nmad.wide.u32 %d0, %r1, 4, %q0;\nmov.f32 %r2, 0f3F000000;\n"
           "red.global.add.f32 [%d0], %r2;", ("u64",), threads=64).launch(5, [cells])  # fmt: skip
    assert (cells == 5 * 16 * 0.5).all()


GRID_BARRIER = """
.reg .pred %first;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %nctaid.x;
setp.ne.u32 %first, %t, 0;
@%first bra WAIT;
mad.wide.u32 %d1, %r1, 4, %q1;
add.u32 %r3, %r1, 1;
st.global.u32 [%d1], %r3;
membar.gl;
mov.u32 %r4, 1;
red.global.add.u32 [%q2], %r4;
SPIN:
ld.volatile.global.u32 %r5, [%q2];
setp.lt.u32 %p1, %r5, %r2;
@%p1 bra SPIN;
WAIT:
bar.sync 0;
add.u32 %r6, %r1, 1;
setp.eq.u32 %p2, %r6, %r2;
selp.u32 %r6, 0, %r6, %p2;
mad.wide.u32 %d2, %r6, 4, %q1;
ld.volatile.global.u32 %r0, [%d2];
mad.wide.u32 %d3, %r1, 4, %q0;
st.global.u32 [%d3], %r0;
"""


@pytest.mark.parametrize("portable", [False, True])
def test_blocks_may_wait_for_later_blocks(portable):
    out, data, count = np.zeros(6, np.int32), np.zeros(6, np.int32), np.zeros(1, np.int32)
    found, ended = kernel(GRID_BARRIER, ("u64",) * 3, threads=64).run(
        6, [out, data, count], portable=portable
    )
    assert ended and not found
    assert (out == [2, 3, 4, 5, 6, 1]).all()


def test_device_functions_have_memory_of_their_own():
    before = """
.func (.param .b32 res) sum(.param .b32 n)
{
.local .align 4 .b8 buf[64];
.reg .b32 %r<8>;
.reg .b64 %d<4>;
.reg .pred %p<2>;
ld.param.u32 %r0, [n];
mov.u64 %d0, buf;
mov.u32 %r1, 0;
mov.u32 %r2, 0;
L:
setp.ge.u32 %p0, %r1, %r0;
@%p0 bra D;
mul.wide.u32 %d1, %r1, 4;
add.u64 %d1, %d0, %d1;
st.local.u32 [%d1], %r1;
ld.local.u32 %r3, [%d1];
add.u32 %r2, %r2, %r3;
add.u32 %r1, %r1, 1;
bra L;
D:
st.param.u32 [res], %r2;
ret;
}
"""
    out = np.zeros(32, np.int32)
    kernel("""
and.b32 %r1, %t, 15;
{
.param .b32 a;
.param .b32 b;
st.param.b32 [a], %r1;
call.uni (b), sum, (a);
ld.param.b32 %r0, [b];
}
""" + OUT, ("u64",), before=before).launch(1, [out])  # fmt: skip
    n = LANE % 16
    assert (out == n * (n - 1) // 2).all()


def test_blocks_over_threads_give_the_same():
    body = (
        "mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %t, %r1, 64, %t;\nmul.lo.u32 %r0, %t, %t;\nbar.sync 0;\n"
        + OUT
    )
    k = kernel(body, ("u64",), threads=64)
    outs = [np.zeros(64 * 33, np.int32) for _ in range(3)]
    for threads, out in zip((1, 2, 3), outs):
        k.launch(33, [out], threads=threads)
    assert all((o == np.arange(64 * 33, dtype=np.int32) ** 2).all() for o in outs)


def test_python_threads_at_once():
    k = kernel("mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %t, %r1, 32, %t;\nbar.sync 0;\nadd.u32 %r0, %t, %w1;\n" + OUT,
               ("u64", "u32"))  # fmt: skip
    outs = [np.zeros(32 * 50, np.int32) for _ in range(6)]
    running = [
        threading.Thread(target=lambda i=i: [k.launch(50, [outs[i], i]) for _ in range(20)])
        for i in range(6)
    ]
    for t in running:
        t.start()
    for t in running:
        t.join()
    assert all((o == np.arange(1600) + i).all() for i, o in enumerate(outs))


def test_constants_and_pointers_to_them():
    before = (
        ".const .align 4 .f32 c[2] = {1.5, 0f40000000};\n.global .align 8 .u64 p[1] = {generic(c)};"
    )
    out = np.zeros(2, np.float32)
    kernel("ld.const.f32 %r0, [c];\nld.global.u64 %d0, [p];\nld.f32 %r1, [%d0+4];\nst.global.v2.f32 [%q0], {%r0, %r1};",
           ("u64",), before=before).launch(1, [out])  # fmt: skip
    assert list(out) == [1.5, 2.0]


def test_arguments_that_do_not_fit_are_named():
    k = kernel("ret;", ("u64", "u32"))
    with pytest.raises(InputError, match="takes 2 arguments, 1 were given"):
        k.launch(1, [None])
    with pytest.raises(InputError, match=r"argument 1 \(k_1\) is a tensor"):
        k.launch(1, [None, torch.zeros(1)])
    with pytest.raises(InputError, match="does not fit 32 bits"):
        k.launch(1, [None, 2**32])
    with pytest.raises(InputError, match="compiled for"):
        k.launch(1, [None, 1], block=64)
    with pytest.raises(InputError, match="did you mean 'k'"):
        load(entry("ret;"))["kk"]


def test_trap_is_a_fault_with_its_place():
    with pytest.raises(Fault, match=r"trap: block \(0, 0, 0\), thread \(3, 0, 0\) at PTX line"):
        kernel("setp.eq.u32 %p0, %t, 3;\n@%p0 trap;").launch(1, [None, None])


def test_division_by_zero_harms_nobody():
    assert (values("rem.s32 %r0, %t, 0;\n") == LANE).all()
