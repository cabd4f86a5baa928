"""The step plan: a table of steps, each of which runs one executable, as text that parses back.

A compiler sees one call; decoders and samplers make many. What differs from call to call and is
known beforehand is a row here, so that a decision becomes several specialised graphs and never a
branch in one: prefill and decode, a network and its shorter form, a scale of an image.

    name = "Llama"
    model = "5d0a3c2e90b1f7aa"
    pipeline = "0f4be1b1d6ce9a3d"

    [[step]]
    name = "prefill"
    run = "prefill{batch=1}"
    resets = ["cache"]

    [[step]]
    name = "decode"
    run = "decode{batch=1}"
    until = ["eos", "length"]

The text is TOML. A plan knows names only; what runs them asks `walk` for the next step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from effc.ir import StepPlanError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Binding", "Step", "StepPlan"]

Constant: TypeAlias = "bool | int | float | str | Sequence[Constant]"


@dataclass(frozen=True)
class Binding:
    """What a plan was made for, as digests; "" where it does not matter.

    model: of the graph as captured, its weights included. pipeline: of its text. grid: of the
    times, scales or lengths that the steps stand for.
    """

    model: str = ""
    pipeline: str = ""
    grid: str = ""

    @staticmethod
    def of(model: str, pipeline: str, grid: Sequence[Constant] = ()) -> Binding:
        """model: the captured graph's text, which holds the digests of its weights."""
        return Binding(_digest(model), _digest(pipeline), _digest(_value(grid)) if grid else "")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Step:
    """One row: `run` is called `repeat` times, or until a condition holds, or whichever is first.

    resets: states that are emptied before the first of these calls. constants: numbers that the
    calls get beside their inputs, and rows of numbers (one for each channel, say). until: names of
    conditions, which whoever runs the plan knows; they are asked before every call.
    """

    name: str
    run: str
    repeat: int | None = None
    until: tuple[str, ...] = ()
    resets: tuple[str, ...] = ()
    constants: Mapping[str, Constant] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.name or not self.run:
            raise StepPlanError("a step has no name, or no executable to run")
        if self.repeat is not None and self.repeat < 1:
            raise StepPlanError(f"step {self.name!r} runs {self.repeat} times")
        plain = {k: _constant(k, v) for k, v in self.constants.items()}
        object.__setattr__(self, "constants", plain)


