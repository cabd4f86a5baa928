"""Graphs as Python text, and back: `parse(text(g)) == g`.

    def graph(x: f32[N, 3, H, W]):
        w0: f32[64, 3, 3, 3] = weight("conv.weight", digest="9f2c41aa")
        y0: f32[N, 64, H, W] = conv2d(x, w0, padding=(1, 1))  # conv  model.py:41
        return y0

An input that is a state (its new value is among the last outputs) is `k: State[f32[2, C, 64]]`.
Annotations are types, checked on the way in. Comments are for people and ignored. Regions are
nested functions. Nothing is evaluated: the parser walks Python's own syntax tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

import torch

from .errors import OpError, ParseError, nearest
from .formats import bits_per_element
from .graph import Graph, Input, Weight
from .op import Field, Op, _free, find_op
from .symbols import dim_text, parse_dim, symbolic
from .types import (
    DTYPES,
    FORMATS,
    LAYOUTS,
    DType,
    Format,
    Layout,
    Number,
    Tensor,
    Type,
    dense,
    parse_format,
    parse_type,
    type_text,
)

INDENT = "    "

# ------------------------------------------------------------------ printing


def text(graph: Graph, header: str = "") -> str:
    """Python source of the graph; `header` lines come first as comments."""
    lines = [f"# {line}" for line in header.splitlines()]
    return "\n".join([*lines, *_Printer().graph(graph, "")]) + "\n"


def node_text(graph: Graph, node: Op) -> str:
    """The line of one node as `text(graph)` prints it, without indentation."""
    printer = _Printer()
    printer.name_all(graph)
    if isinstance(node, Input):
        return f"{printer.names[node]}: {_input_type(node)}"
    return printer.line(node, _body_names(node))


def names(graph: Graph) -> dict[Op, str]:
    """The name of every value in the graph's text."""
    printer = _Printer()
    printer.name_all(graph)
    return printer.names


class _Printer:
    def __init__(self) -> None:
        self.names: dict[Op, str] = {}
        self.taken: set[str] = set()

    def graph(self, graph: Graph, indent: str, name: str | None = None) -> Iterator[str]:
        self.name_all(graph)
        inputs = ", ".join(f"{self.names[i]}: {_input_type(i)}" for i in graph.inputs)
        yield f"{indent}def {name or graph.name}({inputs}):"
        inner = indent + INDENT
        for node in graph.nodes:
            bodies = _body_names(node)
            for field_name, body in bodies.items():
                yield from _Printer().graph(getattr(node, field_name), inner, body)
            yield inner + self.line(node, bodies)
        outputs = ", ".join(self.names[o] for o in graph.outputs)
        yield f"{inner}return {outputs}{',' if len(graph.outputs) == 1 else ''}".rstrip()

    def name_all(self, graph: Graph) -> None:
        counts = {"w": 0, "y": 0}
        numbers = {i.key for i in graph.inputs if isinstance(i.type, Number)}
        self.taken |= {s.name for s in graph.all_symbols} - numbers
        for i in graph.inputs:
            self.name(i, i.key)
        for node in graph.nodes:
            kind = "w" if isinstance(node, Weight) else "y"
            while f"{kind}{counts[kind]}" in self.taken:
                counts[kind] += 1
            self.name(node, f"{kind}{counts[kind]}")

    def name(self, node: Op, name: str) -> None:
        if name in self.taken:
            raise ValueError(f"{name!r} names two inputs, or an input and a size")
        self.taken.add(name)
        self.names[node] = name

    def line(self, node: Op, bodies: Mapping[str, str]) -> str:
        result = f"{self.names[node]}: {type_text(node.type)} = {self.call(node, bodies)}"
        if isinstance(node.type, Tensor) and node.type.format != dense:
            each = bits_per_element(node.type)
            result += "" if each is None else f"  # {each:.2f} bits an element"
        return f"{result}  # {' '.join(node.where.splitlines())}" if node.where else result

    def call(self, node: Op, bodies: Mapping[str, str]) -> str:
        if isinstance(node, Weight):
            also = f", also={self.value(node.also)}" if node.also else ""
            return f"weight({literal(node.key)}, digest={literal(node.content)}{also})"
        target, args = node.name, node_args(node)
        if node.name == "aten":
            target = getattr(node, "target")
            args = [(None, a) for a in getattr(node, "args")]
            args += [(k, v) for k, v in getattr(node, "kwargs")]
        printed = []
        for key, value in args:
            shown = bodies[str(key)] if isinstance(value, Graph) else self.value(value)
            printed.append(f"{key}={shown}" if key else shown)
        return f"{target}({', '.join(printed)})"

    def value(self, value: object) -> str:
        if isinstance(value, Op):
            return self.names[value]
        if isinstance(value, tuple):
            inner = ", ".join(map(self.value, value))
            return f"({inner}{',' if len(value) == 1 else ''})"
        return literal(value)


