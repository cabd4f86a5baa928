"""Kernels with a template of their own: pooling, interpolation, embedding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from effc.ir import DType
from effc.ir.symbols import Dim

from .kernel import kernel
from .pointwise import SHARE, Made
from .scalar import register, storage

# Names of the numbers of an image kernel, as its templates use them.
SIZES = ("images", "channels", "height", "width", "out_h", "out_w")
STRIDES = ("xn", "xc", "xh", "xw", "yn", "yc", "yh", "yw")


def image_kernel(
    template: str, dtype: DType, last: bool, sizes: Sequence[Dim], strides: Sequence[Dim], *,
    more: dict[str, Dim] | None = None, comment: Iterable[str] = (), **holes: Any,
) -> Made:  # fmt: skip
    """last: channels lie together (their stride is 1), else the columns do.

    sizes and strides in the order of SIZES and STRIDES; more: further numbers by name.
    """
    names = [*SIZES, *STRIDES, *(more or {})]
    values = [*sizes, *strides, *(more or {}).values()]
    made = kernel(
        template, template, numbers=names, comment=comment, last=last, share=SHARE,
        operands=_operands(dtype), type=register(dtype), **holes,
    )  # fmt: skip
    return Made(made, tuple(values))


def _operands(dtype: DType) -> list[dict[str, str]]:
    kind = storage(dtype)
    return [{"name": "y0", "qualified": kind}, {"name": "x0", "qualified": f"const {kind}"}]


def embedding(dtype: DType, ids: DType, numbers: Sequence[Dim], comment: Iterable[str]) -> Made:
    """numbers: how many ids, elements a row, rows of the table, elements from row to row."""
    operands = [
        *_operands(dtype)[:1], {"name": "error", "qualified": "int64_t"}, _operands(dtype)[1],
        {"name": "x1", "qualified": f"const {storage(ids)}"},
    ]  # fmt: skip
    made = kernel(
        "embedding", "embedding", numbers=["count", "size", "rows", "row"],
        comment=comment, operands=operands, share=SHARE,
    )  # fmt: skip
    return Made(made, tuple(numbers))
