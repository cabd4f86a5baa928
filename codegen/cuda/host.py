"""CUDA kernels by a C++ compiler: the same text, its intrinsics' host bodies, threads as fibers.

    text = plan_function(kernel)        # a kernel of the cpu backend: same pointers, same numbers

For values on any machine, without NVRTC; the PTX path (codegen/ptx) runs what a GPU would run.
"""

from __future__ import annotations

import re

from effc.codegen.ptx import runtime as ptx

from .compile import HEADERS
from .kernel import CudaKernel

INCLUDE = re.compile(r'^#include "(effc_[a-z_]+\.h)"\n', re.MULTILINE)


def in_one_piece(text: str) -> str:
    """The text with what it includes of ours: a kernel's key covers all of it."""
    seen: set[str] = set()

    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        if name == "effc_simt.h":
            return ptx.header().replace("#pragma once\n", "")
        if not (HEADERS / name).exists():
            return match[0]
        return INCLUDE.sub(include, (HEADERS / name).read_text().replace("#pragma once\n", ""))

    return INCLUDE.sub(include, text)


def plan_function(kernel: CudaKernel) -> str:
    """The kernel as C++ text with the interface of the cpu backend's kernels; numbers of a call
    are the grid, then its own."""
    body = kernel.body.replace("@NAME@", f"{kernel.name}_thread").strip()
    types = [p.type.replace(" __restrict__", "") for p in kernel.pointers]
    given = [f"reinterpret_cast<{t}>(p[{i}])" for i, t in enumerate(types)]
    given += [f"n[{3 + i}]" for i in range(len(kernel.numbers))]
    return in_one_piece(f"""{body}

EFFC_EXPORT void {kernel.name}(char* const* p, const int64_t* n, int64_t) {{
  const GpuIndex grid = {{uint32_t(n[0]), uint32_t(n[1]), uint32_t(n[2])}};
  effc::gpu::launch(grid, {kernel.threads}, {kernel.shared},
                    [&] {{ {kernel.name}_thread({", ".join(given)}); }});
}}
""")


__all__ = ["in_one_piece", "plan_function"]
