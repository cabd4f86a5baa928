"""What each opcode becomes. A handler reads the instruction at hand and writes lines of C++.

Where PTX has an opcode that is not here, translation fails with its name and place: an instruction
is never left out or replaced by something near it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import flow
from .parser import PtxError
from .syntax import BITS, Address, Imm, Instruction, Not, Operand, Pair, Reg, Sink, Symbol, Vector
from .translate import Emitter, ctype, emit, mangle, storage

Handler = Callable[[Emitter], None]
HANDLERS: dict[str, Handler] = {}
HALVES = {"f16": "f16", "bf16": "bf16", "f16x2": "f16", "bf16x2": "bf16"}
ROUNDING = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rna": "RNA",
            "rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}  # fmt: skip


def op(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def type_of(e: Emitter) -> str:
    """The instruction's type: its last part."""
    last = e.ins.parts[-1]
    if last not in BITS:
        raise e.fail(f"{last!r} is no type known here")
    return last


def modified(e: Emitter, f: str) -> str:
    """The operation with .ftz, .sat and .relu of the instruction around it."""
    parts = e.ins.parts
    if "ftz" in parts and "f32" in parts:
        f = f"Ftz<{f}>"
    if "sat" in parts:
        f = f"Sat<{f}>"
    return f"ReluOf<{f}>" if "relu" in parts else f


def half(e: Emitter, type_: str, f: str, *args: Operand) -> None:
    """Arithmetic of 16-bit floats or pairs of them."""
    d = e.ins.operands[0]
    assert isinstance(d, Reg)
    values = ", ".join([e.mask, e.target(d), *(e.value(a, type_) for a in args)])
    e.line(f"map_half<{modified(e, f)}, {HALVES[type_]}>({values});")


def plain(e: Emitter, f: str, *types: str) -> None:
    """d = f(operands), each read as its type."""
    d, *args = e.ins.operands
    if len(args) != len(types):
        raise e.fail(f"{len(types)} operands were expected, there are {len(args)}")
    e.map(d, f, *(e.value(a, t) for a, t in zip(args, types)))


# ------------------------------------------------------------------ arithmetic

BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "min": "Min", "max": "Max",
          "div": "Div", "rem": "Rem"}  # fmt: skip


def directed(e: Emitter) -> str | None:
    """RZ, RM or RP where the instruction rounds that way."""
    return next((ROUNDING[p] for p in e.ins.parts if p in ("rz", "rm", "rp")), None)


@op("add", "sub", "mul", "min", "max", "div", "rem")
def binary(e: Emitter) -> None:
    ins, t = e.ins, type_of(e)
    name, parts = ins.name, ins.parts
    if "cc" in parts:
        carry(e, {"add": "AddC", "sub": "SubC"}[name], t, takes=False)
    elif t in HALVES:
        f = {"min": "Min", "max": "Max"}.get(name, BINARY[name])
        f = f"{f}NaN" if "NaN" in parts else f"{f}<float>"
        half(e, t, f"XorSign<{f}>" if "xorsign" in parts else f, *ins.operands[1:])
    elif t in ("u16x2", "s16x2"):
        inner = f"{BINARY[name]}<{'u' if t[0] == 'u' else ''}int16_t>"
        plain(e, f"Pairs<{'u' if t[0] == 'u' else ''}int16_t, {inner}>", t, t)
    elif t in ("f32", "f64"):
        f = f"{BINARY[name]}<{ctype(t)}>"
        if "NaN" in parts:
            f = f"{BINARY[name]}NaN"
        if "xorsign" in parts:
            f = f"XorSign<{f}>"
        if len(ins.operands) == 4:
            f = f"{BINARY[name]}3<{ctype(t)}>"
        if mode := directed(e):
            f = f"{BINARY[name]}By<{ctype(t)}, {mode}>"
        plain(e, modified(e, f), *[t] * (len(ins.operands) - 1))
    elif t == "f32x2":
        raise e.fail("packed pairs of f32 are of sm_100", "compile for sm_80")
    elif name == "mul" and "wide" in parts:
        plain(e, f"MulWide<{ctype(t)}>", t, t)
    elif name == "mul" and "hi" in parts:
        plain(e, f"MulHi<{ctype(t)}>", t, t)
    elif "sat" in parts:
        plain(e, f"{BINARY[name]}Sat<{ctype(t)}>", t, t)
    else:
        plain(e, f"{BINARY[name]}<{ctype(t)}>", t, t)


