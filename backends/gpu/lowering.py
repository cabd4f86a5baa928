"""The lowerings of GPU targets: which Triton kernels compute which op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.codegen.triton.kernel import ALIGNED, Made
from effc.ir import Op

from ..plan.builder import Builder
from ..plan.lowering import Lowerings
from ..plan.memory import Ref

GPU = Lowerings("gpu", ALIGNED)
lowers, claim = GPU.lowers, GPU.claim


def offsets(refs: Sequence[Ref]) -> list[Any]:
    """Where each operand begins in its memory, in elements: decides how its pointer is aligned."""
    return [r.offset for r in refs]


def call(
    b: Builder, node: Op, made: Made, outs: Sequence[Ref], ins: Sequence[Ref], kind: str = "kernel",
    note: str = "",
) -> None:  # fmt: skip
    """Launch a kernel; its pointers are outs, then ins, its numbers begin with the grid."""
    b.kernel(made.kernel, node, outs, ins, made.numbers, kind=kind, note=note)


__all__ = ["GPU", "call", "claim", "lowers", "offsets"]
