"""Compiles CUDA kernels ahead of time, for a GPU that need not be here; cached by content.

compiled = compile_kernels([made.kernel], target("cuda:sm_80"))
compiled[0].assembly, compiled[0].binary, compiled[0].registers, compiled[0].spills
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from effc.codegen.triton.compile import Target, target
from effc.ir import OptionError, UnsupportedError

from ..compile import BuildError, around, runtime_header
from ..store import made_once
from .kernel import WARP, CudaKernel
from .toolchain import SOURCE, AnyCompiler, MissingCuda, Output, find_cuda

KIND = "cuda"
HEADERS = Path(__file__).parent
# NVRTC and nvcc: `kernel.cu(12): error: ...`, for a header its name.
ERROR = re.compile(r"^(?P<file>[^:(\n]+)\((?P<line>\d+)\): (?:catastrophic )?error: (?P<text>.*)$")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a kernel; the same facts as of a Triton kernel, and what ptxas says.

    assembly: PTX. binary: cubin. shared: bytes of dynamic shared memory of a block. registers: of a
    thread; spills: bytes stored and loaded because they did not suffice.
    """

    kernel: CudaKernel
    target: Target
    assembly: str
    binary: bytes
    registers: int
    spills: int
    log: str = ""
    scratch: int = 0

    @property
    def shared(self) -> int:
        return self.kernel.shared

    @property
    def warps(self) -> int:
        return self.kernel.schedule.warps

    @property
    def threads(self) -> int:
        """Of one block."""
        return self.warps * WARP


@lru_cache(maxsize=1)
def headers() -> dict[str, str]:
    """Name and text of the headers that a kernel may include on a GPU."""
    ours = {path.name: path.read_text() for path in sorted(HEADERS.glob("effc*.h"))}
    return runtime_header() | ours


@lru_cache(maxsize=1)
def _headers_digest() -> str:
    return hashlib.sha256(json.dumps(headers()).encode()).hexdigest()


def compiler() -> AnyCompiler:
    """Raises UnsupportedError where no CUDA compiler works."""
    found = find_cuda()
    if isinstance(found, MissingCuda):
        raise UnsupportedError(f"CUDA kernels cannot be compiled: {found.reason}", fix=found.fix)
    return found


def key_of(kernel: CudaKernel, to: Target, by: AnyCompiler) -> str:
    """What decides the object of a kernel, hashed."""
    parts = [kernel.code, kernel.shared, kernel.schedule.warps, _headers_digest(), by.identity,
             str(to)]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_kernels(kernels: Sequence[CudaKernel], to: Target) -> list[Compiled]:
    """Each kernel compiled, as a module of its own, or taken from the cache.

    Raises UnsupportedError without a compiler, OptionError for a GPU that is not NVIDIA's,
    BuildError where the compiler refuses a kernel.
    """
    if to.backend != "cuda" or not isinstance(to.arch, int) or to.arch < 80:
        raise OptionError(f"CUDA kernels are for sm_80 and newer, not {to}",
                          fix="say the target as cuda:sm_80 or above")  # fmt: skip
    by = compiler() if kernels else None
    return [_compile(k, to, by) for k in kernels if by is not None]


def _compile(kernel: CudaKernel, to: Target, by: AnyCompiler) -> Compiled:
    entry = made_once(KIND, key_of(kernel, to, by), partial(_build, kernel, to, by))
    return _read(entry.folder, entry.manifest, kernel, to)


def _read(folder: Path, facts: dict[str, Any], kernel: CudaKernel, to: Target) -> Compiled:
    return Compiled(
        kernel, to, (folder / "kernel.ptx").read_text(), (folder / "kernel.cubin").read_bytes(),
        facts["registers"], facts["spills"], facts["log"],
    )  # fmt: skip


def _build(kernel: CudaKernel, to: Target, by: AnyCompiler, work: Path) -> dict[str, Any]:
    assert isinstance(to.arch, int)
    made = by.compile(kernel.code, headers(), to.arch)
    if not made.ok:
        raise build_error(kernel, to, made)
    (work / SOURCE).write_text(kernel.source)
    (work / "kernel.ptx").write_text(made.ptx)
    (work / "kernel.cubin").write_bytes(made.cubin)
    return {
        "name": kernel.name, "target": str(to), "compiler": by.identity, "log": made.log,
        **resources(made.log),
    }  # fmt: skip


def resources(log: str) -> dict[str, int]:
    """Registers of a thread and bytes spilled, as ptxas tells them."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return {"registers": max(map(int, registers), default=0), "spills": sum(map(int, spills))}


def build_error(kernel: CudaKernel, to: Target, made: Output) -> BuildError:
    """The first three errors of the compiler, with the lines of the kernel they point at."""
    lines = made.log.splitlines()
    hits = [match for line in lines if (match := ERROR.match(line))][:3]
    shown: list[str] = []
    for hit in hits:
        shown.append(hit.group(0))
        if Path(hit["file"]).name == SOURCE:
            shown += around(kernel.code, int(hit["line"]))
    if not hits:
        shown = lines[:12] or ["no message"]
    first = hits[0]["text"] if hits else shown[0].strip()
    error = BuildError(
        f"kernel {kernel.name}: the CUDA compiler failed for {to}: {first}",
        context="\n".join(f"    {line}" for line in [*shown, f"command: {made.command}"]),
    )
    error.command, error.output = made.command, made.log
    return error


__all__ = ["Compiled", "compile_kernels", "compiler", "headers", "key_of", "resources", "target"]