@op("mad", "fma")
def fused(e: Emitter) -> None:
    ins, t = e.ins, type_of(e)
    parts = ins.parts
    c = ctype(t)
    if "cc" in parts:
        carry(e, f"MadLoC<{c}>" if "lo" in parts else f"MadHiC<{c}>", t, takes=False, ready=True)
    elif t in HALVES:
        half(e, t, "FmaOdd", *ins.operands[1:])
    elif t in ("f32", "f64"):
        mode = directed(e)
        f = f"FmaBy<{c}, {mode}>" if mode else f"Fma<{c}>"
        plain(e, modified(e, f), t, t, t)
    elif "wide" in parts:
        plain(e, f"MadWide<{c}>", t, t, t[0] + str(2 * BITS[t]))
    elif "hi" in parts:
        plain(e, f"MadHi{'Sat' if 'sat' in parts else ''}<{c}>", t, t, t)
    else:
        plain(e, f"Mad<{c}>", t, t, t)


@op("addc", "subc", "madc")
def with_carry(e: Emitter) -> None:
    t = type_of(e)
    c = ctype(t)
    if e.ins.name == "madc":
        f = f"MadLoC<{c}>" if "lo" in e.ins.parts else f"MadHiC<{c}>"
        carry(e, f, t, takes=True, ready=True)
    else:
        carry(e, {"addc": "AddC", "subc": "SubC"}[e.ins.name], t, takes=True)


def carry(e: Emitter, f: str, t: str, *, takes: bool, ready: bool = False) -> None:
    """Operations that read (`takes`) or write the carry, kept as a mask of lanes."""
    d, *args = e.ins.operands
    u = "u" + t[1:] if t[0] in "bus" else t
    f = f if ready else f"{f}<{ctype(u)}>"
    f = f if takes else f"Carry0<{f}>"
    values = ", ".join([e.mask, "carry", e.target(d, t), *(e.value(a, u) for a in args)])
    result = "carry = " if "cc" in e.ins.parts else ""
    e.line(f"{result}map_carry<{f}>({values});")


@op("mul24", "mad24")
def low_24(e: Emitter) -> None:
    if "lo" not in e.ins.parts:
        raise e.fail("only the low half is known")
    t = type_of(e)
    plain(e, f"{e.ins.name.capitalize()}<{ctype(t)}>", *[t] * (len(e.ins.operands) - 1))


@op("sad")
def sad(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"Sad<{ctype(t)}>", t, t, t)


@op("neg", "abs")
def sign(e: Emitter) -> None:
    t, name = type_of(e), e.ins.name
    if t in HALVES:
        mask = {"f16": 0x8000, "bf16": 0x8000}.get(t, 0x80008000)
        u = f"b{BITS[t]}"
        value, f = (mask, "Xor") if name == "neg" else (mask ^ ((1 << BITS[t]) - 1), "And")
        a = e.value(e.ins.operands[1], u)
        e.map(e.ins.operands[0], f"{f}<{ctype(u)}>", a, e.literal(value, u))
    else:
        plain(e, modified(e, f"{name.capitalize()}<{ctype(t)}>"), t)


@op("copysign")
def copysign(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"Copysign<{ctype(t)}>", t, t)


FUNCTIONS = {"ex2": "Ex2", "lg2": "Lg2", "sin": "Sin", "cos": "Cos", "tanh": "Tanh"}


@op("ex2", "lg2", "sin", "cos", "tanh")
def transcendental(e: Emitter) -> None:
    t = type_of(e)
    if t in HALVES:
        half(e, t, FUNCTIONS[e.ins.name], e.ins.operands[1])
    else:
        plain(e, modified(e, FUNCTIONS[e.ins.name]), t)


@op("rcp", "sqrt", "rsqrt")
def roots(e: Emitter) -> None:
    t, name = type_of(e), e.ins.name.capitalize()
    mode = directed(e)
    f = f"{name}By<{ctype(t)}, {mode}>" if mode else f"{name}<{ctype(t)}>"
    plain(e, modified(e, f), t)


