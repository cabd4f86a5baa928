"""Graphs as Python text, and back: `parse(text(g)) == g`.

    def graph(x: f32[N, 3, H, W]):
        w0: f32[64, 3, 3, 3] = weight("conv.weight", digest="9f2c41aa")
        y0: f32[N, 64, H, W] = conv2d(x, w0, padding=(1, 1))  # conv  model.py:41
        return y0

Annotations are types, checked on the way in. Comments are for people and ignored. Regions are
nested functions. Nothing is evaluated: the parser walks Python's own syntax tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

import sympy
import torch

from .errors import OpError, ParseError, nearest
from .graph import Graph, Input, Weight
from .op import OPS, Op, find_op
from .symbols import dim_text, parse_dim
from .types import DTYPES, LAYOUTS, DType, Layout, Number, Tensor, Type, parse_type, type_text

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
        return f"{printer.names[node]}: {type_text(node.type)}"
    return printer.line(node, {})


def names(graph: Graph) -> dict[Op, str]:
    """The name of every value in the graph's text."""
    printer = _Printer()
    printer.name_all(graph)
    return printer.names


class _Printer:
    def __init__(self) -> None:
        self.names: dict[Op, str] = {}
        self.taken: set[str] = set()

    def graph(self, graph: Graph, indent: str) -> Iterator[str]:
        self.name_all(graph)
        inputs = ", ".join(f"{self.names[i]}: {type_text(i.type)}" for i in graph.inputs)
        yield f"{indent}def {graph.name}({inputs}):"
        inner = indent + INDENT
        for node in graph.nodes:
            bodies: dict[str, str] = {}
            for f in node.fields:
                if f.kind == "region":
                    region: Graph = getattr(node, f.name)
                    yield from _Printer().graph(region, inner)
                    bodies[f.name] = region.name
            yield inner + self.line(node, bodies)
        outputs = ", ".join(self.names[o] for o in graph.outputs)
        yield f"{inner}return {outputs}{',' if len(graph.outputs) == 1 else ''}"

    def name_all(self, graph: Graph) -> None:
        counts = {"w": 0, "y": 0}
        for i in graph.inputs:
            self.name(i, i.key)
        for node in graph.nodes:
            kind = "w" if isinstance(node, Weight) else "y"
            while f"{kind}{counts[kind]}" in self.taken:
                counts[kind] += 1
            self.name(node, f"{kind}{counts[kind]}")

    def name(self, node: Op, name: str) -> None:
        if name in self.taken:
            raise ValueError(f"two inputs are called {name!r}")
        self.taken.add(name)
        self.names[node] = name

    def line(self, node: Op, bodies: Mapping[str, str]) -> str:
        result = f"{self.names[node]}: {type_text(node.type)} = {self.call(node, bodies)}"
        return f"{result}  # {node.where}" if node.where else result

    def call(self, node: Op, bodies: Mapping[str, str]) -> str:
        if isinstance(node, Weight):
            return f"weight({node.key!r}, digest={node.content!r})".replace("'", '"')
        target, args = node.name, node_args(node)
        if node.name == "aten":
            target = getattr(node, "target")
            args = [(None, a) for a in getattr(node, "args")]
            args += [(k, v) for k, v in getattr(node, "kwargs")]
        printed = []
        for key, value in args:
            body = bodies.get(key) if key else None
            shown = body or self.value(value)
            printed.append(f"{key}={shown}" if key else shown)
        return f"{target}({', '.join(printed)})"

    def value(self, value: object) -> str:
        if isinstance(value, Op):
            return self.names[value]
        if isinstance(value, tuple):
            inner = ", ".join(map(self.value, value))
            return f"({inner}{',' if len(value) == 1 else ''})"
        return literal(value)


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
    if isinstance(value, sympy.Basic):
        return dim_text(value)
    if isinstance(value, float) and repr(value) in ("inf", "-inf", "nan"):
        return repr(value)
    if isinstance(value, (DType, Tensor)):
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
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if value is None or isinstance(value, (int, float, complex, bool)):
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
        self.lines, self.weights = source.splitlines(), weights
        self.values: dict[str, Op] = {}
        self.bodies: dict[str, Graph] = {}
        self.reals: frozenset[str] = frozenset()

    def graph(self, fn: ast.FunctionDef) -> Graph:
        for a in fn.args.args:
            if a.annotation is None:
                raise self.error(a, f"input {a.arg} has no type")
            if isinstance(a.annotation, ast.Name) and a.annotation.id == "number":
                self.reals |= {a.arg}
        inputs = []
        for a in fn.args.args:
            node = Input(a.arg, parse_type(a.annotation, self.reals))  # type: ignore[arg-type]
            self.values[a.arg] = node
            inputs.append(node)
        nodes: list[Op] = []
        for statement in fn.body:
            match statement:
                case ast.FunctionDef(name=name):
                    nested = _Parser("", self.weights)
                    nested.lines, nested.reals = self.lines, self.reals
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
                    outputs = self.value(value, None) if value else ()
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    return Graph(tuple(inputs), tuple(nodes), outputs, fn.name)
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case _:
                    raise self.error(statement, "not a graph statement")
        raise self.error(fn, f"{fn.name} returns nothing")

    def node(self, call: ast.Call, declared: Type | None) -> Op:
        target = ast.unparse(call.func)
        args = [self.value(a, None) for a in call.args]
        kwargs: dict[str, Any] = {}
        cls = OPS.get("aten") if "." in target else find_op(target)
        if cls is None:
            raise self.error(call, f"unknown op {target!r}")
        kinds = {f.name: f.kind for f in cls.fields}
        for k in call.keywords:
            if k.arg is None:
                raise self.error(call, "** is not allowed in a graph")
            kwargs[k.arg] = self.value(k.value, kinds.get(k.arg))
        if cls is Weight:
            node: Op = Weight(*args, of=declared, **kwargs)
            object.__setattr__(node, "data", self.weights.get(node.key))  # type: ignore[attr-defined]
        elif "." in target:
            node = cls(target, tuple(args), tuple(kwargs.items()), of=declared)
        else:
            unknown = kwargs.keys() - kinds.keys()
            if unknown:
                fix = nearest(min(unknown), kinds)
                raise self.error(call, f"{target} has no field {min(unknown)!r}", fix)
            if any(f.kind == "type" for f in cls.fields):
                kwargs["of"] = declared
            try:
                node = cls(*args, **kwargs)
            except TypeError as e:
                raise self.error(call, f"{target}: {e}") from e
            except OpError as e:
                e.where = e.where or f"line {call.lineno}: {self.lines[call.lineno - 1].strip()}"
                raise
        if declared is not None and type_text(node.type) != type_text(declared):
            raise self.error(
                call, f"{target} gives {type_text(node.type)}, declared {type_text(declared)}"
            )
        return node

    def value(self, node: ast.expr, kind: str | None) -> Any:
        match node:
            case ast.Name(id=name) if kind == "region":
                if name not in self.bodies:
                    raise self.error(node, f"no region {name!r} above this line")
                return self.bodies[name]
            case ast.Name(id=name) if name in self.values and not self._is_symbol(name):
                return self.values[name]
            case ast.Name(id=("inf" | "nan") as name):
                return float(name)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
                return float("-inf")
            case ast.Name(id=name) if name in DTYPES:
                return DTYPES[name]
            case ast.Name(id=name) if name in LAYOUTS:
                return LAYOUTS[name]
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
                return getattr(torch, attr)
            case ast.Call(func=ast.Name(id="device"), args=[ast.Constant(value=str() as name)]):
                return torch.device(name)
            case ast.Tuple(elts=elts):
                return tuple(self.value(e, None) for e in elts)
            case ast.Constant(value=value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
                return -value
            case ast.BinOp(op=ast.Add() | ast.Sub()) if "j" in ast.unparse(node):
                return complex(ast.literal_eval(node))
            case ast.Subscript() | ast.BinOp(op=ast.MatMult()):
                return parse_type(node, self.reals)
        known = set(re.findall(r"[A-Za-z_]\w*", ast.unparse(node)))
        bad = {n for n in known if n in self.values and not self._is_symbol(n)}
        if bad:
            raise self.error(node, f"{min(bad)} is a tensor, not a size")
        return parse_dim(node, self.reals)

    def _is_symbol(self, name: str) -> bool:
        return isinstance(self.values[name].type, Number)

    def error(self, node: Any, what: str, fix: str | None = None) -> ParseError:
        line = self.lines[node.lineno - 1].strip()
        return ParseError(what, where=f"line {node.lineno}: {line}", fix=fix)


