"""The lowerings of the cpu target: C++ kernels, and library routines where they are best."""

from ..plan.lowering import Lowerings

CPU = Lowerings("cpu")
lowers, claim = CPU.lowers, CPU.claim

__all__ = ["CPU", "claim", "lowers"]
