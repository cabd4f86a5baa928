"""Builds a plan: turns nodes into steps over memory, one node after the other.

A step is a call of one of our kernels (`KernelCall`) or a Python call of a torch routine
(`HostCall`). Lowerings ask the builder for a value as kernels read it (`ref`) or as a torch tensor
(`tensor`), and say where the result is (`set`). View ops make no step until somebody needs what
they cannot give for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from effc.codegen.cpp.kernel import Kernel
from effc.ir import DType, Graph, Input, Item, Number, Op, Weight, row_major
from effc.ir.rewrite import No
from effc.ir.symbols import Dim
from effc.ir.types import Tensor, i64

from ..base import Launch
from .aliases import alias_root, consumers
from .memory import Ref, Root, expanded, permuted, reshaped, sliced, whole
from .sizes import Sizes
from .steps import AnyKernel, Held, HostCall, KernelCall, Make, Packed, Window

VIEWS = ("reshape", "permute", "expand", "slice")


@dataclass(eq=False)
class Builder:
    graph: Graph
    names: Mapping[Op, str]
    origin: Mapping[Op, Op] = field(default_factory=dict)  # node -> the one that reports show
    escaping: frozenset[Op] = frozenset()  # values whose memory the caller gets to see, but states
    kernels: bool = True  # whether any can be built here
    precision: str = "highest"  # of float32 products
    target: Any = None  # its Lowerings
    schedules: Any = None  # what they pick schedules by
    lowered: set[Op] = field(default_factory=set)
    steps: list[KernelCall | HostCall] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    constants: dict[Op, Root] = field(default_factory=dict)
    packed: dict[tuple[Op, str, Any], Packed] = field(default_factory=dict)
    derived_roots: dict[int, Root] = field(default_factory=dict)  # slot -> for kernels
    # Held; a tuple of them where a node has several results, or its value is one of parts; or the
    # slot of a number, and of what a fallback gave in one piece.
    values: dict[Op, Any] = field(default_factory=dict)
    slots: int = 0
    shown_in: dict[int, Root] = field(default_factory=dict)  # slot -> the memory its tensor shows
    sizes: Sizes = field(default_factory=Sizes)
    equal: list[tuple[Dim, Dim]] = field(default_factory=list)

    # -------------------------------------------------------------- values

    def new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def new_root(
        self, kind: str, node: Op, t: Tensor, strides: Sequence[Dim] | None = None, **more: Any
    ) -> Root:
        """Memory for a tensor of type t; packed in its layout unless strides say otherwise."""
        strides = t.strides if strides is None else tuple(strides)
        root = Root(kind, node, t.dtype, t.shape, strides, **more)
        root.first = root.last = len(self.steps)
        if kind != "arena":
            root.slot = self.new_slot()
            self.shown_in[root.slot] = root
        self.roots.append(root)
        self.sizes.add((root.shape, root.strides, root.nbytes))
        return root

    def add_input(self, node: Input) -> Root | int:
        if isinstance(node.of, Number):
            self.values[node] = self.new_slot()
            return self.values[node]
        assert isinstance(node.of, Tensor)
        root = self.new_root("input", node, node.of, owned=False)
        self.set(node, root)
        return root

    def held(self, node: Op) -> Any:
        """The value of a node; constants get a place when first asked for."""
        if node not in self.values and node in self.graph.constants:
            root = self.constants[node] = self.new_root("const", node, node.tensor, owned=False)
            self.set(node, root)
        return self.values[node]

    def derived(self, node: Op, what: str, fn: Callable[[Any], Any], key: Any = None) -> int:
        """The slot of fn(constant), computed when weights are bound."""
        if (node, what, key) not in self.packed:
            same = fn if key is None else key
            made = Packed(self.new_slot(), node, fn, what, same)
            self.packed[node, what, key] = made
        return self.packed[node, what, key].slot

    def derived_ref(
        self, node: Op, what: str, fn: Callable[[Any], Any], count: int, key: Any = None,
        dtype: DType | None = None,
    ) -> Ref:  # fmt: skip
        """fn(constant) as kernels read it: `count` elements in a row, of the constant's type."""
        slot = self.derived(node, what, fn, key)
        root = self.derived_roots.get(slot)
        if root is None:
            dtype = dtype or node.tensor.dtype
            root = Root("packed", node, dtype, (count,), (1,), slot=slot, owned=False)
            root.read_by_kernels = True
            self.roots.append(root)
            self.derived_roots[slot] = root
        return whole(root)

    def set(self, node: Op, value: Ref | Root) -> None:
        """Say where a node's value is."""
        ref = whole(value) if isinstance(value, Root) else value
        self.values[node] = self._holding(node, ref)

    def set_results(self, node: Op, values: Sequence[Ref | Root]) -> None:
        """Say where each of several results is."""
        refs = [whole(v) if isinstance(v, Root) else v for v in values]
        self.values[node] = tuple(self._holding(node, ref) for ref in refs)

    def _holding(self, node: Op, ref: Ref) -> Held:
        return Held(node, ref.root, ref, slot=ref.root.slot if ref.whole else -1)

    # -------------------------------------------------------------- view ops

    def set_view(self, node: Op) -> None:
        """A view op: no step, only another way to walk the operand's memory."""
        source = self.held(node.operands[0])
        ref = None if source.ref is None else self.viewed(node, source.ref)
        self.sizes.add(ref and (ref.shape, ref.strides, ref.offset))
        self.values[node] = Held(node, source.root, ref, view_of=source)

    def viewed(self, node: Any, x: Ref) -> Ref | None:
        match node.name:
            case "reshape":
                return reshaped(x, node.to)
            case "permute":
                return permuted(x, node.dims)
            case "expand":
                pairs = zip(x.shape, node.to[len(node.to) - len(x.shape) :], strict=True)
                self.must_equal(*((a, b) for a, b in pairs if a != 1))
                return expanded(x, node.to)
            case "slice":
                return sliced(x, node.dim % len(x.shape), node.start, node.size, node.step)
        raise AssertionError(node.name)

    def must_equal(self, *pairs: tuple[Dim, Dim]) -> None:
        """Sizes that the plan takes to be equal; looked at when they are known."""
        for a, b in pairs:
            if a != b and not (isinstance(a, int) and isinstance(b, int)):
                self.equal.append((a, b))
                self.sizes.add((a, b))

    # -------------------------------------------------------------- what a step reads

    def ref(self, node: Op) -> Ref:
        """The value as kernels read it; packed first where strides cannot say it."""
        ref = self._ref(self.held(node))
        if ref.root.kind in ("input", "const", "dynamic"):
            ref.root.read_by_kernels = True
        return ref

    def _ref(self, held: Held) -> Ref:
        if held.ref is None:
            assert held.view_of is not None
            source = self._ref(held.view_of)
            held.ref = self.viewed(held.node, source) or self.repacked(held.node, source)
            held.root = held.ref.root
        return held.ref

    def repacked(self, node: Op, source: Ref) -> Ref:
        """The value of a reshape that strides cannot say: a copy in logical order."""
        t = node.tensor
        root = self.own(node, t.with_(shape=source.shape, layout=row_major))
        self.target.copy_into(self, node, whole(root), source, note="packed for a reshape")
        ref = reshaped(whole(root), t.shape)
        assert ref is not None
        self.sizes.add((ref.shape, ref.strides))
        return ref

    def tensor(self, node: Op) -> int:
        """The slot of the value as a torch tensor."""
        held = self.held(node)
        if isinstance(held, tuple):
            return self._joined(node, held)
        return held if isinstance(held, int) else self._tensor(held)

    def _joined(self, node: Op, parts: Sequence[Any]) -> int:
        """The slot of a value of parts as one object, made where it is asked for."""
        from .host import joined_call

        given = node.operands if node.name == "encoded" else (node,) * len(parts)
        slots = tuple(
            p
            if isinstance(p, int)
            else self._joined(n, p)
            if isinstance(p, tuple)
            else self._tensor(p)
            for n, p in zip(given, parts, strict=True)
        )
        for root in self.memory_of(node):
            self._uses(root)
        slot = self.new_slot()
        self.host("view", node.name, node, joined_call(self, node, slots, slot), slots)
        return slot

    def memory_of(self, node: Op) -> list[Root]:
        """All that the value lies in."""
        found, waiting = [], [self.held(node)]
        while waiting:
            held = waiting.pop()
            if isinstance(held, tuple):
                waiting += held
            elif isinstance(held, Held):
                found.append(held.root)
        return found

    def _tensor(self, held: Held) -> int:
        if held.slot >= 0:
            return held.slot
        if held.root.kind in ("input", "dynamic", "const"):
            return self._host_view(held)
        ref = self._ref(held)
        if ref.root.kind == "output" and ref.whole:
            held.slot = ref.root.slot
        elif ref.root.kind == "output":
            self._host_window(held, ref)
        else:
            held.slot = self.new_slot()
            self.windows.append(Window(held.slot, ref))
        return held.slot

    def _host_view(self, held: Held) -> int:
        from .host import view_call

        assert held.view_of is not None
        source = self._tensor(held.view_of)
        held.slot = self.new_slot()
        self.shown_in[held.slot] = held.root
        self._uses(held.root)
        make = view_call(self, held.node, source, held.slot)
        self.host("view", held.node.name, held.node, make, (source,))
        return held.slot

    def _host_window(self, held: Held, ref: Ref) -> None:
        from .host import window_call

        held.slot = self.new_slot()
        make = window_call(ref, ref.root.slot, held.slot)
        self.host("view", held.node.name, held.node, make, (ref.root.slot,))

    def reads(self, *nodes: Op) -> tuple[int, ...]:
        """Slots of several values, kept at least until the next step."""
        slots = tuple(self.tensor(n) for n in nodes)
        for n in nodes:
            for root in self.memory_of(n):
                self._uses(root)
        return slots

    def part(self, node: Op, index: int) -> Ref:
        """One part of a compressed value as kernels read it."""
        return self._ref(self.held(node)[index])

    # -------------------------------------------------------------- what a step writes

    def own(self, node: Op, t: Tensor, strides: Sequence[Dim] | None = None) -> Root:
        """Memory that our kernels write: in the arena, or the caller's where it gets out."""
        return self.new_root("output" if node in self.escaping else "arena", node, t, strides)

    def error_word(self) -> Root:
        """Where a kernel says that an index was out of range; the call then raises IndexError."""
        root = next((r for r in self.roots if r.kind == "error"), None)
        if root is None:
            root = self.new_root("error", self.graph.nodes[0], Tensor((1,), i64))
        return root

    def results(self, node: Op) -> list[Ref]:
        """Memory for every result of a node that our kernels compute."""
        if not isinstance(node.type, tuple):
            return [whole(self.own(node, node.tensor))]
        items = {u.index: u for u in self.graph.users[node] if isinstance(u, Item)}
        types: Any = node.type  # tensors all: `dense_elements` lets nothing else come here
        return [whole(self.own(items.get(i, node), t)) for i, t in enumerate(types)]

    # -------------------------------------------------------------- steps

    def kernel(
        self, kernel: AnyKernel, node: Op, outs: Sequence[Ref], ins: Sequence[Ref],
        numbers: Sequence[Dim | Kernel] = (), kind: str = "kernel", note: str = "",
    ) -> None:  # fmt: skip
        """Call one of our kernels; its pointers are outs, then ins."""
        refs = (*outs, *ins)
        for r in refs:
            self.sizes.add(r.offset)
            self._uses(r.root)
        self.sizes.add(tuple(numbers))
        launch = self._launch(kind, kernel.name, node, None, note)
        self.steps.append(KernelCall(kernel, refs, tuple(numbers), launch))

    def host(
        self, kind: str, call: str, node: Op, make: Make, reads: Sequence[int] = (),
        reason: No | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Call a torch routine."""
        launch = self._launch(kind, call, node, reason, note)
        self.steps.append(HostCall(make, tuple(reads), launch))

    def _uses(self, root: Root) -> None:
        root.use(len(self.steps))

    def _launch(self, kind: str, call: str, node: Op, reason: No | None, note: str) -> Launch:
        names = tuple(self.names.get(o, o.name) for o in dict.fromkeys(node.operands))
        result = self.names.get(node, node.name)
        return Launch(kind, call, self.origin.get(node, node), result, names, None, reason, note)

    def is_constant(self, node: Op) -> bool:
        return node in self.graph.constants or isinstance(node, Weight)

    def free_after(self, value: Op, node: Op) -> bool:
        """Nobody reads the value's memory after `node`, which may overwrite it."""
        root = self.held(value).root
        ours = root.kind == "arena" or (root.kind == "dynamic" and root.owned)
        return ours and alias_root(value) not in self.escaping and self._last_read(value, node)

    def overwrites(self, value: Op, node: Op) -> bool:
        """`node` may write its result over an operand: nobody needs that later, it is no second
        operand's memory too, and the memory is ours or a state's."""
        memory = alias_root(value)
        if sum(alias_root(o) is memory for o in node.operands) > 1:
            return False
        if not self.is_state(self.held(value).root):
            return node not in self.escaping and self.free_after(value, node)
        kept = any(alias_root(o) is memory for o in self.graph.outputs)
        return not kept and self._last_read(value, node)

    def _last_read(self, value: Op, node: Op) -> bool:
        """No step after those of `node` reads the value's memory."""
        if self.held(value).root.pinned:
            return False
        readers = self._consumers.get(alias_root(value), ())
        return all(c is node or c in self.lowered for c in readers)

    @staticmethod
    def is_state(root: Root) -> bool:
        """Memory of the caller's that gets the new value of what it holds."""
        return isinstance(root.node, Input) and root.node.state

    @cached_property
    def _consumers(self) -> dict[Op, list[Op]]:
        return consumers(self.graph)
