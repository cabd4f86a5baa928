"""What a file of a dump does when it is run: parse itself, interpret, say what came out.

python out/001_fold-batch-norm.py             values beside it, or random ones
python out/001_fold-batch-norm.py N=1 H=64    symbolic sizes for random inputs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from effc.instruments import evaluate
from effc.ir import EffcError, Graph, InputError, Number, Weight, nearest, parse
from effc.ir.interpret import random_input
from effc.ir.types import type_text

__all__ = [
    "environment", "fill_weights", "load_values", "main", "random_inputs", "rerun",
    "sizes_of",
]  # fmt: skip

DEFAULT_SIZE = 16


def main(path: str, arguments: Sequence[str] | None = None) -> None:
    """Run the graph in a file and print its results; exits with 1 and a sentence on a mistake."""
    try:
        text = rerun(Path(path), sys.argv[1:] if arguments is None else arguments)
    except EffcError as e:
        sys.exit(str(e))
    sys.stdout.write(text)


def rerun(path: Path, arguments: Sequence[str] = ()) -> str:
    """What `main` prints. Raises EffcError."""
    graph = parse(path.read_text(encoding="utf-8"))
    said = [f"{path.name}: {len(graph.nodes)} nodes"]
    missing = fill_weights(graph, load_values(path.parent / "weights.safetensors"))
    if missing:
        said.append(f"random values for {missing} weights: no weights.safetensors beside this file")
    given = sizes_of(arguments)
    saved = {} if given else load_values(path.parent / "inputs.safetensors")
    if saved.keys() >= {i.key for i in graph.inputs}:
        inputs = [_plain(saved[i.key], isinstance(i.of, Number)) for i in graph.inputs]
    else:
        env = environment(graph, given, _report_sizes(path.parent))
        inputs = random_inputs(graph, env)
        shown = ", ".join(f"{s}={v}" for s, v in sorted(env.items(), key=str))
        said.append(f"random inputs{f', {shown}' if shown else ''}")
    for node, value in zip(graph.outputs, evaluate(graph, inputs)):
        said.append(f"{type_text(node.type)}: {_checksum(value)}")
    return "\n".join(said) + "\n"


def fill_weights(graph: Graph, by_digest: Mapping[str, torch.Tensor], random: bool = True) -> int:
    """Give every weight without values its own, else random ones; returns how many had none."""
    missing = 0
    for node in graph.nodes:
        if isinstance(node, Weight) and node.data is None:
            found = by_digest.get(node.digest)
            missing += found is None
            data = _random_weight(node) if found is None and random else found
            object.__setattr__(node, "data", data)
        missing += sum(fill_weights(region, by_digest, random) for region in node.regions)
    return missing


def random_inputs(graph: Graph, env: Mapping[sympy.Symbol, int | float]) -> list[Any]:
    """A value for every input, from fixed seeds."""
    return [
        env[i.symbol] if isinstance(i.of, Number) else random_input(i.of, env, seed)
        for seed, i in enumerate(graph.inputs)
    ]


def _random_weight(node: Weight) -> torch.Tensor:
    """Positive, so that variances are valid, and shrinking with fan-in, so that sums stay small."""
    value = random_input(node.of, {}, seed=int(node.digest or "0", 16))
    if not value.is_floating_point():
        return value
    fan_in = max(1, value[0].numel()) if value.dim() > 1 else 1
    return (value.abs() / fan_in).to(value.dtype)


def environment(
    graph: Graph, given: Mapping[str, int | float], known: Mapping[str, int | float]
) -> dict[sympy.Symbol, int | float]:
    """A number for every size of the inputs: given, else known, else a default."""
    symbols = {s for i in graph.inputs for s in _symbols(i.of)}
    symbols |= {i.symbol for i in graph.inputs if isinstance(i.of, Number)}
    names = {str(s) for s in symbols}
    unknown = given.keys() - names
    if unknown:
        fix = nearest(min(unknown), names) if names else "all sizes of this graph are known"
        raise InputError(f"the graph has no size {min(unknown)}", fix=fix)
    sizes = {**known, **given}
    return {s: sizes.get(str(s), DEFAULT_SIZE if s.is_integer else 1.0) for s in symbols}


def _symbols(t: Any) -> set[sympy.Symbol]:
    if isinstance(t, tuple):
        return set().union(*map(_symbols, t)) if t else set()
    return {s for d in getattr(t, "shape", ()) for s in getattr(d, "free_symbols", ())}


def sizes_of(arguments: Sequence[str]) -> dict[str, int | float]:
    """("N=4", "s=0.5") as numbers. Raises InputError for anything else."""
    found: dict[str, int | float] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            found[name] = float(value) if "." in value else int(value)
        except ValueError as e:
            raise InputError(f"not a size: {argument!r}", fix="write NAME=NUMBER") from e
    return found


def _report_sizes(folder: Path) -> dict[str, int | float]:
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8")).get("sizes", {})
    except (OSError, json.JSONDecodeError, AttributeError):
        return {}  # the file was taken out of its dump


def load_values(path: Path) -> dict[str, torch.Tensor]:
    """Tensors in a safetensors file; none where there is no file."""
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"cannot read {path.name}", why=str(e), fix="remove it, or dump again"
        ) from e


def _plain(value: torch.Tensor, is_number: bool) -> Any:
    return value.item() if is_number else value


def _checksum(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "; ".join(map(_checksum, value))
    if not isinstance(value, torch.Tensor):
        return str(value)
    number = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    number = number.double()
    if not number.numel():
        return "empty"
    return f"mean {number.mean().item():.6g}, norm {number.norm().item():.6g}"
