"""What compilers say of kernels for GPUs that need not be here: registers, spills, instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from effc.backends.base import Options
from effc.backends.gpu import GPU
from effc.backends.plan.planner import make_plan
from effc.codegen.triton.compile import Compiled, compile_kernels, target
from effc.codegen.triton.kernel import TritonKernel
from effc.ir import parse

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")
TENSOR_CORES = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"


@dataclass(frozen=True)
class Usage:
    """Of one kernel. spilled: bytes of memory a thread, or registers where the compiler says those."""

    registers: int
    spilled: int
    shared: int
    tensor_cores: int  # instructions


def usage(kernel: TritonKernel, to: str) -> Usage:
    """Compile a kernel and read what it takes."""
    made = compile_kernels([kernel], target(to))[0]
    registers, spilled = _amd(made) if made.target.backend == "hip" else _nvidia(made)
    found = len(re.findall(TENSOR_CORES, made.assembly))
    return Usage(registers, spilled, made.shared, found)


def _nvidia(made: Compiled) -> tuple[int, int]:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.binary)
        file.flush()
        asked = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd(made: Compiled) -> tuple[int, int]:
    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", made.assembly)
        assert found, name
        return int(found[1])

    return fact("vgpr_count"), fact("vgpr_spill_count") + fact("private_segment_fixed_size")


def kernels(text: str, precision: str = "highest") -> list[TritonKernel]:
    """Those that the plan of a graph launches."""
    plan = make_plan(parse(text), Options(float32_matmul_precision=precision), GPU)
    steps = [getattr(s, "kernel", None) for s in plan.steps]
    return [k for k in steps if isinstance(k, TritonKernel)]