@dataclass(frozen=True)
class StepPlan:
    """Steps in order, and what they were made for. `str()` is the text that `parse` reads."""

    name: str
    steps: tuple[Step, ...]
    binding: Binding = Binding()

    def __post_init__(self) -> None:
        if not self.steps:
            raise StepPlanError(f"plan {self.name!r} has no steps")
        names = [s.name for s in self.steps]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise StepPlanError(f"plan {self.name!r} has two steps named {twice!r}")

    @property
    def executables(self) -> tuple[str, ...]:
        """Names of what the steps run, in order, each once."""
        return tuple(dict.fromkeys(s.run for s in self.steps))

    def step(self, name: str) -> Step:
        for step in self.steps:
            if step.name == name:
                return step
        known = [s.name for s in self.steps]
        raise StepPlanError(f"plan {self.name!r} has no step {name!r}", fix=nearest(name, known))

    def walk(self, holds: Callable[[str], bool]) -> Iterator[tuple[Step, int]]:
        """Each call to make: its step, and how many calls of that step there were before.

        holds: whether a condition of `until` is met. A step without `repeat` and `until` runs once.
        """
        for step in self.steps:
            limit = step.repeat or (sys.maxsize if step.until else 1)
            for count in range(limit):
                if any(map(holds, step.until)):
                    break
                yield step, count

    def check(
        self, binding: Binding, executables: Iterable[str] | None = None,
        conditions: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Raises StepPlanError where the plan is for another model, pipeline or grid, runs what is
        not among the executables, or asks for a condition that nobody knows."""
        for f in fields(Binding):
            ours, theirs = getattr(self.binding, f.name), getattr(binding, f.name)
            if ours and theirs and ours != theirs:
                raise StepPlanError(
                    f"plan {self.name!r} was made for another {f.name}",
                    why=f"it is bound to {ours}, this is {theirs}", fix="make the plan anew",
                )  # fmt: skip
        asked = {c: None for s in self.steps for c in s.until}
        for what, wanted, given in (
            ("runs", self.executables, executables), ("asks for", asked, conditions)
        ):  # fmt: skip
            known = set(wanted if given is None else given)
            if missing := next((w for w in wanted if w not in known), None):
                raise StepPlanError(
                    f"plan {self.name!r} {what} {missing!r}, which is not here",
                    fix=nearest(missing, known),
                )

    # -------------------------------------------------------------- text

    def __str__(self) -> str:
        rows = [f"name = {_value(self.name)}"]
        rows += [f"{k} = {_value(v)}" for k, v in vars(self.binding).items() if v]
        for step in self.steps:
            rows += ["", "[[step]]", f"name = {_value(step.name)}", f"run = {_value(step.run)}"]
            rows += [] if step.repeat is None else [f"repeat = {step.repeat}"]
            rows += [f"until = {_value(step.until)}"] if step.until else []
            rows += [f"resets = {_value(step.resets)}"] if step.resets else []
            if step.constants:
                rows.append("[step.constants]")
                rows += [f"{_key(k)} = {_value(v)}" for k, v in step.constants.items()]
        return "\n".join(rows) + "\n"

    @staticmethod
    def parse(text: str) -> StepPlan:
        """What `str` gave. Raises StepPlanError for anything else."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise StepPlanError("this text is no step plan", why=str(e)) from e
        steps = data.pop("step", [])
        if not (isinstance(steps, list) and all(isinstance(s, dict) for s in steps)):
            raise StepPlanError("`step` must be a list of tables", fix="begin each with [[step]]")
        binding = Binding(**_known(data, Binding, ("name",)))
        name = data.get("name")
        if not isinstance(name, str) or not all(isinstance(v, str) for v in vars(binding).values()):
            raise StepPlanError("a plan's name, model, pipeline and grid are text")
        return StepPlan(name, tuple(map(_step, steps)), binding)

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(str(self), encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> StepPlan:
        """Raises StepPlanError for what is no plan, OSError where there is no file."""
        return StepPlan.parse(Path(path).read_text(encoding="utf-8"))


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str),
    "run": lambda v: isinstance(v, str),
    "repeat": lambda v: type(v) is int,
    "until": lambda v: isinstance(v, list) and all(isinstance(e, str) for e in v),
    "resets": lambda v: isinstance(v, list) and all(isinstance(e, str) for e in v),
    "constants": lambda v: isinstance(v, dict),
}


def _step(data: Mapping[str, Any]) -> Step:
    values = _known(data, Step)
    for key, value in values.items():
        if not _TYPES[key](value):
            raise StepPlanError(f"{key} of step {data.get('name', '?')!r} cannot be {value!r}")
    until, resets = (tuple(values.get(key, ())) for key in ("until", "resets"))
    return Step(
        values.get("name", ""), values.get("run", ""), values.get("repeat"), until, resets,
        values.get("constants", {}),
    )  # fmt: skip


def _known(data: Mapping[str, Any], cls: Any, others: Sequence[str] = ()) -> dict[str, Any]:
    """The entries that are fields of the class. Raises StepPlanError for one that is unknown."""
    names = [f.name for f in fields(cls)]
    if strange := [k for k in data if k not in names and k not in others]:
        fix = nearest(strange[0], [*names, *others])
        raise StepPlanError(f"a step plan has no {strange[0]!r}", fix=fix)
    return {k: v for k, v in data.items() if k in names}


def _constant(name: str, value: Any) -> Constant:
    if isinstance(value, (list, tuple)):
        return tuple(_constant(name, v) for v in value)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise StepPlanError(f"constant {name!r} is a {type(value).__name__}", fix="use numbers or text")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Constant) -> str:
    """As TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    return f"[{', '.join(map(_value, value))}]"
