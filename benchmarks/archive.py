"""What a run found, as JSON: one file per suite, written whole after every case.

An entry is one case in one precision with one number of threads. Its `ways` hold every peer, also
those that were not timed, each with `status`: "timed"; "absent", not on this machine; "unable",
cannot take the model; "failed", raised or crashed; "wrong", too far from eager.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effc.ir import OptionError

FORMAT = 1
PACKAGES = (
    "torch onnxruntime onnxscript openvino transformers diffusers llama-cpp-python numpy effc"
).split()


@dataclass(frozen=True)
class Key:
    """What makes two entries the same measurement."""

    name: str
    precision: str
    threads: int

    @staticmethod
    def of(entry: dict[str, Any]) -> Key:
        return Key(entry["name"], entry["precision"], entry["threads"])


@dataclass
class Results:
    """One suite's file. `machine` and `versions` say where the figures come from."""

    suite: str
    date: str = field(default_factory=lambda: date.today().isoformat())
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    @staticmethod
    def here(suite: str, **settings: Any) -> Results:
        return Results(suite, machine=machine(), versions=versions(), settings=settings)

    def entry(self, key: Key) -> dict[str, Any] | None:
        return next((e for e in self.entries if Key.of(e) == key), None)

    def put(self, entry: dict[str, Any]) -> None:
        """Add an entry, in place of an older one of the same measurement."""
        same = [n for n, e in enumerate(self.entries) if Key.of(e) == Key.of(entry)]
        if same:
            self.entries[same[0]] = entry
        else:
            self.entries.append(entry)

    def done(self, key: Key, ways: Iterable[str]) -> bool:
        """Whether all these ways are in the entry already, measured or with a reason."""
        entry = self.entry(key)
        return entry is not None and set(ways) <= set(entry["ways"])

    def save(self, path: Path) -> None:
        """Replace the file at once: it is whole, whenever somebody stops the run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self), indent=1) + "\n")
            os.chmod(name, 0o644)  # mkstemp makes it private
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: Path) -> Results:
        """Raises OptionError for a file that is not this suite's or of another format."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise OptionError(f"{path} has format {found['format']}, this effc writes {FORMAT}")
            return Results(**found)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise OptionError(f"{path} holds no benchmark results", why=str(e)) from e


def file_of(out: Path, suite: str) -> Path:
    return out / f"{suite}.json"


def machine() -> dict[str, Any]:
    """What decides speed here, without names that would identify the machine."""
    from effc.backends.cpu.features import CpuFeatures, detect

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    cpu = detect()
    if isinstance(cpu, CpuFeatures):
        described = {**asdict(cpu), "extensions": list(cpu.extensions)}
        found["cpu"] = {k: v for k, v in described.items() if k != "notes"}
    return found


def versions() -> dict[str, str]:
    from effc.codegen.toolchain import find_toolchain

    found = {"compiler": str(getattr(find_toolchain(), "banner", "none"))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
