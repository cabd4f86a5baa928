"""Ops are declared once: fields, `infer`, `reference`, `cost`. A node is an instance of its op.

    @op("linear")
    class Linear(Op):
        x: Value
        w: Value
        bias: Value | None = None

        def infer(self) -> Type: ...
        def reference(self, x, w, bias): return F.linear(x, w, bias)

A field whose annotation mentions `Value` holds operands (nodes, or tuples of nodes; numbers where
`Operand` says so), `Graph` a region, anything else an attribute. Printing, parsing, verifying,
interpreting and costing read this declaration and nothing else.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, TypeVar, Union

from typing_extensions import Self, dataclass_transform

from .errors import OpError, nearest
from .symbols import Dim, evaluate, free_symbols, symbolic
from .types import Tensor, Type, type_text

if typing.TYPE_CHECKING:
    import sympy

    from .graph import Graph


@dataclass(frozen=True)
class Origin:
    """Where in the user's program a value comes from."""

    module: str = ""  # "block_1.c1_r"
    source: str = ""  # "model.py:41"
    text: str = ""  # the line itself

    def __str__(self) -> str:
        return "  ".join(filter(None, (self.module, self.source)))


@dataclass(frozen=True)
class Cost:
    """Work of one node: floating-point operations and bytes moved, as numbers or expressions."""

    flops: Dim
    bytes: Dim

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Rates:
    """What takes a target as long as moving one byte to or from memory: so many floating-point
    operations; and the bytes that it would move in the time it takes to start a kernel."""

    operations: float = 8.0
    launch: float = 0.0


@dataclass(frozen=True)
class Field:
    name: str
    kind: str  # "operand" | "attr" | "region" | "type"
    default: object
    words: frozenset[str] = frozenset()  # of the annotation

    def allows(self, value: object) -> bool:
        """Whether an operand field takes the value, as far as its annotation says."""
        if value is None:
            return self.default is None
        if "tuple" in self.words:
            numbers = "Operand" in self.words
            return isinstance(value, tuple) and (numbers or all(isinstance(v, Op) for v in value))
        if isinstance(value, (int, float, complex)) or symbolic(value):
            return "Operand" in self.words
        return isinstance(value, Op)


class Op:
    """Base of every node. Immutable once it is in a graph; compared by identity."""

    name: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    pointwise: ClassVar[bool] = False  # element i of the result reads element i of the operands
    view: ClassVar[bool] = False  # the result may share memory with the first operand
    random: ClassVar[bool] = False  # draws from the generator: keeps its place and its count

    type: Type
    origins: tuple[Origin, ...]

    if typing.TYPE_CHECKING:  # fields are declared by subclasses, and passes see them as `Op`

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    # -------------------------------------------------------------- what a declaration supplies

    def infer(self) -> Type:
        """Type of the result from operands' types and attributes. Raises OpError by `self.fail`."""
        raise NotImplementedError(f"{self.name} declares no infer")

    def reference(self, *operands: Any) -> Any:
        """The meaning, in plain torch, on concrete tensors (sizes in attributes are numbers)."""
        raise NotImplementedError(f"{self.name} declares no reference")

    def cost(self) -> Cost:
        """Default: one operation an element of the result; every operand and result moved once."""
        return Cost(numel(self.type), self.bytes_moved())

    # -------------------------------------------------------------- what every node offers

    def __post_init__(self) -> None:
        for f in self.fields:
            if f.kind == "operand" and not f.allows(getattr(self, f.name)):
                shown = getattr(self, f.name)
                raise OpError(f"{self.name}: {f.name} must be a value of a graph, not {shown!r}")
        object.__setattr__(self, "origins", ())
        object.__setattr__(self, "type", self.infer())

    @cached_property
    def operands(self) -> tuple[Op, ...]:
        found: list[Op] = []
        for f in self.fields:
            if f.kind == "operand":
                _collect(getattr(self, f.name), found)
        return tuple(found)

    @property
    def attrs(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in self.fields if f.kind in ("attr", "type")}

    @property
    def regions(self) -> tuple[Graph, ...]:
        return tuple(getattr(self, f.name) for f in self.fields if f.kind == "region")

    @property
    def region_types(self) -> tuple[Type, ...]:
        """What a region is applied to: the operands, unless the op says else."""
        return tuple(o.type for o in self.operands)

    @property
    def tensor(self) -> Tensor:
        """The type, where it must be one tensor."""
        if not isinstance(self.type, Tensor):
            given = type_text(self.type)
            raise OpError(f"{self.name} gives {given}, not one tensor", where=self.where)
        return self.type

    @property
    def read_type(self) -> Type:
        """The type of what lies in memory where the value is read."""
        return self.type

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    @property
    def where(self) -> str:
        return str(self.origins[0]) if self.origins else ""

    def fail(self, why: str, fix: str | None = None) -> OpError:
        operands = ", ".join(type_text(o.type) for o in self.operands)
        where = next((o.where for o in self.operands if o.where), "")
        return OpError(f"{self.name}({operands}): {why}", where=where, fix=fix)

    def bytes_moved(self) -> Dim:
        total = nbytes(self.type)
        for operand in self.operands:
            total = total + nbytes(operand.read_type)
        return total

    def replace(self, **changes: object) -> Self:
        """The same op with some fields changed; keeps origins."""
        values = {f.name: getattr(self, f.name) for f in self.fields} | changes
        return type(self)(**values).from_(self)

    def map_operands(self, fn: Callable[[Op], Op]) -> Op:
        """The same op on other operands; `self` when fn changes none of them."""
        old = self.operands
        new = tuple(map(fn, old))
        if new == old:  # nodes compare by identity
            return self
        swap = dict(zip(map(id, old), new, strict=True))
        values = {f.name: getattr(self, f.name) for f in self.fields}
        for f in self.fields:
            if f.kind == "operand":
                values[f.name] = map_values(values[f.name], lambda o: swap[id(o)])
        if any(a.type is not b.type and a.type != b.type for a, b in zip(old, new, strict=True)):
            return type(self)(**values).from_(self)
        node = object.__new__(type(self))  # equal operand types: infer would say the same again
        node.__dict__.update(values, type=self.type, origins=self.origins, symbols=self.symbols)
        return node

    def from_(self, *sources: Op) -> Self:
        """Inherit the origins of the nodes this one stands for; not for nodes of a graph."""
        merged = dict.fromkeys(o for s in sources for o in s.origins)
        object.__setattr__(self, "origins", tuple(merged) or self.origins)
        return self

    def at(self, *origins: Origin) -> Self:
        object.__setattr__(self, "origins", origins)
        return self

    @cached_property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """Symbols in attributes and number operands (not in types of operands)."""
        found: set[sympy.Symbol] = set()
        for f in self.fields:
            value = getattr(self, f.name)
            found |= value.free_symbols if f.kind == "region" else _free(value)
        return frozenset(found)

    @cached_property
    def all_symbols(self) -> frozenset[sympy.Symbol]:
        """`symbols`, and those of the result's type."""
        return self.symbols | _free(self.type)

    def bind(self, env: Mapping[sympy.Symbol, int | float]) -> Op:
        """A copy with every symbol in attributes replaced by its number, to call `reference`."""
        if not self.symbols:
            return self
        node = object.__new__(type(self))
        node.__dict__.update(self.__dict__)
        for f in self.fields:
            value = getattr(self, f.name)
            node.__dict__[f.name] = value if f.kind == "region" else _evaluate(value, env)
        node.__dict__.pop("operands", None)
        return node

    def __repr__(self) -> str:
        return f"<{self.name}: {type_text(self.type)}{'  ' + self.where if self.where else ''}>"


