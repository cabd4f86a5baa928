"""Rows of a table by index: of a dense one as they lie, of a compressed one from its codes."""

from __future__ import annotations

from typing import Any

from effc.codegen.cpp.image import embedding
from effc.codegen.cpp.products import core
from effc.ir import row_major
from effc.ir.symbols import product

from ..plan.builder import Builder
from ..plan.memory import whole
from ..plan.moves import packed_ref
from ..plan.regions import Region
from . import codes
from .lowering import lowers


@lowers("embedding")
def _embedding(b: Builder, node: Any) -> None:
    if codes.table_takes(b, node):
        _from_codes(b, node)
        return
    (out,) = b.results(node)
    table, ids = b.ref(node.table), b.ref(node.ids)
    if table.strides[1] != 1:
        table = packed_ref(b, node.table, table, row_major)
    if ids.strides != node.ids.tensor.strides:
        ids = packed_ref(b, node.ids, ids, row_major)
    numbers = (product(node.ids.shape), table.shape[1], table.shape[0], table.strides[0])
    made = embedding(node.dtype, node.ids.dtype, numbers, Region.of(node).comment(b))
    b.kernel(made.kernel, node, [out, whole(b.error_word())], [table, ids], made.numbers)
    b.set(node, out)


def _from_codes(b: Builder, node: Any) -> None:
    """Of the table that a decoded constant is, packed as a product with it reads it."""
    w = node.table.x
    out = whole(b.own(node, node.tensor))
    ids = b.ref(node.ids)
    if ids.strides != node.ids.tensor.strides:
        ids = packed_ref(b, node.ids, ids, row_major)
    numbers = (product(node.ids.shape), *codes.weight_numbers(w), codes.KINDS[node.dtype],
               int(ids.dtype.bits == 64))  # fmt: skip
    made = core("embedding_of_codes", w.tensor.dtype.bits)
    b.kernel(made, node, [out, whole(b.error_word())], [ids, *codes.weight_refs(b, w)], numbers,
             note=f"{w.tensor.dtype} codes")  # fmt: skip
    b.set(node, out)


__all__: list[str] = []
