"""Which tensors share memory: the questions a functional graph can no longer answer by itself.

A functional graph has values only. What a caller sees of memory - a result that is a view of an
argument, two results over one buffer, a write that shows through a view - must be compared before
and after capture, and arguments that overlap looked at before a call that writes into one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


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


def undeclared_views(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Nodes that return memory of an argument although their schema does not say so.

    `broadcast_tensors`, `einsum` or `type_as` may do that. Functionalisation believes the schema:
    a write through such a result is lost on the argument, and the other way round. It does no harm
    (`_unsafe_view` of a clone) if nothing else ever uses the argument's memory.
    """
    found = []
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not _declares_views(node.target):
            keys = _storage_keys(node)
            sources = [n for n in node.all_input_nodes if keys & _storage_keys(n)]
            if not all(_is_fresh(source) and len(source.users) == 1 for source in sources):
                found.append(node)
    return found


def _declares_views(op: torch._ops.OpOverload) -> bool:
    return any(result.alias_info for result in op._schema.returns)


def _is_fresh(node: torch.fx.Node) -> bool:
    """True if the node made its memory itself."""
    mine = _storage_keys(node)
    return node.op == "call_function" and not any(
        mine & _storage_keys(source) for source in node.all_input_nodes
    )


def _storage_keys(node: torch.fx.Node) -> set[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {key for v in values if (key := storage_key(v)) is not None}


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