Value: TypeAlias = Op
Operand: TypeAlias = Union[Op, int, float, bool, complex, "sympy.Expr"]


# ------------------------------------------------------------------ registry

OPS: dict[str, type[Op]] = {}
C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def op(name: str) -> Callable[[C], C]:
    """Declare an op under `name`; the class becomes a frozen dataclass of its annotations."""

    def declare(cls: C) -> C:
        if name in OPS:
            raise OpError(f"op {name!r} is already declared by {OPS[name].__module__}")
        if not name.isidentifier():
            raise OpError(f"op name {name!r} is not an identifier")
        made: Any = dataclass(frozen=True, eq=False, repr=False)(cls)
        made.name = name
        made.fields = tuple(_fields(made))
        OPS[name] = made
        return made

    return declare


def find_op(name: str) -> type[Op]:
    if name not in OPS:
        raise OpError(f"unknown op {name!r}", fix=nearest(name, OPS))
    return OPS[name]


def _fields(cls: Any) -> Iterator[Field]:
    for f in dataclasses.fields(cls):
        default = f.default
        if default is MISSING and f.default_factory is not MISSING:
            default = f.default_factory()
        words = _words(f.type)
        yield Field(f.name, "type" if f.name == "of" else _kind(words), default, words)


def _words(hint: Any) -> frozenset[str]:
    """Of an annotation, which may be text that cannot be evaluated yet."""
    words = frozenset(re.findall(r"\w+", hint if isinstance(hint, str) else repr(hint)))
    return words | {"Operand"} if {"Op", "complex"} <= words else words  # the alias, spelt out


def _kind(words: frozenset[str]) -> str:
    if "Graph" in words:
        return "region"
    return "operand" if words & {"Value", "Operand", "Op"} else "attr"


# ------------------------------------------------------------------ helpers over nested fields


def map_values(value: Any, fn: Callable[[Op], Any]) -> Any:
    """Apply fn to every node in a field value (a node, or tuples of nodes and plain values)."""
    if isinstance(value, Op):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(map_values(v, fn) for v in value)
    return value


def _collect(value: Any, into: list[Op]) -> None:
    if isinstance(value, Op):
        into.append(value)
    elif isinstance(value, tuple):
        for v in value:
            _collect(v, into)


def _free(value: Any) -> set[sympy.Symbol]:
    if isinstance(value, Tensor):
        return free_symbols(value.shape)
    if isinstance(value, tuple):
        return set().union(*map(_free, value)) if value else set()
    return free_symbols(value)


def _evaluate(value: Any, env: Mapping[sympy.Symbol, int | float]) -> Any:
    if isinstance(value, Tensor):
        return value.with_(shape=evaluate(value.shape, env))
    if isinstance(value, tuple):
        return tuple(_evaluate(v, env) for v in value)
    return evaluate(value, env)


def numel(t: Type) -> Dim:
    if isinstance(t, tuple):
        return sum((numel(x) for x in t), start=0)  # type: ignore[arg-type]
    return t.numel if isinstance(t, Tensor) else 1


def nbytes(t: Type) -> Dim:
    if isinstance(t, tuple):
        return sum((nbytes(x) for x in t), start=0)  # type: ignore[arg-type]
    return t.nbytes if isinstance(t, Tensor) else 8
