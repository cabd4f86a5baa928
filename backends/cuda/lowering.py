"""The lowerings of NVIDIA GPUs with CUDA C++ kernels: a GPU's own, where ours take no node.

Who asks for this target gets CUDA C++ where a kernel of ours takes a node, and Triton's for the
rest. One reason speaks against ours: from sm_90 on tensor cores reach their rate by instructions of
whole warp groups (`wgmma`, `tcgen05`), which Triton emits and our products, made of `mma.sync`, do
not. There a product is Triton's. Where both can compute a node, `tune=True` measures both, and the
faster is taken whatever was the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from effc.codegen.cuda.kernel import Made
from effc.ir import Op
from effc.ir.rewrite import Answer

from ..gpu import GPU
from ..gpu.lowering import Candidate, GpuLowerings, choose, forked
from ..gpu.products import GUESS
from ..plan.builder import Builder
from ..plan.lowering import Lowering
from ..plan.memory import Ref
from ..plan.regions import Region

CUDA = GpuLowerings("cuda", GPU.alignment, base=GPU)
WARP_GROUPS = ("sm_90", "sm_100", "sm_103")  # whose products take the instructions of warp groups

Check = Callable[[Any], Answer]
Lower = Callable[[Builder, Any], None]


def prefer(op: str, check: Check, lower: Lower, product: Callable[[Any], bool]) -> None:
    """Ours where `check` says yes, else the GPU's; its refusal is the one to tell.

    product: whether a node is bound by tensor cores.
    """
    theirs = GPU.table[op]

    def either(node: Any) -> Answer:
        return check(node) or theirs.check(node)

    def lower_one(b: Builder, node: Any) -> None:
        if not check(node):
            theirs.lower(b, node)
        elif not theirs.check(node):
            lower(b, node)
        else:
            _fastest(b, node, lower, theirs.lower, product(node))

    CUDA.table[op] = Lowering(either, lower_one)


def _fastest(b: Builder, node: Any, ours: Lower, theirs: Lower, product: bool) -> None:
    """By measured times, else ours but for products of warp groups."""
    for value in Region.of(node).operands:
        b.ref(value)  # copies that both need are made before either is tried
    slower = product and b.target.device.name in WARP_GROUPS
    why = "warp groups multiply in Triton's kernels only" if slower else ""
    cuda = Candidate("CUDA C++", "", 2.0 if slower else 1.0, lambda b: ours(b, node))
    other = Candidate("Triton", "", 1.0 if slower else 2.0, lambda b: theirs(b, node), why)
    if b.schedules is not None and b.schedules.measuring:
        for lower in (ours, theirs):  # what is to be chosen inside is noted, and measured, first
            lower(forked(b), node)
    choose(b, [other, cuda] if slower else [cuda, other], GUESS, nested=True)


def call(b: Builder, node: Op, made: Made, outs: Sequence[Ref], ins: Sequence[Ref]) -> None:
    """Launch a kernel; its pointers are outs, then ins, its numbers begin with the grid."""
    b.kernel(made.kernel, node, outs, ins, made.numbers, note=str(made.kernel.schedule))


__all__ = ["CUDA", "call", "prefer"]
