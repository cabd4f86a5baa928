"""A shared library of kernels, loaded; and what a fork means for it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compile import BuildError
from .openmp import torch_runtime
from .store import Note


class Library:
    """A loaded shared library of kernels with a plain C interface. The file stays on disk."""

    def __init__(
        self,
        path: Path,
        key: str = "",
        name: str = "kernel",
        built: bool = False,
        seconds: float = 0.0,
        notes: tuple[Note, ...] = (),
    ) -> None:
        torch_runtime()  # loaded first: the library must find torch's OpenMP, not bring one
        self.path, self.key, self.name = path, key, name
        self.built, self.seconds, self.notes = built, seconds, notes
        self.cdll = ctypes.CDLL(str(path))
        if _Forked.here and hasattr(self.cdll, "effc_set_serial"):
            self.cdll.effc_set_serial(1)  # effc_parallel.h says why

    def function(self, symbol: str, *argtypes: Any, restype: Any = None) -> Callable[..., Any]:
        """The C function `symbol`. Calling it releases the GIL."""
        try:
            function = self.cdll[symbol]
        except AttributeError:
            raise BuildError(f"kernel {self.name}: {self.path} exports no {symbol}") from None
        function.argtypes, function.restype = argtypes, restype
        return function

    def read(self) -> bytes:
        """The object file, to keep in an artefact."""
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return f"Library({self.name!r}, key={self.key[:12]!r}, built={self.built})"


class _Forked:
    here = False


def _after_fork() -> None:
    _Forked.here = True


os.register_at_fork(after_in_child=_after_fork)
