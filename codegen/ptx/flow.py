"""Control flow of a function: blocks, what is the same in all lanes, and the registers' homes.

A branch on a value that differs between lanes splits the warp. The blocks between it and the place
where both ways meet again (its immediate post-dominator) run under a mask and are called divergent;
everywhere else all lanes that live are there. A register is uniform where every definition computes
it from uniform values outside divergent blocks: it is a scalar then.

A conditional return is no branch here: lanes that leave are only taken out of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .parser import PtxError
from .syntax import (
    BITS,
    Address,
    Function,
    Instruction,
    Label,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Vector,
)

CARRY = Reg("%cc")
# Their first operand is no result.
NO_RESULT = frozenset(
    "st red bra brx call ret exit bar barrier cp membar fence prefetch prefetchu discard trap "
    "brkpt griddepcontrol nanosleep pmevent stmatrix applypriority setmaxnreg".split()
)
# Lanes meet: the mask must be complete before they run.
COLLECTIVE = frozenset(
    "shfl vote match redux bar barrier mma ldmatrix stmatrix movmatrix wmma elect".split()
)
UNIFORM_SPECIAL = ("%ctaid", "%ntid", "%nctaid", "%warpsize", "%WARP_SZ", "%nwarpid", "%warpid",
                   "%clock", "%globaltimer", "%smid", "%nsmid", "%gridid", "%dynamic_smem_size",
                   "%total_smem_size", "%envreg", "%cluster", "%nclusterid", "%is_explicit",
                   "%lanemask")  # fmt: skip
# A scalar computes the same as the lanes do. Not in it: what reads memory that may change or
# differs by lane, and arithmetic of 16-bit floats, which exists for whole warps only.
PURE = frozenset(
    "mov add sub mul mad mul24 mad24 sad div rem min max and or xor not cnot shl shr neg abs setp "
    "selp slct set cvt cvta bfe bfi bfind popc clz brev prmt lop3 shf dp4a dp2a fma rcp sqrt rsqrt "
    "ex2 lg2 sin cos tanh testp copysign szext bmsk fns addc subc madc ld ldu isspacep".split()
)


@dataclass
class Block:
    index: int
    items: list[Instruction]
    first: int  # position of its first instruction in the function
    labels: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    divergent: bool = False
    collective: bool = False  # starts with one, in a divergent block

    @property
    def branch(self) -> Instruction | None:
        last = self.items[-1] if self.items else None
        return last if last and last.name in ("bra", "brx") else None


@dataclass
class Flow:
    """The analysed function. slots: home of each register that is an array, (width, index)."""

    function: Function
    blocks: list[Block]
    uniform: frozenset[str]
    reads: dict[int, frozenset[str]]
    slots: dict[str, tuple[int, int]]
    slot_counts: dict[int, int]
    carries: bool


def is_return(item: Instruction) -> bool:
    return item.name in ("ret", "exit")


def registers(operand: Operand) -> Iterator[Reg]:
    """Every register an operand mentions."""
    match operand:
        case Reg():
            yield operand
        case Not(reg=reg):
            yield reg
        case Address(base=Reg() as reg):
            yield reg
        case Vector(items=items):
            for item in items:
                yield from registers(item)
        case Pair(first=first, second=second):
            yield from registers(first)
            yield from registers(second)


def has_result(ins: Instruction) -> bool:
    parts = ins.parts
    if ins.name in ("bar", "barrier"):
        return "red" in parts
    if ins.name in ("wmma", "tcgen05"):
        return "store" not in parts
    return ins.name not in NO_RESULT and bool(ins.operands)


def defs_uses(ins: Instruction) -> tuple[list[str], list[str]]:
    """Names of registers written and read, `%cc` for the carry."""
    operands = ins.operands
    defs = [r.name for r in registers(operands[0])] if has_result(ins) else []
    rest = operands[1:] if has_result(ins) else operands
    uses = [r.name for o in rest for r in registers(o)]
    if ins.guard:
        uses += [r.name for r in registers(ins.guard)]
    if "cc" in ins.parts:
        defs.append(CARRY.name)
    if ins.name in ("addc", "subc", "madc"):
        uses.append(CARRY.name)
    return defs, uses


def _uses_carry(ins: Instruction) -> bool:
    defs, uses = defs_uses(ins)
    return CARRY.name in defs or CARRY.name in uses


def analyse(function: Function) -> Flow:
    """Raises PtxError for a jump to a label that is not there."""
    cuts: frozenset[int] = frozenset()
    while True:
        blocks = _blocks(function, cuts)
        uniform, reads = _uniformity(function, blocks)
        more = {
            block.first + k
            for block in blocks if block.divergent
            for k, item in enumerate(block.items) if k and item.name in COLLECTIVE
        }  # fmt: skip
        if not more:
            break
        cuts |= more
    for block in blocks:
        block.collective = bool(
            block.divergent and block.items and block.items[0].name in COLLECTIVE
        )
    slots, counts = _homes(function, blocks, uniform)
    carries = any(_uses_carry(i) for b in blocks for i in b.items)
    return Flow(function, blocks, uniform, reads, slots, counts, carries)


# ------------------------------------------------------------------ blocks


def _blocks(function: Function, cuts: frozenset[int]) -> list[Block]:
    body = function.body or []
    returning = _returning_labels(body)
    blocks: list[Block] = []
    current: Block | None = None
    position, labels = 0, []

    def start() -> Block:
        block = Block(len(blocks), [], position, list(labels))
        blocks.append(block)
        labels.clear()
        return block

    for item in body:
        if isinstance(item, Label):
            labels.append(item.name)
            current = None
            continue
        if item.name == "bra" and item.operands[0].name in returning:  # type: ignore[union-attr]
            item = Instruction("ret", (), item.location, item.guard)
        if current is None or position in cuts:
            current = start()
        current.items.append(item)
        position += 1
        if item.name in ("bra", "brx") or (is_return(item) and item.guard is None):
            current = None
    if labels or not blocks or _falls_through(blocks[-1]):
        current = start()
        current.items.append(Instruction("ret", (), function.location))
    home = {label: block.index for block in blocks for label in block.labels}
    for block in blocks:
        block.successors = _successors(function, block, home)
    return blocks


def _returning_labels(body: list[Instruction | Label]) -> set[str]:
    """Labels of places that only return."""
    found: set[str] = set()
    pending: list[str] = []
    for item in body:
        if isinstance(item, Label):
            pending.append(item.name)
        else:
            if is_return(item) and item.guard is None and item.name == "ret":
                found.update(pending)
            pending = []
    return found


def _falls_through(block: Block) -> bool:
    last = block.items[-1] if block.items else None
    if last is None:
        return True
    return last.guard is not None or not (is_return(last) or last.name in ("bra", "brx"))


def targets(function: Function, ins: Instruction) -> list[str]:
    names = [o.name for o in ins.operands if isinstance(o, Symbol)]
    if ins.name == "brx":
        names = list(function.tables.get(names[-1] if names else "", ()))
        if not names:
            raise PtxError(f"{ins.location}: {ins.opcode} without a .branchtargets table")
    return names


def _successors(function: Function, block: Block, home: dict[str, int]) -> list[int]:
    found = []
    if branch := block.branch:
        for name in targets(function, branch):
            if name not in home:
                raise PtxError(f"{branch.location}: jump to {name}, which is no label of it")
            found.append(home[name])
    if _falls_through(block):
        found.append(block.index + 1)
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------ uniformity


def _post_dominators(blocks: list[Block]) -> list[int]:
    """Bit sets of the blocks that every way from a block to its end passes."""
    everything = (1 << len(blocks)) - 1
    sets = [everything] * len(blocks)
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            new = everything if block.successors else 0
            for s in block.successors:
                new &= sets[s]
            new |= 1 << block.index
            if new != sets[block.index]:
                sets[block.index], changed = new, True
    return sets


def _meeting_point(blocks: list[Block], sets: list[int], block: Block) -> int | None:
    rest = sets[block.index] & ~(1 << block.index)
    for i in range(len(blocks)):
        if rest >> i & 1 and sets[i] == rest:
            return i
    return None


def _between(blocks: list[Block], block: Block, stop: int | None) -> set[int]:
    found: set[int] = set()
    todo = list(block.successors)
    while todo:
        i = todo.pop()
        if i != stop and i not in found:
            found.add(i)
            todo += blocks[i].successors
    return found


def _uniformity(
    function: Function, blocks: list[Block]
) -> tuple[frozenset[str], dict[int, frozenset[str]]]:
    """Registers that are scalars; and for an instruction (by id), those it reads that are arrays
    but hold one value there. A compiler reuses registers: a counter may start from the zero that
    an accumulator starts from."""
    sets = _post_dominators(blocks)
    bit = {r: 1 << i for i, r in enumerate([*function.registers, CARRY.name])}
    facts = [
        [(ins, _union(bit, defs), _union(bit, uses), _fixed(function, ins, uses))
         for ins in block.items for defs, uses in (defs_uses(ins),)]
        for block in blocks
    ]  # fmt: skip
    divergent: set[int] = set()
    while True:
        into = _flow_of_values(blocks, facts, divergent)
        more = set(divergent)
        for block in blocks:
            if len(block.successors) < 2 or block.branch is None:
                continue
            state = _through(facts[block.index][:-1], into[block.index], block.index in divergent)
            _, _, uses, fixed = facts[block.index][-1]
            if block.index in divergent or uses & state or fixed == "varying":
                more |= _between(blocks, block, _meeting_point(blocks, sets, block))
        if more == divergent:
            break
        divergent = more
    for block in blocks:
        block.divergent = block.index in divergent
    varying = 0
    for block in blocks:
        state = into[block.index]
        for fact in facts[block.index]:
            if block.divergent or fact[3] != "pure" or fact[2] & state:
                varying |= fact[1]
            state = _through([fact], state, block.divergent)
    uniform = frozenset(r for r in function.registers if not varying & bit[r])
    reads: dict[int, frozenset[str]] = {}
    for block in blocks:
        state = into[block.index]
        for fact in facts[block.index]:
            if not block.divergent and (same := fact[2] & varying & ~state):
                reads[id(fact[0])] = frozenset(
                    r for r in defs_uses(fact[0])[1] if bit.get(r, 0) & same
                )
            state = _through([fact], state, block.divergent)
    return uniform, reads


Fact = tuple[Instruction, int, int, str]


def _union(bit: dict[str, int], names: list[str]) -> int:
    found = 0
    for name in names:
        found |= bit.get(name, 0)
    return found


def _fixed(function: Function, ins: Instruction, uses: list[str]) -> str:
    """What is known of an instruction whatever its registers hold."""
    if any(map(_varying_special, uses)):
        return "varying"
    return "pure" if _pure(function, ins) else "impure"


def _through(facts: list[Fact], state: int, divergent: bool) -> int:
    """Registers that differ between lanes after some instructions, as bits."""
    for ins, defs, uses, fixed in facts:
        if not defs:
            continue
        if divergent or fixed != "pure" or uses & state:
            state |= defs
        elif ins.guard is None:
            state &= ~defs
    return state


def _flow_of_values(blocks: list[Block], facts: list[list[Fact]], divergent: set[int]) -> list[int]:
    into = [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for block in blocks:
            out = _through(facts[block.index], into[block.index], block.index in divergent)
            for s in block.successors:
                if out & ~into[s]:
                    into[s] |= out
                    changed = True
    return into


def _varying_special(name: str) -> bool:
    return name.startswith(("%tid", "%laneid", "%lanemask"))


def _pure(function: Function, ins: Instruction) -> bool:
    parts = ins.parts
    if ins.name not in PURE or _uses_carry(ins):
        return False
    if ins.name in ("ld", "ldu"):
        if "local" in parts or {"volatile", "acquire", "relaxed", "mmio"} & set(parts):
            return False
        if "param" in parts:
            address = ins.operands[1]
            assert isinstance(address, Address)
            return function.entry and not _is_call_parameter(function, address)
        return True
    if ins.name == "cvta" and "local" in parts:
        return False
    halves = {"f16", "bf16", "f16x2", "bf16x2"}
    if halves & set(parts) and ins.name not in ("mov", "selp", "cvt"):
        return False
    return not (ins.name == "cvt" and ("f16x2" in parts or "bf16x2" in parts))


def _is_call_parameter(function: Function, address: Address) -> bool:
    return isinstance(address.base, Symbol) and any(
        v.name == address.base.name for v in function.variables
    )


# ------------------------------------------------------------------ homes

ELEMENTWISE = PURE - {"ld", "ldu", "addc", "subc", "madc"}


def width_of(type_: str) -> int:
    return BITS[type_]


def _homes(
    function: Function, blocks: list[Block], uniform: frozenset[str]
) -> tuple[dict[str, tuple[int, int]], dict[int, int]]:
    """Arrays are shared by registers that are never live at the same time: what a warp touches
    should fit the first-level cache. Linear scan (Poletto and Sarkar, 1999)."""
    kept = [r for r, t in function.registers.items() if r not in uniform and t != "pred"]
    bit = {r: 1 << i for i, r in enumerate(kept)}
    use, kill = [], []
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    bounds = []
    position = 0
    for block in blocks:
        u = k = 0
        start = position
        for ins in block.items:
            defs, uses = defs_uses(ins)
            whole = ins.guard is None  # for the lanes that run it
            shares = ins.name in ELEMENTWISE and not isinstance(ins.operands[0], Vector | Pair)
            for r in uses:
                if r in bit:
                    if not k & bit[r]:
                        u |= bit[r]
                    first.setdefault(r, position)
                    last[r] = position
            for r in defs:
                if r in bit:
                    at = position + 1 if shares else position
                    if whole:
                        k |= bit[r]
                    elif not k & bit[r]:
                        u |= bit[r]  # lanes outside the mask keep what they had
                    first[r] = min(first.get(r, at), at)
                    last[r] = max(last.get(r, at), position + 1)
            position += 2
        use.append(u)
        kill.append(k)
        bounds.append((start, position - 1))
    live_in, live_out = _liveness(blocks, use, kill)
    for block in blocks:
        for sets, edge in ((live_in, 0), (live_out, 1)):
            live, at = sets[block.index], bounds[block.index][edge]
            while live:
                low = live & -live
                r = kept[low.bit_length() - 1]
                first[r], last[r] = min(first.get(r, at), at), max(last.get(r, at), at)
                live ^= low
    return _scan(function, first, last)


def _liveness(blocks: list[Block], use: list[int], kill: list[int]) -> tuple[list[int], list[int]]:
    n = len(blocks)
    live_in, live_out = [0] * n, [0] * n
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            i = block.index
            out = 0
            for s in block.successors:
                out |= live_in[s]
            into = use[i] | (out & ~kill[i])
            if out != live_out[i] or into != live_in[i]:
                live_out[i], live_in[i], changed = out, into, True
    # A use before any definition (of lanes that never reach it) must not keep a home for ever.
    return live_in, live_out


def _scan(
    function: Function, first: dict[str, int], last: dict[str, int]
) -> tuple[dict[str, tuple[int, int]], dict[int, int]]:
    slots: dict[str, tuple[int, int]] = {}
    counts: dict[int, int] = {}
    free: dict[int, list[int]] = {}
    active: list[tuple[int, str]] = []
    for r in sorted(first, key=lambda r: (first[r], r)):
        still = []
        for end, other in active:
            if end < first[r]:
                w, index = slots[other]
                free.setdefault(w, []).append(index)
            else:
                still.append((end, other))
        active = still
        w = width_of(function.registers[r])
        pool = free.setdefault(w, [])
        if pool:
            index = pool.pop()
        else:
            index = counts.get(w, 0)
            counts[w] = index + 1
        slots[r] = (w, index)
        active.append((last[r], r))
    return slots, counts
