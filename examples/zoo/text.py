"""Text as windows of tokens, and how well a language model foretells them."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def read(path: Path) -> str:
    """The text of a file, plain or .gz."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def windows(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """[windows, length] ids: the text tokenised once and cut without overlap; the rest is dropped.

    Raises ValueError where the text has fewer than `count` windows.
    """
    ids = torch.tensor(tokenizer.encode(text).ids)
    found = ids[: len(ids) // length * length].reshape(-1, length)
    if count is not None and len(found) < count:
        raise ValueError(f"the text has {len(found)} windows of {length} tokens, not {count}")
    return found[:count]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean nats a token: logits [B, T, V] at each position against the ids [B, T] after it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> float:
    """exp of the mean loss over batches [B, T] of ids, all of one size. logits: ids -> [B, T, V]"""
    losses = [float(next_token_loss(logits(ids), ids)) for ids in batches]
    return math.exp(sum(losses) / len(losses))