# ------------------------------------------------------------------ bits


@op("and", "or", "xor")
def logic(e: Emitter) -> None:
    t, name = type_of(e), e.ins.name
    if t != "pred":
        plain(e, f"{name.capitalize()}<{ctype(t)}>", t, t)
        return
    d, a, b = e.ins.operands
    sign_ = {"and": "&", "or": "|", "xor": "^"}[name]
    if e.is_scalar(d):
        e.set_bool(d, f"bool({e.bool_of(a)} {sign_} {e.bool_of(b)})")
    else:
        e.set_mask(d, f"({e.mask_of(a)} {sign_} {e.mask_of(b)})")


@op("not", "cnot")
def invert(e: Emitter) -> None:
    t = type_of(e)
    if t == "pred":
        d, a = e.ins.operands
        if e.is_scalar(d):
            e.set_bool(d, f"!{e.bool_of(a)}")
        else:
            e.set_mask(d, f"(~{e.mask_of(a)})")
    else:
        plain(e, f"{e.ins.name.capitalize()}<{ctype(t)}>", t)


@op("shl", "shr")
def shift(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"{e.ins.name.capitalize()}<{ctype(t)}>", t, "u32")


@op("bfe")
def bfe(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"Bfe<{ctype(t)}>", t, "u32", "u32")


@op("bfi")
def bfi(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"Bfi<{ctype(t)}>", t, t, "u32", "u32")


@op("bfind")
def bfind(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"Bfind<{ctype(t)}, {'true' if 'shiftamt' in e.ins.parts else 'false'}>", t)


@op("popc", "clz", "brev")
def counts(e: Emitter) -> None:
    t = type_of(e)
    plain(e, f"{e.ins.name.capitalize()}<{ctype(t)}>", t)


@op("fns")
def fns(e: Emitter) -> None:
    plain(e, "Fns", "b32", "b32", "s32")


@op("bmsk", "szext")
def masks(e: Emitter) -> None:
    wrap = "true" if "wrap" in e.ins.parts else "false"
    t = type_of(e)
    f = f"Bmsk<{wrap}>" if e.ins.name == "bmsk" else f"Szext<{ctype(t)}, {wrap}>"
    plain(e, f, t, "b32")


@op("prmt")
def prmt(e: Emitter) -> None:
    mode = next(
        (p for p in e.ins.parts if p in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), "bytes"
    )
    plain(e, f"Prmt<{mode.upper()}>", "b32", "b32", "b32")


@op("lop3")
def lop3(e: Emitter) -> None:
    if "or" in e.ins.parts or "and" in e.ins.parts:
        raise e.fail("the form with a predicate is of sm_70's successors only")
    d, a, b, c, table = e.ins.operands
    if not isinstance(table, Imm):
        raise e.fail("the table must be a number")
    e.map(d, f"Lop3<{table.value & 255}>", *(e.value(x, "b32") for x in (a, b, c)))


@op("shf")
def funnel(e: Emitter) -> None:
    left = "true" if "l" in e.ins.parts else "false"
    wrap = "true" if "wrap" in e.ins.parts else "false"
    plain(e, f"Shf<{left}, {wrap}>", "b32", "b32", "b32")


@op("dp4a", "dp2a")
def dot(e: Emitter) -> None:
    parts = e.ins.parts
    a, b = parts[-2], parts[-1]
    c = {t: ("u" if t[0] == "u" else "") + "int" for t in (a, b)}
    if parts[0] == "dp4a":
        plain(e, f"Dp4a<{c[a]}8_t, {c[b]}8_t>", "b32", "b32", "b32")
    else:
        high = "true" if "hi" in parts else "false"
        plain(e, f"Dp2a<{c[a]}16_t, {c[b]}8_t, {high}>", "b32", "b32", "b32")


# ------------------------------------------------------------------ comparing and choosing

COMPARE = {"eq": "Eq", "ne": "Ne", "lt": "Lt", "le": "Le", "gt": "Gt", "ge": "Ge",
           "lo": "Lt", "ls": "Le", "hi": "Gt", "hs": "Ge"}  # fmt: skip


