"""Triton templates of other packages: how a researcher gives an op a GPU kernel.

    template("geglu", TEXT, grid=lambda node: (512,), holes=lambda node: {"n": node.shape[-1]})

The text is a jinja template of one @triton.jit function `@NAME@({{ parameters }})`. Its pointers
are `out` and the op's operands by their field names, each packed in logical order. It sees the
holes (sizes; one that only a call knows becomes an argument) and the schedule's blocks by name.
examples/write_a_gpu_kernel.py is the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from effc.codegen.triton.kernel import Schedule, kernel
from effc.codegen.triton.numbers import Numbers
from effc.codegen.triton.tile import pointer
from effc.ir import Op, row_major, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim

from ..plan.builder import Builder
from ..plan.memory import Ref
from ..plan.moves import packed_ref
from ..plan.regions import Region
from .lowering import call, lowers


def template(
    op: str, text: str, *, grid: Callable[[Any], Sequence[Dim]],
    holes: Callable[[Any], Mapping[str, Any]] = lambda node: {},
    schedule: Callable[[Any], Schedule] = lambda node: Schedule(),
    check: Callable[[Any], Answer] = lambda node: yes,
) -> None:  # fmt: skip
    """Compute the op, which has one result, by this template on every GPU target.

    grid(node): programs along up to three dimensions. check(node): `no` with a reason for what the
    template cannot do. Raises nothing here; a template that Triton does not compile is an
    EffcError, with the text, when a model with the op is compiled.
    """

    def lower(b: Builder, node: Any) -> None:
        (out,) = b.results(node)
        fields = [(f.name, getattr(node, f.name)) for f in node.fields if f.kind == "operand"]
        refs = {name: _packed(b, value) for name, value in fields if isinstance(value, Op)}
        numbers = Numbers()
        known = {name: _text(numbers, value) for name, value in holes(node).items()}
        named = [("out", out), *refs.items()]
        made = kernel(
            op, text, pointers=[pointer(n, r.dtype, r.offset) for n, r in named], numbers=numbers,
            schedule=schedule(node), grid=grid(node), comment=Region.of(node).comment(b), **known,
        )  # fmt: skip
        call(b, node, made, [out], list(refs.values()))
        b.set(node, out)

    lowers(op, check=check)(lower)


def _text(numbers: Numbers, value: Any) -> Any:
    return numbers.text(value) if isinstance(value, sympy.Basic) else value


def _packed(b: Builder, value: Op) -> Ref:
    ref = b.ref(value)
    return (
        ref if ref.strides == row_major.strides(ref.shape) else packed_ref(b, value, ref, row_major)
    )


__all__ = ["template"]