def _input_type(node: Input) -> str:
    return f"State[{type_text(node.of)}]" if node.state else type_text(node.of)


def _body_names(node: Op) -> dict[str, str]:
    """The printed name of each region of a node, by field; distinct, for the parser."""
    found: dict[str, str] = {}
    for f in node.fields:
        if f.kind == "region":
            name = getattr(node, f.name).name
            while name in found.values():
                name += "_"
            found[f.name] = name
    return found


def node_args(node: Op) -> list[tuple[str | None, object]]:
    """Arguments as printed: leading operands by position, the rest by name, defaults left out."""
    args: list[tuple[str | None, object]] = []
    positional = True
    for f in node.fields:
        value = getattr(node, f.name)
        if f.kind == "type":
            continue
        if f.default is not MISSING and _same(value, f.default):
            positional = False
            continue
        positional = positional and f.kind == "operand"
        args.append((None if positional else f.name, value))
    return args


def literal(value: object) -> str:
    """Python source of an attribute that is not a node."""
    if symbolic(value):
        return dim_text(value)
    if isinstance(value, float) and repr(value) in ("inf", "-inf", "nan"):
        return repr(value)
    if isinstance(value, (DType, Tensor, Format)):
        return str(value)
    if isinstance(value, Layout):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, str):
        shown = repr(value)
        return shown if '"' in shown else f'"{shown[1:-1]}"'
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if value is None or isinstance(value, (int, float, bool)):
        return repr(value)
    raise TypeError(f"an attribute of type {type(value).__name__} has no text: {value!r}")


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and repr(value) == repr(default)


# ------------------------------------------------------------------ parsing


