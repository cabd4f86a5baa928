"""Types of values: element type, shape, layout in memory, and format (how elements are encoded).

Compression is a type: a pass that quantises or prunes a weight changes its `format`, and a backend
picks kernels by it. A layout names the order of dimensions in memory; strides follow from it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from .errors import ParseError, nearest
from .symbols import Dim, dim, dim_text, floordiv, from_torch, parse_dim, product

if TYPE_CHECKING:
    import sympy

# ------------------------------------------------------------------ element types


@dataclass(frozen=True)
class DType:
    """An element type. `torch` is what holds its values at run time: a byte each for codes, the
    integers of less than 8 bits. Where they are kept, codes are packed (codes.py).

    bits: of an element by itself. run: (n, b) where n elements together take b bits, if fewer.
    """

    name: str
    bits: int
    kind: str  # "float" | "int" | "bool" | "complex"
    torch: torch.dtype | None = field(default=None, compare=False)
    range: tuple[int, int] | None = None  # least and largest code
    run: tuple[int, int] = (1, 0)

    def __repr__(self) -> str:
        return self.name

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_code(self) -> bool:
        """Whether it is packed where it is kept."""
        return self.range is not None

    def bits_of(self, count: Dim) -> Dim:
        """Bits that so many elements take where they are kept."""
        if self.run == (1, 0):
            return count * self.bits
        together, bits = self.run
        return floordiv(count + together - 1, together) * bits

    @staticmethod
    def of(dtype: Any) -> DType:
        """Our name for a torch dtype; KeyError when there is none."""
        return _FROM_TORCH[dtype]


DTYPES: dict[str, DType] = {}


def _declare(
    name: str, bits: int, kind: str, dtype: torch.dtype | None = None, **more: Any
) -> DType:
    return DTYPES.setdefault(name, DType(name, bits, kind, dtype, **more))


f64 = _declare("f64", 64, "float", torch.float64)
f32 = _declare("f32", 32, "float", torch.float32)
f16 = _declare("f16", 16, "float", torch.float16)
bf16 = _declare("bf16", 16, "float", torch.bfloat16)
i64 = _declare("i64", 64, "int", torch.int64)
i32 = _declare("i32", 32, "int", torch.int32)
i16 = _declare("i16", 16, "int", torch.int16)
i8 = _declare("i8", 8, "int", torch.int8)
u8 = _declare("u8", 8, "int", torch.uint8)
boolean = _declare("bool", 8, "bool", torch.bool)
_FROM_TORCH = {d.torch: d for d in DTYPES.values()}
for _bits in range(1, 8):
    _half = 1 << (_bits - 1)
    _declare(f"int{_bits}", _bits, "int", torch.int8, range=(-_half, _half - 1))
    _declare(f"uint{_bits}", _bits, "int", torch.uint8, range=(0, 2 * _half - 1))
    for _sign in ("int", "uint"):
        _FROM_TORCH[getattr(torch, f"{_sign}{_bits}")] = DTYPES[f"{_sign}{_bits}"]
# Five levels, -2 to 2, which papers on quantisation write int2*: three of them in 7 bits.
int2b = _declare("int2b", 3, "int", torch.int8, range=(-2, 2), run=(3, 7))
for _name, _bits in (("uint16", 16), ("uint32", 32), ("uint64", 64)):
    _declare(_name.replace("uint", "u"), _bits, "int", getattr(torch, _name))
for _name, _bits in (("complex32", 32), ("complex64", 64), ("complex128", 128)):
    _declare(_name.replace("complex", "c"), _bits, "complex", getattr(torch, _name))
for _name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
    _declare(_name.replace("float8", "f8"), 8, "float", getattr(torch, _name))
_FROM_TORCH |= {d.torch: d for d in DTYPES.values() if not d.is_code}

# ------------------------------------------------------------------ layout


@dataclass(frozen=True)
class Layout:
    """Order of dimensions in memory, outermost first. `row_major` keeps the logical order."""

    name: str
    order: Callable[[int], tuple[int, ...]] = field(compare=False, repr=False)

    def strides(self, shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """Elements to step for each logical dimension, packed without gaps."""
        strides: list[Dim] = [1] * len(shape)
        step: Dim = 1
        for axis in reversed(self.order(len(shape))):
            strides[axis] = step
            step = step * shape[axis]
        return tuple(dim(s) for s in strides)


def _channels_last_order(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


row_major = Layout("row_major", lambda rank: tuple(range(rank)))
channels_last = Layout("channels_last", _channels_last_order)
LAYOUTS = {layout.name: layout for layout in (row_major, channels_last)}

# ------------------------------------------------------------------ format

FORMATS: dict[str, type[Format]] = {}


@dataclass(frozen=True)
class Format:
    """How elements are stored. Subclasses are frozen dataclasses; their fields print as options.

    Subclassing registers the format, so a plug-in's format prints and parses like ours.
    """

    def __init_subclass__(cls) -> None:
        FORMATS[cls.__name__] = cls

    def nbytes(self, tensor: Tensor) -> Dim:
        """Bytes of a tensor in this format, scales and indices included."""
        return sum((part.nbytes for part in self.parts(tensor).values()), start=0)  # type: ignore[arg-type]

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """The types of the tensors that hold a value of this format, by name (formats.py)."""
        raise NotImplementedError(f"{type(self).__name__} must say of what parts it is")

    def decode(self, tensor: Tensor, parts: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
        """The elements as numbers of a torch type, from the values of the parts."""
        raise NotImplementedError(f"{type(self).__name__} must say what its parts stand for")

    def __str__(self) -> str:
        options = ((f.name, getattr(self, f.name)) for f in fields(self))
        listed = (f"{k}={v if isinstance(v, Format) else repr(v)}" for k, v in options)
        return f"{type(self).__name__}({', '.join(listed)})"


@dataclass(frozen=True)
class Dense(Format):
    """Every element stored, in `dtype`; sub-byte elements packed."""

    def nbytes(self, tensor: Tensor) -> Dim:
        bits = tensor.dtype.bits_of(tensor.numel)
        return (bits + 7) // 8 if isinstance(bits, int) else _whole(bits)


dense = Dense()


def _whole(bits: sympy.Expr) -> Dim:
    import sympy

    return dim(sympy.ceiling(bits / 8))


# ------------------------------------------------------------------ types of values


@dataclass(frozen=True)
class Tensor:
    """A tensor value: `f32[N, 64, H, W]`, `f32[N, 64, H, W] @ channels_last`."""

    shape: tuple[Dim, ...]
    dtype: DType
    layout: Layout = row_major
    format: Format = dense

    text_name: ClassVar[str] = "tensor"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        return product(self.shape)

    @property
    def nbytes(self) -> Dim:
        return self.format.nbytes(self)

    @property
    def strides(self) -> tuple[Dim, ...]:
        return self.layout.strides(self.shape)

    @property
    def stored(self) -> tuple[tuple[Dim, ...], torch.dtype | None]:
        """Shape and torch type of what a weight of this type keeps: codes lie packed, in bytes."""
        if self.dtype.is_code:
            return (self.nbytes,), torch.uint8
        return self.shape, self.dtype.torch

    def with_(self, **changes: object) -> Tensor:
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        shape = ", ".join(map(dim_text, self.shape)) or "()"
        text = f"{self.dtype}[{shape}]"
        if self.layout != row_major:
            text += f" @ {self.layout.name}"
        if self.format != dense:
            text += f" @ {self.format}"
        return text


@dataclass(frozen=True)
class Number:
    """A Python number known only at call time: `size` (an integer) or `number` (a float)."""

    integer: bool = True

    def __str__(self) -> str:
        return "size" if self.integer else "number"


Type: TypeAlias = "Tensor | Number | tuple[Type, ...]"


def type_text(t: Type) -> str:
    if isinstance(t, tuple):
        return f"({', '.join(map(type_text, t))}{',' if len(t) == 1 else ''})"
    return str(t)


def type_of(t: torch.Tensor) -> Tensor:
    """Type of a real or fake tensor; the layout is row-major, as the importer wants it."""
    shape = tuple(from_torch(s) for s in t.shape)
    return Tensor(shape, DType.of(t.dtype))  # type: ignore[arg-type]


def parse_type(node: ast.expr, reals: frozenset[str] = frozenset()) -> Type:
    """Python annotation -> type; raises ParseError with the line."""

    def fail(what: str) -> ParseError:
        return ParseError(f"{what}: {ast.unparse(node)}", where=f"line {node.lineno}")

    match node:
        case ast.Tuple(elts=elts):
            return tuple(parse_type(e, reals) for e in elts)
        case ast.Name(id="size"):
            return Number(True)
        case ast.Name(id="number"):
            return Number(False)
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            if name not in DTYPES:
                raise fail(f"unknown element type {name!r} ({nearest(name, DTYPES)})")
            sizes = index.elts if isinstance(index, ast.Tuple) else [index]
            return Tensor(tuple(parse_dim(s, reals) for s in sizes), DTYPES[name])
        case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Name(id=name)) if name in LAYOUTS:
            return _tensor(parse_type(left, reals), fail).with_(layout=LAYOUTS[name])
        case ast.BinOp(left=left, op=ast.MatMult(), right=ast.Call() as call):
            return _tensor(parse_type(left, reals), fail).with_(format=parse_format(call, fail))
        case ast.BinOp(op=ast.MatMult(), right=ast.Name(id=name)):
            raise fail(f"unknown layout {name!r} ({nearest(name, LAYOUTS)})")
    raise fail("not a type")


def parse_format(call: ast.Call, fail: Callable[[str], ParseError]) -> Format:
    """`GroupQuant(group=32, scale=f16)`: options are literals, element types or formats."""

    def option(value: ast.expr) -> object:
        match value:
            case ast.Call():
                return parse_format(value, fail)
            case ast.Name(id=name) if name in DTYPES:
                return DTYPES[name]
        return ast.literal_eval(value)

    name = ast.unparse(call.func)
    if name not in FORMATS:
        raise fail(f"unknown format {name!r} ({nearest(name, FORMATS)})")
    try:
        if call.args:
            raise ValueError("options are given by name")
        return FORMATS[name](**{str(o.arg): option(o.value) for o in call.keywords})
    except (TypeError, ValueError) as e:
        raise fail(f"{name}: {e}") from e


def _tensor(t: Type, fail: Callable[[str], ParseError]) -> Tensor:
    if not isinstance(t, Tensor):
        raise fail("only a tensor has a layout or format")
    return t
