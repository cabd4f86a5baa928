"""Capture: from what torch hands a backend to one functional ATen graph with its inputs named.

Both ways in, a graph from Dynamo and a program from `torch.export`, go through the same export
before dispatch, so composite operators (linear, attention, norms, interpolation) are still whole
and both give the same graph. Nothing here knows the compiler's own IR or rewrites arithmetic. A
graph that cannot be expressed faithfully is refused with a reason, and the caller runs it as
PyTorch would.

`aot_export_module` is private to torch and used in this file only; `regions` and `origins` hold the
two other private parts, keeping operators whole under autocast and the source of an argument.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, cast

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effc.aliasing import (
    ArgumentView,
    alias_pairs,
    argument_view,
    is_written,
    overlapping,
    tensors_of,
    undeclared_view,
)
from effc.origins import Origin, argument_names, innermost_line, is_module_tensor, origin
from effc.regions import drop_checks, explicit_casts, without_regions
from effc.sampling import sampled

if TYPE_CHECKING:
    from torch._functorch.aot_autograd import GraphSignature

__all__ = [
    "ArgumentView",
    "Captured",
    "CapturedInput",
    "CapturedOutput",
    "Origin",
    "Refusal",
    "capture_dynamo",
    "capture_exported",
    "origin",
    "overlapping",
]

_P = ParamSpec("_P")
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class CapturedInput:
    """One placeholder of the captured graph.

    `kind` is "user", "weight" (a module's tensor or a constant, only read), "state" (a module's
    tensor that the graph writes), "symbol" (a SymInt), "scalar" (a Python number that arrives as a
    0-dim tensor) or "constant" (an argument that `torch.export` fixed to its value). `position`
    indexes the runtime arguments; None: the graph owns the tensor. `tensor` is the live tensor of
    a weight or state, never a copy.
    """

    node: torch.fx.Node
    kind: str
    name: str
    position: int | None
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class CapturedOutput:
    """One result; `mutates` is the index in `Captured.inputs` of what it must be copied into.

    `value` is a node, a constant or an `ArgumentView`.
    """

    value: object
    mutates: int | None = None


@dataclass(frozen=True)
class Captured:
    """A functional graph; inputs in placeholder order, outputs with the mutations first.

    Autocast's casts are nodes of the graph, so it has to be run with autocast off.
    """

    graph: torch.fx.Graph
    inputs: tuple[CapturedInput, ...]
    outputs: tuple[CapturedOutput, ...]

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """A module that runs the graph, made anew: torch writes and compiles Python for it."""
        return torch.fx.GraphModule(torch.nn.Module(), self.graph)

    @property
    def written(self) -> tuple[int, ...]:
        """The inputs a call writes into."""
        return tuple(o.mutates for o in self.outputs if o.mutates is not None)

    @property
    def needs_overlap_check(self) -> bool:
        """True if arguments that share memory would go wrong, because one of them is written."""
        return bool(self.written)

    @property
    def effects(self) -> tuple[torch.fx.Node, ...]:
        """Nodes without users that must run all the same: assertions and unused random numbers."""
        return tuple(n for n in self.graph.nodes if n.op == "call_function" and not n.users)


@dataclass(frozen=True)
class Refusal:
    """Why a graph is not taken; `kind` is one word for counting, `where` the user's line."""

    kind: str
    reason: str
    where: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" + (f" ({self.where})" if self.where else "")


class _Refused(Exception):
    """Carries a refusal out of the depths; never leaves this module."""

    def __init__(self, kind: str, reason: str, where: str | torch.fx.Node | None = None) -> None:
        if isinstance(where, torch.fx.Node):
            where = origin(where).source or None
        self.refusal = Refusal(kind, reason, where)


# -------------------------------------------------------------------------------- the two ways in


def _or_refusal(capture: Callable[_P, Captured]) -> Callable[_P, Captured | Refusal]:
    @functools.wraps(capture)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> Captured | Refusal:
        try:
            return capture(*args, **kwargs)
        except _Refused as refused:
            return refused.refusal

    return guarded


