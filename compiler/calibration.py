"""Calibration data: the caller's argument sets as values of a graph's inputs; a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from effc.ir import InputError, OptionError
from effc.passes.base import Pipeline

__all__ = ["Arguments", "argument_sets", "asked_for", "flattened", "progress"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one call: positional, by name


def asked_for(passes: Pipeline, calibrate: object) -> None:
    """Raises OptionError where data is missing that a pass needs, or given that none reads."""
    reading = [p for p in passes if p.calibrated]
    needing = [str(p) for p in reading if not p.remembers]
    if needing and calibrate is None:
        raise OptionError(
            f"{needing[0]} needs calibration data",
            fix="calibrate=batches, an iterable of sets of arguments",
        )
    if calibrate is not None and not reading:
        raise OptionError(
            "calibrate is for passes that learn from data, and no pass of this pipeline does",
            fix="drop calibrate, or name such a pass in recipe: drop-blocks, distil",
        )


def argument_sets(calibrate: Iterable[Any]) -> list[Arguments]:
    """Each item is a call: a tensor, a tuple of arguments, or a mapping of named ones.

    Read once and to its end, so a DataLoader or a generator will do. Raises OptionError where it is
    empty or no iterable of such items.
    """
    if isinstance(calibrate, (torch.Tensor, Mapping, str)) or not isinstance(calibrate, Iterable):
        raise OptionError(
            f"calibrate must be an iterable of sets of arguments, not {type(calibrate).__name__}",
            fix="calibrate=[batch, ...]",
        )
    sets = list(map(_call, calibrate))
    if not sets:
        raise OptionError("calibrate has no set of arguments")
    return sets


def _call(item: Any) -> Arguments:
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    if isinstance(item, torch.Tensor):
        return (item,), {}
    raise OptionError(
        f"an item of calibrate is a {type(item).__name__}",
        fix="give a tensor, a tuple of arguments, or a mapping of named arguments",
    )


def flattened(sets: Sequence[Arguments], example: Arguments) -> list[list[Any]]:
    """The leaves of each call in the order of the example's. Raises InputError at a difference.

    What is no tensor is part of the compiled graph, so it must be as in the example.
    """
    wanted, spec = pytree.tree_flatten(example)
    names = list(example[1])
    found = []
    for position, (args, kwargs) in enumerate(sets):
        if kwargs.keys() == set(names):
            kwargs = {name: kwargs[name] for name in names}
        leaves, got = pytree.tree_flatten((args, kwargs))
        if got != spec:
            raise InputError(f"set {position} of calibrate differs from the example inputs in form")
        for leaf, want in zip(leaves, wanted):
            if not isinstance(want, (torch.Tensor, int, float)) and leaf != want:
                raise InputError(f"set {position} of calibrate has {leaf!r}, the example {want!r}")
        found.append(leaves)
    return found


def progress(steps: Sequence[Any], title: str) -> Iterable[Any]:
    """The steps, with a bar on standard error if that is a terminal. Ctrl-C takes the bar away."""
    from rich.console import Console
    from rich.progress import track

    shown = sys.stderr.isatty()
    return track(steps, title, console=Console(stderr=True), transient=True, disable=not shown)
