"""Runs the compiler: its flags, the precompiled header, interrupts, and errors people can read."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from effc.ir.errors import EffcError

from .openmp import OpenMP, torch_runtime
from .store import Note, Store, StoreError
from .toolchain import Toolchain

HEADERS = Path(__file__).parent / "cpp"
HEADER = "effc.h"
# No -ffast-math: NaN, infinities and signed zeros keep torch's meaning. These three are what the
# vectoriser needs: no errno, no FP exceptions to preserve, multiply-adds fused.
BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-semantic-interposition",
    "-pipe",
)
# Symbols bind inside the library: kernels built for different instruction sets share names.
LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,-Bsymbolic", "-Wl,-z,defs")
ERROR = re.compile(r"^(?P<file>[^:\n]+):(?P<line>\d+):(?:\d+:)? (?:fatal )?error: (?P<text>.*)$")


class BuildError(EffcError):
    """A kernel could not be built; shows the compiler's first errors and the source around them."""

    command: str = ""
    output: str = ""


class Cancelled(Exception):
    """Another build of the same batch was interrupted."""


@functools.lru_cache(maxsize=1)
def runtime_header() -> dict[str, str]:
    """Name and text of the headers a kernel may include."""
    return {path.name: path.read_text() for path in sorted(HEADERS.glob("effc*.h"))}


@functools.lru_cache(maxsize=1)
def header_digest() -> str:
    return hashlib.sha256(json.dumps(runtime_header()).encode()).hexdigest()


def all_flags(flags: Sequence[str], toolchain: Toolchain) -> tuple[str, ...]:
    """What the compiler is called with, apart from paths."""
    # clang's own pragma needs clang's own runtime; effc::parallel_for works with torch's.
    openmp = "-fopenmp" if toolchain.kind == "gcc" and torch_runtime() else "-fopenmp-simd"
    return (*BASE_FLAGS, openmp, *(("-DEFFC_OPENMP",) if torch_runtime() else ()), *flags)


class Processes:
    """Compilers running for one call, so that an interrupt can end all of them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._mutex = threading.Lock()
        self._cancelled = False

    def check(self) -> None:
        if self._cancelled:
            raise Cancelled

    def cancel(self) -> None:
        with self._mutex:
            self._cancelled = True
            for process in self._running:
                _kill(process)

    def run(self, command: Sequence[str], cwd: Path) -> tuple[int, str]:
        """Exit status and what it said. A session of its own: Ctrl-C reaches Python, which then
        kills the driver together with the passes it started."""
        with self._mutex:
            self.check()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env={**os.environ, "LC_ALL": "C"},
                    start_new_session=True,
                )
            except OSError as error:
                return 127, f"{command[0]}: {error.strerror}"
            self._running.add(process)
        try:
            output, _ = process.communicate()
        except BaseException:
            _kill(process)
            raise
        finally:
            with self._mutex:
                self._running.discard(process)
        self.check()
        return process.returncode, output


def compile_library(
    work: Path,
    source: str,
    name: str,
    flags: Sequence[str],
    toolchain: Toolchain,
    processes: Processes,
    pch: Path | None,
) -> None:
    """kernel.cpp and kernel.so in `work`. Raises BuildError, or OSError on a full disk."""
    (work / "kernel.cpp").write_text(source)
    include = [f"-I{folder}" for folder in (pch, HEADERS) if folder]
    compile_ = [*toolchain.command, *flags, *include, "-c", "kernel.cpp", "-o", "kernel.o"]
    # Linked apart and without -fopenmp, which would add the system's libgomp: torch's is the one.
    openmp = torch_runtime()
    runtime = [openmp.path] if isinstance(openmp, OpenMP) else []
    link = [*toolchain.command, *LINK_FLAGS, "kernel.o", *runtime, "-lm", "-o", "kernel.so"]
    for command in (compile_, link):
        status, output = processes.run(command, work)
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if status:
            raise build_error(name, source, command, status, output)
    (work / "kernel.o").unlink(missing_ok=True)


def precompiled_header(
    store: Store, flags: Sequence[str], toolchain: Toolchain, processes: Processes
) -> Path | Note:
    """A folder to put first on the include path, or why kernels are compiled without it.

    It takes three quarters off the build time of a small kernel. Only g++ finds it by itself.
    """
    if toolchain.kind != "gcc":
        return Note("no-pch", f"no precompiled header with {toolchain.kind}: kernels build slower")
    parts = json.dumps([header_digest(), toolchain.identity, list(flags)])
    key = hashlib.sha256(parts.encode()).hexdigest()
    known = _known_pch.get((store.root, key))
    if known is None or (isinstance(known, Path) and not known.exists()):
        known = _known_pch[store.root, key] = _make_pch(store, key, flags, toolchain, processes)
    return known


_known_pch: dict[tuple[Path, str], Path | Note] = {}


def _make_pch(
    store: Store, key: str, flags: Sequence[str], toolchain: Toolchain, processes: Processes
) -> Path | Note:
    def make(work: Path) -> dict[str, object]:
        out = str(work / f"{HEADER}.gch")
        command = [*toolchain.command, *flags, "-x", "c++-header", str(HEADERS / HEADER), "-o", out]
        status, output = processes.run(command, work)
        if status:
            raise BuildError(output.strip().partition("\n")[0] or f"exit status {status}")
        # For a second #include, which g++ looks for beside the precompiled one.
        (work / HEADER).write_text(runtime_header()[HEADER])
        return {"parts": {"compiler": toolchain.identity, "flags": list(flags)}}

    try:
        return store.put("pch", key, make, processes.check)[0].folder
    except (BuildError, StoreError) as error:
        return Note("no-pch", f"no precompiled header: {error}; kernels build slower")


def build_error(
    name: str, source: str, command: Sequence[str], status: int, output: str
) -> BuildError:
    """The first three errors of the compiler, with the lines of `source` they point at."""
    lines = output.splitlines()
    hits = [match for line in lines if (match := ERROR.match(line))][:3]
    shown: list[str] = []
    for hit in hits:
        shown.append(hit.group(0))
        if Path(hit["file"]).name == "kernel.cpp":
            shown += around(source, int(hit["line"]))
    if not hits:
        shown = lines[:12] or [f"exit status {status}, no message"]
    first = hits[0]["text"] if hits else shown[0].strip()
    text = shlex.join(command)
    error = BuildError(
        f"kernel {name}: the C++ compiler failed: {first}",
        context="\n".join(f"    {line}" for line in [*shown, f"command: {text}"]),
    )
    error.command, error.output = text, output
    return error


def around(source: str, line: int, reach: int = 2) -> list[str]:
    lines = source.splitlines()
    numbers = range(max(1, line - reach), min(len(lines), line + reach) + 1)
    return [f"{'>' if n == line else ' '}{n:5} | {lines[n - 1]}" for n in numbers]


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
