"""What a launch found wrong, in words: from the scheduler's numbers to lines of the source."""

from __future__ import annotations

import ctypes
import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effc.ir.errors import EffcError

from .runtime import CFinding
from .syntax import Instruction
from .translate import Unit

KINDS = {
    1: "divergent barrier", 2: "divergent warp", 3: "trap", 4: "assert", 10: "deadlock",
    11: "spinning", 12: "out of bounds", 13: "misaligned", 14: "uninitialised shared memory",
    15: "race", 16: "weak async wait", 17: "no stack",
}  # fmt: skip
ACCESS = ("read", "write", "atomic", "cp.async write")
SPACES = ("global", "shared", "local", "param")


@dataclass(frozen=True)
class Finding:
    """One mistake of a kernel. count: how often it was seen at this place.

    other: the instruction it conflicts with. address: an offset for shared and local memory.
    """

    kind: str
    text: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    instruction: Instruction | None
    other: Instruction | None = None
    address: int = 0
    size: int = 0
    count: int = 1

    def __str__(self) -> str:
        return self.text


class Fault(EffcError):
    """A kernel did what it must not; `findings` lists it all."""

    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, name: str, found: Sequence[Finding]) -> Fault:
        first, rest = found[0], found[1:]
        where = str(first.instruction.location) if first.instruction else None
        context = "\n".join(f"  also: {f}" for f in rest[:9]) or None
        fault = cls(
            f"kernel {name}: {first}",
            where=where,
            node=str(first.instruction) if first.instruction else None,
            context=context,
        )
        fault.findings = tuple(found)
        return fault


def findings(
    raw: Sequence[CFinding], unit: Unit, block: tuple[int, int, int], held: Mapping[int, Any],
    names: Sequence[str] = (),
) -> list[Finding]:  # fmt: skip
    """The scheduler's findings with places and sentences. held: arrays by their argument."""
    return [_finding(f, unit, block, held, names) for f in raw]


def _finding(
    f: CFinding, unit: Unit, block: tuple[int, int, int], held: Mapping[int, Any],
    names: Sequence[str],
) -> Finding:  # fmt: skip
    ins = unit.places[f.pc] if f.pc >= 0 else None
    other = unit.places[f.other_pc] if f.other_pc >= 0 else None
    kind = KINDS[f.kind]
    text = _text(kind, f, ins, other, block, _place(f, held, names))
    return Finding(
        kind, text, tuple(f.block), _thread(f.thread, block), ins, other, f.address, f.size, f.count
    )


def _thread(t: int, block: tuple[int, int, int]) -> tuple[int, int, int]:
    return t % block[0], t // block[0] % block[1], t // (block[0] * block[1])


def _text(
    kind: str,
    f: CFinding,
    ins: Instruction | None,
    other: Instruction | None,
    block: tuple[int, int, int],
    place: str,
) -> str:
    who = f"block {tuple(f.block)}, thread {_thread(f.thread, block)}"
    at = f" at {_line(ins)}" if ins else ""
    space = SPACES[f.space]
    where = f"{f.size} bytes at {place}"
    match kind:
        case "race":
            there = _line(other) if other else "an earlier access"
            return (
                f"race on {space} memory: {who} {ACCESS[f.access]}s {where}{at}, which thread "
                f"{_thread(f.other_thread, block)} {ACCESS[f.other_access]}s at {there}, with no "
                "barrier between"
            )
        case "out of bounds":
            return f"out of bounds: {who} {ACCESS[f.access]}s {where} of {space} memory{at}"
        case "misaligned":
            return f"misaligned: {who} {ACCESS[f.access]}s {where} of {space} memory{at}"
        case "uninitialised shared memory":
            return f"uninitialised shared memory: {who} reads {where}{at}, which nobody wrote"
        case "weak async wait":
            there = f" issued at {other.location}" if other else ""
            writer = f"thread {_thread(f.other_thread, block)}{there}"
            return (
                f"weak async wait: {who} {ACCESS[f.access]}s {where} of shared memory{at} while "
                f"the cp.async of {writer} may still be copying"
            )
        case "divergent barrier":
            return (
                f"divergent barrier: {who} waits{at}, but only lanes {f.size:#010x} of its warp "
                "come there"
            )
        case "divergent warp":
            here = f"here are {f.size:#010x}"
            return f"divergent warp: {who} waits{at} for lanes that never come; {here}"
        case "deadlock":
            return f"deadlock: {who} waits at barrier {f.size}{at}, which is never complete"
        case "spinning":
            return f"deadlock: {who} waits in a loop{at} for what no block will write"
        case "assert":
            return f"assert failed: {_string(f.address)} (line {f.other_thread}), {who}{at}"
        case "no stack":
            return f"no memory for a stack of {f.size} KiB a warp"
    return f"{kind}: {who}{at}"


def _line(ins: Instruction) -> str:
    """Where an instruction is, and its line of the source where that can be read."""
    where = ins.location
    text = linecache.getline(where.file, where.source_line).strip()
    return f"{where} [{ins.opcode}]{f' in `{text}`' if text else ''}"


def _place(f: CFinding, held: Mapping[int, Any], names: Sequence[str]) -> str:
    if SPACES[f.space] != "global":
        return f"offset {f.address}"
    nearest_, distance = "", 1 << 62
    for i, value in held.items():
        if isinstance(value, torch.Tensor):
            base, size = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
        else:
            base, size = value.ctypes.data, value.nbytes
        gap = max(base - f.address, f.address + f.size - base - size, 0)
        if gap < distance:
            distance = gap
            name = f" ({names[i]})" if i < len(names) else ""
            nearest_ = f", byte {f.address - base} of array argument {i}{name}, which has {size}"
    return f"{f.address:#x}{nearest_}"


def _string(address: int) -> str:
    if not address:
        return "?"
    return repr(ctypes.string_at(address).decode("utf-8", "replace"))
