"""Values: comparing, choosing, moving, converting."""

from __future__ import annotations

from ..syntax import BITS, Operand, Pair, Reg, Sink, Vector
from ..translate import Emitter, ctype, storage
from .common import HALVES, ROUNDING, op, plain, type_of

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
