"""Kernels around matrix products: fixed cores, and the generated text that follows their sums.

A core (core/*.cpp) computes a block of sums in scratch memory and hands it to an epilogue, a
generated function that computes what follows element by element and writes the result. So each
instruction set compiles a core once, and a model costs only its epilogues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from effc.ir.types import DTYPES

from .kernel import TEMPLATES, Kernel, kernel
from .loops import Nest, Numbers, Operand, step
from .pointwise import Made
from .region import Statements, store
from .scalar import storage

F32, BF16, F16 = DTYPES["f32"], DTYPES["bf16"], DTYPES["f16"]


@dataclass(frozen=True)
class Tile:
    """The register tile of effc_tile.h for an instruction set: sizes of packed weights follow."""

    width: int  # floats in a vector
    vectors: int  # of a panel
    rows: int

    @property
    def panel(self) -> int:
        return self.vectors * self.width


TILES = {"default": Tile(4, 2, 6), "avx2": Tile(8, 2, 6), "avx512": Tile(16, 3, 8)}


@cache
def core(name: str, bits: int | None = None) -> Kernel:
    """A kernel of core/, which is a translation unit of its own; bits: of the codes it reads."""
    text = (TEMPLATES / "core" / f"{name}.cpp").read_text().replace("@BITS@", str(bits))
    return Kernel(f"effc_{name}{'' if bits is None else bits}", text, alone=True)


def epilogue(
    nest: Nest,
    leaves: Sequence[Any],
    body: Callable[[Statements, tuple[Any, ...]], Any],
    *,
    first: int,
    comment: Iterable[str] = (),
) -> Made:
    """What follows a product. first: the place of its own operands among the call's pointers.

    nest: the result's dimensions in order of memory, those of its columns last; operands are the
    result's, then those of the leaves. body(statements, sum) gives what to store.
    """
    outer = Nest(nest.sizes[:-1], tuple(Operand(o.dtype, o.strides[:-1]) for o in nest.operands))
    outer = outer.collapsed().at_least(1)
    numbers = Numbers()
    sizes = [numbers.add(("size", axis), size) for axis, size in enumerate(outer.sizes)]
    last = Nest(nest.sizes[-1:], tuple(Operand(o.dtype, o.strides[-1:]) for o in nest.operands))
    names = ["y0", *(f"x{i}" for i in range(len(leaves)))]
    operands, places = [], []
    for i, (name, operand) in enumerate(zip(names, nest.operands, strict=True)):
        rows = (step(f"i{a}", numbers.stride(i, a, outer)) for a in range(outer.rank))
        across = last.operands[i].kind(0)
        stride = str(across)
        if across is None:
            stride = numbers.add(("column", i), last.operands[i].strides[0])
        qualified = f"{'const ' if i else ''}{storage(operand.dtype)}"
        operands.append({
            "name": name, "qualified": qualified, "row": "".join(rows),
            "place": first + i - 1 if i else 0, "column": " + column" if across == 1 else "",
            "late": stride if across is None else "",
        })  # fmt: skip
        places.append(f"{name}r{step('j', stride)}")
    statements = Statements(numbers)
    total = statements.let(F32, "sums[j]", True, "sum")
    for leaf, operand, place, way in zip(
        leaves, nest.operands[1:], places[1:], last.operands[1:], strict=True
    ):
        statements.load(leaf, operand.dtype, place, way.kind(0) != 0)
    result = body(statements, total)
    made = kernel(
        "epilogue", "epilogue", numbers=list(numbers.text.values()),
        comment=comment, operands=operands, hoisted=statements.hoisted,
        outer=[{"index": f"i{a}", "size": size} for a, size in enumerate(sizes)],
        body=[*statements.body, store(places[0], nest.operands[0].dtype, result)],
    )  # fmt: skip
    return Made(made, tuple(numbers.values))


__all__ = ["TILES", "Tile", "core", "epilogue"]