def comparison(e: Emitter, name: str, t: str) -> str:
    c = "float" if t in HALVES else ctype(t)
    if t in ("f32", "f64") or t in HALVES:
        if name == "ne":
            f = f"NeOrdered<{c}>"
        elif name in ("num", "nan"):
            f = {"num": f"Num<{c}>", "nan": f"IsNan<{c}>"}[name]
        elif name.endswith("u") and name[:-1] in COMPARE:
            f = f"Unordered<{COMPARE[name[:-1]]}<{c}>>"
        elif name in COMPARE:
            f = f"{COMPARE[name]}<{c}>"
        else:
            raise e.fail(f"the comparison {name} is not known")
        return f"Ftz<{f}>" if "ftz" in e.ins.parts and t == "f32" else f
    if name not in COMPARE:
        raise e.fail(f"the comparison {name} is not known")
    if name in ("lo", "ls", "hi", "hs"):
        c = f"uint{BITS[t]}_t"
    return f"{COMPARE[name]}<{c}>"


@op("setp")
def setp(e: Emitter) -> None:
    parts, t = e.ins.parts, type_of(e)
    f = comparison(e, parts[1], t)
    d, a, b, *rest = e.ins.operands
    both = [d.first, d.second] if isinstance(d, Pair) else [d]
    combine = next((p for p in parts[2:] if p in ("and", "or", "xor")), None)
    sign_ = {"and": "&", "or": "|", "xor": "^"}.get(combine or "", "")
    u = "u" + t[1:] if parts[1] in ("lo", "ls", "hi", "hs") else t
    if t in ("f16x2", "bf16x2"):
        raise e.fail("comparing pairs of 16-bit floats is not known here")
    x, y = e.value(a, u), e.value(b, u)
    results = [r for r in both if not isinstance(r, Sink)]
    if results and all(e.is_scalar(r) for r in results):
        e.line(f"{{ const bool q_ = {f}::f({x}, {y});")
        c = e.bool_of(rest[0]) if rest else ""
        for r, q in zip(both, ("q_", "!q_")):
            e.set_bool(r, f"bool({q} {sign_} {c})" if sign_ else q)
    else:
        call = f"compare_half<{f}, {HALVES[t]}>" if t in HALVES else f"compare<{f}>"
        e.line(f"{{ const Mask q_ = {call}({x}, {y});")
        c = e.mask_of(rest[0]) if rest else ""
        for r, q in zip(both, ("q_", "~q_")):
            e.set_mask(r, f"({q} {sign_} {c})" if sign_ else f"({q})")
    e.line("}")


@op("selp")
def selp(e: Emitter) -> None:
    t = type_of(e)
    d, a, b, p = e.ins.operands
    if t == "pred":
        raise e.fail("a predicate cannot be selected")
    s = f"b{BITS[t]}"
    if e.is_scalar(d):
        e.set_scalar(d, f"{e.bool_of(p)} ? {e.value(a, s)} : {e.value(b, s)}")
        return
    values = ", ".join([e.mask_of(p), e.value(a, s), e.value(b, s)])
    if e.partial:
        e.line(f"select_masked({e.mask}, {e.target(d, s)}, {values});")
    else:
        e.line(f"select({e.target(d, s)}, {values});")


@op("slct")
def slct(e: Emitter) -> None:
    *_, t, c = e.ins.parts
    plain(e, f"Slct<{ctype('b' + str(BITS[t]))}, {ctype(c)}>", f"b{BITS[t]}", f"b{BITS[t]}", c)


@op("set")
def set_(e: Emitter) -> None:
    parts = e.ins.parts
    d, s = parts[-2], parts[-1]
    if any(p in parts for p in ("and", "or", "xor")) or s in HALVES or d in HALVES:
        raise e.fail("this form of set is not known here", "use setp and selp")
    plain(e, f"Set<{ctype(d)}, {comparison(e, parts[1], s)}>", s, s)


@op("testp")
def testp(e: Emitter) -> None:
    t, kind = type_of(e), e.ins.parts[1].upper()
    d, a = e.ins.operands
    f = f"Testp<{ctype(t)}, {kind}>"
    if e.is_scalar(d):
        e.set_bool(d, f"{f}::f({e.value(a, t)})")
    else:
        e.set_mask(d, f"compare<{f}>({e.value(a, t)})")


