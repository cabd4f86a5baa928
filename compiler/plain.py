"""Dataclasses to JSON and back, by their annotations; a version that differs is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from effc.ir import InputError

__all__ = ["read", "write"]

T = TypeVar("T")


def write(value: Any) -> str:
    """JSON text of a dataclass. Fields that take no part in comparison are left out."""
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def read(text: str, cls: type[T], version: int) -> T:
    """What `write` wrote of this class. Raises InputError for anything else."""
    what = f"not a {cls.__name__.lower()} of effc"
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(what, why=str(e)) from e
    if not isinstance(data, dict) or "version" not in data:
        raise InputError(what, why="it has no version")
    if data["version"] != version:
        raise InputError(
            what, why=f"it has version {data['version']}, this effc reads {version}",
            fix="read it with the effc that wrote it",
        )  # fmt: skip
    try:
        return _load(cls, data)
    except (TypeError, KeyError, ValueError, AttributeError) as e:
        raise InputError(what, why=f"{type(e).__name__}: {e}") from e


def _plain(value: Any) -> Any:
    """Dataclasses to dicts; a float that JSON lacks becomes text."""
    if dataclasses.is_dataclass(value):
        kept = (f.name for f in dataclasses.fields(value) if f.compare)
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _load(hint: Any, data: Any) -> Any:
    if data is None:
        return None
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{k: _load(hints[k], v) for k, v in data.items()})  # type: ignore[operator]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [_load(args[0], v) for v in data]
    if typing.get_origin(hint) is dict:
        return {k: _load(args[1], v) for k, v in data.items()}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in args if a is not types.NoneType]
        return _load(inner[0], data) if len(inner) == 1 else data
    return float(data) if hint is float else data