def parse(source: str, weights: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """Text -> graph. `weights` (by state-dict name) give the values behind weight nodes.

    Raises ParseError (line, reason) for anything that is not a graph, OpError from an op's infer.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as e:
        raise ParseError(f"not Python: {e.msg}", where=f"line {e.lineno}") from e
    graphs = [s for s in tree.body if isinstance(s, ast.FunctionDef)]
    if len(graphs) != 1:
        raise ParseError(f"expected one graph function, found {len(graphs)}")
    return _Parser(source, weights or {}).graph(graphs[0])


class _Parser:
    def __init__(self, source: str, weights: Mapping[str, torch.Tensor]) -> None:
        self.lines, self.weights = source.split("\n"), weights
        self.values: dict[str, Op] = {}
        self.bodies: dict[str, Graph] = {}
        self.reals: frozenset[str] = frozenset()
        self.sizes: frozenset[str] = frozenset()  # names of sizes and numbers

    def graph(self, fn: ast.FunctionDef) -> Graph:
        inputs = self.inputs(fn)
        nodes: list[Op] = []
        for statement in fn.body:
            match statement:
                case ast.FunctionDef(name=name):
                    nested = _Parser("", self.weights)
                    nested.lines, nested.reals, nested.sizes = self.lines, self.reals, self.sizes
                    self.bodies[name] = nested.graph(statement)
                case ast.AnnAssign(
                    target=ast.Name(id=name), annotation=note, value=ast.Call() as call
                ):
                    nodes.append(self.node(call, parse_type(note, self.reals)))
                    self.values[name] = nodes[-1]
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                    nodes.append(self.node(call, None))
                    self.values[name] = nodes[-1]
                case ast.Return(value=value):
                    outputs = self.value(value, _OUTPUT) if value else ()
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    if not all(isinstance(o, Op) for o in outputs):
                        raise self.error(statement, "a graph returns values of its own only")
                    return Graph(inputs, tuple(nodes), outputs, fn.name)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case _:
                    raise self.error(statement, "not a graph statement")
        raise self.error(fn, f"{fn.name} returns nothing")

    def inputs(self, fn: ast.FunctionDef) -> tuple[Input, ...]:
        args = fn.args
        if args.posonlyargs or args.kwonlyargs or args.vararg or args.kwarg or args.defaults:
            raise self.error(fn, "inputs are plain names with types")
        for a in args.args:
            if a.annotation is None:
                raise self.error(a, f"input {a.arg} has no type")
            if isinstance(a.annotation, ast.Name) and a.annotation.id == "number":
                self.reals |= {a.arg}
        found = []
        for a in args.args:
            note, state = _state(a.annotation)
            of = parse_type(note, self.reals)
            if state and not isinstance(of, Tensor):
                raise self.error(a, f"{a.arg} is {type_text(of)}; a state is one tensor")
            node = Input(a.arg, of, state)
            self.values[a.arg] = node
            found.append(node)
            own = {node.symbol} if isinstance(node.of, Number) else _free(node.of)
            self.sizes |= {s.name for s in own}
        return tuple(found)

    def node(self, call: ast.Call, declared: Type | None) -> Op:
        target = ast.unparse(call.func)
        try:
            node = self.make(call, target, declared)
        except OpError as e:
            e.where = e.where or self.at(call)
            raise
        if declared is not None and type_text(node.type) != type_text(declared):
            raise self.error(
                call, f"{target} gives {type_text(node.type)}, declared {type_text(declared)}"
            )
        return node

    def make(self, call: ast.Call, target: str, declared: Type | None) -> Op:
        if any(k.arg is None for k in call.keywords):
            raise self.error(call, "** is not allowed in a graph")
        cls = find_op("aten" if "." in target else target)
        if "." in target:
            args = tuple(self.value(a, None) for a in call.args)
            kwargs = tuple((k.arg, self.value(k.value, None)) for k in call.keywords)
            values: dict[str, Any] = {"target": target, "args": args, "kwargs": kwargs}
        else:
            values = self.fields(call, target, cls)
        if any(f.kind == "type" for f in cls.fields):
            if declared is None:
                raise self.error(call, f"{target} must be given a type, `name: type = ...`")
            values["of"] = declared
        try:
            node = cls(**values)
        except OpError:
            raise
        except Exception as e:  # whatever infer stumbles over, it is the text that is wrong
            raise self.error(call, f"{target}: {e}") from e
        if isinstance(node, Weight):
            object.__setattr__(node, "data", self.weights.get(node.key))
        return node

    def fields(self, call: ast.Call, target: str, cls: type[Op]) -> dict[str, Any]:
        known = {f.name: f for f in cls.fields if f.kind != "type"}
        if len(call.args) > len(known):
            raise self.error(call, f"{target} takes {len(known)} arguments, not {len(call.args)}")
        given = dict(zip(known, call.args, strict=False))
        for k in call.keywords:
            name = str(k.arg)
            if name not in known:
                raise self.error(call, f"{target} has no field {name!r}", nearest(name, known))
            if name in given:
                raise self.error(call, f"{target}: {name} is given twice")
            given[name] = k.value
        return {name: self.value(v, known[name]) for name, v in given.items()}

    def value(self, node: ast.expr, f: Field | None) -> Any:
        """The value of an argument of field `f`; None: an argument of a generic op."""
        match node:
            case ast.Name(id=name):
                return self.named(node, name, f)
            case ast.Tuple(elts=elts):
                return tuple(self.value(e, f) for e in elts)
            case ast.Constant(value=None | bool() | int() | float() | complex() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
                return float("-inf")
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
                found = getattr(torch, attr, None)
                if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                    return found
                raise self.error(node, f"torch.{attr} is not an element type or memory format")
            case ast.Call(func=ast.Name(id="device"), args=[ast.Constant(value=str() as name)]):
                return torch.device(name)
            case ast.Call(func=ast.Name(id="complex"), args=[real, imag]):
                return complex(self.value(real, f), self.value(imag, f))
            case ast.Call(func=ast.Name(id=name)) if name in FORMATS:
                return parse_format(node, lambda what: self.error(node, what))
            case ast.Subscript() | ast.BinOp(op=ast.MatMult()):
                return parse_type(node, self.reals)
        return self.size(node)

    def named(self, node: ast.Name, name: str, f: Field | None) -> Any:
        if f is not None and f.kind == "region":
            if name not in self.bodies:
                raise self.error(node, f"no region {name!r} above this line")
            return self.bodies[name]
        value = self.values.get(name)
        number = isinstance(value, Input) and isinstance(value.of, Number)
        if value is not None and (f is None or f.kind == "operand"):
            if not number or (f is not None and "Operand" not in f.words):
                return value
        if name in ("inf", "nan"):
            return float(name)
        return DTYPES.get(name) or LAYOUTS.get(name) or self.size(node)

    def size(self, node: ast.expr) -> Any:
        called = {n.func for n in ast.walk(node) if isinstance(n, ast.Call)}
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and n not in called and n.id not in self.sizes:
                if n.id in self.values:
                    raise self.error(node, f"{n.id} is a tensor, not a size")
                known = self.sizes | self.values.keys()
                raise self.error(node, f"undefined name {n.id!r}", nearest(n.id, known))
        return parse_dim(node, self.reals)

    def at(self, node: Any) -> str:
        return f"line {node.lineno}: {self.lines[node.lineno - 1].strip()}"

    def error(self, node: Any, what: str, fix: str | None = None) -> ParseError:
        return ParseError(what, where=self.at(node), fix=fix)


def _state(note: Any) -> tuple[ast.expr, bool]:
    """The annotation of an input without `State[...]`, and whether that was there."""
    match note:
        case ast.Subscript(value=ast.Name(id="State"), slice=inner):
            return inner, True
    return note, False


_OUTPUT = Field("return", "operand", None)