# ------------------------------------------------------------------ moving and converting


@op("mov")
def mov(e: Emitter) -> None:
    t = type_of(e)
    d, a = e.ins.operands
    if t == "pred":
        if e.is_scalar(d):
            e.set_bool(d, e.bool_of(a))
        else:
            e.set_mask(d, e.mask_of(a))
    elif isinstance(d, Vector):
        split(e, t, d, a)
    elif isinstance(a, Vector):
        join(e, t, d, a)
    elif isinstance(d, Sink):
        pass
    else:
        s = f"b{BITS[t]}"
        x = e.value(a, s)
        if not e.is_scalar(d) and not e.partial and x.startswith("in<"):
            if isinstance(a, Reg) and a.name in e.flow.slots and isinstance(d, Reg):
                if e.flow.slots[a.name] == e.flow.slots[d.name]:
                    return
                if e.type_of(a) != "pred" and BITS[e.type_of(a)] == BITS[t]:
                    e.line(f"{e.home(d)} = {e.home(a)};")
                    return
        e.map(d, f"Mov<{ctype(s)}>", x)


def split(e: Emitter, t: str, d: Vector, a: Operand) -> None:
    """mov.b32 {lo, hi}, whole"""
    width = BITS[t] // len(d.items)
    whole, part = f"uint{BITS[t]}_t", f"uint{width}_t"
    if t == "b128":
        raise e.fail("128-bit registers are not known here")
    x = e.value(a, f"b{BITS[t]}")
    if isinstance(a, Reg) and any(isinstance(i, Reg) and i.name == a.name for i in d.items):
        raise e.fail("a register is split into itself")
    for k, item in enumerate(d.items):
        e.map(item, f"Piece<{part}, {k}, {whole}>", x)


def join(e: Emitter, t: str, d: Operand, a: Vector) -> None:
    """mov.b32 whole, {lo, hi}"""
    width = BITS[t] // len(a.items)
    if t == "b128":
        raise e.fail("128-bit registers are not known here")
    parts = [e.value(i, f"b{width}") for i in a.items]
    whole, part = f"uint{BITS[t]}_t", f"uint{width}_t"
    if e.is_scalar(d):
        text = " | ".join(f"{whole}({part}({p})) << {width * k}" for k, p in enumerate(parts))
        e.set_scalar(d, f"{whole}({text})")
    else:
        mask = e.mask if e.partial else "ALL"
        e.line(f"join<{part}>({', '.join([mask, e.target(d, t), *parts])});")


@op("cvt")
def cvt(e: Emitter) -> None:
    ins, parts = e.ins, e.ins.parts
    d, s = [p for p in parts[1:] if p in BITS][-2:] if "pack" not in parts else ("", "")
    if "pack" in parts:
        return cvt_pack(e)
    mode = next((ROUNDING[p] for p in parts if p in ROUNDING), None)
    dst, *src = ins.operands
    uniform = e.is_scalar(dst)
    wrap = "Relu" if "relu" in parts else "Same"
    if "sat" in parts and d in ("f16", "bf16", "f32"):
        wrap = "Sat<Same>"
    if d in ("f16x2", "bf16x2") and s == "f32":
        h = HALVES[d]
        a, b = (e.value(x, "f32") for x in src)
        if mode in ("RN", None):
            e.line(f"pack_half<{wrap}, {h}>({e.mask}, {e.target(dst)}, {a}, {b});")
        else:
            e.map(dst, f"PackBy<{wrap}, {h}, uint32_t, {mode}>", a, b)
        return None
    if d in ("e4m3x2", "e5m2x2"):
        which = "true" if d[1] == "4" else "false"
        if s == "f16x2":
            e.map(dst, f"CvtHalfFp8x2<{which}>", e.value(src[0], "b32"))
        elif s == "f32":
            e.map(dst, f"CvtToFp8x2<{which}, {wrap}>", *(e.value(x, "f32") for x in src))
        else:
            raise e.fail(f"from {s} is not known")
        return None
    if s in ("e4m3x2", "e5m2x2"):
        which = "true" if s[1] == "4" else "false"
        e.map(dst, f"CvtFp8Half2<{which}>", e.value(src[0], "b16"))
        return None
    (a,) = src
    if d in HALVES and s == "f32" and mode in ("RN", None) and not uniform:
        e.line(f"float_to_half_lanes<{wrap}, {d}>({e.mask}, {e.target(dst, 'b16')}, "
               f"{e.value(a, 'f32')});")  # fmt: skip
        return None
    if d == "f32" and s in HALVES and not uniform and wrap == "Same":
        e.line(f"half_to_float_lanes<{s}>({e.mask}, {e.target(dst)}, {e.value(a, 'b16')});")
        return None
    f = conversion(e, d, s, mode, wrap)
    e.map(dst, f, e.value(a, stored(e, a, s)))
    return None


