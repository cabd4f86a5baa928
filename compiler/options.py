"""Options of `torch.compile(..., backend="effc", options={...})` and `effc.compile(...)`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from effc.ir import OptionError, nearest
from effc.passes.base import Pipeline
from effc.passes.pipelines import DEFAULT

FALLBACKS = ("aten", "inductor")


@dataclass(frozen=True)
class Options:
    """What a compilation may be told.

    pipeline: passes as text, in order. target: name of a backend. strict: a node that no kernel of
    the target claims is an error that lists all of them. dump: folder for the stages as files.
    fallback: who runs graphs that are not taken (training, refusals): "aten" or "inductor".
    measure: run the reference interpreter around every pass and record the error it adds.
    verify: check every graph and its text after every pass.
    """

    pipeline: str = DEFAULT
    target: str = "cpu"
    strict: bool = False
    dump: str | None = None
    fallback: str = "aten"
    measure: bool = False
    verify: bool = bool(os.environ.get("EFFC_VERIFY"))

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> Options:
        """Raises OptionError for an unknown name (with the nearest known one) or a wrong type."""
        fields = {f.name: f for f in dataclasses.fields(Options)}
        hints = get_type_hints(Options)
        values: dict[str, Any] = {}
        for name, value in (given or {}).items():
            if name not in fields:
                raise OptionError(f"unknown option {name!r}", fix=nearest(name, fields))
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, hints[name]):
                raise OptionError(f"option {name} must be {_words(hints[name])}, not {value!r}")
            values[name] = value
        options = Options(**values)
        if options.fallback not in FALLBACKS:
            fix = nearest(options.fallback, FALLBACKS)
            raise OptionError(f"option fallback is {options.fallback!r}", fix=fix)
        options.passes.check()
        return options

    @property
    def passes(self) -> Pipeline:
        return Pipeline.parse(self.pipeline)


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint).replace("str | None", "str or None"))
