"""Finds a CUDA compiler that works: NVRTC, a library, or nvcc. Absence is a value with a fix.

NVRTC comes first: it needs no toolkit (one pip package) and compiles a kernel in a tenth of nvcc's
time. It is looked for among the installed packages, then in a toolkit, then where the system's
loader looks. Each candidate compiles a small kernel before it counts as found.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # that bring the library
FIX = 'pip install "effc[cuda]"'
OLDEST = (12, 0)  # C++17 and the instructions of effc_cuda.h
PROBE = 'extern "C" __global__ void probe(float* x) { x[threadIdx.x] *= 2.0f; }\n'
FLAGS = ("-std=c++17",)
SOURCE = "kernel.cu"


@dataclass(frozen=True)
class Output:
    """What a compiler made of a text: PTX, machine code and everything it said; or an error."""

    ok: bool
    log: str
    ptx: str = ""
    cubin: bytes = b""
    command: str = ""


@dataclass(frozen=True)
class Nvrtc:
    """NVIDIA's run-time compiler, as a library that is loaded here."""

    path: str
    version: tuple[int, ...]
    skipped: tuple[str, ...] = ()  # candidates that came first and did not work, with the reason

    kind = "nvrtc"

    @property
    def identity(self) -> str:
        """What of the compiler decides the object it makes: part of every cache key."""
        return f"{self.kind} {'.'.join(map(str, self.version))}"

    def __str__(self) -> str:
        return f"NVRTC {'.'.join(map(str, self.version))} ({self.path})"

    def compile(
        self, source: str, headers: Mapping[str, str], arch: int, flags: Sequence[str] = ()
    ) -> Output:
        """Compile a text that includes `headers` for sm_<arch>."""
        options = [f"--gpu-architecture=sm_{arch}", *FLAGS, "--ptxas-options=-v", *flags]
        program = _Program(_library(self.path), source, headers)
        try:
            return program.compile(options)
        finally:
            program.close()


@dataclass(frozen=True)
class Nvcc:
    """The compiler of a CUDA toolkit."""

    path: str
    version: tuple[int, ...]
    skipped: tuple[str, ...] = ()

    kind = "nvcc"

    @property
    def identity(self) -> str:
        return f"{self.kind} {'.'.join(map(str, self.version))}"

    def __str__(self) -> str:
        return f"nvcc {'.'.join(map(str, self.version))} ({self.path})"

    def compile(
        self, source: str, headers: Mapping[str, str], arch: int, flags: Sequence[str] = ()
    ) -> Output:
        with tempfile.TemporaryDirectory(prefix="effc-nvcc-") as folder:
            for name, text in {**headers, SOURCE: source}.items():
                Path(folder, name).write_text(text)
            options = [f"-arch=sm_{arch}", *FLAGS, "--expt-relaxed-constexpr", *flags]
            texts = []
            command = ""
            for what in ("-ptx", "-cubin"):
                call = [self.path, *options, what, SOURCE, "-o", f"kernel{what}", "-Xptxas", "-v"]
                done = _run(call, folder)
                command, text = " ".join(call), done.stdout + done.stderr
                if done.returncode:
                    return Output(False, text, command=command)
                texts.append(text)
            ptx, cubin = Path(folder, "kernel-ptx").read_text(), Path(folder, "kernel-cubin")
            return Output(True, texts[-1], ptx, cubin.read_bytes(), command)


@dataclass(frozen=True)
class MissingCuda:
    """No CUDA compiler works here. `fix` is the command that changes that."""

    reason: str
    fix: str = FIX
    tried: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason}; fix: {self.fix}"


AnyCompiler = Nvrtc | Nvcc