def stored(e: Emitter, a: Operand, s: str) -> str:
    """The type in which to read a source: an integer's whole register, which may be wider."""
    if isinstance(a, Reg) and s not in ("f32", "f64") and s not in HALVES:
        return f"b{BITS[e.type_of(a)]}"
    return f"b{BITS[s]}" if s in HALVES else s


def conversion(e: Emitter, d: str, s: str, mode: str | None, wrap: str) -> str:
    """The operation from a source type to the register of the result."""
    sat = "true" if "sat" in e.ins.parts else "false"
    ftz = "ftz" in e.ins.parts
    floats = ("f32", "f64", "f16", "bf16")
    dst = e.ins.operands[0]
    ext = f"Ext<{storage(e.type_of(dst))}>" if isinstance(dst, Reg) else "Ext<uint32_t>"
    source = f"FromHalf<{s}>" if s in HALVES else None
    c = "float" if s in HALVES else ctype(s)
    if d == "tf32":
        return f"CvtTf32<{mode or 'RNA'}>"
    if d not in floats and s not in floats:
        return f"Then<{ext}, CvtInt<{ctype(d)}, {ctype(s)}, {sat}>>"
    if d not in floats:
        f = f"CvtFloatInt<{ctype(d)}, {mode or 'RZ'}>"
        f = f"Then<{f}, {source}>" if source else f"Then<{f}, Flush>" if ftz else f
        return f"Then<{ext}, {f}>"
    if s not in floats:
        if d in HALVES:
            return f"CvtIntHalf<{d}, {ctype(s)}, {mode or 'RN'}>"
        if mode in ("RN", None):
            f = f"CvtIntFloat<{ctype(d)}, {ctype(s)}>"
        else:
            f = f"CvtIntFloatBy<{ctype(d)}, {ctype(s)}, {mode}>"
        return f"Sat<{f}>" if sat == "true" else f
    integral = any(p in e.ins.parts for p in ("rni", "rzi", "rmi", "rpi"))
    chain = [source] if source else ["Flush"] if ftz and s == "f32" else []
    if integral:
        chain.append(f"CvtIntegral<{mode}>")
        mode = "RN"
    if wrap != "Same":
        chain.append(wrap)
    if d in HALVES:
        chain.append(f"CvtToHalf<{d}, {mode or 'RN'}>")
    elif ctype(d) != c:
        chain.append(f"CvtFloat<{ctype(d)}, {mode or 'RN'}>")
    if ftz and d == "f32":
        chain.append("Flush")
    f = chain[0] if chain else f"Mov<{c}>"
    for g in chain[1:]:
        f = f"Then<{g}, {f}>"
    return f


def cvt_pack(e: Emitter) -> None:
    """cvt.pack.sat.D.s32{.b32} d, a, b{, c}"""
    types = [p for p in e.ins.parts[1:] if p in BITS]
    d, s = types[0], types[1]
    if BITS[d] < 8 or s != "s32":
        raise e.fail("only packing to 16 and 8 bits is known")
    operands = e.ins.operands
    args = [e.value(a, "s32") for a in operands[1:3]] + [e.value(a, "b32") for a in operands[3:]]
    e.map(operands[0], f"CvtPackSat<{ctype(d)}, int32_t>", *args)


