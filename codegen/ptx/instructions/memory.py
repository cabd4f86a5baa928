"""Memory: loads, stores, atomics, asynchronous copies, fences."""

from __future__ import annotations

from ..syntax import BITS, Address, Imm, Instruction, Not, Operand, Reg, Sink, Symbol, Vector
from ..translate import Emitter, ctype, mangle, storage
from .common import HALVES, op, type_of


def space_of(e: Emitter) -> str:
    for p in e.ins.parts[1:]:
        name = p.partition("::")[0]
        if name in ("shared", "local", "param"):
            if p == "shared::cluster" and "cp" not in e.ins.parts:
                raise e.fail("memory of other blocks of a cluster", "compile for sm_80")
            return name.upper()
    return "GLOBAL"


def base_of(e: Emitter, address: Operand) -> tuple[str, int]:
    """A base (a number or lanes) and what to add to it."""
    if not isinstance(address, Address):
        raise e.fail(f"{address} is no address")
    base = address.base
    if isinstance(base, Imm):
        return f"uint64_t({base.value})", address.offset
    if isinstance(base, Symbol):
        return f"uint64_t({e.address_of(base)})", address.offset
    t = "b32" if BITS[e.type_of(base)] == 32 else "b64"
    x = e.value(base, t)
    return (x if x.startswith("in<") else f"uint64_t({x})"), address.offset


def private_of(e: Emitter, address: Operand) -> tuple[str, int] | None:
    """A parameter of a call, which each lane has for itself."""
    if isinstance(address, Address) and isinstance(address.base, Symbol):
        if v := e.private.get(address.base.name):
            return f"P_{mangle(v.name)} + {address.offset}", v.size
    return None


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def memory_type(t: str) -> str:
    """How an element lies in memory: signed where a load extends the sign."""
    return ctype(t) if t.startswith("s") else f"uint{BITS[t]}_t"


def is_ordered(ins: Instruction) -> bool:
    return bool({"volatile", "acquire", "release", "acq_rel"} & set(ins.parts))


@op("ld", "ldu")
def ld(e: Emitter) -> None:
    d, address = e.ins.operands[:2]
    t, space = type_of(e), space_of(e)
    if t == "b128" or BITS[t] == 128:
        raise e.fail("128-bit loads into one register are not known here")
    m = memory_type(t)
    if is_ordered(e.ins) and space == "GLOBAL":
        e.state.alone = e.state.fenced = True
    targets = elements(d)
    if space == "PARAM":
        if private := private_of(e, address):
            where, size = private
            outs = [receive(e, x, t) for x in targets]
            e.line(f"load_private<{m}>({', '.join([e.mask, where, str(size), *outs])});")
            return
    base, offset = base_of(e, address)
    uniform = [e.is_scalar(x) for x in targets]
    if space != "PARAM" or (isinstance(address, Address) and isinstance(address.base, Reg)):
        e.mark()
    if e.is_uniform(address) and space != "LOCAL":
        for k, x in enumerate(targets):
            at = f"{base} + {offset + k * BITS[t] // 8}"
            call = f"load_uniform<{m}, {space}>(w, {e.mask}, {at})"
            e.map(x, f"Ext<{storage(e.type_of(x))}>", call) if isinstance(x, Reg) else None
        if e.guard:  # nobody may be there
            at = len(e.lines) - sum(isinstance(x, Reg) for x in targets)
            e.lines[at:] = [f"if ({e.mask}) {{ {line} }}" for line in e.lines[at:]]
        return
    assert not any(uniform)
    outs = [receive(e, x, t) for x in targets]
    e.line(f"load<{m}, {space}>({', '.join(['w', e.mask, base, str(offset), *outs])});")


def receive(e: Emitter, x: Operand, t: str) -> str:
    """The array that takes one loaded element."""
    if isinstance(x, Reg):
        return f"{e.home(x)}.x"
    return f"{e.temporary(BITS[t])}.x"


@op("st")
def st(e: Emitter) -> None:
    address, value = e.ins.operands[:2]
    t, space = type_of(e), space_of(e)
    if BITS[t] == 128:
        raise e.fail("128-bit stores of one register are not known here")
    if is_ordered(e.ins) and space == "GLOBAL":
        e.state.alone = e.state.fenced = True
    values = []
    for x in elements(value):
        bits = BITS[e.type_of(x)] if isinstance(x, Reg) else BITS[t]
        values.append(e.value(x, f"b{max(bits, BITS[t])}"))
    m = f"uint{BITS[t]}_t"
    if space == "PARAM":
        if not (private := private_of(e, address)):
            raise e.fail("this parameter cannot be written")
        where, size = private
        e.line(f"store_private<{m}>({', '.join([e.mask, where, str(size), *values])});")
        return
    base, offset = base_of(e, address)
    e.mark()
    e.line(f"store<{m}, {space}>({', '.join(['w', e.mask, base, str(offset), *values])});")


