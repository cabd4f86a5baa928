"""GPU kernels on a CPU: the PTX of Triton, NVRTC and nvcc, run on CPU tensors.

    kernel = load(ptx)["softmax"]            # or from_triton(triton.compile(...))
    kernel.launch(rows, [x, y, n], block=128)

The text is translated to C++ in which a warp's 32 lanes are vectors (effc_simt.h), built through
the cache of `effc.codegen.build`, and run in place on the memory of the arguments. `race` looks for
missing barriers and other mistakes that a GPU shows only sometimes.
"""

from .faults import Fault, Finding
from .kernel import Kernel, Module, Schedule, from_triton, load
from .parser import PtxError, parse
from .race import Difference, Report, race

__all__ = [
    "Difference",
    "Fault",
    "Finding",
    "Kernel",
    "Module",
    "PtxError",
    "Report",
    "Schedule",
    "from_triton",
    "load",
    "parse",
    "race",
]
