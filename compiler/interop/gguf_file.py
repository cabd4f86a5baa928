"""GGUF files of llama.cpp: their tensors under the names, and in the row order, of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effc.ir import InputError, OptionError
from effc.ir.formats import Encoded
from effc.ir.types import DType, f32

from .checkpoint import Checkpoint, Value
from .gguf_types import PLAIN, encoded, unmapped

NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp -> transformers, inside a block."""
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FREQUENCIES = "rope_freqs.weight"  # part of transformers' configuration, not of its weights
ADJACENT = ("llama",)
"""Architectures whose q and k have rows for RoPE on pairs (0, 1), (2, 3), not on halves."""
KNOWN = (*ADJACENT, "qwen2", "qwen3")


def read_gguf(path: Path, parts: DType = f32, dense: bool = False) -> Checkpoint:
    """What a file holds. dense: what has no type of ours comes as dense numbers.

    Raises InputError for another architecture, and, all at once, for what cannot be had.
    """
    file = GgufFile.open(path)
    tensors, arch = file.tensors, file["general.architecture"]
    if arch not in KNOWN:
        raise InputError(
            f"{path.name} holds a model of architecture {arch!r}",
            why="how its tensors differ from transformers' is known here for " + ", ".join(KNOWN),
        )
    reasons = {t.tensor_type.name: unmapped(t.tensor_type.name) for t in tensors}
    refused = {kind: why for kind, why in reasons.items() if why is not None}
    if refused and not dense:
        raise InputError(
            f"{path.name} has tensors of {', '.join(refused)}",
            why="; ".join(f"{kind}: {why}" for kind, why in refused.items()),
            fix='read it with unmapped="dense", as numbers that nothing compresses',
        )
    entries: dict[str, Callable[[], Value]] = {}
    for t in tensors:
        if t.name != FREQUENCIES:
            heads = _turned(t.name, file, arch)
            entries[renamed(t.name)] = partial(_value, t, heads, parts)
    if "model.embed_tokens.weight" in entries:  # tied: stored once
        entries.setdefault("lm_head.weight", entries["model.embed_tokens.weight"])
    return Checkpoint(path.name, entries)


@dataclass(frozen=True)
class GgufFile:
    """A file's fields, by name, and its tensors as `gguf` has them."""

    name: str
    fields: Mapping[str, Any]
    tensors: Sequence[Any]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Raises OptionError where `gguf` is not installed, InputError for what is no GGUF file."""
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise OptionError("GGUF files are read by package gguf", fix="pip install gguf") from e
        try:
            reader = GGUFReader(path)
        except ValueError as e:
            raise InputError(f"{path.name} is no GGUF file", why=str(e)) from e
        return GgufFile(path.name, reader.fields, list(reader.tensors))

    def __getitem__(self, name: str) -> Any:
        """Raises InputError where the file does not say it."""
        if name not in self.fields:
            raise InputError(f"{self.name} does not say {name}")
        return self.fields[name].contents()

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields[name].contents() if name in self.fields else default


def renamed(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block is not None and block[2] in NAMES:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.{block[3]}"
    stem, _, last = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{last}"
    raise InputError(f"no part of a model of {', '.join(KNOWN)} is called {name}")


def _turned(name: str, file: GgufFile, arch: str) -> int | None:
    """Heads whose rows are in another order than in transformers; None where none are."""
    if arch not in ADJACENT:
        return None
    heads = file[f"{arch}.attention.head_count"]
    found = {"attn_q": heads, "attn_k": file.get(f"{arch}.attention.head_count_kv", heads)}
    return found.get(name.split(".")[-2])


def _value(tensor: Any, heads: int | None, parts: DType) -> Value:
    """The tensor, its rows in transformers' order."""
    from gguf import dequantize

    kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
    if kind in PLAIN or unmapped(kind) is not None:
        numbers = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        return in_halves(numbers.reshape(shape), heads)
    value = encoded(tensor.data, kind, parts)
    if value.type.shape != shape:
        raise InputError(f"{tensor.name} has {list(value.type.shape)} numbers, not {list(shape)}")
    return Encoded(value.type, tuple(in_halves(p, heads) for p in value.parts))


def in_halves(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows for RoPE on adjacent pairs as rows for RoPE on halves, head by head."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape).contiguous()
