"""What handlers of instructions are registered by, and what they share."""

from __future__ import annotations

from collections.abc import Callable

from ..syntax import BITS, Operand, Reg
from ..translate import Emitter

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


def scalar(e: Emitter, operand: Operand) -> str:
    """One number for the warp: that of its first lane."""
    x = e.value(operand, "u32")
    return f"at({x}, __builtin_ctz({e.mask} | 1u << 31))"
