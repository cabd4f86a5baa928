"""A folder of finished files, each under the hash of what made it.

An entry is a folder `<kind>/<key>` with its files and a `manifest.json` that lists their sizes and
hashes. It is made beside the others and renamed into place, so it is there whole or not at all. An
entry whose files do not match its manifest counts as absent and is replaced.

One process builds a key at a time, held by `flock` on a file: the system drops that lock when the
process ends, however it ends, so no lock goes stale.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYOUT = "v1"  # changes when the meaning of the folder does


def cache_dir() -> Path:
    """EFFC_CACHE_DIR, else XDG_CACHE_HOME/effc, else ~/.cache/effc. Absolute."""
    if chosen := os.environ.get("EFFC_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "effc"
    try:
        return Path.home() / ".cache" / "effc"
    except RuntimeError:  # a user without a home; /tmp/effc could be anybody's
        return private_folder()


@functools.lru_cache(maxsize=1)
def private_folder() -> Path:
    """Where this process builds when the cache folder cannot be written; removed at exit."""
    folder, owner = tempfile.mkdtemp(prefix="effc-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child that exits must leave it to its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


@dataclass(frozen=True)
class Note:
    """Something the builder had to go round. `kind` is for programs, the rest for people."""

    kind: str  # "read-only", "full", "denied", "not-a-folder", "no-exec", "unusable", "no-pch", ...
    reason: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; fix: {self.fix}" if self.fix else self.reason


class StoreError(Exception):
    """The folder cannot be written; carries the note that says why."""

    def __init__(self, note: Note) -> None:
        super().__init__(str(note))
        self.note = note


@dataclass(frozen=True)
class Entry:
    """A finished entry whose files match their manifest."""

    folder: Path
    manifest: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.folder / name


def made_once(kind: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry of the cache folder, made there first if need be.

    Where the folder cannot be written, it is made where this process alone sees it.
    """
    store = Store(cache_dir())
    if entry := store.get(kind, key):
        return entry
    try:
        return store.put(kind, key, make)[0]
    except StoreError:
        return Store(private_folder()).put(kind, key, make)[0]


