"""PTX text to a typed structure.

Reads what Triton, NVRTC and nvcc write. Scopes are resolved here: a register or variable declared
in an inner `{ }` gets a name of its own, so that later stages see one flat name space a function.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NoReturn

from effc.ir.errors import EffcError

from .syntax import (
    BITS,
    Address,
    FloatImm,
    Function,
    Imm,
    Instruction,
    Label,
    Location,
    Module,
    Not,
    Operand,
    Pair,
    Reg,
    Sink,
    Symbol,
    Variable,
    Vector,
)

TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+) | (?P<newline>\n)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<float>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|\d+\.\d*(?:[eE][+-]?\d+)?)
  | (?P<int>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?(?![\w$]))
  | (?P<directive>\.[A-Za-z_]\w*)
  | (?P<word>%?[A-Za-z_$][\w$]*(?:(?:\.|::)[A-Za-z0-9_]+)*|%\d+)
  | (?P<punct>[][(){},;:|!@<>+=*/-])
""",
    re.X,
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
INLINE = re.compile(r"// begin inline asm.*?// end inline asm", re.S)
LOC = re.compile(r"\s*(\d+)\s+(\d+)\s+(\d+)(?:.*?inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
Place = tuple[str, str, str]  # file, line, column
LINKAGE = {".visible", ".extern", ".weak", ".common"}
SPACES = {".global", ".const", ".shared", ".local", ".param"}
# Said about a function and without meaning here, with the count of values each takes.
HINTS = {".maxnreg", ".minnctapersm", ".maxnctapersm", ".pragma", ".noreturn", ".maxntid",
         ".reqnctapercluster", ".explicitcluster", ".maxclusterrank", ".blocksareclusters",
         ".abi_preserve", ".abi_preserve_control", ".unified"}  # fmt: skip


class PtxError(EffcError):
    """PTX text that cannot be read, translated or run; names the line and what to do."""


def parse(text: str) -> Module:
    """The module in `text`. Raises PtxError with the line where it cannot be read."""
    return _Parser(text).module()


def _one_place(block: re.Match[str]) -> str:
    """LLVM counts source lines on with each line of inline assembly; the first is right."""
    first = block[0].find(".loc") + 1
    return block[0][:first] + re.sub(r"\.loc[^\n]*", "", block[0][first:])


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, line
        self.files: dict[int, str] = {}
        self.locations: dict[int, tuple[int, int]] = {}  # index of a token -> file, line
        self.inlined: dict[Place, Place] = {}  # a place in a function -> of its call
        text = INLINE.sub(_one_place, text)
        self._tokenise(COMMENT.sub(lambda m: "\n" * m[0].count("\n") or " ", text))
        self.at = 0
        self.source = (0, 0)

    def _tokenise(self, text: str) -> None:
        line, position, end = 1, 0, len(text)
        while position < end:
            match = TOKEN.match(text, position)
            if not match:
                self._fail(
                    line, f"cannot read {text[position : position + 20].split(chr(10))[0]!r}"
                )
            kind, word = match.lastgroup or "", match[0]
            position = match.end()
            if kind == "newline":
                line += 1
            elif kind == "directive" and word in (".loc", ".file"):
                stop = text.find("\n", position)
                self._note(word, text[position : stop if stop >= 0 else end], line)
                position = stop if stop >= 0 else end
            elif kind == "directive" and word == ".section":  # debug information
                position = self._after_braces(text, position)
                line += text.count("\n", match.end(), position)
            elif kind != "space":
                self.tokens.append((kind, word, line))
        self.tokens.append(("end", "", line))

    def _note(self, word: str, rest: str, line: int) -> None:
        if word == ".file":
            if match := re.match(r'\s*(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', rest):
                self.files[int(match[1])] = match[3] or match[2]
        elif match := LOC.match(rest):
            at: Place = (match[1], match[2], match[3])
            if match[4]:  # the call's own place, where it is inlined too, came just before
                call = (match[4], match[5], match[6])
                self.inlined[at] = self.inlined.get(call, call)
                at = self.inlined[at]
            self.locations[len(self.tokens)] = (int(at[0]), int(at[1]))

    def _after_braces(self, text: str, position: int) -> int:
        depth, position = 1, text.index("{", position) + 1
        while depth:
            close = text.find("}", position)
            if close < 0:
                return len(text)
            depth += text.count("{", position, close) - 1
            position = close + 1
        return position

    def _fail(self, line: int, why: str, fix: str = "") -> NoReturn:
        lines = self.text.splitlines()
        shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
        raise PtxError(
            f"PTX line {line}: {why}", why=f"in: {shown}" if shown else None, fix=fix or None
        )

    # ------------------------------------------------------------ tokens

    @property
    def word(self) -> str:
        return self.tokens[self.at][1]

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def line(self) -> int:
        return self.tokens[self.at][2]

    def next(self) -> str:
        if self.at in self.locations:
            self.source = self.locations[self.at]
        self.at += 1
        return self.tokens[self.at - 1][1]

    def take(self, word: str) -> bool:
        if self.word == word:
            self.next()
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.take(word):
            self._fail(self.line, f"expected {word!r}, found {self.word!r}")

    def location(self) -> Location:
        self.source = self.locations.get(self.at, self.source)
        return Location(self.line, *self.source_name())

    def source_name(self) -> tuple[str, int]:
        number, line = self.source
        return (f"\0{number}", line) if line else ("", 0)  # .file comes last: named at the end

    def integer(self) -> int:
        sign = -1 if self.take("-") else 1
        if self.kind != "int":
            self._fail(self.line, f"expected a number, found {self.word!r}")
        word = self.next().rstrip("U")
        octal = len(word) > 1 and word[0] == "0" and word.isdigit()
        return sign * int(word, 8 if octal else 0)

    # ------------------------------------------------------------ module

    def module(self) -> Module:
        version = target = ""
        functions: dict[str, Function] = {}
        variables: list[Variable] = []
        while self.kind != "end":
            word = self.word
            if word == ".version":
                self.next()
                version = self.next()
            elif word == ".target":
                self.next()
                target = self.next()
                while self.take(","):
                    self.next()
            elif word == ".address_size":
                self.next()
                if (size := self.integer()) != 64:
                    self._fail(self.line, f".address_size {size}", "compile for 64-bit addresses")
            elif word in (".pragma", ".alias"):
                while self.next() != ";":
                    pass
            else:
                linkage = set()
                while self.word in LINKAGE:
                    linkage.add(self.next())
                if self.word in (".entry", ".func"):
                    function = self.function()
                    known = functions.get(function.name)
                    if function.body is not None or known is None:
                        functions.pop(function.name, None)
                        functions[function.name] = function
                elif self.word in SPACES:
                    variables += self.variable(".extern" in linkage)
                else:
                    self._fail(self.line, f"expected a function or variable, found {self.word!r}")
        module = Module(version, target, functions, variables, self.files, self.text)
        _name_files(module)
        return module

    def variable(self, extern: bool = False) -> list[Variable]:
        space, align, type_, vector = self.next()[1:], 0, "", 1
        while self.kind == "directive":
            word = self.next()
            if word == ".align":
                align = self.integer()
            elif word in (".v2", ".v4"):
                vector = int(word[2])
            elif word[1:] in BITS:
                type_ = word[1:]
            elif word == ".ptr":  # what the pointer of a parameter points to
                while self.word in SPACES or self.word == ".align":
                    if self.next() == ".align":
                        self.integer()
            elif word not in (".attribute", ".managed"):
                self._fail(self.line, f"unknown directive {word} in a declaration")
        if not type_:
            self._fail(self.line, "a variable without a type")
        found = []
        while True:
            name, count = self.name(), 1
            while self.take("["):
                count *= self.integer() if self.kind == "int" else 0
                self.expect("]")
            init = self.initialiser() if self.take("=") else ()
            element = max(1, BITS[type_] // 8) * vector
            found.append(
                Variable(name, space, type_, align or element, element * count, init, extern)
            )
            if space == "param" or not self.take(","):
                break
        if space != "param" or self.word == ";":
            self.expect(";")
        return found

    def initialiser(self) -> tuple[int | float | tuple[str, int], ...]:
        if self.take("{"):
            values: list[int | float | tuple[str, int]] = []
            while not self.take("}"):
                values += self.initialiser()
                self.take(",")
            return tuple(values)
        if self.kind == "word":
            name = self.next()
            if name == "generic":
                self.expect("(")
                name = self.next()
                self.expect(")")
            return ((name, self.integer() if self.take("+") else 0),)
        if self.kind == "float":
            value = self.number(1)
            assert isinstance(value, FloatImm)
            code = {32: ("<I", "<f"), 64: ("<Q", "<d")}[value.width]
            return (struct.unpack(code[1], struct.pack(code[0], value.bits))[0],)
        return (self.integer(),)

    def name(self) -> str:
        if self.kind != "word":
            self._fail(self.line, f"expected a name, found {self.word!r}")
        return self.next()

    # ------------------------------------------------------------ functions

    def function(self) -> Function:
        location = self.location()
        entry = self.next() == ".entry"
        returns = self.parameters() if self.word == "(" else ()
        name = self.name()
        params = self.parameters() if self.word == "(" else ()
        function = Function(name, entry, params, returns, location=location)
        while self.word not in ("{", ";"):
            word = self.next()
            if word == ".reqntid":
                sizes = [self.integer()]
                while self.take(","):
                    sizes.append(self.integer())
                function.required = (*sizes, 1, 1)[:3]  # type: ignore[assignment]
            elif word in HINTS:
                while self.kind in ("int", "string") or self.word == ",":
                    self.next()
            else:
                self._fail(self.line, f"unknown directive {word} of function {name}")
        if self.take(";"):
            return function
        self.expect("{")
        _Body(self, function).read()
        return function

    def parameters(self) -> tuple[Variable, ...]:
        self.expect("(")
        found: list[Variable] = []
        while not self.take(")"):
            if self.word not in (".param", ".reg"):
                self._fail(self.line, f"expected a parameter, found {self.word!r}")
            found += self.variable()
            self.take(",")
        return tuple(found)

    # ------------------------------------------------------------ operands

    def number(self, sign: int) -> Imm | FloatImm:
        if self.kind == "int":
            return Imm(sign * self.integer())
        word = self.next()
        if word[:2] in ("0f", "0F"):
            return FloatImm(int(word[2:], 16) ^ (1 << 31 if sign < 0 else 0), 32)
        if word[:2] in ("0d", "0D"):
            return FloatImm(int(word[2:], 16) ^ (1 << 63 if sign < 0 else 0), 64)
        return FloatImm(struct.unpack("<Q", struct.pack("<d", sign * float(word)))[0], 64)

    def operand(self, body: _Body) -> Operand:
        first = self.single(body)
        if self.take("|"):
            return Pair(first, self.single(body))
        return first

    def single(self, body: _Body) -> Operand:
        word = self.word
        if word in ("{", "("):
            self.next()
            close, items = ("}" if word == "{" else ")"), []
            while not self.take(close):
                items.append(self.operand(body))
                self.take(",")
            return Vector(tuple(items))
        if self.take("["):
            base = self.single(body)
            if isinstance(base, Symbol) and base.offset:
                base, offset = Symbol(base.name), base.offset
            else:
                offset = 0
            while self.word in ("+", "-"):
                sign = -1 if self.next() == "-" else 1
                offset += sign * self.integer()
            self.expect("]")
            if not isinstance(base, Reg | Symbol | Imm):
                self._fail(self.line, f"an address cannot start with {base}")
            return Address(base, offset)
        if self.take("!"):
            operand = self.single(body)
            assert isinstance(operand, Reg)
            return Not(operand)
        if self.take("-"):
            return self.number(-1)
        if self.kind in ("int", "float"):
            return self.number(1)
        if word == "_":
            self.next()
            return Sink()
        name = self.name()
        resolved = body.resolve(name)
        if isinstance(resolved, Symbol) and self.word == "+":
            self.next()
            return Symbol(resolved.name, self.integer())
        return resolved


class _Body:
    """The statements of a function; renames what inner scopes declare."""

    def __init__(self, parser: _Parser, function: Function) -> None:
        self.p, self.function = parser, function
        self.scopes: list[dict[str, str]] = [{}]
        self.counter = 0

    def resolve(self, name: str) -> Operand:
        for scope in reversed(self.scopes):
            if name in scope:
                unique = scope[name]
                return Reg(unique) if unique in self.function.registers else Symbol(unique)
        return Reg(name) if name.startswith("%") else Symbol(name)

    def declare(self, name: str) -> str:
        unique = name
        if len(self.scopes) > 1:
            self.counter += 1
            unique = f"{name}~{self.counter}"
        self.scopes[-1][name] = unique
        return unique

    def read(self) -> None:
        p, body = self.p, []
        self.function.body = body
        while True:
            if p.kind == "end":
                p._fail(p.line, f"function {self.function.name} does not end")
            if p.take("{"):
                self.scopes.append(self._labels())
                continue
            if p.take("}"):
                self.scopes.pop()
                if not self.scopes:
                    return
                continue
            if p.take(";"):
                continue
            if p.kind == "directive":
                self.directive()
                continue
            location = p.location()
            guard: Reg | Not | None = None
            if p.take("@"):
                operand = p.single(self)
                assert isinstance(operand, Reg | Not)
                guard = operand
            name = p.name()
            if guard is None and p.word == ":":
                p.next()
                if p.word == ".branchtargets":
                    p.next()
                    names = []
                    while not p.take(";"):
                        names.append(p.next())
                        p.take(",")
                    self.function.tables[name] = tuple(names)
                elif p.word == ".callprototype":
                    while p.next() != ";":
                        pass
                else:
                    body.append(Label(self._label(name)))
                continue
            operands = []
            while not p.take(";"):
                operands.append(p.operand(self))
                if not p.take(",") and p.word != ";":
                    p._fail(p.line, f"expected ',' or ';', found {p.word!r}")
            body.append(Instruction(name, tuple(operands), location, guard))

    def _labels(self) -> dict[str, str]:
        """Labels that the scope about to be read declares: they may be jumped to before."""
        p, depth, at, found = self.p, 1, self.p.at, {}
        while depth and p.tokens[at][0] != "end":
            word = p.tokens[at][1]
            depth += (word == "{") - (word == "}")
            starts = p.tokens[at - 1][1] in (";", "{", "}", ":")
            if depth == 1 and starts and p.tokens[at + 1][1] == ":":
                self.counter += 1
                found[word] = f"{word}~{self.counter}"
            at += 1
        return found

    def _label(self, name: str) -> str:
        return self.scopes[-1].get(name, name)

    def directive(self) -> None:
        p, function = self.p, self.function
        word = p.word
        if word == ".reg":
            p.next()
            type_ = p.next()[1:]
            if type_ in ("v2", "v4"):
                p._fail(p.line, f".reg .{type_}: vector registers", "use scalar registers")
            while True:
                name = p.name()
                if p.take("<"):
                    count = p.integer()
                    p.expect(">")
                    names = [f"{name}{i}" for i in range(count)]
                else:
                    names = [name]
                for one in names:
                    function.registers[self.declare(one)] = type_
                if not p.take(","):
                    break
            p.expect(";")
        elif word in SPACES:
            for v in p.variable():
                unique = self.declare(v.name)
                function.variables.append(
                    Variable(unique, v.space, v.type, v.align, v.size, v.init, v.extern)
                )
        elif word == ".pragma":
            while p.next() != ";":
                pass
        else:
            p._fail(p.line, f"unknown directive {word}", "report it with the PTX")


def _name_files(module: Module) -> None:
    for function in module.functions.values():
        function.location = _named(function.location, module.files)
        body = function.body or []
        for i, item in enumerate(body):
            if isinstance(item, Instruction):
                where = _named(item.location, module.files)
                body[i] = Instruction(item.opcode, item.operands, where, item.guard)


def _named(where: Location, files: dict[int, str]) -> Location:
    if not where.file.startswith("\0"):
        return where
    return Location(where.line, files.get(int(where.file[1:]), "") or "source", where.source_line)


def instructions(function: Function) -> Iterator[Instruction]:
    return (item for item in function.body or () if isinstance(item, Instruction))