ATOMICS = ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas")


@op("atom", "red")
def atomic(e: Emitter) -> None:
    parts, t = e.ins.parts, type_of(e)
    operands = list(e.ins.operands)
    d = operands.pop(0) if e.ins.name == "atom" else Sink()
    address, values = operands[0], operands[1:]
    name = next((p for p in parts if p in ATOMICS), None)
    if name is None or BITS[t] == 128 or "async" in parts or "vec" in parts:
        raise e.fail("this atomic operation is not known here")
    space = space_of(e)
    if space == "GLOBAL":
        e.state.alone = True
        e.state.fenced |= is_ordered(e.ins)
    values = values[: 2 if name == "cas" else 1]
    u = storage(t)
    c = ctype(t) if t[0] in "sf" and t not in HALVES else u
    if t in HALVES:
        if name not in ("add", "exch", "cas"):
            raise e.fail(f"atomic {name} of {t} is not known here")
        f = f"HalfAdd<{HALVES[t]}>" if name == "add" else f"Atom{name.capitalize()}<{u}>"
    else:
        known = {"inc": "AtomInc", "dec": "AtomDec", "exch": "AtomExch", "cas": "AtomCas"}
        f = f"{known.get(name, name.capitalize())}<{c}>"
    vector = elements(values[0])
    results = [d] * len(vector) if isinstance(d, Sink) else elements(d)
    for k, (x, v) in enumerate(zip(results, vector)):
        base, offset = base_of(e, address)
        args = [v, *values[1:]]
        if isinstance(x, Sink):
            out = f"({u}*)nullptr"
        else:
            out = f"{e.home(x)}.x"  # type: ignore[arg-type]
        reads = ", ".join(atomic_value(e, a, t, c) for a in args)
        e.mark()
        e.line(f"atomic<{f}, {c}, {space}>(w, {e.mask}, {out}, {base}, "
               f"{offset + k * BITS[t] // 8}, {reads});")  # fmt: skip


def atomic_value(e: Emitter, a: Operand, t: str, c: str) -> str:
    return e.value(a, t if c in ("float", "double") or c.startswith("int") else f"b{BITS[t]}")


@op("cp")
def cp(e: Emitter) -> None:
    parts, operands = e.ins.parts, e.ins.operands
    if "async" not in parts or "bulk" in parts or "mbarrier" in parts or "reduce" in parts:
        raise e.fail("bulk copies and mbarriers are of sm_90", "compile for sm_80")
    if "commit_group" in parts:
        e.line(f"ASYNC_COMMIT({e.mask});")
    elif "wait_group" in parts:
        e.line(f"ASYNC_WAIT({e.mask}, {e.value(operands[0], 'u32')}, {e.place()});")
    elif "wait_all" in parts:
        e.line(f"ASYNC_WAIT({e.mask}, ~0u, {e.place()});")
    else:
        size = operands[2]
        if not isinstance(size, Imm):
            raise e.fail("the size must be a number")
        extra = operands[3] if len(operands) > 3 else size
        policy = any(p.endswith("cache_hint") for p in parts)
        if policy and len(operands) == 4:
            extra = size
        if (isinstance(extra, Reg) and e.type_of(extra) == "pred") or isinstance(extra, Not):
            temp = e.temporary(32)
            e.line(f"select({temp}.x, {e.mask_of(extra)}, 0u, {size.value}u);")
            valid = f"in<uint32_t>({temp})"
        else:
            valid = e.value(extra, "u32")
        to, to_off = base_of(e, operands[0])
        from_, from_off = base_of(e, operands[1])
        e.mark()
        e.line(
            f"async_copy(w, {e.mask}, {to}, {to_off}, {from_}, {from_off}, {size.value}u, {valid});"
        )


@op("membar", "fence")
def fence(e: Emitter) -> None:
    """One warp runs at a time, so that memory is always in order."""
    if "proxy" in e.ins.parts:
        return
    if not {"cta"} & set(e.ins.parts):
        e.state.fenced = e.state.alone = True


@op("prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "nanosleep", "pmevent",
    "setmaxnreg")  # fmt: skip
def nothing(e: Emitter) -> None:
    """Hints, and waiting for grids that have ended: no effect on results."""


@op("createpolicy")
def createpolicy(e: Emitter) -> None:
    e.map(e.ins.operands[0], "Mov<uint64_t>", "uint64_t(0)")
