"""PTX to C++ on effc_simt.h: a function for each entry and each device function it calls.

Lanes that hold different values are arrays, values equal in all lanes are scalars, predicates are
masks; `flow` says which is which. `instructions` knows what each opcode becomes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from . import flow
from .flow import Block, Flow
from .parser import PtxError
from .syntax import (
    BITS,
    Address,
    FloatImm,
    Function,
    Imm,
    Instruction,
    Location,
    Module,
    Not,
    Operand,
    Reg,
    Sink,
    Symbol,
    Variable,
    Vector,
)

CTYPE = {
    "pred": "bool", "f32": "float", "tf32": "float", "f64": "double",
    **{t: f"int{BITS[t]}_t" for t in ("s8", "s16", "s32", "s64")},
}  # fmt: skip


def ctype(type_: str) -> str:
    """The C type in which an operand of a PTX type is read."""
    return CTYPE.get(type_) or f"uint{BITS[type_]}_t"


def storage(type_: str) -> str:
    return f"uint{BITS[type_]}_t"


SPECIAL = {
    "%laneid": "in<uint32_t>(w.lane)", "%warpid": "w.index", "%nwarpid": "w.nwarp",
    "%WARP_SZ": "32u", "%warpsize": "32u", "%clock": "0u", "%clock_hi": "0u",
    "%clock64": "uint64_t(0)", "%globaltimer": "uint64_t(0)", "%globaltimer_lo": "0u",
    "%globaltimer_hi": "0u", "%smid": "0u", "%nsmid": "1u", "%gridid": "uint64_t(1)",
    "%dynamic_smem_size": "(w.shared_bytes - SHARED_STATIC)", "%total_smem_size": "w.shared_bytes",
    "%lanemask_eq": "LANEMASK(eq)", "%lanemask_lt": "LANEMASK(lt)", "%lanemask_le": "LANEMASK(le)",
    "%lanemask_gt": "LANEMASK(gt)", "%lanemask_ge": "LANEMASK(ge)",
    "%cluster_nctarank": "1u", "%cluster_ctarank": "0u", "%is_explicit_cluster": "false",
}  # fmt: skip
VECTOR_SPECIAL = {"%tid": "in<uint32_t>(w.tid[{}])", "%ctaid": "w.ctaid[{}]", "%ntid": "w.ntid[{}]",
                  "%nctaid": "w.nctaid[{}]", "%clusterid": "w.ctaid[{}]",
                  "%nclusterid": "w.nctaid[{}]", "%cluster_ctaid": "0u",
                  "%cluster_nctaid": "1u"}  # fmt: skip


def mangle(name: str) -> str:
    return re.sub(r"\W", lambda m: f"_{ord(m[0]):x}_", name)


@dataclass(frozen=True)
class Unit:
    """C++ of one entry.

    shared: bytes of its own shared variables. local: bytes a thread. frame: bytes of registers.
    fibers: its warps may have to wait for others. alone: blocks may exchange data, so that they run
    on one CPU thread, in order. fenced: it orders memory between blocks itself.
    """

    source: str
    symbol: str
    shared: int
    local: int
    frame: int
    fibers: bool
    alone: bool
    fenced: bool
    places: tuple[Instruction, ...]  # by the number that findings carry
    variables: tuple[str, ...]  # module variables it uses, in the order of `<symbol>_variables`


@dataclass
class _State:
    """What the functions of one unit share."""

    module: Module
    places: list[Instruction] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local_bytes: int = 0
    frame: int = 0
    fibers: bool = False
    alone: bool = False
    fenced: bool = False
    globals: dict[str, Variable] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def add_shared(self, v: Variable) -> None:
        self.shared_bytes = -(-self.shared_bytes // v.align) * v.align
        self.shared[v.name] = self.shared_bytes
        self.shared_bytes += v.size


def translate(module: Module, name: str) -> Unit:
    """The entry `name` of a module in C++. Raises PtxError, which lists every unknown opcode."""
    entry = module.functions[name]
    state = _State(module)
    _place_shared(state, entry)
    text = emit(state, name)
    # Dynamic shared memory follows what the entry declares.
    state.shared_bytes = -(-state.shared_bytes // 16) * 16
    symbol = f"kernel_{mangle(name)}"
    functions = [*list(state.done.values())[:-1], text] if state.done else [text]
    variables = _variables(state)
    parts = [
        f"#define SHARED_STATIC {state.shared_bytes}u",
        "using namespace simt;",
        *(f"static void f_{mangle(n)}{_signature(module.functions[n])};"
          for n in state.done if n != name),
        variables,
        *functions,
        f'extern "C" __attribute__((visibility("default"))) void {symbol}(Warp& w, const char* '
        f"params) {{ f_{mangle(name)}(w, params); }}",
        _variable_table(state, symbol),
    ]  # fmt: skip
    return Unit(
        "\n".join(parts) + "\n", symbol, state.shared_bytes, -(-state.local_bytes // 16) * 16,
        state.frame, state.fibers, state.alone, state.fenced, tuple(state.places),
        tuple(state.globals),
    )  # fmt: skip


def _place_shared(state: _State, entry: Function) -> None:
    """Static variables first, then the one block that all `.extern .shared` names share."""
    reached = _reached(state.module, entry)
    mentioned = {
        name
        for f in reached
        for i in flow_instructions(f)
        for o in i.operands
        for name in symbols(o)
    }
    owned = [v for f in reached for v in f.variables if v.space == "shared"]
    variables = [v for v in state.module.variables if v.space == "shared" and v.name in mentioned]
    for v in [*variables, *owned]:
        if v.size:
            state.add_shared(v)
    dynamic = [v for v in variables if not v.size]
    if dynamic:
        align = max(16, *(v.align for v in dynamic))
        state.shared_bytes = -(-state.shared_bytes // align) * align
        for v in dynamic:
            state.shared[v.name] = state.shared_bytes


def flow_instructions(function: Function) -> list[Instruction]:
    return [i for i in function.body or () if isinstance(i, Instruction)]


def symbols(operand: Operand) -> list[str]:
    match operand:
        case Symbol(name=name) | Address(base=Symbol(name=name)):
            return [name]
        case Vector(items=items):
            return [n for i in items for n in symbols(i)]
    return []


def _reached(module: Module, entry: Function) -> list[Function]:
    found, todo = [], [entry]
    while todo:
        function = todo.pop()
        if function in found:
            continue
        found.append(function)
        for i in flow_instructions(function):
            if i.name == "call":
                names = [n for o in i.operands for n in symbols(o)]
                todo += [f for n in names if (f := module.functions.get(n)) and f.body is not None]
    return found


def _signature(function: Function) -> str:
    if function.entry:
        return "(Warp& w, const char* params)"
    names = [f"char* P_{mangle(v.name)}" for v in (*function.returns, *function.params)]
    return f"({', '.join(['Warp& w', 'Mask act', *names])})"


def emit(state: _State, name: str) -> str:
    """C++ of a function; what it calls is emitted before it."""
    function = state.module.functions[name]
    state.active.append(name)
    text = Emitter(state, function).text()
    state.active.pop()
    state.done[name] = text
    return text


# ------------------------------------------------------------------ module variables


def _variables(state: _State) -> str:
    lines = []
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for value in state.globals[name].init:
            if isinstance(value, tuple):
                use_global(state, value[0])
                visit(value[0])
        order.append(name)

    for name in list(state.globals):
        visit(name)
    for name in order:
        v = state.globals[name]
        size = max(1, BITS[v.type] // 8)
        if any(isinstance(x, tuple) for x in v.init):
            values = ", ".join(
                f"uint64_t(g_{mangle(x[0])}) + {x[1]}" if isinstance(x, tuple) else str(x)
                for x in v.init
            )
            lines.append(f"alignas({max(v.align, 16)}) static uint64_t g_{mangle(name)}"
                         f"[{max(1, v.size // 8)}] = {{{values}}};")  # fmt: skip
            continue
        data = bytearray()
        for x in v.init:
            assert not isinstance(x, tuple)
            data += _bytes(x, v.type, size)
        data = data.ljust(v.size, b"\0")
        values = ", ".join(str(b) for b in data)
        init = f" = {{{values}}}" if any(data) else ""
        lines.append(f"alignas({max(v.align, 16)}) static unsigned char g_{mangle(name)}"
                     f"[{max(1, v.size)}]{init};")  # fmt: skip
    return "\n".join(lines)


def _bytes(value: int | float, type_: str, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if type_ == "f32" else "<d", value)
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _variable_table(state: _State, symbol: str) -> str:
    rows = "".join(f"uint64_t(g_{mangle(n)}), {v.size}, " for n, v in state.globals.items())
    return (
        f'extern "C" __attribute__((visibility("default"))) void {symbol}_variables(uint64_t* out) '
        f"{{ const uint64_t t[] = {{{rows}0}}; memcpy(out, t, sizeof t - 8); }}"
    )


def use_global(state: _State, name: str) -> bool:
    for v in state.module.variables:
        if v.name == name and v.space in ("global", "const"):
            if v.extern and not v.init:
                raise PtxError(
                    f"variable {name} is declared .extern and defined nowhere",
                    fix="compile the module that defines it together with this one",
                )
            state.globals.setdefault(name, v)
            return True
    return False


# ------------------------------------------------------------------ one function


class Emitter:
    """Writes one function; handlers of opcodes call its methods. `ins`: the instruction at hand."""

    def __init__(self, state: _State, function: Function) -> None:
        self.state, self.function, self.module = state, function, state.module
        self.flow: Flow = flow.analyse(function)
        self.lines: list[str] = []
        self.scratch: dict[int, int] = {}  # width -> arrays in use by the instruction at hand
        self.scratch_most: dict[int, int] = {}
        self.local: dict[str, int] = {}
        self.params: dict[str, int] = {}  # of an entry: offset
        self.private: dict[str, Variable] = {}  # parameters of calls, bytes for each lane
        self.unknown: list[PtxError] = []
        self.block: Block = self.flow.blocks[0]
        self.ins: Instruction = Instruction("", (), Location(0))
        self._place()

    def _place(self) -> None:
        function, state = self.function, self.state
        offset = 0
        for v in function.params if function.entry else ():
            offset = -(-offset // v.align) * v.align
            self.params[v.name] = offset
            offset += v.size
        if not function.entry:
            self.private |= {v.name: v for v in (*function.returns, *function.params)}
        for v in function.variables:
            if v.space == "local":
                state.local_bytes = -(-state.local_bytes // v.align) * v.align
                self.local[v.name] = state.local_bytes
                state.local_bytes += v.size
            elif v.space == "param":
                self.private[v.name] = v

    # -------------------------------------------------------------- what handlers use

    def fail(self, why: str, fix: str = "") -> PtxError:
        return unsupported(self.ins, why, fix)

    @property
    def base(self) -> str:
        """The mask of the block: all lanes of the function, or those that came here."""
        return "m" if self.block.divergent else "act"

    @property
    def guard(self) -> str | None:
        """The guard as a mask, None without one or with a uniform one (which is an `if`)."""
        guard = self.ins.guard
        if guard is None or self.is_uniform(guard):
            return None
        return self.mask_of(guard)

    @property
    def mask(self) -> str:
        guard = self.guard
        return f"({self.base} & {guard})" if guard else self.base

    @property
    def partial(self) -> bool:
        return self.block.divergent or self.guard is not None

    def line(self, text: str) -> None:
        self.lines.append(text)

    def place(self) -> int:
        """The number of this instruction in findings."""
        self.state.places.append(self.ins)
        return len(self.state.places) - 1

    def mark(self) -> None:
        self.line(f"PC({self.place()});")

    def is_uniform(self, operand: Operand) -> bool:
        match operand:
            case Reg(name=name) if name in self.function.registers:
                return name in self.flow.uniform or self.reads_one(name)
            case Reg(name=name):
                return not name.startswith(("%tid", "%laneid", "%lanemask"))
            case Not(reg=reg):
                return self.is_uniform(reg)
            case Address(base=base):
                return self.is_uniform(base)
            case Vector(items=items):
                return all(map(self.is_uniform, items))
        return True

    def is_scalar(self, d: Operand) -> bool:
        """A result that is kept as one number."""
        return isinstance(d, Reg) and d.name in self.flow.uniform

    def reads_one(self, name: str) -> bool:
        """An array that holds one value here."""
        return name in self.flow.reads.get(id(self.ins), ())

    def type_of(self, reg: Reg) -> str:
        if reg.name in self.function.registers:
            return self.function.registers[reg.name]
        wide = reg.name.startswith(("%clock64", "%globaltimer", "%gridid")) and "_" not in reg.name
        return "b64" if wide else "b32"

    def home(self, reg: Reg) -> str:
        """The array of a register whose lanes differ."""
        width, index = self.flow.slots[reg.name]
        return f"r{width}[{index}]"

    def variable(self, name: str) -> str:
        return f"u_{mangle(name)}"

    def value(self, operand: Operand, type_: str) -> str:
        """An operand as the argument of an operation on `type_`: a number or a pointer to lanes."""
        c = ctype(type_)
        match operand:
            case Reg(name=name) if name in self.function.registers:
                bits = BITS[self.function.registers[name]]
                if name in self.flow.uniform:
                    u = self.variable(name)
                    return f"bits<{c}>({u})" if c in ("float", "double") else f"{c}({u})"
                if bits == 1:
                    raise self.fail(f"{name} is a predicate, {type_} was expected")
                if self.reads_one(name):
                    one = f"{self.home(operand)}.x[__builtin_ctz(act)]"
                    return f"bits<{c}>({one})" if c in ("float", "double") else f"{c}({one})"
                if bits != BITS[type_]:
                    return self.resized(reg=operand, type_=type_)
                return f"in<{c}>({self.home(operand)})"
            case Reg(name=name):
                return self.special(name, c)
            case Imm(value=v):
                return self.literal(v, type_)
            case FloatImm():
                return self.float_literal(operand, type_)
            case Symbol():
                return f"{c}({self.address_of(operand)})"
        raise self.fail(f"operand {operand} cannot be read as {type_}")

    def resized(self, reg: Reg, type_: str) -> str:
        """A register of another width than the operation: its low bits, or extended by sign."""
        have = BITS[self.type_of(reg)]
        source = ("int" if type_.startswith("s") else "uint") + f"{have}_t"
        temp = self.temporary(BITS[type_])
        ext = f"Ext<{storage(type_)}>"
        self.line(f"map<{ext}>({temp}.x, in<{source}>({self.home(reg)}));")
        return f"in<{ctype(type_)}>({temp})"

    def special(self, name: str, c: str) -> str:
        base, _, axis = name.partition(".")
        text = SPECIAL.get(name)
        if text is None and base in VECTOR_SPECIAL and axis in ("x", "y", "z"):
            text = VECTOR_SPECIAL[base].format("xyz".index(axis))
        if text is None:
            raise self.fail(f"the special register {name} is not known here")
        if text.startswith("LANEMASK"):
            temp = self.temporary(32)
            kind = name.rpartition("_")[2]
            self.line(f"lanemask_{kind}({temp}.x);")
            return f"in<uint32_t>({temp})"
        if text.startswith("in<"):
            if c in ("uint64_t", "int64_t", "uint16_t", "int16_t"):
                temp = self.temporary(64 if "64" in c else 16)
                self.line(f"map<Ext<u{c.lstrip('u')}>>({temp}.x, {text});")
                return f"in<{c}>({temp})"
            return text.replace("uint32_t", c)
        return f"{c}({text})"

    def literal(self, v: int, type_: str) -> str:
        c, bits = ctype(type_), BITS[type_]
        if c in ("float", "double"):
            return f"bits<{c}>(uint{bits}_t({v & ((1 << bits) - 1)}u{'ll' if bits == 64 else ''}))"
        return f"{c}({v & ((1 << bits) - 1)}u{'ll' if bits == 64 else ''})"

    def float_literal(self, f: FloatImm, type_: str) -> str:
        bits, width, want = f.bits, f.width, BITS[type_]
        if width != want:
            number = struct.unpack("<d", struct.pack("<Q", bits))[0] if width == 64 else (
                struct.unpack("<f", struct.pack("<I", bits))[0])  # fmt: skip
            if want == 64:
                bits = struct.unpack("<Q", struct.pack("<d", number))[0]
            elif want == 32:
                bits = struct.unpack("<I", struct.pack("<f", number))[0]
            elif type_ == "f16":
                bits = struct.unpack("<H", struct.pack("<e", number))[0]
            else:
                raise self.fail(f"literal {f} cannot be read as {type_}")
            if math.isnan(number):
                bits |= 1
        return self.literal(bits, type_)

    def address_of(self, symbol: Symbol) -> str:
        """A symbol's address in its own space; shared and local ones are offsets."""
        name, plus = symbol.name, f" + {symbol.offset}" if symbol.offset else ""
        if name in self.state.shared:
            return f"{self.state.shared[name] + symbol.offset}u"
        if name in self.local:
            return f"{self.local[name] + symbol.offset}u"
        if name in self.params:
            return f"(uint64_t(params) + {self.params[name] + symbol.offset})"
        if use_global(self.state, name):
            return f"(uint64_t(g_{mangle(name)}){plus})"
        raise self.fail(f"the symbol {name} is not defined")

    def mask_of(self, operand: Operand) -> str:
        """A predicate as a mask of lanes."""
        match operand:
            case Not(reg=reg):
                return f"(~{self.mask_of(reg)})"
            case Reg(name=name) if name in self.flow.uniform:
                return f"({self.variable(name)} ? ALL : 0u)"
            case Reg(name=name) if self.function.registers.get(name) == "pred":
                return f"p_{mangle(name)}"
            case Imm(value=v):
                return "ALL" if v else "0u"
        raise self.fail(f"{operand} is no predicate")

    def bool_of(self, operand: Operand) -> str:
        match operand:
            case Not(reg=reg):
                return f"(!{self.bool_of(reg)})"
            case Reg(name=name) if name not in self.flow.uniform:
                return f"bool(p_{mangle(name)} >> __builtin_ctz(act) & 1)"
            case Reg(name=name):
                return self.variable(name)
            case Imm(value=v):
                return "true" if v else "false"
        raise self.fail(f"{operand} is no predicate")

    def temporary(self, width: int) -> str:
        index = self.scratch.get(width, 0)
        self.scratch[width] = index + 1
        self.scratch_most[width] = max(self.scratch_most.get(width, 0), index + 1)
        return f"t{width}[{index}]"

    def lanes(self, operand: Operand, type_: str = "b32") -> str:
        """An operand as an array of lanes whatever it is: `uint32_t*` for 32 bits."""
        if isinstance(operand, Reg) and operand.name in self.flow.slots:
            if BITS[self.type_of(operand)] == BITS[type_]:
                return f"{self.home(operand)}.x"
        value = self.value(operand, type_)
        if value.startswith("in<") and not isinstance(operand, Imm):
            return f"const_cast<{ctype(type_)}*>({value})"
        temp = self.temporary(BITS[type_])
        self.line(f"fill<{storage(type_)}>({temp}.x, reg<{storage(type_)}>({value}));")
        return f"{temp}.x"

    def target(self, operand: Operand, type_: str = "b32") -> str:
        """Where a whole-warp operation writes: the register's array, or nowhere."""
        if isinstance(operand, Sink):
            return f"{self.temporary(BITS[type_])}.x"
        assert isinstance(operand, Reg)
        return f"{self.home(operand)}.x"

    def map(self, d: Operand, op: str, *args: str) -> None:
        """d = op(args), lane by lane or once."""
        if isinstance(d, Sink):
            return
        if not isinstance(d, Reg):
            raise self.fail(f"{d} cannot hold the result")
        type_ = self.type_of(d)
        if d.name in self.flow.uniform:
            self.line(
                f"{self.variable(d.name)} = reg<{storage(type_)}>({op}::f({', '.join(args)}));"
            )
        elif self.partial:
            self.line(f"map_masked<{op}>({', '.join([self.mask, self.home(d) + '.x', *args])});")
        else:
            self.line(f"map<{op}>({', '.join([self.home(d) + '.x', *args])});")

    def set_mask(self, d: Operand, expression: str) -> None:
        """A predicate of lanes."""
        if isinstance(d, Sink):
            return
        assert isinstance(d, Reg)
        p = f"p_{mangle(d.name)}"
        if d.name in self.flow.uniform:
            raise self.fail(f"{d} should differ between lanes")
        if self.partial:
            self.line(f"{p} = blend({self.mask}, {expression}, {p});")
        else:
            self.line(f"{p} = {expression};")

    def set_scalar(self, d: Operand, expression: str) -> None:
        if isinstance(d, Reg):
            self.line(f"{self.variable(d.name)} = {expression};")

    def set_bool(self, d: Operand, expression: str) -> None:
        if isinstance(d, Reg):
            self.line(f"{self.variable(d.name)} = {expression};")

    # -------------------------------------------------------------- the text

    def text(self) -> str:
        from .instructions import HANDLERS

        blocks = self.flow.blocks
        order = [b.index for b in blocks if b.divergent] + [
            b.index for b in blocks if not b.divergent
        ]
        self.numbers = {index: n for n, index in enumerate(order)}
        self.splits = any(b.divergent for b in blocks)
        for block in blocks:
            self.block = block
            self._start(block)
            for ins in block.items:
                self.ins = ins
                self.scratch = {}
                handler = HANDLERS.get(ins.name)
                try:
                    if handler is None:
                        raise self.fail(f"the opcode {ins.opcode} is not known")
                    self._one(handler)
                except PtxError as error:
                    self.unknown.append(error)
            self._end(block)
        if self.unknown:
            raise _together(self.unknown)
        return "\n".join([*self._head(), *self.lines, *self._dispatch(), "}"])

    def _one(self, handler: Callable[[Emitter], None]) -> None:
        guard = self.ins.guard
        if guard is not None and self.is_uniform(guard) and self.ins.name not in ("bra", "brx"):
            self.line(f"if ({self.bool_of(guard)}) {{")
            handler(self)
            self.line("}")
        else:
            handler(self)

    def _start(self, block: Block) -> None:
        self.line(f"B{block.index}: __attribute__((unused));")
        if block.collective:
            self.ins = block.items[0]
            self.scratch = {}
            wanted = self._wanted(block.items[0])
            self.line(f"if ({wanted} & ~m) {{ pending.park({self.numbers[block.index]}, m); "
                      "goto next; }")  # fmt: skip

    def _wanted(self, ins: Instruction) -> str:
        """Lanes without which a collective does not start."""
        parts, all_ = ins.parts, "act"
        if ins.name in ("shfl", "vote", "match", "redux") and "sync" in parts:
            member = self.value(ins.operands[-1], "b32")
            return f"(members(m, {member}) & act)"
        if parts[:2] in (("bar", "warp"), ("barrier", "warp")):
            return f"(members(m, {self.value(ins.operands[0], 'b32')}) & act)"
        return all_ if "sync" in parts or ins.name in ("bar", "barrier") else "m"

    def _end(self, block: Block) -> None:
        """Falls through to the next block; branches and returns have said where they go."""
        last = block.items[-1]
        if last.name in ("bra", "brx") or (flow.is_return(last) and last.guard is None):
            return
        if block.successors:
            self.jump(block.successors[-1])

    def go(self, to: int) -> str:
        """All lanes of this block go to one place."""
        if self.block.divergent or self.flow.blocks[to].divergent:
            return f"pending.add({self.numbers[to]}, {self.base}); goto next;"
        return f"goto B{to};"

    def jump(self, to: int) -> None:
        text = self.go(to)
        if text != f"goto B{self.block.index + 1};":
            self.line(text)

    def _head(self) -> list[str]:
        function, counts = self.function, dict(self.flow.slot_counts)
        lines = [f"static void f_{mangle(function.name)}{_signature(function)} {{"]
        if function.entry:
            lines.append("Mask act = w.live;")
        frame = 0
        for name, sizes in (("r", counts), ("t", self.scratch_most)):
            for width, count in sorted(sizes.items()):
                lines.append(f"Lanes<uint{width}_t> {name}{width}[{count}];")
                frame += count * width * 4
        for v in self.private.values():
            if v in function.variables:
                lines.append(f"alignas(16) char P_{mangle(v.name)}[{32 * v.size}];")
                frame += 32 * v.size
        used = {
            r
            for b in self.flow.blocks
            for i in b.items
            for names in flow.defs_uses(i)
            for r in names
        }
        for r, t in function.registers.items():
            if r not in used:
                continue
            if r in self.flow.uniform:
                c = "bool" if t == "pred" else storage(t)
                lines.append(f"{c} {self.variable(r)} = 0;")
            elif t == "pred":
                lines.append(f"Mask p_{mangle(r)} = 0;")
        if self.flow.carries:
            lines.append("Mask carry = 0;")
        if self.splits:
            lines.append(f"Mask m = 0; Pending<{len(self.flow.blocks)}> pending;")
        if self.state.active.count(function.name) > 1:
            raise PtxError(f"function {function.name} calls itself", fix="write it as a loop")
        self.state.frame += frame
        return lines

    def _dispatch(self) -> list[str]:
        """Picks the block to go on with where lanes have parted."""
        if not self.splits:
            return []
        self.state.fibers = True  # lanes may get stuck, which needs a place to report from
        stuck = ", ".join(str(self._stuck(b)) for b in self._by_number())
        kinds = ", ".join(
            "DIVERGED_BARRIER" if b.items and b.items[0].name in ("bar", "barrier") and
            "warp" not in b.items[0].parts else "STUCK_WARP" for b in self._by_number()
        )  # fmt: skip
        cases = []
        divergent = sum(b.divergent for b in self.flow.blocks)
        for number, block in enumerate(self._by_number()):
            take = f"m = pending.take({number}); " if number < divergent else (
                f"pending.take({number}); ")  # fmt: skip
            cases.append(f"case {number}: {take}goto B{block.index};")
        return [
            "next:",
            "if (!act) return;",
            f"switch (pending.next({divergent}, act)) {{",
            *cases,
            "}",
            f"{{ static const int pc[] = {{{stuck}}}, kind[] = {{{kinds}}}; const int i = "
            "pending.stuck(); w.hooks->fail(&w, kind[i], pending.at[i], act, 0, pc[i]); }",
        ]

    def _by_number(self) -> list[Block]:
        blocks = self.flow.blocks
        return [blocks[i] for i in sorted(self.numbers, key=lambda i: self.numbers[i])]

    def _stuck(self, block: Block) -> int:
        self.ins = block.items[0]
        return self.place() if block.collective else -1


def unsupported(ins: Instruction, why: str, fix: str = "") -> PtxError:
    return PtxError(
        f"cannot translate {ins.opcode}: {why}",
        node=str(ins),
        where=str(ins.location),
        fix=fix
        or "run this kernel on a GPU, or rewrite it without the instruction; if Triton or "
        "NVRTC wrote it, report it together with the PTX",
    )


def _together(errors: list[PtxError]) -> PtxError:
    if len(errors) == 1:
        return errors[0]
    first = errors[0]
    rest = [f"    {e.where}: {e.what}" for e in errors[1:9]]
    if len(errors) > 9:
        rest.append(f"    and {len(errors) - 9} more")
    return PtxError(
        first.what, node=first.node, where=first.where, fix=first.fix,
        context="\n".join(["  also:", *rest]),
    )  # fmt: skip