@op("cvta")
def cvta(e: Emitter) -> None:
    """Addresses of global and constant memory are those of the host."""
    parts = e.ins.parts
    d, a = e.ins.operands
    x = e.value(a, "b64")
    if any(p.startswith("shared") for p in parts):
        if "to" in parts:
            e.map(d, "Sub<uint64_t>", x, "uint64_t(w.shared)")
        else:
            e.map(d, "Add<uint64_t>", x, "uint64_t(w.shared)")
    elif "local" in parts:
        f = "generic_to_local" if "to" in parts else "local_to_generic"
        e.line(f"{f}(w, {e.mask}, {e.target(d, 'b64')}, {x});")
    else:
        e.map(d, "Mov<uint64_t>", x)


@op("isspacep")
def isspacep(e: Emitter) -> None:
    d, a = e.ins.operands
    space = e.ins.parts[1].partition("::")[0]
    if space not in ("global", "shared", "local"):
        raise e.fail(f"the space {space} is not known here")
    call = f"is_in_space<{space.upper()}>(w, {e.value(a, 'b64')})"
    if e.is_scalar(d):
        e.set_bool(d, f"{call} & 1")
    else:
        e.set_mask(d, call)


# ------------------------------------------------------------------ memory


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
        e.line(f"ASYNC_WAIT({e.mask}, {e.value(operands[0], 'u32')});")
    elif "wait_all" in parts:
        e.line(f"ASYNC_WAIT({e.mask}, ~0u);")
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
        e.line(f"WARP_SYNC(members({e.mask}, {e.value(operands[0], 'b32')}));")
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


def scalar(e: Emitter, operand: Operand) -> str:
    """One number for the warp: that of its first lane."""
    x = e.value(operand, "u32")
    return f"at({x}, __builtin_ctz({e.mask} | 1u << 31))"


# ------------------------------------------------------------------ between lanes

SHUFFLES = {"up": "UP", "down": "DOWN", "bfly": "BFLY", "idx": "IDX"}


@op("shfl")
def shfl(e: Emitter) -> None:
    parts, operands = e.ins.parts, e.ins.operands
    mode = next(p for p in parts if p in SHUFFLES)
    d, a, b, c = operands[:4]
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, Sink())
    full = isinstance(c, Imm) and c.value & 0x1F1F == 0x1F
    if (
        mode == "bfly"
        and full
        and isinstance(second, Sink)
        and not e.partial
        and isinstance(b, Imm)
    ):
        e.line(f"shuffle_xor({e.target(first)}, {e.value(a, 'b32')}, {e.value(b, 'u32')});")
        return
    values = ", ".join([e.mask, e.target(first), *(e.value(x, "u32") for x in (a, b, c))])
    e.line(f"{{ const Mask q_ = shuffle<{SHUFFLES[mode]}>({values}); (void)q_;")
    e.set_mask(second, "q_")
    e.line("}")


@op("vote")
def vote(e: Emitter) -> None:
    parts, operands = e.ins.parts, e.ins.operands
    d, p = operands[:2]
    member = e.value(operands[2], "b32") if "sync" in parts else "ALL"
    if "ballot" in parts:
        e.line(f"ballot({e.mask}, {e.target(d)}, {e.mask_of(p)}, {member});")
    else:
        kind = {"all": "ALL_OF", "any": "ANY_OF", "uni": "UNIFORM"}[
            next(x for x in parts if x in ("all", "any", "uni"))
        ]
        e.set_mask(d, f"vote<{kind}>({e.mask}, {e.mask_of(p)}, {member})")


@op("activemask")
def activemask(e: Emitter) -> None:
    e.map(e.ins.operands[0], "Mov<uint32_t>", f"uint32_t({e.base})")


@op("elect")
def elect(e: Emitter) -> None:
    d = e.ins.operands[0]
    first, second = (d.first, d.second) if isinstance(d, Pair) else (Sink(), d)
    e.map(first, "Mov<uint32_t>", f"uint32_t(__builtin_ctz({e.mask}))")
    e.set_mask(second, f"({e.mask} & -{e.mask})")


@op("match")
def match(e: Emitter) -> None:
    parts, operands, t = e.ins.parts, e.ins.operands, type_of(e)
    d, a, member = operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, Sink())
    u = f"b{BITS[t]}"
    args = ", ".join([e.mask, e.target(first), e.value(a, u), e.value(member, "b32")])
    if "any" in parts:
        e.line(f"match_any<{ctype(u)}>({args});")
    else:
        e.line(f"{{ const Mask q_ = match_all<{ctype(u)}>({args}); (void)q_;")
        e.set_mask(second, "q_")
        e.line("}")


