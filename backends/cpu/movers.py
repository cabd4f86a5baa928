"""Ops that move elements: copies between any two ways to walk memory."""

from __future__ import annotations

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.pointwise import pointwise
from effc.ir import Op

from .builder import Builder
from .memory import Ref


def copy_into(b: Builder, node: Op, out: Ref, x: Ref, note: str = "") -> None:
    """out[...] = x[...], element types converted as torch does."""
    nest = Nest(out.shape, (Operand(out.dtype, out.strides), Operand(x.dtype, x.strides)))
    nest = nest.collapsed(order_of(out))
    made = pointwise(nest, [node], [], [node], kind="copy", comment=[f"cpu  copy for {node.name}"])
    b.kernel(made.kernel, node, [out], [x], made.numbers, kind="copy", note=note)


def order_of(ref: Ref) -> list[int]:
    """Dimensions by how far apart their elements lie, farthest first, as far as that is known."""
    order = list(range(len(ref.shape)))
    if any(not isinstance(s, int) for s in ref.strides):
        channels = ref.root.shape == ref.shape and ref.root.strides == ref.strides
        return _packed_order(ref) if channels else order
    return sorted(order, key=lambda i: (-abs(ref.strides[i]), i))  # type: ignore[arg-type]


def _packed_order(ref: Ref) -> list[int]:
    """Of a packed tensor with symbolic sizes: the stride-1 dimension goes last."""
    order = list(range(len(ref.shape)))
    inner = [i for i in order if ref.strides[i] == 1 and ref.shape[i] != 1]
    if len(inner) == 1:
        order.remove(inner[0])
        order.append(inner[0])
    return order