@_or_refusal
def capture_dynamo(gm: torch.fx.GraphModule, example_inputs: Sequence) -> Captured:
    """Capture the graph module Dynamo gives a backend; positions index `example_inputs`."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    _check_arguments(placeholders, example_inputs)
    _check_training(gm, placeholders, example_inputs)
    traced, casts = _traced(gm)
    root, graph, signature = _export(traced, example_inputs, casts)

    owned = dict(traced.named_parameters(remove_duplicate=False))
    owned.update(traced.named_buffers(remove_duplicate=False))
    qualified = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = argument_names(placeholders)
    position = {name: i for i, name in enumerate(signature.user_inputs)}
    slots = []
    for node in graph.find_nodes(op="placeholder"):
        if node.name in qualified:
            name = qualified[node.name]
            slots.append(_Slot(node, "weight", name, None, owned[name], None))
            continue
        i = position[node.name]
        seen = placeholders[i].meta.get("example_value")
        kind = _dynamo_kind(placeholders[i], example_inputs[i])
        tensor = example_inputs[i] if kind == "weight" else None
        slots.append(_Slot(node, kind, names[i], i, tensor, seen))

    mutated = {str(k): str(v) for k, v in signature.user_inputs_to_mutate.items()}
    by_name = {name: node for node, name in qualified.items()}
    for output, name in (signature.buffers_to_mutate | signature.parameters_to_mutate).items():
        mutated[output] = by_name[name]
    results = [_value(n, "example_value") for n in traced.graph.output_node().args[0]]
    return _finish(root, graph, slots, mutated, [], results)


@_or_refusal
def capture_exported(program: torch.export.ExportedProgram) -> Captured:
    """Capture an exported program; positions index its flattened arguments (args, then kwargs)."""
    gm, specs = program.graph_module, program.graph_signature.input_specs
    example_inputs = [_value(n, "val") for n in gm.graph.find_nodes(op="placeholder")]
    _check_arguments(gm.graph.find_nodes(op="placeholder"), example_inputs)
    traced, casts = _traced(gm)
    root, graph, signature = _export(traced, example_inputs, casts)

    owned = {**program.constants, **program.state_dict}
    spec_of = dict(zip(signature.user_inputs, specs, strict=True))
    value_of = dict(zip(signature.user_inputs, example_inputs, strict=True))
    positions = iter(range(len(specs)))
    position = {n: next(positions) for n, s in spec_of.items() if s.kind.name == "USER_INPUT"}
    slots = []
    for node in graph.find_nodes(op="placeholder"):
        spec, seen = spec_of[node.name], value_of[node.name]
        if spec.kind.name == "USER_INPUT":
            symbol = "symbol" if isinstance(seen, _SYMBOLS) else "constant"
            kind = "user" if isinstance(seen, torch.Tensor) else symbol
            slots.append(_Slot(node, kind, spec.arg.name, position[node.name], None, seen))
        elif spec.kind.name in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            slots.append(_Slot(node, "weight", spec.target, None, owned[spec.target], seen))
        else:
            raise _Refused("effect", f"the program takes a {spec.kind.name.lower()} as an input")

    node_of = {s.target or s.arg.name: name for name, s in spec_of.items()}
    declared = []  # mutations the program itself returns, before its results
    for spec in program.graph_signature.output_specs:
        if spec.kind.name.endswith("MUTATION"):
            declared.append(node_of[spec.target])
        elif spec.kind.name != "USER_OUTPUT":
            raise _Refused("effect", f"the program returns a {spec.kind.name.lower()}")
    results = [_value(n, "val") for n in traced.graph.output_node().args[0][len(declared) :]]
    mutated = {str(k): str(v) for k, v in signature.user_inputs_to_mutate.items()}
    return _finish(root, graph, slots, mutated, declared, results)


# ----------------------------------------------------------------------------------- common to both


@dataclass(frozen=True)
class _Slot:
    """A placeholder on its way to a `CapturedInput`; `seen` is its value before capture."""

    node: torch.fx.Node
    kind: str
    name: str
    position: int | None
    tensor: torch.Tensor | None
    seen: object


def _traced(gm: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, bool]:
    """The graph to export, free of regions, and whether autocast is on anywhere in it."""
    for node in gm.graph.nodes:
        if (getattr(node.target, "__module__", None) or "").startswith("torch._functorch"):
            # tracing these and failing leaves torch's stack of transforms unbalanced
            raise _Refused("transform", "the graph holds a torch.func transform", node)
    traced, casts = without_regions(gm)
    if view := undeclared_view(traced.graph):
        name = getattr(view.target, "__name__", view.target)
        raise _Refused("alias", f"{name} may return memory that is written", view)
    return traced, casts


def _export(
    gm: torch.fx.GraphModule, example_inputs: Sequence, casts: bool
) -> tuple[torch.nn.Module, torch.fx.Graph, GraphSignature]:
    """What owns the graph's constants, the functional graph and its signature: from a sample of its
    calls where that tells all."""
    with contextlib.suppress(_Refused):  # the whole graph's refusal has the right place and words
        if not casts and (found := sampled(gm, _export_whole)) is not None:
            root, graph, signature = found
            return root, graph, cast("GraphSignature", signature)  # named alike
    graph_module, signature = _export_whole(gm, example_inputs, casts)
    return graph_module, graph_module.graph, signature


def _export_whole(
    gm: torch.fx.GraphModule, example_inputs: Sequence, casts: bool = False
) -> tuple[torch.fx.GraphModule, GraphSignature]:
    """The functional graph and its signature, or the exporter's own words for why there is none."""
    import torch._inductor.config  # with the next two a second to import, and Dynamo has done so
    from torch._functorch.aot_autograd import aot_export_module
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # without this the exporter drops random operators whose result is not used
            stack.enter_context(torch._inductor.config.patch(fallback_random=True))
            if casts:
                stack.enter_context(explicit_casts(gm))
            graph_module, signature = aot_export_module(
                gm, example_inputs, trace_joint=False, pre_dispatch=not casts
            )
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        # what aot_export_module documents, what its own checks raise, and torch's shape functions
        reason = str(error).strip() or type(error).__name__
        kind = "alias" if "aliased inputs that are mutated" in reason else "export-failed"
        if isinstance(error, GuardOnDataDependentSymNode):
            kind = "unbacked-size"
        raise _Refused(kind, reason, innermost_line(reason)[0] or None) from error
    _drop_tokens(graph_module, signature)
    return graph_module, signature


