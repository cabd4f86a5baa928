"""Arithmetic: sums, products, fused steps, carries, elementary functions."""

from __future__ import annotations

from ..syntax import BITS
from ..translate import Emitter, ctype
from .common import HALVES, ROUNDING, half, modified, op, plain, type_of

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
