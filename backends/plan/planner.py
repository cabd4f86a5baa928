"""From a graph to a plan: every node to its lowering, outputs to memory the caller may keep."""

from __future__ import annotations

from typing import Any

from effc.ir import Graph, Input, Item, No, Op, Weight, no
from effc.ir.types import Tensor

from ..base import Options
from .aliases import alias_root, escaping
from .builder import VIEWS, Builder
from .host import clone_call, copy_call, fallback, item
from .lowering import Lowerings
from .memory import Root, whole
from .plan import Plan
from .prepare import prepare
from .steps import Held


def make_plan(
    graph: Graph, options: Options, target: Lowerings, without: No | None = None,
    schedules: Any = None,
) -> Plan:  # fmt: skip
    """A target's plan for a graph.

    without: why no kernel can be built here; then torch runs everything. schedules: what the
    target's lowerings pick schedules by.
    """
    prepared = prepare(graph, lambda n: without is None and bool(target.claim(n)))
    graph = prepared.graph
    b = Builder(
        graph, prepared.names, prepared.origin, escaping(graph), without is None,
        options.precision, target, schedules,
    )  # fmt: skip
    inputs = [b.add_input(i) for i in graph.inputs]
    for node in graph.nodes:
        if node not in graph.constants:
            lower(b, node, without)
            b.lowered.add(node)
    captured = options.captured or graph
    outputs, shared = _outputs(b, captured)
    outputs += _states(b)
    return Plan(
        graph, b.steps, b.roots, b.windows, b.constants, list(b.packed.values()), inputs,
        outputs, shared, b.slots, b.shown_in, b.sizes, b.equal, target.alignment,
    )  # fmt: skip


def lower(b: Builder, node: Op, without: No | None) -> None:
    """One node: a view, a kernel, a library routine, or ATen with the reason."""
    if isinstance(node, Item):
        item(b, node)
        return
    if node.name in VIEWS:
        b.set_view(node)
        return
    if node.name == "encoded":  # its parts, which are there
        b.values[node] = tuple(b.held(part) for part in node.operands)
        return
    answer = b.target.claim(node)
    found = b.target.find(node.name)
    if answer and found is not None:
        if not found.native or without is None:
            found.lower(b, node)
            return
        answer = without
    fallback(b, node, answer if isinstance(answer, No) else no("not taken"))


# ------------------------------------------------------------------ outputs


def _key(node: Op) -> object:
    """The same for an input or weight of two versions of a graph."""
    return (type(node), node.key) if isinstance(node, (Input, Weight)) else node


def _outputs(b: Builder, captured: Graph) -> tuple[list[int], list[int]]:
    """Slots of outputs that are no states; cloned where they would share memory and eager's not."""
    ours = [_key(alias_root(o)) for o in b.graph.outputs]
    eager = [_key(alias_root(o)) for o in captured.outputs]
    slots: list[int] = []
    shared: list[int] = []
    wanted = b.graph.outputs[: len(b.graph.outputs) - len(b.graph.states)]
    for i, node in enumerate(wanted):
        slot = b.tensor(node)
        held = b.held(node)
        if not isinstance(held, Held) or not isinstance(node.type, Tensor):
            slots.append(slot)
            continue
        constant = alias_root(node) in b.graph.constants and not isinstance(
            alias_root(node), Weight
        )
        given = isinstance(alias_root(node), (Input, Weight))
        clash = any(ours[i] == ours[j] and eager[i] != eager[j] for j in range(i))
        kept = any(map(b.is_state, (held.root, *held.root.pins)))  # the next call writes there
        if constant or clash or kept or (given and ours[i] != eager[i]):
            made = b.new_slot()
            b.host("copy", "clone", node, clone_call(slot, made), b.reads(node))
            slots.append(made)
            continue
        if held.root.kind == "dynamic" and not held.root.owned and not given:
            shared.append(i)
        slots.append(slot)
    for node in wanted:
        if isinstance(held := b.held(node), Held):
            held.root.use(len(b.steps))
    return slots, shared


def _states(b: Builder) -> list[int]:
    """Slots of the states: each is given back as it came, with the new value in it.

    An `update` has mostly put it there. What is elsewhere is copied at the end, when nobody reads
    the old value any more; and by way of a copy where it lies in a state's memory.
    """
    new = b.graph.outputs[len(b.graph.outputs) - len(b.graph.states) :]
    roots: list[Root] = [b.held(state).root for state in b.graph.states]
    moved = [(root, node) for root, node in zip(roots, new) if not _is_in(b, node, root)]
    sources = {root: b.tensor(node) for root, node in moved}
    for root, node in moved:
        if b.is_state(b.held(node).root):
            made = b.new_slot()
            b.host("copy", "clone", node, clone_call(sources[root], made), b.reads(node))
            sources[root] = made
    for root, node in moved:
        slots = (root.slot, sources[root])
        b.reads(node)
        b.host("copy", "copy_", node, copy_call(*slots), slots, note="into the state")
    return [root.slot for root in roots]


def _is_in(b: Builder, node: Op, root: Root) -> bool:
    held = b.held(node)
    return held.root is root and held.ref == whole(root)


__all__ = ["lower", "make_plan"]