def _drop_tokens(graph_module: torch.fx.GraphModule, signature: GraphSignature) -> None:
    """Drop the tokens that order effects where no operator takes one (linalg asks for them)."""
    if not signature.input_tokens:
        return
    graph, count = graph_module.graph, len(signature.input_tokens)
    output = graph.output_node()
    tokens, outputs = graph.find_nodes(op="placeholder")[:count], output.args[0]
    if list(outputs[:count]) != tokens or any(len(token.users) > 1 for token in tokens):
        raise _Refused("effect", "an operator with side effects has to stay in order")
    output.args = (outputs[count:],)
    for token in tokens:
        graph.erase_node(token)


def _finish(
    root: torch.nn.Module,
    graph: torch.fx.Graph,
    slots: list[_Slot],
    mutated: Mapping[str, str],
    declared: Sequence[str],
    results: list,
) -> Captured:
    values = list(graph.output_node().args[0])
    leading = len(values) - len(results) - len(declared)
    if leading != len(mutated):
        raise _Refused("alias", "two arguments are overwritten with one and the same value")
    drop_checks(graph)
    for node in graph.nodes:
        _check_node(node)
    slots = _lift_constants(root, graph, slots)

    index = {slot.node.name: i for i, slot in enumerate(slots)}
    targets = [index[mutated[v.name]] for v in values[:leading]] + [index[n] for n in declared]
    targets += [None] * len(results)
    outputs = tuple(CapturedOutput(v, t) for v, t in zip(values, targets, strict=True))
    inputs = tuple(
        CapturedInput(
            slot.node,
            "state" if slot.kind == "weight" and i in targets else slot.kind,
            slot.name,
            slot.position,
            slot.tensor,
        )
        for i, slot in enumerate(slots)
    )
    for i, slot in enumerate(slots):
        if is_written(slot.seen) and i not in targets:
            raise _Refused(
                "alias", f"a write into {slot.name} through a copy that was none is lost"
            )
    captured = Captured(graph, inputs, outputs)
    return _with_aliases(captured, [slot.seen for slot in slots], results)


