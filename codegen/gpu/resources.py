"""What compilers report of a kernel: registers, spills, memory, and its instructions by name.

NVIDIA's binaries are read by cuobjdump and nvdisasm, which come with Triton; AMD's assembly text
says all of it itself.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from effc.ir import EffcError, UnsupportedError

from ..triton.compile import Target
from .compile import AnyCompiled

# What rows of a report count: mnemonics without their suffixes, NVIDIA's and AMD's.
TENSOR = re.compile(r"([HIBDQO]G?MMA|UTC\w*MMA)|v_(mfma|smfmac|wmma)")
GROUPS = {
    "tensor": TENSOR,
    "async copies": re.compile(r"LDGSTS|UTMALDG|UBLKCP|\w+_load_lds"),
    "matrix loads": re.compile(r"LDSM|ds_read_\w*tr_"),
    "barriers": re.compile(r"BAR|s_barrier"),
    "loads": re.compile(r"LDG(?!STS)|(global|buffer|flat)_load(?!_lds)"),
    "stores": re.compile(r"STG|(global|buffer|flat)_store"),
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target.

    registers: 32-bit ones of a thread; on AMD vector and accumulation registers together. scalars:
    AMD's scalar registers. spill_stores, spill_loads: instructions that access local memory on
    NVIDIA; on AMD both are the registers that the compiler spilled. stack, shared: bytes, shared
    static and dynamic. instructions: mnemonic without suffixes -> how often it is in the text.
    """

    kernel: str
    target: Target
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    instructions: Mapping[str, int] = field(hash=False)
    scalars: int = 0

    @property
    def spills(self) -> int:
        return max(self.spill_stores, self.spill_loads)

    @property
    def total(self) -> int:
        """Instructions in the text."""
        return sum(self.instructions.values())

    @property
    def tensor(self) -> int:
        """Instructions of tensor cores or matrix cores."""
        return self.count("tensor")

    def count(self, group: str) -> int:
        """Instructions of one of GROUPS."""
        pattern = GROUPS[group]
        return sum(n for name, n in self.instructions.items() if pattern.match(name))


def resources(compiled: AnyCompiled) -> Resources:
    """What the compiler reports of a kernel. Raises UnsupportedError where NVIDIA's tools are not
    there, EffcError where they do not understand the binary."""
    return _of_nvidia(compiled) if compiled.target.backend == "cuda" else _of_amd(compiled)


# ------------------------------------------------------------------ NVIDIA

RESERVED = 1024  # bytes
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def _of_nvidia(compiled: AnyCompiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    named = re.search(rf"Function {compiled.kernel.name}:\s*\n(.*)", usage)
    if named is None:
        raise EffcError(f"cuobjdump tells nothing of kernel {compiled.kernel.name}", context=usage)
    facts = {name: int(value) for name, value in re.findall(r"(\w+(?:\[\d\])?):(\d+)", named[1])}
    counted = Counter(INSTRUCTION.findall(text))
    arch = compiled.target.arch
    # From sm_90 on the figure has in it what the driver reserves for kernels with shared memory.
    static = facts["SHARED"]
    if isinstance(arch, int) and arch >= 90:
        static -= min(static, RESERVED)
    return Resources(
        compiled.kernel.name, compiled.target, compiled.threads, facts["REG"], counted["STL"],
        counted["LDL"], facts["STACK"], static + compiled.shared, dict(counted),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EffcError(f"{tool} fails: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _tool(name: str) -> str:
    """A program of NVIDIA's toolkit, from where Triton keeps its own."""
    found = importlib.util.find_spec("triton")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    raise UnsupportedError(
        f"the binary of a kernel cannot be read: {name} is not there",
        fix='pip install "effc[gpu]": Triton brings it',
    )


# ------------------------------------------------------------------ AMD


def _of_amd(compiled: AnyCompiled) -> Resources:
    text = compiled.assembly

    def fact(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise EffcError(f"no .{name} in the assembly of kernel {compiled.kernel.name}")
        return int(found[1])

    spilled = fact("vgpr_spill_count") + fact("sgpr_spill_count")
    body = text[: text.index(".rodata")] if ".rodata" in text else text
    names = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", body, re.MULTILINE)
    # .vgpr_count has the accumulation registers in it where both share a file.
    return Resources(
        compiled.kernel.name, compiled.target, compiled.threads, fact("vgpr_count"), spilled,
        spilled, fact("private_segment_fixed_size"),
        max(fact("group_segment_fixed_size"), compiled.shared), dict(Counter(names)),
        fact("sgpr_count"),
    )  # fmt: skip


__all__ = ["GROUPS", "Resources", "resources"]
