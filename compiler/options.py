"""Options of `torch.compile(..., backend="effc", options={...})` and `effc.compile(...)`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from effc.backends.base import PRECISIONS
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
    tune: measure schedules of kernels of which nothing is known yet, some 0.1 s for each; the times
    are kept in the cache folder, where every later compilation finds them.
    cuda_graphs: on an NVIDIA GPU, launch what is between two torch routines as one CUDA graph, from
    the second call with the same sizes on. Results are the caller's own as ever, and inputs may lie
    anywhere; other targets refuse it.

    float32_matmul_precision: "highest", "high" or "medium", with the meaning they have for
    torch.set_float32_matmul_precision; None is what is set there when a graph is compiled. A
    compiled graph keeps the precision it was compiled with (a change of torch's switch between
    "highest" and the others makes Dynamo compile again; one between those two does not).
    "high" takes float32 factors as two bf16 parts each, 16 bits of 24; "medium" as bf16, 8 bits;
    sums are float32. They are a permission: on a CPU without AMX products stay float32. With
    "high" a product with an infinity may be NaN. Routines of torch's libraries follow torch's
    switch at each call.
    """

    pipeline: str = DEFAULT
    target: str = "cpu"
    strict: bool = False
    dump: str | None = None
    fallback: str = "aten"
    measure: bool = False
    verify: bool = bool(os.environ.get("EFFC_VERIFY"))
    float32_matmul_precision: str | None = None
    tune: bool = False
    cuda_graphs: bool = False

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
        precision = options.float32_matmul_precision
        if precision is not None and precision not in PRECISIONS:
            fix = nearest(precision, PRECISIONS)
            raise OptionError(f"option float32_matmul_precision is {precision!r}", fix=fix)
        options.passes.check()
        return options

    @property
    def passes(self) -> Pipeline:
        return Pipeline.parse(self.pipeline)


def _words(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint).replace("str | None", "str or None"))