class Store:
    """Entries under one root. Reading needs no permission to write."""

    def __init__(self, root: Path) -> None:
        self.root = root / LAYOUT

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    def get(self, kind: str, key: str) -> Entry | None:
        return self.check(kind, key)[0]

    def check(self, kind: str, key: str) -> tuple[Entry | None, str]:
        """The entry, or None and why not: "absent", or what is wrong with it."""
        folder = self.folder(kind, key)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            files = dict(manifest["files"])
        except FileNotFoundError:
            return None, "absent"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"manifest cannot be read: {error}"
        for name, (size, digest) in files.items():
            try:
                if (actual := (folder / name).stat().st_size) != size:
                    return None, f"{name} has {actual} bytes instead of {size}"
                if digest != _digest(folder / name):
                    return None, f"{name} does not match its hash"
            except OSError as error:
                return None, f"{name} cannot be read: {error.strerror}"
        return Entry(folder, manifest), ""

    def manifests(self, kind: str, limit: int = 2000) -> Iterator[tuple[str, dict[str, Any]]]:
        """Newest entries first, as (key, manifest); unreadable ones are passed over."""
        folders = [(_mtime(path), path) for path in (self.root / kind).glob("*/*")]
        for _, path in sorted(folders, reverse=True)[:limit]:
            with contextlib.suppress(OSError, ValueError):
                yield path.name, json.loads((path / "manifest.json").read_bytes())

    def put(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], dict[str, Any]],
        wait: Callable[[], None] = lambda: None,
    ) -> tuple[Entry, bool]:
        """The entry and whether this call made it.

        `make` fills a folder and returns what else the manifest holds. `wait` is called again and
        again while another process builds the same key; it may raise to give up.
        """
        with self._writing(), self._lock(kind, key, wait):
            if entry := self.get(kind, key):
                return entry, False
            self._sweep(own=f"{kind}-{key}")
            tmp = self._ensure(self.root / "tmp")
            work = Path(tempfile.mkdtemp(prefix=f"{kind}-{key}.", dir=tmp))
            try:
                os.chmod(work, 0o755)  # mkdtemp's 0700 would hide it from others sharing the cache
                manifest = make(work)
                names = sorted(path.name for path in work.iterdir())
                manifest["files"] = {
                    n: [(work / n).stat().st_size, _digest(work / n)] for n in names
                }
                (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
                folder = self.folder(kind, key)
                self._ensure(folder.parent)
                if folder.exists():  # damaged, or `get` had found it
                    os.rename(folder, work.with_suffix(".old"))
                os.rename(work, folder)
                return Entry(folder, manifest), True
            finally:
                shutil.rmtree(work, ignore_errors=True)
                shutil.rmtree(work.with_suffix(".old"), ignore_errors=True)

    def load_json(self, kind: str, key: str) -> dict[str, Any] | None:
        """A small fact kept by `save_json`, or None."""
        try:
            value = json.loads((self.root / kind / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def save_json(self, kind: str, key: str, value: dict[str, Any]) -> None:
        """Keep a small fact. Losing it costs time only, so an unwritable folder is fine."""
        with contextlib.suppress(OSError):
            folder = self._ensure(self.root / kind)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                try:
                    file.write(json.dumps(value))
                    file.flush()
                    os.replace(file.name, folder / f"{key}.json")
                except OSError:
                    os.unlink(file.name)

    def note(self, error: OSError) -> Note:
        """What a failed write means for the user."""
        where = str(self.root.parent)
        other = f"set EFFC_CACHE_DIR to a folder that can be written (now {where})"
        kind, what, fix = {
            errno.EROFS: ("read-only", "is on a read-only file system", other),
            errno.EACCES: ("denied", "cannot be written by this user", other),
            errno.EPERM: ("denied", "cannot be written by this user", other),
            errno.ENOSPC: ("full", "is on a full disk", f"free space on the disk of {where}"),
            errno.EDQUOT: ("full", "is over its quota", f"free space in {where}"),
            errno.ENOTDIR: ("not-a-folder", "is not a folder", other),
            errno.EEXIST: ("not-a-folder", "is not a folder", other),
            errno.ENOLCK: ("no-locks", "is on a file system without locks", other),
        }.get(error.errno or 0, ("unusable", f"cannot be used: {error}", other))
        return Note(kind, f"cache folder {where} {what}", fix)

    def _ensure(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(self.note(error)) from error

    @contextlib.contextmanager
    def _lock(self, kind: str, key: str, wait: Callable[[], None]) -> Iterator[None]:
        path = self._ensure(self.root / "locks") / f"{kind}-{key}"
        fd = _open_lock(path, wait)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock goes: see _open_lock
            os.close(fd)

    def _sweep(self, own: str) -> None:
        """Remove unfinished work of dead processes: what nobody, or we ourselves, hold locked."""
        for work in (self.root / "tmp").glob("*"):
            if work.stem == own:
                shutil.rmtree(work, ignore_errors=True)
                continue
            path = self.root / "locks" / work.stem
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if _try_lock(fd) and _is_named(fd, path):
                    shutil.rmtree(work, ignore_errors=True)
                    path.unlink()
            finally:
                os.close(fd)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _open_lock(path: Path, wait: Callable[[], None]) -> int:
    """Take the lock named `path`; closing the returned descriptor gives it back."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Polled, so that Ctrl-C and `wait` are heard while another process compiles.
            while not _try_lock(fd):
                wait()
                time.sleep(0.02)
            if _is_named(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_named(fd: int, path: Path) -> bool:
    """False when the holder before us removed the file: then nobody else sees our lock."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# A forked child makes a folder of its own: its parent's goes when the parent ends.
os.register_at_fork(after_in_child=private_folder.cache_clear)
