"""The lowerings of NVIDIA GPUs with CUDA C++ kernels: a GPU's own, where ours take no node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from effc.codegen.cuda.kernel import Made
from effc.ir import Op
from effc.ir.rewrite import Answer

from ..gpu import GPU
from ..plan.builder import Builder
from ..plan.lowering import Lowering, Lowerings
from ..plan.memory import Ref

CUDA = Lowerings("cuda", GPU.alignment, base=GPU)

Check = Callable[[Any], Answer]
Lower = Callable[[Builder, Any], None]


def prefer(op: str, check: Check, lower: Lower) -> None:
    """Ours where `check` says yes, else the GPU's; its refusal is the one to tell."""
    theirs = GPU.table[op]

    def either(node: Any) -> Answer:
        return check(node) or theirs.check(node)

    def lower_one(b: Builder, node: Any) -> None:
        (lower if check(node) else theirs.lower)(b, node)

    CUDA.table[op] = Lowering(either, lower_one)


def call(b: Builder, node: Op, made: Made, outs: Sequence[Ref], ins: Sequence[Ref]) -> None:
    """Launch a kernel; its pointers are outs, then ins, its numbers begin with the grid."""
    b.kernel(made.kernel, node, outs, ins, made.numbers, note=str(made.kernel.schedule))


__all__ = ["CUDA", "call", "prefer"]
