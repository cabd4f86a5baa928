"""Finds a C++ compiler that works. Absence is a value with a fix, never an exception.

It tries `CXX`, then g++, c++ and clang++, and compiles a small library with each until one does.
The answer is kept on disk under the compiler's path, size and time, so that the next process asks
nothing of the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .store import Store, cache_dir

CANDIDATES = ("g++", "c++", "clang++")
PROBE = """
#include <cmath>
#include <cstdint>
#include <type_traits>
template <class T> constexpr bool real = std::is_floating_point_v<T>;
extern "C" float probe(float x) { if constexpr (real<float>) return std::sqrt(x); }
"""
INSTALL = {
    "debian": "apt-get install g++",
    "ubuntu": "apt-get install g++",
    "fedora": "dnf install gcc-c++",
    "rhel": "dnf install gcc-c++",
    "alpine": "apk add g++",
    "arch": "pacman -S gcc",
    "suse": "zypper install gcc-c++",
    "opensuse": "zypper install gcc-c++",
}


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler that compiled and linked a shared library here."""

    command: tuple[str, ...]  # with what stood before it in CXX, such as ccache
    kind: str  # "gcc" or "clang"
    version: tuple[int, ...]
    target: str  # x86_64-linux-gnu
    banner: str  # first line of --version: tells distribution builds apart
    skipped: tuple[str, ...] = ()  # candidates that came first and did not work, with the reason

    @property
    def path(self) -> str:
        return [word for word in self.command if not word.startswith("-")][-1]

    @property
    def identity(self) -> str:
        """What of the compiler decides the object it makes: part of every cache key."""
        options = "".join(f" {word}" for word in self.command if word.startswith("-"))
        version = ".".join(map(str, self.version))
        return f"{self.kind} {version} {self.target}{options} ({self.banner})"

    def supported(self, flags: Iterable[str]) -> tuple[str, ...]:
        """Those of `flags` that this compiler knows: an old one lacks the newest -m flags."""
        flags = tuple(flags)
        if _accepts(self.command, flags):
            return flags
        return tuple(flag for flag in flags if _accepts(self.command, (flag,)))

    def __str__(self) -> str:
        return f"{self.path} ({self.kind} {'.'.join(map(str, self.version))}, {self.target})"


@dataclass(frozen=True)
class MissingToolchain:
    """No C++ compiler works here. `fix` is the command that changes that."""

    reason: str
    fix: str
    tried: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason}; fix: {self.fix}"


def find_toolchain() -> Toolchain | MissingToolchain:
    """The first of CXX, g++, c++, clang++ that compiles and links a shared library."""
    return _find(os.environ.get("CXX", ""), os.environ.get("PATH", ""), str(cache_dir()))


@functools.lru_cache(maxsize=32)
def _find(cxx: str, path: str, cache: str) -> Toolchain | MissingToolchain:
    """Keyed by all of the environment it looks at, so that a changed CXX is seen."""
    skipped: list[str] = []
    for words in ([shlex.split(cxx)] if cxx.strip() else []) + [[name] for name in CANDIDATES]:
        # CXX may hold more than a name: `ccache g++ -m64`.
        found = [w if w.startswith("-") else shutil.which(w, path=path) for w in words]
        if None in found:
            skipped.append(f"{words[found.index(None)]}: not found")
            continue
        # Absolute: it is called from other folders.
        command = tuple(
            str(w) if str(w).startswith("-") else os.path.abspath(str(w)) for w in found
        )
        result = _probe_cached(command, Path(cache))
        if isinstance(result, Toolchain):
            return replace(result, skipped=tuple(skipped))
        skipped.append(f"{' '.join(words)}: {result}")
    absent = all(reason.endswith(": not found") for reason in skipped)
    reason = "no C++ compiler found" if absent else "no C++ compiler works"
    return MissingToolchain(f"{reason} ({'; '.join(skipped)})", install_command(), tuple(skipped))


def install_command(os_release: str = "/etc/os-release") -> str:
    """The command that installs a C++ compiler on this system."""
    try:
        text = Path(os_release).read_text()
    except OSError:
        text = ""
    names = " ".join(re.findall(r'^ID(?:_LIKE)?="?([^"\n]*)"?', text, re.MULTILINE)).split()
    known = [INSTALL[name] for name in names if name in INSTALL]
    return known[0] if known else "install g++ or clang++ (C++17) and put it on PATH, or set CXX"


def _probe_cached(command: tuple[str, ...], cache: Path) -> Toolchain | str:
    """A `Toolchain`, or why this compiler is none. Only success is kept on disk."""
    stat = os.stat([word for word in command if not word.startswith("-")][-1])
    mark = json.dumps([command, stat.st_size, stat.st_mtime_ns, PROBE])
    store = Store(cache)
    key = hashlib.sha256(mark.encode()).hexdigest()
    if known := store.load_json("toolchain", key):
        with contextlib.suppress(KeyError, TypeError):  # written by another version of effc
            version = tuple(known["version"])
            return Toolchain(command, known["kind"], version, known["target"], known["banner"])
    result = _probe(command)
    if isinstance(result, Toolchain):
        store.save_json("toolchain", key, asdict(result))
    return result


def _probe(command: tuple[str, ...]) -> Toolchain | str:
    with tempfile.TemporaryDirectory(prefix="effc-probe-") as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(PROBE)
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
        why = _failure(_run([*command, *options]))
        if why or not library.exists():
            return why or "made no output"
    macros = dict(
        line.split(" ", 2)[1:]
        for line in _run([*command, "-dM", "-E", "-x", "c++", os.devnull]).stdout.splitlines()
        if line.count(" ") >= 2
    )
    kind, names = ("gcc", ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__"))
    if "__clang__" in macros:
        kind, names = "clang", ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
    version = tuple(int(macros.get(name, "0")) for name in names)
    banner = _run([*command, "--version"]).stdout.partition("\n")[0].strip()
    return Toolchain(
        command, kind, version, _run([*command, "-dumpmachine"]).stdout.strip(), banner
    )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Never raises: a compiler that cannot be started has failed with what the system says."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _failure(done: subprocess.CompletedProcess[str]) -> str | None:
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines
    return telling[0] if telling else f"exit status {done.returncode}"


@functools.lru_cache(maxsize=256)
def _accepts(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    options = ["-Werror", *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return _run([*command, *options]).returncode == 0
