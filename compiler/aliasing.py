"""Which tensors share memory: the questions a functional graph can no longer answer by itself.

A functional graph has values only. What a caller sees of memory - a result that is a view of an
argument, two results over one buffer, a write that shows through a view - must be compared before
and after capture, and arguments that overlap looked at before a call that writes into one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ArgumentView:
    """A result that is memory of a written argument: `of` it, once the mutations are copied back.

    `index` is the argument's index in `Captured.inputs`; without a size it is returned as it is.
    """

    index: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0

    def of(self, argument: torch.Tensor) -> torch.Tensor:
        """The result, given the argument."""
        if self.size is None:
            return argument
        return argument.as_strided(self.size, self.stride, argument.storage_offset() + self.offset)


def storage_key(value: object) -> int | None:
    """The identity of the memory behind a (fake or real) tensor; None if it has none of its own."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage()._cdata


def alias_pairs(values: Sequence[object]) -> set[tuple[int, int]]:
    """Pairs `(i, j)`, `i < j`, of values that lie in one storage."""
    seen: dict[int, list[int]] = {}
    pairs: set[tuple[int, int]] = set()
    for index, value in enumerate(values):
        if (key := storage_key(value)) is not None:
            pairs.update((other, index) for other in seen.setdefault(key, []))
            seen[key].append(index)
    return pairs


def is_written(value: object) -> bool:
    """True if a fake tensor, or one it is a view of, was written in place while it was traced."""
    return isinstance(value, torch.Tensor) and not value.is_inference() and value._version > 0


def argument_view(index: int, argument: torch.Tensor, result: torch.Tensor) -> ArgumentView | None:
    """How `result` lies in the memory of `argument`; None if that is no plain strided view."""
    if argument.dtype != result.dtype or argument.is_conj() != result.is_conj():
        return None
    shapes = [(*t.shape, *t.stride(), t.storage_offset()) for t in (argument, result)]
    if str(shapes[0]) == str(shapes[1]):
        return ArgumentView(index)
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return None
    offset = int(result.storage_offset() - argument.storage_offset())
    return ArgumentView(index, tuple(result.shape), tuple(result.stride()), offset)


def tensors_of(node: torch.fx.Node) -> list[torch.Tensor]:
    """The fake tensors of a node, of a Dynamo graph or of an ATen graph."""
    value = node.meta.get("example_value", node.meta.get("val"))
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def undeclared_view(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """A node that returns memory of an argument, unknown to its schema, which something writes.

    `broadcast_tensors`, `einsum` or `type_as` may do that. Functionalisation believes the schema:
    a write through such a result is lost on the argument, and the other way round. It is looked
    for before the export, which removes the dead code such writes become.
    """
    written = {storage_key(v) for node in graph.nodes for v in _written_values(node)} - {None}
    nodes = list(graph.nodes)
    for position, node in enumerate(nodes):
        mine = {storage_key(v) for v in tensors_of(node)} & written
        shared = mine & _storages_read(node)
        if shared and not _declares_alias(node):
            # What was written before the view was made is in the value; only later writes get lost.
            writers = [i for i, n in enumerate(nodes) if _writes(n) and shared & _storages_read(n)]
            if not writers or max(writers) > position:
                return node
    return None


def _storages_read(node: torch.fx.Node) -> set[int | None]:
    return {storage_key(v) for source in node.all_input_nodes for v in tensors_of(source)}


_UPDATES_STATISTICS = ("batch_norm", "instance_norm")


def _writes(node: torch.fx.Node) -> bool:
    """True if a call may write an argument: by its schema, its name, or how it is called."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    module = getattr(target, "__module__", "")
    operator_in_place = module == "_operator" and name.startswith("i") and name not in _PURE_I
    given = "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    known = node.op != "call_module" and (node.op == "call_method" or module.startswith(_TORCH))
    if node.op in ("placeholder", "output", "get_attr"):
        return False
    return (
        in_place or operator_in_place or given or not known or name == "setitem"
        or name in _UPDATES_STATISTICS
    )  # fmt: skip


_PURE_I = ("invert", "inv", "index", "is_", "is_not", "itemgetter", "indexOf")
_TORCH = ("torch", "_operator", "math")


def _written_values(node: torch.fx.Node) -> list[torch.Tensor]:
    found = [value for value in tensors_of(node) if is_written(value)]
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        found += [value for source in node.all_input_nodes for value in tensors_of(source)]
    return found


def _declares_alias(node: torch.fx.Node) -> bool:
    """True unless an ATen operator of that name exists and none of its overloads returns a view."""
    target = node.target
    if node.op == "placeholder" or "out" in node.kwargs:
        return True
    if isinstance(target, torch._ops.OpOverload):
        return any(result.alias_info for result in target._schema.returns)
    if not isinstance(target, str) and target.__module__ not in ("torch", "torch.functional"):
        return True
    packet = getattr(torch.ops.aten, target if isinstance(target, str) else target.__name__, None)
    schemas = [getattr(packet, name)._schema for name in packet.overloads()] if packet else []
    schemas = [s for s in schemas if not any(a.is_out for a in s.arguments)]
    return not schemas or any(r.alias_info for s in schemas for r in s.returns)


def overlapping(tensors: Sequence[torch.Tensor], written: Iterable[int] | None = None) -> bool:
    """True if two of the tensors may share a byte and, given `written`, one of the two is in it.

    Compares address ranges, about a microsecond per tensor, so two interleaved views of one buffer
    count as overlapping: where the answer errs, it errs to True.
    """
    spans = sorted(
        (start, start + _extent(tensor), index)
        for index, tensor in enumerate(tensors)
        if tensor.layout is torch.strided and tensor.numel()
        for start in (tensor.data_ptr(),)
    )
    matters = set(range(len(tensors)) if written is None else written)
    for n, (_, end, i) in enumerate(spans):
        for start, _, j in spans[n + 1 :]:
            if start >= end:
                break
            if i in matters or j in matters:
                return True
    return False


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last (strides are never negative)."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()
