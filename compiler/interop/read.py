"""`read(path)`: a GGUF file, or a folder (or file) of safetensors with its `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from effc.ir import InputError, OptionError, nearest
from effc.ir.types import DTYPES

from .checkpoint import Checkpoint, Value
from .gguf_file import read_gguf
from .packed import columns_in_order, from_awq, from_compressed, from_gptq

PARTS = ("f32", "f16")
UNMAPPED = ("refuse", "dense")
ALLOWED = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (2, 4, 8)}
SCATTERED = "columns of a group are not neighbours, and our types have groups of neighbours"
COMPUTED = "rotary_emb.inv_freq"  # a buffer that transformers saved once, and computes
BY_TABLE = "its levels come from a table and are not evenly spaced"
REASONS = {
    "bitsandbytes": f"{BY_TABLE} (nf4, fp4), or outliers lie apart (int8)",
    "fp8": "its codes are floats, whose levels are not evenly spaced",
    "fbgemm_fp8": "its codes are floats, whose levels are not evenly spaced",
    "mxfp4": BY_TABLE,
    "aqlm": "weights are sums of vectors from tables",
    "vptq": "weights are vectors from tables",
    "quip": "weights are vectors from a lattice, in a rotated basis",
    "spqr": "outliers lie apart in a sparse matrix",
    "higgs": "weights are vectors from a grid, in a rotated basis",
    "hqq": "its layout of words depends on the kernel that it was saved for",
    "eetq": "its columns are shuffled for one kernel",
}


def read(path: str | os.PathLike[str], parts: str = "f32", unmapped: str = "refuse") -> Checkpoint:
    """What a checkpoint holds; its values are read when they are asked for.

    path: a .gguf file; a folder with config.json and safetensors, as transformers saves one; one
    file of such a folder. parts: "f32" or "f16", what holds the zeros and products of scales of
    GGUF (see effc.interop). unmapped: "refuse", or "dense": numbers that nothing compresses.

    Raises InputError for what cannot be read, with the reason.
    """
    for name, value, allowed in (("parts", parts, PARTS), ("unmapped", unmapped, UNMAPPED)):
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}", fix=nearest(value, allowed))
    path, dense = Path(path), unmapped == "dense"
    if not path.exists():
        raise InputError(f"there is no {path}")
    if path.suffix == ".gguf":
        return read_gguf(path, DTYPES[parts], dense)
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.safetensors")) if path.is_dir() else [path]
    return _Folder.of(folder, files).checkpoint(dense)


@dataclass(frozen=True)
class _Folder:
    """files: which file a tensor is in. told: what the configuration says of quantisation."""

    name: str
    files: dict[str, Path]
    tied: bool
    told: dict[str, Any]

    @staticmethod
    def of(folder: Path, paths: Iterable[Path]) -> _Folder:
        files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as e:
                raise InputError(f"{path.name} is no file of safetensors", why=str(e)) from e
        if not files:
            raise InputError(f"{folder.name} has no *.safetensors", fix="name a .gguf file or a "
                             "folder that transformers saved")  # fmt: skip
        config = {}
        for name in ("quantize_config.json", "config.json"):  # AutoGPTQ writes one of its own
            if (folder / name).exists():
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                own = {"quant_method": "gptq", **found}
                config |= found if name == "config.json" else {"quantization_config": own}
        told = config.get("quantization_config") or config.get("compression_config") or {}
        return _Folder(folder.name, files, bool(config.get("tie_word_embeddings")), told)

    def checkpoint(self, dense: bool) -> Checkpoint:
        method = self.told.get("quant_method")
        readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
        packed: dict[str, tuple[Callable[[], Value], set[str]]] = {}
        if method in readers:
            packed = readers[method](self, dense)
        elif method is not None:
            why = REASONS.get(method, f"have {', '.join(readers)} and GGUF")
            raise InputError(f"{self.name} is quantised by {method}", why=why)
        taken = set().union(*(names for _, names in packed.values()))
        entries: dict[str, Callable[[], Value]] = {name: make for name, (make, _) in packed.items()}
        for name in self.files:
            if name not in taken and not name.endswith(COMPUTED):
                entries[name] = partial(self.tensor, name)
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if self.tied and table in entries:
            entries.setdefault(head, entries[table])
        return Checkpoint(self.name, entries)

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def stems(self, last: str) -> list[str]:
        """Layers that have a tensor of this name."""
        return [n[: -len(last) - 1] for n in self.files if n.endswith(f".{last}")]

    def bits(self, method: str, told: Any) -> int:
        if told not in ALLOWED[method]:
            have = ", ".join(map(str, ALLOWED[method]))
            raise InputError(f"{self.name} has {told} bits", why=f"{method} has {have} here")
        return told

    def group(self, told: int | None) -> int | None:
        return None if told is None or told < 1 else told


Layers = dict[str, tuple[Callable[[], Value], set[str]]]
"""Weight -> what makes it, and the tensors that it is made of."""


def _gptq(f: _Folder, dense: bool) -> Layers:
    bits, group = f.bits("gptq", f.told.get("bits")), f.group(f.told.get("group_size"))
    layout = f.told.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        why = f"layout {layout!r} is made for one kernel; have gptq and gptq_v2"
        raise InputError(f"{f.name} cannot be read", why=why)

    def make(stem: str) -> Value:
        qweight, qzeros, scales = (f.tensor(f"{stem}.{n}") for n in ("qweight", "qzeros", "scales"))
        value = from_gptq(qweight, qzeros, scales, bits, _regular(group, qweight, bits),
                          layout == "gptq_v2")  # fmt: skip
        if f"{stem}.g_idx" not in f.files:
            return value
        g_idx = f.tensor(f"{stem}.g_idx").long()
        if columns_in_order(g_idx, group):
            return value
        if not dense:
            raise InputError(
                f"{stem} of {f.name} was quantised in another order of columns (desc_act)",
                why=SCATTERED,
                fix='read it with unmapped="dense", as numbers that nothing compresses',
            )
        zero = value["zero"].float() if "zero" in value.type.format.parts(value.type) else 0.0
        scale = value["scale"].float()
        if isinstance(zero, torch.Tensor):
            zero = zero[:, g_idx]
        return (value["codes"].float() - zero) * scale[:, g_idx]

    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {
        f"{s}.weight": (partial(make, s), {f"{s}.{n}" for n in parts}) for s in f.stems("qweight")
    }


def _regular(group: int | None, qweight: torch.Tensor, bits: int) -> int | None:
    return group if group is not None and group < qweight.shape[0] * 32 // bits else None


def _awq(f: _Folder, dense: bool) -> Layers:
    f.bits("awq", f.told.get("bits", f.told.get("w_bit")))
    group = f.group(f.told.get("group_size", f.told.get("q_group_size")))
    version = str(f.told.get("version", "gemm")).lower()
    if version != "gemm":
        why = f"version {version!r} lays words out for one kernel; have gemm"
        raise InputError(f"{f.name} cannot be read", why=why)

    def make(stem: str) -> Value:
        qweight, qzeros, scales = (f.tensor(f"{stem}.{n}") for n in parts)
        return from_awq(qweight, qzeros, scales, group)

    parts = ("qweight", "qzeros", "scales")
    return {
        f"{s}.weight": (partial(make, s), {f"{s}.{n}" for n in parts}) for s in f.stems("qweight")
    }


def _compressed(f: _Folder, dense: bool) -> Layers:
    layout = f.told.get("format")
    if layout not in ("pack-quantized", "int-quantized"):
        raise InputError(
            f"{f.name} has compressed-tensors in format {layout!r}",
            why="have pack-quantized and int-quantized, whose codes are integers",
        )
    schemes = [g.get("weights") or {} for g in f.told.get("config_groups", {}).values()]
    if len({json.dumps(s, sort_keys=True) for s in schemes}) != 1:
        why = f"{len(schemes)} groups of layers are quantised in different ways"
        raise InputError(f"{f.name} cannot be read", why=why)
    scheme = schemes[0]
    bits, strategy = f.bits("compressed-tensors", scheme.get("num_bits")), scheme.get("strategy")
    if scheme.get("type", "int") != "int" or strategy not in ("group", "channel", "tensor"):
        why = f"codes of type {scheme.get('type')!r} with scales by {strategy}"
        raise InputError(f"{f.name} cannot be read", why=why, fix="int codes by group, channel or "
                         "tensor can be")  # fmt: skip
    group = f.group(scheme.get("group_size")) if strategy == "group" else None
    last = "weight_packed" if layout == "pack-quantized" else "weight"

    def make(stem: str) -> Value:
        packed, scale = f.tensor(f"{stem}.{last}"), f.tensor(f"{stem}.weight_scale")
        zero = f"{stem}.weight_zero_point"
        order = f"{stem}.weight_g_idx"
        if order in f.files and not columns_in_order(f.tensor(order), group):
            raise InputError(
                f"{stem} of {f.name} was quantised in another order of columns (actorder)",
                why=SCATTERED,
            )
        shape = tuple(packed.shape)
        if last == "weight_packed":
            shape = tuple(f.tensor(f"{stem}.weight_shape").tolist())
        offsets = f.tensor(zero) if zero in f.files else None
        return from_compressed(packed, scale, offsets, shape, bits, group)  # type: ignore[arg-type]

    parts = (last, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    more = ("input_scale", "input_zero_point")  # of activations, which stay float here
    return {
        f"{s}.weight": (partial(make, s), {f"{s}.{n}" for n in (*parts, *more)})
        for s in f.stems("weight_scale")
    }
