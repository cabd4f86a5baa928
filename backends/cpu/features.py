"""What this CPU can run, asked of the machine and never guessed from its name.

A machine may report one model and have another's instructions, so compiler flags are built from
feature flags, not from -march=native. Three levels follow torch's ATEN_CPU_CAPABILITY: `default`
(SSE2), `avx2` (with FMA and F16C) and `avx512`; beyond a level, each extension stands on its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from effc.codegen.store import Note
from effc.codegen.toolchain import Toolchain

LEVELS = ("default", "avx2", "avx512")
# level -> kernel's names of what it needs, beyond the level below
NEEDS = {
    "default": ("sse2",),
    "avx2": ("avx", "avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"),
}
# kernel's name of an extension -> (level it belongs to, compiler flag)
EXTENSIONS = {
    "bmi1": ("avx2", "-mbmi"),
    "bmi2": ("avx2", "-mbmi2"),
    "popcnt": ("avx2", "-mpopcnt"),
    "abm": ("avx2", "-mlzcnt"),
    "avx_vnni": ("avx2", "-mavxvnni"),
    "gfni": ("avx2", "-mgfni"),
    "avx512_vnni": ("avx512", "-mavx512vnni"),
    "avx512vbmi": ("avx512", "-mavx512vbmi"),
    "avx512_vbmi2": ("avx512", "-mavx512vbmi2"),
    "avx512_bitalg": ("avx512", "-mavx512bitalg"),
    "avx512_vpopcntdq": ("avx512", "-mavx512vpopcntdq"),
    "avx512_bf16": ("avx512", "-mavx512bf16"),
    "avx512_fp16": ("avx512", "-mavx512fp16"),
    "amx_tile": ("avx512", "-mamx-tile"),
    "amx_int8": ("avx512", "-mamx-int8"),
    "amx_bf16": ("avx512", "-mamx-bf16"),
}
ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, SYS_ARCH_PRCTL = 0x1023, 18, 158


@dataclass(frozen=True)
class CpuFeatures:
    """An x86-64 CPU as the code generator may use it: what it has, cut down to what is allowed."""

    level: str
    extensions: tuple[str, ...]
    cores: int  # physical, of those this process may use
    threads: int  # logical, of those this process may use
    l1d: int  # bytes of data cache a core has
    l2: int
    l3: int  # as reported; virtual machines may report the whole socket's, or more
    model: str
    notes: tuple[Note, ...] = ()

    @property
    def vector_bits(self) -> int:
        return {"default": 128, "avx2": 256, "avx512": 512}[self.level]

    def has(self, extension: str) -> bool:
        return extension in self.extensions

    def capability(self) -> str:
        """All that decides which code runs here, as one word: for cache keys and artefacts."""
        return "+".join(("x86_64", self.level, *self.extensions))

    def flags(self, toolchain: Toolchain | None = None) -> tuple[str, ...]:
        """Compiler flags for this CPU; with a toolchain, without those it is too old to know."""
        flags = compile_flags(self.level, self.extensions)
        return toolchain.supported(flags) if toolchain else flags


@dataclass(frozen=True)
class UnsupportedCpu:
    """Not a CPU the `cpu` target generates code for."""

    reason: str
    fix: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason}; fix: {self.fix}"


def lacking(capability: str, here: CpuFeatures) -> tuple[str, ...]:
    """What of a `CpuFeatures.capability()` this CPU lacks; nothing: code built for it runs here."""
    machine, _, rest = capability.partition("+")
    level, *extensions = rest.split("+")
    if machine != here.capability().partition("+")[0] or level not in LEVELS:
        return (capability,)
    levels = LEVELS[LEVELS.index(here.level) + 1 : LEVELS.index(level) + 1]
    return (*levels, *(e for e in extensions if not here.has(e)))


_planned_for: ContextVar[CpuFeatures | None] = ContextVar("planned_for", default=None)


@contextlib.contextmanager
def planning_for(cpu: CpuFeatures | None) -> Iterator[None]:
    """Plan, and pack weights, as on that CPU: `detect` gives it. None: this machine.

    Both must match the code that was built then: sizes of tiles and blocks depend on the CPU.
    """
    token = _planned_for.set(cpu)
    try:
        yield
    finally:
        _planned_for.reset(token)


def detect() -> CpuFeatures | UnsupportedCpu:
    """This machine, under EFFC_CPU (or torch's ATEN_CPU_CAPABILITY) as the highest level."""
    if (cpu := _planned_for.get()) is not None:
        return cpu
    asked = os.environ.get("EFFC_CPU") or os.environ.get("ATEN_CPU_CAPABILITY") or ""
    return _detect(asked, len(_affinity()))


@functools.lru_cache(maxsize=8)
def _detect(asked: str, _usable: int) -> CpuFeatures | UnsupportedCpu:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return _unsupported(f"this machine is {platform.machine()}, the cpu target is x86-64")
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        return _unsupported(f"/proc/cpuinfo cannot be read ({error.strerror})")
    return describe(cpuinfo, asked, caches=cache_sizes(), amx=request_amx)


def describe(
    cpuinfo: str,
    asked: str = "",
    *,
    caches: Mapping[str, int] | None = None,
    amx: object = None,
) -> CpuFeatures | UnsupportedCpu:
    """The CPU that a /proc/cpuinfo text is about.

    `asked` can lower the level and never raise it. `amx` asks the kernel for the tile registers
    and returns why not, or None; it is called only on a CPU that has them.
    """
    names = frozenset(_field(cpuinfo, "flags").split())
    if "sse2" not in names:
        return _unsupported("/proc/cpuinfo lists no x86 feature flags")
    notes: list[Note] = []
    level = _level(names, asked.strip().lower(), notes)
    extensions = [
        name
        for name, (needs, _) in EXTENSIONS.items()
        if name in names and LEVELS.index(level) >= LEVELS.index(needs)
    ]
    if "amx_tile" in extensions and callable(amx) and (refused := amx()):
        extensions = [name for name in extensions if not name.startswith("amx_")]
        notes.append(Note("no-amx", f"AMX is not used: {refused}"))
    known = {"L1d": 32 << 10, "L2": 512 << 10, "L3": 8 << 20, **(caches or {})}
    return CpuFeatures(
        level=level,
        extensions=tuple(extensions),
        cores=_cores(cpuinfo),
        threads=len(_affinity()),
        l1d=known["L1d"],
        l2=known["L2"],
        l3=known["L3"],
        model=_field(cpuinfo, "model name"),
        notes=tuple(notes),
    )


def compile_flags(level: str, extensions: Iterable[str] = ()) -> tuple[str, ...]:
    """Compiler flags of a level and extensions, whatever machine this is."""
    flags = [f"-m{name}" for step in LEVELS[1 : LEVELS.index(level) + 1] for name in NEEDS[step]]
    flags += [EXTENSIONS[name][1] for name in extensions]
    # g++ would stay at 256 bits; kernels are written for full width.
    return (*flags, "-mprefer-vector-width=512") if level == "avx512" else tuple(flags)


def request_amx() -> str | None:
    """Ask the kernel for AMX tile data in this process; why not, or None when granted.

    Without this call the first tile instruction is an illegal instruction, even where
    /proc/cpuinfo lists amx_tile.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        arguments = (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        status = libc.syscall(*map(ctypes.c_long, arguments))
    except (OSError, AttributeError) as error:
        return f"no system call interface ({error})"
    return None if status == 0 else f"the kernel refuses ({os.strerror(ctypes.get_errno())})"


def cache_sizes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int]:
    """Bytes of L1d, L2 and L3 as the system reports them; what it does not report is absent."""
    sizes = {}
    for index in sorted(Path(root).glob("index*")):
        try:
            level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and (match := re.fullmatch(r"(\d+)([KMG]?)", size)):
            name = "L1d" if level == "1" else f"L{level}"
            sizes[name] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return sizes


def _level(names: frozenset[str], asked: str, notes: list[Note]) -> str:
    have = "default"
    for level in LEVELS[1:]:
        if not names.issuperset(NEEDS[level]):
            break
        have = level
    if not asked:
        return have
    # torch has taken names such as avx512_vnni: the level is how it begins
    wish = next((level for level in LEVELS if asked.startswith(level)), None)
    if wish is None:
        notes.append(Note("cpu-level", f"unknown CPU level {asked!r}", f"use {', '.join(LEVELS)}"))
        return have
    if LEVELS.index(wish) > LEVELS.index(have):
        notes.append(Note("cpu-level", f"{wish} was asked for, this CPU has {have}"))
        return have
    return wish


def _unsupported(reason: str) -> UnsupportedCpu:
    return UnsupportedCpu(reason, 'use backend "reference", or an x86-64 Linux machine')


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:[ \t]*(.*)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else ""


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores(cpuinfo: str) -> int:
    """Physical cores among the logical ones this process may use."""
    cores = set()
    for block in cpuinfo.split("\n\n"):
        number = _field(block, "processor")
        if number.isdigit() and int(number) in _affinity():
            cores.add((_field(block, "physical id"), _field(block, "core id") or number))
    return len(cores) or len(_affinity())
