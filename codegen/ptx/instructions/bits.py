"""Bits: logic, shifts, fields, permutations of bytes."""

from __future__ import annotations

from ..syntax import Imm
from ..translate import Emitter, ctype
from .common import op, plain, type_of


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
