"""Between the lanes of a warp: shuffles, votes, matrix fragments."""

from __future__ import annotations

import re

from ..syntax import BITS, Imm, Pair, Sink
from ..translate import Emitter, ctype
from .common import op, type_of
from .memory import base_of, elements, space_of

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