def find_cuda() -> AnyCompiler | MissingCuda:
    """NVRTC of a package, of CUDA_HOME, of the system; then nvcc of CUDA_HOME and on PATH."""
    return _find(os.environ.get("CUDA_HOME", ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=8)
def _find(home: str, path: str) -> AnyCompiler | MissingCuda:
    """Keyed by all of the environment it looks at."""
    skipped: list[str] = []
    for library in _libraries(home):
        found = _probe_nvrtc(library)
        if isinstance(found, Nvrtc):
            return replace(found, skipped=tuple(skipped))
        skipped.append(f"{library}: {found}")
    if not skipped:
        skipped.append("NVRTC: not installed")
    for program in _programs(home, path):
        result = _probe_nvcc(program)
        if isinstance(result, Nvcc):
            return replace(result, skipped=tuple(skipped))
        skipped.append(f"{program}: {result}")
    if len(skipped) == 1:
        skipped.append("nvcc: not found")
    absent = skipped == ["NVRTC: not installed", "nvcc: not found"]
    what = "no CUDA compiler found" if absent else "no CUDA compiler works"
    return MissingCuda(f"{what} ({'; '.join(skipped)})", tried=tuple(skipped))


def _libraries(home: str) -> Iterator[str]:
    """Where NVRTC may be."""
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (str(f.locate()) for f in files if re.fullmatch(r"libnvrtc\.so\.\d+", f.name))
    for folder in ("lib64", "lib") if home else ():
        yield from (str(p) for p in sorted(Path(home, folder).glob("libnvrtc.so.*[0-9]"))[:1])
    if system := ctypes.util.find_library("nvrtc"):
        yield system


def _programs(home: str, path: str) -> Iterator[str]:
    found = [shutil.which("nvcc", path=str(Path(home, "bin")))] if home else []
    found.append(shutil.which("nvcc", path=path))
    yield from dict.fromkeys(os.path.abspath(p) for p in found if p)


def _probe_nvrtc(path: str) -> Nvrtc | str:
    """The compiler, or why it is none."""
    try:
        library = _library(path)
    except OSError as e:
        return str(e)
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    found = Nvrtc(path, (major.value, minor.value))
    if found.version < OLDEST:
        return f"version {major.value}.{minor.value} is too old"
    made = found.compile(PROBE, {}, 80)
    return found if made.ok else _first_line(made.log)


def _probe_nvcc(path: str) -> Nvcc | str:
    banner = _run([path, "--version"], None)
    match = re.search(r"release (\d+)\.(\d+)", banner.stdout)
    if banner.returncode or not match:
        return _first_line(banner.stderr or banner.stdout)
    found = Nvcc(path, (int(match[1]), int(match[2])))
    if found.version < OLDEST:
        return f"version {match[1]}.{match[2]} is too old"
    made = found.compile(PROBE, {}, 80)
    return found if made.ok else _first_line(made.log)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0])


def _run(command: Sequence[str], folder: str | None) -> subprocess.CompletedProcess[str]:
    """Never raises: a compiler that cannot be started has failed with what the system says."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", env=env,
            stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


# ------------------------------------------------------------------ NVRTC's C interface


@functools.lru_cache(maxsize=8)
def _library(path: str) -> ctypes.CDLL:
    """Raises OSError where it cannot be loaded."""
    # NVRTC opens its second library by name alone, which the loader finds only if it is there.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


_compiling = threading.Lock()  # NVRTC is safe to call from several threads only from 13.1 on


class _Program:
    """One text being compiled."""

    def __init__(self, library: ctypes.CDLL, source: str, headers: Mapping[str, str]) -> None:
        self.library, self.handle = library, ctypes.c_void_p()
        names, texts = _strings(headers), _strings(headers.values())
        given = (source.encode(), SOURCE.encode(), len(headers), texts, names)
        self._check(library.nvrtcCreateProgram(ctypes.byref(self.handle), *given))

    def compile(self, options: Sequence[str]) -> Output:
        command = " ".join(["nvrtc", *options, SOURCE])
        with _compiling:
            status = self.library.nvrtcCompileProgram(self.handle, len(options), _strings(options))
        log = self._get("ProgramLog").decode(errors="replace").rstrip("\0")
        if status:
            text = log or self.library.nvrtcGetErrorString(status).decode()
            return Output(False, text, command=command)
        ptx = self._get("PTX").decode().rstrip("\0")
        return Output(True, log, ptx, self._get("CUBIN"), command)

    def close(self) -> None:
        self.library.nvrtcDestroyProgram(ctypes.byref(self.handle))

    def _get(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(self.handle, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(self.handle, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: {self.library.nvrtcGetErrorString(status).decode()}")


def _strings(texts: Any) -> Any:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


__all__ = ["AnyCompiler", "MissingCuda", "Nvcc", "Nvrtc", "Output", "find_cuda"]
