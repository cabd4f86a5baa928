"""Captured ATen -> IR: one declared op for each operator that has one, a generic `aten` op else.

Numbers that torch knows symbolically become sizes in attributes, so the graph holds tensors only.
`compiler/aten/` says which operator becomes which op; other packages add theirs by
`@converts("my.operator.default")`. What a converter gives is compared with the shape and element
type torch traced; on a difference the operator is kept whole, and the reason kept for the report.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch

from effc.capture import Captured, CapturedInput, Refusal
from effc.ir import Graph, Input, Item, No, Number, Op, OpError, Origin, Weight, no
from effc.ir.ops.aten import Aten
from effc.ir.symbols import from_torch, symbolic
from effc.ir.types import DTYPES, LAYOUTS, DType, Tensor, Type, type_of
from effc.origins import origin

Converter: TypeAlias = Callable[..., Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*targets: str) -> Callable[[Converter], Converter]:
    """Register fn(call, **schema arguments) for ATen overloads such as "aten.linear.default".

    fn returns a value, a tuple of values (an operator with several results), or `no(reason)`.
    """

    def register(fn: Converter) -> Converter:
        for target in targets:
            CONVERTERS[target] = fn
        return fn

    return register


@dataclass(frozen=True)
class Call:
    """What a converter may know besides its arguments."""

    target: str
    val: Any  # the traced result: fake tensor(s)
    node: torch.fx.Node | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes of the traced result."""
        return tuple(from_torch(s) for s in self.val.shape)

    @property
    def dtype(self) -> DType:
        return DType.of(self.val.dtype)

    @property
    def is_alias(self) -> bool:
        """torch's result shares the memory of its first argument."""
        first = self.node.args[0] if self.node and self.node.args else None
        given = first.meta.get("val") if isinstance(first, torch.fx.Node) else None
        if not isinstance(given, torch.Tensor):
            return False
        return given.untyped_storage()._cdata == self.val.untyped_storage()._cdata


@dataclass(frozen=True)
class Imported:
    """The graph, and how a call's arguments and results map onto its inputs and outputs."""

    graph: Graph
    arguments: tuple[int, ...]  # graph input i is captured input arguments[i]
    results: tuple[Any, ...]  # per captured output: ("node", i), or the size or constant itself
    kept: Mapping[Op, No] = field(default_factory=dict)  # generic nodes: why not a declared op


def import_captured(captured: Captured) -> Imported | Refusal:
    """Raises nothing for odd graphs: what cannot be expressed is a Refusal or a generic node."""
    return _Importer(captured).run()