def _lift_constants(
    root: torch.nn.Module, graph: torch.fx.Graph, slots: list[_Slot]
) -> list[_Slot]:
    """Tensors the root owns become weights like any other, so there is one kind of input."""
    slot_of = {slot.node: slot for slot in slots}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    lifted: dict[str, torch.fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            tensor = operator.attrgetter(node.target)(root)
            with graph.inserting_before(first):
                placeholder = graph.placeholder(node.name)
            placeholder.meta = dict(node.meta)
            lifted[node.target] = placeholder
            slot_of[placeholder] = _Slot(placeholder, "weight", node.target, None, tensor, None)
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    return [slot_of[node] for node in graph.find_nodes(op="placeholder")]


def _value(result: object, key: str) -> object:
    return result.meta.get(key) if isinstance(result, torch.fx.Node) else result


# ----------------------------------------------------------------------------------------- refusals


def _check_arguments(placeholders: Sequence[torch.fx.Node], values: Sequence) -> None:
    plain = (int, float, bool, str, type(None), *_SYMBOLS)
    for node, value in zip(placeholders, values):
        name = getattr(value, "__class__", type(value)).__name__
        if isinstance(value, torch.Tensor):
            if is_traceable_wrapper_subclass(value):
                raise _Refused("subclass", f"argument {node.name} is a {name}")
            if value.layout is not torch.strided or value.is_quantized:
                raise _Refused("layout", f"argument {node.name} is stored as {value.layout}")
        elif not isinstance(value, plain):
            raise _Refused("argument", f"argument {node.name} is a {name}")


def _check_training(
    gm: torch.fx.GraphModule, placeholders: Sequence[torch.fx.Node], values: Sequence
) -> None:
    """Refuse a graph that leaves a gradient to be computed: in a result, or in a written argument.

    Dynamo restores the gradient mode of the graph's start before it calls a backend and guards on
    it, so what is seen here holds for every later call.
    """
    for node in gm.graph.output_node().all_input_nodes:
        if any(value.requires_grad for value in tensors_of(node)):
            raise _Refused("training", f"result {node.name} needs a gradient", node)
    for node, value in zip(placeholders, values):
        for seen in tensors_of(node):
            grown = seen.requires_grad and is_written(seen)
            if grown and not (value.requires_grad and value.is_leaf):
                raise _Refused("training", f"argument {node.name} is written with a gradient", node)


def _check_node(node: torch.fx.Node) -> None:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    target, value = node.target, node.meta.get("val")
    if value is not None and free_unbacked_symbols(value):
        raise _Refused("unbacked-size", f"{node.name} has a size or value only data tells", node)
    if node.op != "call_function":
        return
    if isinstance(target, HigherOrderOperator):
        if "auto_functionalized" in target.name():
            raise _Refused("mutation", f"{node.args[0]} writes into its argument", node)
        raise _Refused("higher-order", f"{target} holds a graph of its own", node)
    if _writes(target):
        raise _Refused("mutation", f"{target} writes into its argument", node)
    if not isinstance(target, OpOverload) and target.__module__ not in (
        "_operator",
        "math",
        "torch",
    ):
        raise _Refused("function", f"{target.__module__}.{target.__name__} is no operator", node)


def _writes(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _with_aliases(captured: Captured, seen: list, results: list) -> Captured:
    """Compare who shares memory with whom: as PyTorch runs it, and as the captured graph shows.

    A result that should be memory of a written argument becomes a view of it; what else got lost
    is refused.
    """
    leading = len(captured.outputs) - len(results)
    outputs = list(captured.outputs)
    after = [_value(i.node, "val") if s is not None else s for i, s in zip(captured.inputs, seen)]
    after += [_value(output.value, "val") for output in outputs[leading:]]
    for i, j in sorted(alias_pairs([*seen, *results]) - alias_pairs(after)):
        result, where = j - len(seen), None
        if result < 0 or isinstance(outputs[leading + result].value, ArgumentView):
            continue
        if isinstance(outputs[leading + result].value, torch.fx.Node):
            where = outputs[leading + result].value
        if i >= len(seen):
            reason = f"result {result} shares memory with result {i - len(seen)}"
            raise _Refused("alias", reason, where)
        view = argument_view(i, seen[i], results[result])
        if view is None:
            reason = f"result {result} shares memory with {captured.inputs[i].name}"
            raise _Refused("alias", reason, where)
        outputs[leading + result] = CapturedOutput(view)
    return replace(captured, outputs=tuple(outputs))


def _dynamo_kind(node: torch.fx.Node, value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return "symbol"
    if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False) and not value.dim():
        return "scalar"
    return "weight" if is_module_tensor(node) else "user"
