"""effc: the efficiency compiler for PyTorch.

torch.compile(model, backend="effc"), effc.compile(model, ...), effc.explain(compiled).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effc.api import compile
    from effc.artefact import build, load, save
    from effc.bisection import bisect
    from effc.decoding import decoder
    from effc.dynamo import dynamo_backend
    from effc.explanation import explain

__version__ = "0.1.0"
__all__ = ["bisect", "build", "compile", "decoder", "dynamo_backend", "explain", "load", "save"]

_HOMES = {
    "bisect": "effc.bisection",
    "build": "effc.artefact",
    "compile": "effc.api",
    "decoder": "effc.decoding",
    "dynamo_backend": "effc.dynamo",
    "explain": "effc.explanation",
    "load": "effc.artefact",
    "save": "effc.artefact",
}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use: `effc doctor` starts without torch._dynamo."""
    if name not in _HOMES:
        raise AttributeError(f"module 'effc' has no attribute {name!r}")
    from importlib import import_module

    from effc.collector import collector_paused

    with collector_paused():
        return getattr(import_module(_HOMES[name]), name)