class _Importer:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.env: dict[torch.fx.Node, Any] = {}
        self.inputs: list[Input] = []
        self.arguments: list[int] = []
        self.nodes: list[Op] = []
        self.kept: dict[Op, No] = {}
        self.taken: set[str] = set()

    def run(self) -> Imported | Refusal:
        for index, given in enumerate(self.captured.inputs):
            self.env[given.node] = self.input(index, given)
        try:
            for node in self.captured.graph.nodes:
                if node.op == "call_function":
                    self.env[node] = self.call(node)
        except Unimportable as e:
            return Refusal("import", str(e), e.where)
        outputs: list[Op] = []
        results: list[Any] = []
        for output in self.captured.outputs:
            value = self.value(output.value)  # an ArgumentView stays one
            if isinstance(value, Op):
                results.append(("node", len(outputs)))
                outputs.append(value)
            else:
                results.append(value)
        graph = Graph.of(self.inputs, outputs).with_nodes(self.nodes)
        unknown = graph.all_symbols - _bound(self.inputs)
        if unknown:
            return Refusal("symbol", f"size {min(map(str, unknown))} stands in no input's shape")
        left = set(graph.nodes)
        kept = {n: why for n, why in self.kept.items() if n in left}
        return Imported(graph, tuple(self.arguments), tuple(results), kept)

    # -------------------------------------------------------------- inputs

    def input(self, index: int, given: CapturedInput) -> Any:
        val = given.node.meta.get("val")
        if given.kind == "weight" and given.tensor is not None:
            node = Weight.holding(given.name, given.tensor)
            self.nodes.append(node)
            return node
        if isinstance(val, torch.Tensor):
            made = Input(self.name(given.name), self.type(val))
        elif isinstance(val, (torch.SymInt, torch.SymFloat)):
            expr = from_torch(val)
            if not (symbolic(expr) and expr.is_Symbol):
                return expr  # specialised, or an expression of sizes that tensors carry
            if any(i.key == expr.name for i in self.inputs):
                return expr  # sizes found equal after torch made an argument of each
            self.taken.add(expr.name)
            made = Input(expr.name, Number(isinstance(val, torch.SymInt)))
        else:
            return val
        self.inputs.append(made)
        self.arguments.append(index)
        return made if isinstance(val, torch.Tensor) else from_torch(val)

    def name(self, raw: str) -> str:
        """An identifier that is no keyword, element type or layout, and not taken."""
        name = re.sub(r"\W+", "_", raw).strip("_") or "x"
        if not name[0].isalpha() or keyword.iskeyword(name) or name in (*DTYPES, *LAYOUTS):
            name = f"x_{name}"
        if re.fullmatch(r"([wyszu]\d+|inf|nan|size|number|torch|device|weight)", name):
            name += "_"  # the printer's own names, torch's names of sizes
        base, count = name, 2
        while name in self.taken:
            name, count = f"{base}_{count}", count + 1
        self.taken.add(name)
        return name

    # -------------------------------------------------------------- nodes

    def call(self, node: torch.fx.Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            return from_torch(val)
        if node.target is operator.getitem:
            return self.item(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Unimportable(f"{node.target} is no ATen operator", origin(node).source)
        target = _target(node.target)
        args = tuple(map(self.value, node.args))
        kwargs = {k: self.value(v) for k, v in node.kwargs.items()}
        where = self.origin(node)
        made, why = self.convert(Call(target, val, node), node.target, args, kwargs)
        if why is not None:
            of = self.type(val)
            if isinstance(of, tuple) and any(isinstance(t, tuple) and t for t in of):
                raise Unimportable(f"{target} gives a list inside its results", where.source)
            made = Aten(target, args, tuple(kwargs.items()), of=of)
            self.kept[made] = why
        for value in made if isinstance(made, tuple) else (made,):
            self.adopt(value, where)
        return made

    def convert(self, call: Call, overload: Any, args: Any, kwargs: Any) -> tuple[Any, No | None]:
        target, val = call.target, call.val
        converter = CONVERTERS.get(target)
        if converter is None:
            return None, no("{} has no op of its own", target)
        if not _ordinary(val) or not all(map(_ordinary_value, (*args, *kwargs.values()))):
            return None, no("{} on element types without declared arithmetic", target)
        try:
            made = converter(call, **_bind(overload, args, kwargs))
        except OpError as e:
            return None, no("{}: {}", target, e.what)
        if isinstance(made, No):
            return None, made
        vals = val if isinstance(made, tuple) else (val,)
        for value, traced in zip(made if isinstance(made, tuple) else (made,), vals, strict=True):
            want = self.type(traced)
            if not _agree(value.type, want):
                return None, no("{} would give {}, torch gives {}", target, value.type, want)
        return made, None

    def item(self, node: torch.fx.Node) -> Any:
        value, index = self.env[node.args[0]], node.args[1]
        if isinstance(value, tuple):
            return value[index]
        made = Item(value, index)
        self.adopt(made, self.origin(node))
        return made

    def adopt(self, value: Any, where: Origin) -> None:
        """Give fresh nodes their origin and their place in program order."""
        stack = [value]
        fresh = []
        while stack:
            node = stack.pop()
            if node.origins or isinstance(node, (Input, Weight)):
                continue
            node.at(where)
            fresh.append(node)
            stack += node.operands
        self.nodes += reversed(fresh)

    def origin(self, node: torch.fx.Node) -> Origin:
        found = origin(node)
        return Origin(found.module, found.source, found.text)

    def value(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.env[arg]
        if isinstance(arg, (list, tuple)):
            return tuple(map(self.value, arg))
        if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return from_torch(arg)
        return arg

    def type(self, val: Any) -> Type:
        if isinstance(val, (tuple, list)):
            return tuple(map(self.type, val))
        if isinstance(val, torch.Tensor):
            return type_of(val)
        if val is None:
            return ()
        raise Unimportable(f"an operator gives a {type(val).__name__}", None)


class Unimportable(Exception):
    """Internal: the whole graph goes to ATen, with this reason."""

    def __init__(self, reason: str, where: str | None) -> None:
        super().__init__(reason)
        self.where = where


@cache
def _target(overload: Any) -> str:
    name = overload._schema.name.split("::")[1]
    return f"{overload.namespace}.{name}.{overload._overloadname}"


def _bind(overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    bound = {}
    for i, (name, keyword_only, default) in enumerate(_arguments(overload)):
        if i < len(args) and not keyword_only:
            bound[_safe(name)] = args[i]
        else:
            bound[_safe(name)] = kwargs.get(name, default)
    return bound


@cache
def _arguments(overload: Any) -> tuple[tuple[str, bool, Any], ...]:
    """Name, whether by keyword only, and default of each argument; torch makes them anew each time
    they are asked for."""
    return tuple((a.name, a.kwarg_only, a.default_value) for a in overload._schema.arguments)


def _safe(name: str) -> str:
    return "x" if name in ("self", "input") else name


def _ordinary(val: Any) -> bool:
    """Plain CPU tensors of real numbers: what declared ops are written for."""
    if isinstance(val, (tuple, list)):
        return all(map(_ordinary, val))
    if not isinstance(val, torch.Tensor):
        return val is None
    return not val.is_complex() and val.layout is torch.strided and not val.is_quantized


def _ordinary_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_ordinary_value, value))
    if isinstance(value, Op) and isinstance(value.type, Tensor):
        return value.type.dtype.kind != "complex"
    return not isinstance(value, complex)


def _agree(made: Type, traced: Type) -> bool:
    if not (isinstance(made, Tensor) and isinstance(traced, Tensor)):
        return made == traced
    if made.dtype != traced.dtype or made.rank != traced.rank:
        return False
    pairs = zip(made.shape, traced.shape, strict=True)
    return all(not (isinstance(a, int) and isinstance(b, int)) or a == b for a, b in pairs)


def _bound(inputs: list[Input]) -> set[Any]:
    found: set[Any] = set()
    for i in inputs:
        if isinstance(i.of, Number):
            found.add(i.symbol)
        elif isinstance(i.of, Tensor):
            found |= {d for d in i.of.shape if symbolic(d) and d.is_Symbol}
    return found


__all__ = ["CONVERTERS", "Call", "Imported", "converts", "import_captured"]
