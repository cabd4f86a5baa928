"""Control: branches, calls, traps, barriers."""

from __future__ import annotations

from .. import flow
from ..syntax import Instruction, Reg, Symbol, Vector
from ..translate import Emitter, emit, mangle
from .common import op, scalar

# ------------------------------------------------------------------ control


@op("bra")
def bra(e: Emitter) -> None:
    block, numbers, guard = e.block, e.numbers, e.ins.guard
    to, *rest = block.successors
    onward = rest[0] if rest else to
    spin(e, to)
    if guard is None:
        e.line(e.go(to))
    elif e.is_uniform(guard) and not block.divergent:
        e.line(f"if ({e.bool_of(guard)}) {{ {e.go(to)} }}")
        e.jump(onward)
    else:
        p = e.mask_of(guard)
        e.line(f"pending.add({numbers[to]}, {e.base} & {p}); "
               f"pending.add({numbers[onward]}, {e.base} & ~{p}); goto next;")  # fmt: skip


def spin(e: Emitter, to: int) -> None:
    """A loop that reads what another warp may write lets the others run from time to time."""
    blocks = e.flow.blocks
    if to > e.block.index:
        return
    if any(_may_wait(i) for b in blocks[to : e.block.index + 1] for i in b.items):
        e.state.fibers = True
        e.line(f"if (++w.spins % 256 == 0) w.hooks->yield(&w, {e.place()});")


def _may_wait(ins: Instruction) -> bool:
    return ins.name in ("atom", "nanosleep") or (
        ins.name == "ld" and bool({"volatile", "acquire", "relaxed"} & set(ins.parts))
    )


@op("brx")
def brx(e: Emitter) -> None:
    names = flow.targets(e.function, e.ins)
    home = {label: b.index for b in e.flow.blocks for label in b.labels}
    index = e.ins.operands[0]
    if e.is_uniform(index) and not e.block.divergent and e.ins.guard is None:
        cases = " ".join(f"case {k}: {e.go(home[n])}" for k, n in enumerate(names))
        e.line(f"switch ({e.value(index, 'u32')}) {{ {cases} }}")
        e.line("__builtin_unreachable();")
        return
    x = e.value(index, "u32")
    for k, n in enumerate(names):
        e.line(f"pending.add({e.numbers[home[n]]}, {e.mask} & compare<Eq<uint32_t>>({x}, {k}u));")
    if e.ins.guard is not None:
        e.line(f"pending.add({e.numbers[e.block.index + 1]}, {e.base} & ~{e.mask});")
    e.line("goto next;")


@op("ret", "exit")
def ret(e: Emitter) -> None:
    guard, live = e.ins.guard, e.function.entry or e.ins.name == "exit"
    if (
        guard is None
        and not e.block.divergent
        and not (e.ins.name == "exit" and not e.function.entry)
    ):
        if e.function.entry:
            e.line("w.live &= ~act;")
        e.line("return;")
        return
    leaves = f"act &= ~{e.mask};"
    if live:
        leaves = f"w.live &= ~{e.mask}; {leaves}"
    if e.block.divergent:
        e.line(f"{leaves} m &= act;")
        e.line("if (!m) goto next;" if guard is not None else "goto next;")
    else:
        e.line(f"{leaves} if (!act) return;")