@op("redux")
def redux(e: Emitter) -> None:
    parts, t = e.ins.parts, type_of(e)
    d, a, member = e.ins.operands
    name = next((p for p in parts if p in ("add", "min", "max", "and", "or", "xor")), None)
    if name is None or t in ("f32",):
        raise e.fail("this reduction is not known here")
    c = ctype(t)
    e.line(f"redux<{name.capitalize()}<{c}>, {c}>({e.mask}, {e.target(d)}, {e.value(a, t)}, "
           f"{e.value(member, 'b32')});")  # fmt: skip


# ------------------------------------------------------------------ matrices


@op("mma")
def mma(e: Emitter) -> None:
    parts = e.ins.parts
    shape = next((p for p in parts if re.fullmatch(r"m\d+n\d+k\d+", p)), "")
    m, n, k = map(int, re.findall(r"\d+", shape) or (0, 0, 0))
    sparse = "sp" in parts or "sp::ordered_metadata" in parts
    types = [p for p in parts if p in ("f16", "bf16", "tf32", "f32", "f64", "s32", "s8", "u8", "s4",
                                       "u4", "b1", "e4m3", "e5m2")]  # fmt: skip
    if sparse or n != 8 or m not in (8, 16) or len(types) != 4 or "col" not in parts:
        raise e.fail(f"the matrix shape {shape} of {'.'.join(types)} is not known here")
    td, ta, tb, tc = types
    wide = {"f64": "b64"}.get(ta, "b32")
    d, a, b, c = (elements(o) for o in e.ins.operands[:4])
    if ta == "f64":
        if shape != "m8n8k4":
            raise e.fail("of f64 only m8n8k4 is known here")
        args = [e.target(x, wide) for x in d] + [e.lanes(x, wide) for o in (a, b, c) for x in o]
        pointers = [f"reinterpret_cast<double*>({x})" for x in args]
        e.line(f"mma_f64({', '.join(pointers)});")
        return
    outs = f"Outs<{len(d)}>{{{{{', '.join(e.target(x) for x in d)}}}}}"
    ins = [f"Regs<{len(o)}>{{{{{', '.join(e.lanes(x) for x in o)}}}}}" for o in (a, b, c)]
    bits = {"f16": 16, "bf16": 16, "tf32": 32, "s4": 4, "u4": 4, "b1": 1}.get(ta, 8)
    if len(a) != m // 8 * (k * bits // 128) or len(b) != k * bits // 128 or len(a) < 1:
        raise e.fail(f"the matrix shape {shape} of {'.'.join(types)} is not known here")
    if ta == "b1":
        xor = "true" if "xor" in parts else "false"
        e.line(f"mma_b1<{xor}, {m}>({', '.join([outs, *ins])});")
        return
    acc = {"f32": "float", "f16": "f16", "s32": "int32_t"}
    sat = "true" if "satfinite" in parts else "false"
    e.line(f"mma<{ta}, {tb}, {acc[tc]}, {acc[td]}, {m}, {k}, {sat}>({', '.join([outs, *ins])});")


@op("ldmatrix", "stmatrix")
def matrix_memory(e: Emitter) -> None:
    parts = e.ins.parts
    if "m8n8" not in parts or "b16" not in parts:
        raise e.fail("only m8n8 of b16 is known here", "compile for sm_80")
    trans = "true" if "trans" in parts else "false"
    load = e.ins.name == "ldmatrix"
    values, address = e.ins.operands if load else reversed(e.ins.operands)
    base, offset = base_of(e, address)
    space = space_of(e)
    regs = [e.target(x) if load else e.lanes(x) for x in elements(values)]
    e.mark()
    e.line(f"{e.ins.name}<{trans}, {space}>({', '.join(['w', base, str(offset), *regs])});")


@op("movmatrix")
def movmatrix(e: Emitter) -> None:
    d, a = e.ins.operands
    e.line(f"movmatrix({e.target(d)}, {e.lanes(a)});")


__all__ = ["HANDLERS", "PtxError"]
