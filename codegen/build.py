"""C++ source in, loaded library out, each built once: a content-addressed cache on disk.

The key covers the source, the runtime header, the compiler and all flags. Several processes may
build at once, and be killed at any moment. A cache folder that cannot be written costs speed and
leaves a note on the library; it is no error.

Why a kernel was built although the cache holds much alike is logged, for those who ask:

    logging.basicConfig(); logging.getLogger("effc.codegen").setLevel("INFO")
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import compile as compiler
from .compile import BuildError, Cancelled, Processes
from .library import Library
from .openmp import torch_runtime
from .store import Note, Store, StoreError, cache_dir, private_folder
from .toolchain import MissingToolchain, Toolchain, find_toolchain

KIND = "objects"
log = logging.getLogger("effc.codegen.build")


@dataclass(frozen=True)
class Unit:
    """One source to build. `name` is for people; it is no part of the key."""

    source: str
    name: str = "kernel"
    flags: tuple[str, ...] = ()


def build(
    source: str,
    *,
    flags: Sequence[str] = (),
    toolchain: Toolchain | MissingToolchain | None = None,
    name: str = "kernel",
) -> Library:
    """Compile `source` with `flags` after the house's own, or take it from the cache; load it."""
    return _build(Unit(source, name, tuple(flags)), _working(toolchain), Processes())


def build_many(
    units: Sequence[Unit],
    *,
    flags: Sequence[str] = (),
    toolchain: Toolchain | MissingToolchain | None = None,
    jobs: int | None = None,
) -> list[Library]:
    """Build several sources with at most `jobs` compilers at a time (default: usable cores).

    All are tried; one BuildError lists every failure. An interrupt ends all compilers.
    """
    found, processes = _working(toolchain), Processes()
    jobs = max(1, min(jobs or len(os.sched_getaffinity(0)), len(units) or 1))
    units = [Unit(unit.source, unit.name, (*flags, *unit.flags)) for unit in units]
    with ThreadPoolExecutor(jobs, thread_name_prefix="effc-build") as pool:
        futures = [pool.submit(_build, unit, found, processes) for unit in units]
        try:
            errors = [error for future in futures if (error := future.exception())]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.cancel()
            raise
    wrong = [error for error in errors if not isinstance(error, BuildError)]
    if wrong or len(errors) == 1:
        raise (wrong or errors)[0]
    if errors:
        text = "\n".join(map(str, errors))
        raise BuildError(f"{len(errors)} of {len(units)} kernels failed to build", context=text)
    return [future.result() for future in futures]


def load_code(code: bytes, name: str = "kernel") -> Library:
    """The library in `code`, what `Library.read` gave; needs no compiler.

    Raises BuildError where the system does not load it.
    """
    return _library(_Given(code, name))


@dataclass(frozen=True)
class Miss:
    """Why a source is not in the cache: what differs from the nearest entry that is."""

    reason: str  # "absent", or what is wrong with the entry
    nearest: str | None = None  # key and name of the nearest entry
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.nearest is None:
            return f"{self.reason}; the cache holds nothing comparable"
        return f"{self.reason}; nearest is {self.nearest}: {'; '.join(self.differs)}"


def explain_miss(
    source: str,
    *,
    flags: Sequence[str] = (),
    toolchain: Toolchain | MissingToolchain | None = None,
    name: str = "kernel",
) -> Miss | None:
    """What differs from the nearest entry of the cache, or None if this source is in it."""
    parts = key_parts(Unit(source, name, tuple(flags)), _working(toolchain))
    key, store = key_of(parts), Store(cache_dir())
    entry, reason = store.check(KIND, key)
    if entry:
        return None
    best, score = None, (0, 0)
    for other_key, manifest in store.manifests(KIND):
        theirs = manifest.get("parts", {})
        same = sum(theirs.get(part) == mine for part, mine in parts.items())
        # Of equal ones the same kernel's, then the newest, which comes first.
        if other_key != key and (same, manifest.get("name") == name) > score:
            best, score = (other_key, manifest), (same, manifest.get("name") == name)
    if best is None:
        return Miss(reason)
    theirs = best[1]["parts"]
    differs = [_difference(k, theirs.get(k), v) for k, v in parts.items() if theirs.get(k) != v]
    if theirs["source"] != parts["source"]:
        differs.append(_first_line(store.folder(KIND, best[0]) / "kernel.cpp", source))
    return Miss(reason, f"{best[0][:12]} ({best[1].get('name')})", tuple(differs))


def key_parts(unit: Unit, toolchain: Toolchain) -> dict[str, Any]:
    """All that decides the object; kept beside it."""
    return {
        "source": hashlib.sha256(unit.source.encode()).hexdigest(),
        "header": compiler.header_digest(),
        "compiler": toolchain.identity,
        "flags": [*compiler.all_flags(unit.flags, toolchain), *compiler.LINK_FLAGS],
        "openmp": getattr(torch_runtime(), "name", "none"),
    }


