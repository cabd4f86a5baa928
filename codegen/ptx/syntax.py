"""The typed structure of a PTX module: what the parser makes and the translator reads.

Names follow the PTX ISA, version 9.0: https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Bits of each fundamental and packed type.
BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "e4m3": 8, "e5m2": 8,
    "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "e4m3x2": 16, "e5m2x2": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32,
    "u16x2": 32, "s16x2": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64, "b128": 128,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Location:
    """Where an instruction comes from: its line in the PTX and, by `.loc`, in the source."""

    line: int
    file: str = ""
    source_line: int = 0

    def __str__(self) -> str:
        source = f"{self.file}:{self.source_line}" if self.file and self.source_line else ""
        return f"{source} (PTX line {self.line})" if source else f"PTX line {self.line}"


@dataclass(frozen=True, slots=True)
class Reg:
    """A register by its resolved name, `%r1` or a special one such as `%tid.x`."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Imm:
    """An integer literal; its width is the instruction's."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class FloatImm:
    """A float literal by its bits: 0f3F800000, 0d3FF0000000000000, or 1.0, which is 64 bits."""

    bits: int
    width: int

    def __str__(self) -> str:
        return f"0{'f' if self.width == 32 else 'd'}{self.bits:0{self.width // 4}X}"


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, or the name of a function or label."""

    name: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}+{self.offset}" if self.offset else self.name


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset]"""

    base: Reg | Symbol | Imm
    offset: int = 0

    def __str__(self) -> str:
        return f"[{self.base}+{self.offset}]" if self.offset else f"[{self.base}]"


@dataclass(frozen=True, slots=True)
class Vector:
    """{a, b, ...}, or the (a, b) of a call."""

    items: tuple[Operand, ...]

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.items)) + "}"


@dataclass(frozen=True, slots=True)
class Pair:
    """d|p: two results of one instruction."""

    first: Operand
    second: Operand

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


@dataclass(frozen=True, slots=True)
class Not:
    """!p"""

    reg: Reg

    def __str__(self) -> str:
        return f"!{self.reg}"


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: a result nobody wants."""

    def __str__(self) -> str:
        return "_"


Operand = Reg | Imm | FloatImm | Symbol | Address | Vector | Pair | Not | Sink


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. guard: the predicate that lets a thread execute it, or None."""

    opcode: str  # as written, "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    location: Location
    guard: Reg | Not | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(map(str, self.operands))};"


@dataclass(frozen=True, slots=True)
class Label:
    name: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in a state space. size: bytes, 0 for `.extern .shared x[]`.

    init: numbers, or (symbol, offset) where the address of a variable is stored.
    """

    name: str
    space: str  # "global", "const", "shared", "local", "param"
    type: str
    align: int
    size: int
    init: tuple[int | float | tuple[str, int], ...] = ()
    extern: bool = False


@dataclass
class Function:
    """An entry (`kernel`) or a device function; `body` is None where it is only declared."""

    name: str
    entry: bool
    params: tuple[Variable, ...]
    returns: tuple[Variable, ...] = ()
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    variables: list[Variable] = field(default_factory=list)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets
    body: list[Instruction | Label] | None = None
    required: tuple[int, int, int] | None = None  # .reqntid
    location: Location = Location(0)


@dataclass
class Module:
    version: str
    target: str
    functions: dict[str, Function]
    variables: list[Variable]
    files: dict[int, str]
    text: str

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.functions.values() if f.entry)
