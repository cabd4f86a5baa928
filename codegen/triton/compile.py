"""Compiles Triton kernels ahead of time, for a target that need not be here; cached by content.

    compiled = compile_kernels([made.kernel], target("cuda:sm_80"))
    compiled[0].ptx, compiled[0].binary, compiled[0].shared

An entry of the cache answers without importing triton, which takes longer than reading it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import linecache
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from effc.ir import EffcError, OptionError, UnsupportedError

from ..store import made_once
from .kernel import TEMPLATES, TritonKernel

KIND = "triton"


@dataclass(frozen=True)
class Target:
    """What code is made for. backend: "cuda" or "hip"; arch: 80 (sm_80) or "gfx942"."""

    backend: str
    arch: int | str
    warp: int = 32  # threads

    def __str__(self) -> str:
        return f"cuda:sm_{self.arch}" if self.backend == "cuda" else f"hip:{self.arch}"


def target(text: str) -> Target:
    """From "cuda:sm_80" or "hip:gfx942". Raises OptionError for anything else."""
    backend, _, arch = text.partition(":")
    number = arch.removeprefix("sm_").rstrip("a")
    if backend == "cuda" and number.isdecimal() and int(number) >= 70:
        return Target("cuda", int(number))
    if backend == "hip" and arch.startswith("gfx") and len(arch) > 5:
        return Target("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise OptionError(f"unknown GPU {text!r}", fix="say it as cuda:sm_80 or hip:gfx942")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a kernel.

    assembly: PTX, or AMD's. binary: cubin or hsaco. shared: bytes of dynamic shared memory of a
    block; scratch: bytes of global scratch memory a program wants. source: the text whose lines
    the assembly names; comments of kernels that share an object may differ.
    """

    kernel: TritonKernel
    target: Target
    assembly: str
    binary: bytes
    shared: int
    warps: int
    scratch: int = 0
    source: str = ""

    @property
    def threads(self) -> int:
        """Of one block."""
        return self.warps * self.target.warp


@lru_cache(maxsize=1)
def triton_version() -> str:
    """Raises UnsupportedError where Triton is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(
            "Triton kernels cannot be compiled: triton is not installed",
            fix='pip install "effc[gpu]"',
        ) from None


@lru_cache(maxsize=1)
def _functions() -> str:
    return (TEMPLATES / "functions.py").read_text()


def key_of(kernel: TritonKernel, to: Target) -> str:
    """What decides the object of a kernel, hashed."""
    parts = [kernel.code, kernel.signature, sorted(map(repr, kernel.attributes.items())),
             repr(kernel.schedule), _functions(), triton_version(), str(to)]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_kernels(kernels: Sequence[TritonKernel], to: Target) -> list[Compiled]:
    """Each kernel compiled, or taken from the cache."""
    return [_compile(k, to) for k in kernels]


def _compile(kernel: TritonKernel, to: Target) -> Compiled:
    entry = made_once(KIND, key_of(kernel, to), partial(_build, kernel, to))
    return _read(entry.folder, entry.manifest, kernel, to)


def _read(folder: Path, facts: dict[str, Any], kernel: TritonKernel, to: Target) -> Compiled:
    return Compiled(
        kernel, to, (folder / "kernel.s").read_text(), (folder / "kernel.bin").read_bytes(),
        facts["shared"], facts["warps"], facts["scratch"], (folder / "kernel.py").read_text(),
    )  # fmt: skip


def _build(kernel: TritonKernel, to: Target, work: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = module_of(kernel).__dict__[kernel.name]
    source = ASTSource(function, kernel.signature, {}, kernel.attributes)
    options = {
        "num_warps": kernel.schedule.warps, "num_stages": kernel.schedule.stages,
        "enable_fp_fusion": True,
    }  # fmt: skip
    # Our own cache keeps the result; Triton's would keep it a second time in the user's home.
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(work / "triton")
        try:
            made = triton.compile(source, target=GPUTarget(to.backend, to.arch, to.warp),
                                  options=options)  # fmt: skip
        except Exception as e:  # Triton raises its own kinds, MLIR's and ptxas'
            raise EffcError(
                f"kernel {kernel.name}: Triton does not compile it for {to}: {_first(e)}",
                context=kernel.source,
            ) from e
    text, binary = ("ptx", "cubin") if to.backend == "cuda" else ("amdgcn", "hsaco")
    shutil.rmtree(work / "triton", ignore_errors=True)
    (work / "kernel.py").write_text(kernel.source)
    (work / "kernel.s").write_text(made.asm[text])
    (work / "kernel.bin").write_bytes(made.asm[binary])
    return {
        "name": kernel.name, "target": str(to), "triton": triton_version(),
        "shared": made.metadata.shared, "warps": made.metadata.num_warps,
        "scratch": getattr(made.metadata, "global_scratch_size", 0) or 0,
    }  # fmt: skip


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@lru_cache(maxsize=512)
def module_of(kernel: TritonKernel) -> ModuleType:
    """The kernel's source, executed; Triton finds its lines through linecache."""
    file = f"<{kernel.name}>"
    lines = kernel.source.splitlines(keepends=True)
    linecache.cache[file] = (len(kernel.source), None, lines, file)
    module = ModuleType(f"effc_kernel_{kernel.name}")
    module.__file__ = file
    exec(compile(kernel.source, file, "exec"), module.__dict__)
    return module


__all__ = ["Compiled", "Target", "compile_kernels", "key_of", "module_of", "target"]