def key_of(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _difference(part: str, theirs: Any, mine: Any) -> str:
    if part == "flags" and isinstance(theirs, list):
        new = [flag for flag in mine if flag not in theirs]
        gone = [flag for flag in theirs if flag not in mine]
        changes = [f"with {' '.join(new)}"] * bool(new) + [f"without {' '.join(gone)}"] * bool(gone)
        return f"flags: {', '.join(changes) or 'another order'}"
    if part in ("source", "header"):
        return f"{part} text"
    return f"{part}: {mine}, was {theirs}"


def _first_line(theirs: Path, mine: str) -> str:
    """Where two sources part."""
    try:
        old = theirs.read_text().splitlines()
    except OSError:
        return "its source is gone"
    for number, pair in enumerate(itertools.zip_longest(old, mine.splitlines()), 1):
        if pair[0] != pair[1]:
            return f"line {number} is {pair[1]!r}, was {pair[0]!r}"
    return "line ends"


def _working(toolchain: Toolchain | MissingToolchain | None) -> Toolchain:
    found = find_toolchain() if toolchain is None else toolchain
    if isinstance(found, MissingToolchain):
        raise BuildError("cannot build kernels", why=found.reason, fix=found.fix)
    return found


class _Request:
    """One unit on its way to a library."""

    kind = KIND

    def __init__(self, unit: Unit, toolchain: Toolchain, processes: Processes) -> None:
        self.unit, self.toolchain, self.processes = unit, toolchain, processes
        self.flags = compiler.all_flags(unit.flags, toolchain)
        self.parts = key_parts(unit, toolchain)
        self.key = key_of(self.parts)
        self.started = time.perf_counter()
        self.notes: list[Note] = []

    def make(self, store: Store, work: Path) -> dict[str, Any]:
        """Fill `work`, and say what the manifest holds."""
        pch: Path | Note | None = None
        if f'"{compiler.HEADER}"' in self.unit.source:
            pch = compiler.precompiled_header(store, self.flags, self.toolchain, self.processes)
        if isinstance(pch, Note):
            self.notes.append(pch)
            pch = None
        compiler.compile_library(
            work, self.unit.source, self.unit.name, self.flags, self.toolchain, self.processes, pch
        )
        return {"name": self.unit.name, "parts": self.parts}

    def _log_miss(self) -> None:
        if log.isEnabledFor(logging.INFO):  # reads every manifest of the cache
            unit = self.unit
            miss = explain_miss(
                unit.source, flags=unit.flags, toolchain=self.toolchain, name=unit.name
            )
            log.info("building %s: %s", unit.name, miss)

    def library(self, store: Store) -> Library:
        """Load it from `store`, built there first if need be."""
        entry, built = store.get(self.kind, self.key), False
        if entry is None:
            self._log_miss()
            make = functools.partial(self.make, store)
            entry, built = store.put(self.kind, self.key, make, self.processes.check)
        path, seconds = entry.file("kernel.so"), time.perf_counter() - self.started
        try:
            return Library(path, self.key, self.unit.name, built, seconds, tuple(self.notes))
        except OSError as error:
            if "failed to map segment" in str(error):  # a file system mounted noexec
                reason = f"cache folder {store.root.parent} does not allow loading libraries"
                fix = "set EFFC_CACHE_DIR to a folder on a file system without noexec"
                raise StoreError(Note("no-exec", reason, fix)) from error
            raise BuildError(f"kernel {self.unit.name} cannot be loaded", why=str(error)) from error


class _Given(_Request):
    """Code that was built elsewhere and only needs a place on disk to be loaded from."""

    kind = "loaded"

    def __init__(self, code: bytes, name: str) -> None:
        self.unit, self.code, self.processes = Unit("", name), code, Processes()
        self.key = hashlib.sha256(code).hexdigest()
        self.started = time.perf_counter()
        self.notes = []

    def make(self, store: Store, work: Path) -> dict[str, Any]:
        (work / "kernel.so").write_bytes(self.code)
        return {"name": self.unit.name}


def _build(unit: Unit, toolchain: Toolchain, processes: Processes) -> Library:
    return _library(_Request(unit, toolchain, processes))


def _library(request: _Request) -> Library:
    root, unit = cache_dir(), request.unit
    if library := _loaded.get((root, request.key)):
        return library
    try:
        library = request.library(Store(root))
    except StoreError as error:
        request.notes.append(error.note)
        try:
            library = request.library(Store(private_folder()))
        except StoreError as second:
            raise BuildError(
                f"kernel {unit.name}: no folder to build in",
                why=f"{error.note.reason}; {second.note.reason}",
                fix=error.note.fix,
            ) from second
    _loaded[root, request.key] = library
    return library


# Libraries in use, so that asking again for the same source costs a hash.
_loaded: weakref.WeakValueDictionary[tuple[Path, str], Library] = weakref.WeakValueDictionary()


__all__ = [
    "BuildError",
    "Cancelled",
    "Library",
    "Miss",
    "Note",
    "Unit",
    "build",
    "build_many",
    "load_code",
]