@op("call")
def call(e: Emitter) -> None:
    operands = e.ins.operands
    names = [o for o in operands if isinstance(o, Symbol)]
    groups = [o for o in operands if isinstance(o, Vector)]
    if not names or any(isinstance(o, Reg) for o in operands):
        raise e.fail("calls through pointers are not known here", "make the call direct")
    name = names[0].name
    first = operands[0]
    returns = first.items if isinstance(first, Vector) and operands[0] is groups[0] else ()
    args = (
        groups[-1].items
        if groups and operands[-1] is groups[-1] and operands[-1] is not first
        else ()
    )
    if name == "__assertfail":
        e.state.fibers = True
        message, line = (f"P_{mangle(a.name)}" for a in (args[0], args[2]))  # type: ignore[union-attr]
        e.line(
            f"if ({e.mask}) {{ const int l_ = __builtin_ctz({e.mask}); uint64_t s_; uint32_t n_; "
            f"memcpy(&s_, {message} + 8 * l_, 8); memcpy(&n_, {line} + 4 * l_, 4); "
            f"w.hooks->fail(&w, ASSERT, {e.mask}, s_, n_, {e.place()}); }}"
        )
        return
    function = e.module.functions.get(name)
    if function is None or function.body is None:
        what = "printf from a kernel" if name == "vprintf" else f"{name} is defined nowhere"
        raise e.fail(what, "take the print out" if name == "vprintf" else "")
    if name in e.state.active:
        raise e.fail(f"{name} calls itself", "write it as a loop")
    if name not in e.state.done:
        emit(e.state, name)
    values = [f"P_{mangle(a.name)}" for a in (*returns, *args)]  # type: ignore[union-attr]
    e.line(f"if ({e.mask}) f_{mangle(name)}({', '.join(['w', e.mask, *values])});")
    after = "act &= w.live;" + (" m &= act; if (!m) goto next;" if e.block.divergent else "")
    if _may_exit(e, name):
        e.line(after + ("" if e.block.divergent else " if (!act) return;"))


def _may_exit(e: Emitter, name: str) -> bool:
    body = e.module.functions[name].body or ()
    return any(isinstance(i, Instruction) and i.name == "exit" for i in body)


@op("trap", "brkpt")
def trap(e: Emitter) -> None:
    e.state.fibers = True
    e.line(f"if ({e.mask}) w.hooks->fail(&w, TRAP, {e.mask}, 0, 0, {e.place()});")


# ------------------------------------------------------------------ barriers


@op("bar", "barrier")
def barrier(e: Emitter) -> None:
    parts, operands = e.ins.parts, e.ins.operands
    if "cluster" in parts:
        raise e.fail("barriers of a cluster are of sm_90", "compile for sm_80")
    if "warp" in parts:
        members = f"members({e.mask}, {e.value(operands[0], 'b32')})"
        e.line(f"WARP_SYNC({members}, {e.place()});")
        return
    e.state.fibers = True
    place = e.place()
    if not e.function.entry:
        e.line(f"if (act != w.live) w.hooks->fail(&w, DIVERGED_BARRIER, act, 0, 0, {place});")
    if e.guard is not None:
        e.line(f"if ({e.mask} != {e.base} && {e.mask}) w.hooks->fail(&w, DIVERGED_BARRIER, "
               f"{e.mask}, 0, 0, {place});")  # fmt: skip
        e.line(f"if ({e.mask}) {{")
    if "red" in parts:
        d, id_, *rest = operands
        p = rest[-1]
        threads = e.value(rest[0], "u32") if len(rest) > 1 else "0u"
        kind = {"popc": 0, "and": 1, "or": 2}[next(x for x in parts if x in ("popc", "and", "or"))]
        call_ = (f"w.hooks->barrier_reduce(&w, {e.mask}, {scalar(e, id_)}, {threads}, {kind}, "
                 f"{e.mask_of(p)}, {place})")  # fmt: skip
        if kind:
            e.line(f"{{ const Mask q_ = {call_} ? ALL : 0u;")
            e.set_mask(d, "q_")
            e.line("}")
        else:
            e.map(d, "Mov<uint32_t>", call_)
    else:
        wait = 0 if "arrive" in parts else 1
        threads = scalar(e, operands[1]) if len(operands) > 1 else "0u"
        e.line(
            f"w.hooks->barrier(&w, {e.mask}, {scalar(e, operands[0])}, {threads}, {wait}, {place});"
        )
    if e.guard is not None:
        e.line("}")
