"""The OpenMP runtime of this process: the one torch loaded, and no other.

Two OpenMP runtimes in one process mean two thread pools on the same cores, and deadlocks after
fork. torch brings its own libgomp (or libiomp5), so kernels are linked against that very file.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path

RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


@dataclass(frozen=True)
class OpenMP:
    """A runtime mapped into this process."""

    path: str

    @property
    def name(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class MissingOpenMP:
    """torch runs without OpenMP here: kernels then run on the calling thread."""

    reason: str
    fix: str = "install a torch build with OpenMP; torch.__config__.parallel_info() names it"

    def __bool__(self) -> bool:
        return False


def mapped_runtimes() -> tuple[str, ...]:
    """Paths of all OpenMP runtimes mapped into this process, in order of address."""
    found: dict[str, None] = {}
    for line in _maps():
        path = line.split(maxsplit=5)[-1].strip()
        if RUNTIME.search(path):
            found[path] = None
    return tuple(found)


@functools.lru_cache(maxsize=1)
def torch_runtime() -> OpenMP | MissingOpenMP:
    """The runtime that torch's own parallel loops use."""
    import torch  # noqa: F401  loads the runtime

    mapped = mapped_runtimes()
    if not mapped:
        return MissingOpenMP("torch has no OpenMP runtime loaded")
    if len(mapped) == 1:
        return OpenMP(mapped[0])
    return OpenMP(_used_by_torch() or mapped[0])


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("fname", ctypes.c_char_p),
        ("fbase", ctypes.c_void_p),
        ("sname", ctypes.c_char_p),
        ("saddr", ctypes.c_void_p),
    )


def _used_by_torch() -> str | None:
    """Of several runtimes, the file whose omp_get_max_threads libtorch_cpu calls."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in _maps() if "libtorch_cpu" in line}
    for path in paths:
        symbol = ctypes.cast(ctypes.CDLL(path).omp_get_max_threads, ctypes.c_void_p)
        info = _DlInfo()
        dladdr = ctypes.CDLL(None).dladdr
        dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_DlInfo))
        if dladdr(symbol, ctypes.byref(info)) and info.fname:
            return info.fname.decode()
    return None


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
