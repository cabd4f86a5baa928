"""Steps that call torch from Python: fallbacks, library routines' plumbing, views, copies.

Each function returns `make(frame)`, and that the step itself: a closure with everything looked up
beforehand, because at small sizes the time of a call is the time of these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from effc.ir import Op
from effc.ir.formats import Encoded
from effc.ir.op import map_values
from effc.ir.rewrite import No
from effc.ir.types import Dense, Tensor

from .memory import Ref, Root
from .sizes import has_symbols
from .steps import Make

if TYPE_CHECKING:
    from .builder import Builder
    from .frame import Frame

Step = Callable[[], None]


def fallback(b: Builder, node: Op, reason: No | None) -> None:
    """Run the node's own meaning through ATen; without a reason it is a choice, no fallback."""
    slots = b.reads(*node.operands)
    results = node.type if isinstance(node.type, tuple) else (node.type,)
    pins = {root for o in node.operands for root in b.memory_of(o)}
    for pin in pins:
        pin.pinned = True
    call = getattr(node, "target", node.name)
    kind = "aten" if reason is not None else "library"
    # lists in tuples, a result left out, or one of parts
    if not all(isinstance(t, Tensor) and isinstance(t.format, Dense) for t in results):
        b.values[node] = whole = b.new_slot()
        b.host(kind, call, node, reference_call(b, node, slots, whole), slots, reason)
        return
    tensors = [t for t in results if isinstance(t, Tensor)]  # all of them
    roots = [b.new_root("dynamic", node, t, owned=False, pins=pins) for t in tensors]
    b.host(kind, call, node, reference_call(b, node, slots, roots), slots, reason)
    if isinstance(node.type, tuple):
        b.set_results(node, roots)
    else:
        b.set(node, roots[0])


def item(b: Builder, node: Any) -> None:
    """One of several results, where they are kept as torch gave them."""
    source = b.held(node.x)
    if isinstance(source, tuple):
        b.values[node] = source[node.index]
        return
    slot, index, root = -1, node.index, None
    if isinstance(node.type, Tensor):
        root = b.new_root("dynamic", node, node.type, owned=False)
        b.set(node, root)
    else:
        b.values[node] = slot = b.new_slot()

    def make(frame: Frame) -> Step:
        v = frame.values
        if root is None:
            return lambda: v.__setitem__(slot, v[source][index])
        store = _store(frame, root)
        return lambda: store(v[source][index])

    b.host("view", "item", node, make, (source,))


def reference_call(b: Builder, node: Op, slots: Sequence[int], into: Sequence[Root] | int) -> Make:
    """node.reference on tensors in slots; its results go into roots, or as they are into a slot."""
    b.sizes.add(tuple(getattr(node, f.name) for f in node.fields if f.kind != "region"))
    place = dict(zip(node.operands, slots, strict=True))
    fields = [getattr(node, f.name) for f in node.fields if f.kind == "operand"]

    def make(frame: Frame) -> Step:
        v, bound = frame.values, frame.bind(node)
        given = [getattr(bound, f.name) for f in node.fields if f.kind == "operand"]
        run = _bound_call(node, bound, frame)
        simple = all(isinstance(f, Op) for f in fields)
        if simple and len(fields) == 1:
            (a,) = slots

            def get() -> Any:
                return run(v[a])

        elif simple and len(fields) == 2:
            first, second = place[fields[0]], place[fields[1]]

            def get() -> Any:
                return run(v[first], v[second])

        else:
            swap = dict(zip(map(id, bound.operands), node.operands, strict=True))

            def get() -> Any:
                return run(*(map_values(g, lambda o: v[place[swap[id(o)]]]) for g in given))

        if isinstance(into, int):
            return lambda: v.__setitem__(into, get())
        if not isinstance(node.type, tuple):
            return _storing(frame, into[0], get)
        stores = [_store(frame, root) for root in into]

        def step() -> None:
            for store, value in zip(stores, get(), strict=True):
                store(value)

        return step

    return make


def _bound_call(node: Op, bound: Op, frame: Frame) -> Callable[..., Any]:
    if node.regions:
        env = frame.numbers.env
        return lambda *args: bound.run_region(env, *args)  # type: ignore[attr-defined]  # has regions
    return bound.reference


def _storing(frame: Frame, root: Root, get: Callable[[], Any]) -> Step:
    v, slot = frame.values, root.slot
    if root.number < 0:

        def step() -> None:
            v[slot] = get()

        return step
    store = _store(frame, root)
    return lambda: store(get())


def _store(frame: Frame, root: Root) -> Callable[[Any], None]:
    """Keep a tensor, and publish its address where kernels read it."""
    v, slot = frame.values, root.slot
    publish = frame.publisher(root)

    def store(t: Any) -> None:
        v[slot] = t
        if publish is not None and t is not None:
            publish(t)

    return store


def joined_call(b: Builder, node: Op, parts: Sequence[int], slot: int) -> Make:
    """The parts of a compressed value as one object."""
    t = node.tensor
    b.sizes.add(t.shape)

    def make(frame: Frame) -> Step:
        v, of = frame.values, t.with_(shape=frame.numbers(t.shape))

        def step() -> None:
            v[slot] = Encoded(of, tuple(v[p] for p in parts))

        return step

    return make


def view_call(b: Builder, node: Op, source: int, slot: int) -> Make:
    """A view op on a real tensor, as eager makes it."""
    b.sizes.add(tuple(node.attrs.values()))

    def make(frame: Frame) -> Step:
        v, view = frame.values, frame.bind(node).reference

        def step() -> None:
            v[slot] = view(v[source])

        return step

    return make


def window_call(ref: Ref, source: int, slot: int) -> Make:
    """A part of a tensor that each call allocates anew."""

    def make(frame: Frame) -> Step:
        v = frame.values
        shape, strides, offset = frame.numbers((ref.shape, ref.strides, ref.offset))

        def step() -> None:
            v[slot] = v[source].as_strided(shape, strides, offset)

        return step

    return make


def library(
    b: Builder, node: Op, call: str, build: Callable[[Frame], Callable[[], torch.Tensor]],
    slots: Sequence[int], root: Root, note: str = "", kind: str = "library",
) -> None:  # fmt: skip
    """A routine chosen on purpose. build(frame) gives a function that returns the result; the
    caller says which node's value it is."""

    def make(frame: Frame) -> Step:
        return _storing(frame, root, build(frame))

    b.host(kind, call, node, make, slots, note=note)


def clone_call(source: int, slot: int) -> Make:
    def make(frame: Frame) -> Step:
        v = frame.values

        def step() -> None:
            v[slot] = v[source].clone()

        return step

    return make


def copy_call(into: int, source: int) -> Make:
    def make(frame: Frame) -> Step:
        v = frame.values

        def step() -> None:
            v[into].copy_(v[source])

        return step

    return make


__all__ = [
    "clone_call", "copy_call", "fallback", "has_symbols", "joined_call", "library",
    "reference_call", "view_call", "window_call",
]  # fmt: skip
