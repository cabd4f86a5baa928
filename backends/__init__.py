"""Backends: one folder per target, from claimed nodes to a plan that runs."""

from .base import (
    Backend,
    Bound,
    Constants,
    Executable,
    Launch,
    Object,
    Options,
    backend_names,
    find_backend,
    register_backend,
)

__all__ = [
    "Backend", "Bound", "Constants", "Executable", "Launch", "Object", "Options",
    "backend_names", "find_backend", "register_backend",
]  # fmt: skip
