"""Tensors of an artefact: values as safetensors, and a table of how they lie in memory.

Tensors that share memory are stored once and share it again; a tensor that is not packed in the
order of its dimensions keeps its strides, because libraries pick their routines by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from effc.ir import ArtefactError
from effc.ir.types import DTYPES, DType

__all__ = ["read_tensors", "write_tensors"]

STORED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
SPARSE = 2  # a tensor that uses less than one in so many of the elements it spans is packed
ALIGN = 16  # bytes; no element type is larger

# ------------------------------------------------------------------ writing


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the values to a file; returns the table, JSON data.

    Raises ArtefactError for a tensor that is not plain memory of this CPU.
    """
    groups: dict[Any, dict[str, torch.Tensor]] = {}
    parameters = {name for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    for name, t in tensors.items():
        t = _plain(name, t)
        key = t.untyped_storage().data_ptr() if t.numel() else name
        groups.setdefault(key, {})[name] = t
    stored: dict[str, torch.Tensor] = {}
    table: dict[str, Any] = {}
    for group in groups.values():
        value, places = _lay_out(group)
        home = next(iter(group))
        stored[home] = value if value.dtype in STORED else _bytes(home, value)
        for name, t in group.items():
            strides, offset = places[name]
            table[name] = {
                "in": home, "dtype": DType.of(t.dtype).name, "shape": [*t.shape],
                "stride": [*strides], "offset": offset, "parameter": name in parameters,
            }  # fmt: skip
    try:
        save_file(stored, path)
    except SafetensorError as e:
        raise ArtefactError("the weights cannot be written", why=str(e)) from e
    return table


def _plain(name: str, t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    if t.layout is not torch.strided or t.is_quantized or not t.is_cpu:
        where = t.layout if t.is_cpu else t.device
        raise ArtefactError(
            f"weight {name!r} cannot be saved", why=f"it is stored as {where}",
            fix="compile the model with dense weights on the CPU",
        )  # fmt: skip
    return t.resolve_conj().resolve_neg()


def _lay_out(
    group: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
    """What to store for tensors of one memory, and the strides and offset of each in it."""
    first = next(iter(group.values()))
    if all(_place(t) == _place(first) for t in group.values()):
        count = first.numel()
        if first.is_contiguous() or SPARSE * count < _extent(first):
            made = first.contiguous()
            return made, dict.fromkeys(group, (made.stride(), 0))
    start = min(t.storage_offset() * t.element_size() for t in group.values()) // ALIGN * ALIGN
    end = max((t.storage_offset() + _extent(t)) * t.element_size() for t in group.values())
    memory: Any = torch.empty(0, dtype=torch.uint8)
    memory.set_(first.untyped_storage(), start, (end - start,), (1,))
    places = {
        name: (t.stride(), t.storage_offset() - start // t.element_size())
        for name, t in group.items()
    }
    return memory, places


def _place(t: torch.Tensor) -> tuple[Any, ...]:
    return (t.dtype, t.shape, t.stride(), t.storage_offset())


def _extent(t: torch.Tensor) -> int:
    """Elements from the first to the last, both counted."""
    if not t.numel():
        return 0
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1


def _bytes(name: str, t: torch.Tensor) -> torch.Tensor:
    """The memory of a packed tensor, for element types that safetensors lacks."""
    try:
        return t.reshape(-1).view(torch.uint8)
    except RuntimeError as e:
        why = f"torch cannot show {t.dtype} as bytes"
        raise ArtefactError(f"weight {name!r} cannot be saved", why=why) from e


# ------------------------------------------------------------------ reading


def read_tensors(
    data: bytes, table: Mapping[str, Any], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors that `write_tensors` was given: parameters as such, memory shared as it was.

    device: where to put them. Raises KeyError, TypeError, ValueError or RuntimeError where values
    and table do not fit.
    """
    try:
        stored = load(data)
    except SafetensorError as e:
        raise ValueError(f"the weights cannot be read: {e}") from e
    # into memory of torch's own, aligned for vectors: what load gives lies where the file had it
    memory = {name: stored.pop(name).to(device, copy=True) for name in list(stored)}
    made: dict[Any, torch.Tensor] = {}
    found = {}
    for name, row in table.items():
        key = repr({**row, "parameter": None})
        if key not in made:
            made[key] = _tensor(memory[row["in"]], row)
        t = made[key]
        if row["parameter"] and not isinstance(t, nn.Parameter):
            t = made[key] = nn.Parameter(t, requires_grad=False)
        found[name] = t
    return found


def _tensor(memory: torch.Tensor, row: Mapping[str, Any]) -> torch.Tensor:
    dtype = DTYPES[row["dtype"]].torch
    shape, stride = tuple(row["shape"]), tuple(row["stride"])
    if (memory.dtype, memory.shape, memory.stride()) == (dtype, shape, stride):
        if not row["offset"]:
            return memory
    flat = memory.reshape(-1)
    if flat.dtype != dtype:
        size = DTYPES[row["dtype"]].bits // 8
        flat = flat.view(torch.uint8)[: flat.nbytes // size * size].view(dtype)  # type: ignore[arg-type]
    return flat.as_strided(shape, stride, row["offset"])
