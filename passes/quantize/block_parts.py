"""What calibrate-blocks makes of each block, by weight key: kept in a folder while it runs.

Every block that is done is a file of tensors, `block-003.safetensors`, beside `calibration.json`,
which says of which graph and of which pass they are. A run that was stopped takes up what it finds;
the folder of a finished run stands for its calibration data, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from effc.ir import Graph, PassError

MANIFEST = "calibration.json"
VERSION = 1


@dataclass(frozen=True)
class BlockParts:
    """A folder of results. identity: what must be equal for them to be of use."""

    folder: Path
    identity: Mapping[str, str]

    @staticmethod
    def open(folder: str, identity: Mapping[str, str]) -> BlockParts:
        """Makes the folder where it is not there. Raises PassError where it is of another run."""
        parts = BlockParts(Path(folder), {"version": str(VERSION), **identity})
        known = parts.manifest()
        if known is None:
            parts.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(parts.identity, indent=1) + "\n"
            _write(parts.folder / MANIFEST, text.encode())
            return parts
        for name, value in parts.identity.items():
            if value and known.get(name) and known[name] != value:
                raise PassError(
                    f"{folder} is of another calibration",
                    why=f"its {name} is {known[name]}, not {value}",
                    fix="name another folder in checkpoint=, or remove this one",
                )
        return parts

    @staticmethod
    def finished(folder: str) -> bool:
        """Whether every block of such a folder is done."""
        parts = BlockParts(Path(folder), {})
        blocks = int((parts.manifest() or {}).get("blocks", 0))
        return blocks > 0 and all(parts.path(i).exists() for i in range(blocks))

    def manifest(self) -> dict[str, str] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as e:
            raise PassError(f"{path} cannot be read", why=str(e), fix="remove the folder") from e

    def path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"

    def read(self, block: int) -> dict[str, torch.Tensor] | None:
        """The tensors of a block; None where it is not done."""
        path = self.path(block)
        if not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except SafetensorError as e:
            raise PassError(f"{path} cannot be read", why=str(e), fix="remove that file") from e

    def write(self, block: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """All of it or, where the process is stopped, nothing."""
        _write(self.path(block), save({k: v.contiguous() for k, v in tensors.items()}))


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def of_graph(graph: Graph) -> str:
    """A hash of the graph and the values of its weights: the same on every machine."""
    return hashlib.blake2b(repr(graph.signature).encode(), digest_size=8).hexdigest()


def of_data(batches: object) -> str:
    h = hashlib.blake2b(digest_size=8)
    for batch in batches:  # type: ignore[attr-defined]
        for value in batch:
            if isinstance(value, torch.Tensor):
                h.update(f"{value.dtype}{tuple(value.shape)}".encode())
                h.update(
                    value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                )
            else:
                h.update(repr(value).encode())
    return h.hexdigest()


__all__ = ["BlockParts", "of_data", "of_graph"]
