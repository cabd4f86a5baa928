"""all-MiniLM-L6-v2: transformers' BERT encoder, mean over tokens, L2 norm; int8 rows as float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from .files import dequantised_rows, filled, metadata, tensors


class SentenceEncoder(nn.Module):
    """Token ids of sentences -> unit vectors."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] ids and 0/1 mask -> [B, C]."""
        h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(h.dtype)
        return F.normalize((h * weight).sum(1) / weight.sum(1))


def load(folder: Path) -> SentenceEncoder:
    """The encoder; its `bert` is the transformers model."""
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    bert = BertModel(config, add_pooling_layer=False)
    state = dequantised_rows(tensors(folder / "minilm_l6_v2_int8.safetensors"))
    return SentenceEncoder(filled(bert, state)).eval()


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """Four sentences, padded; the vectors are the float32 model's (cosine 0.9993 to int8 rows)."""
    path = folder / "golden.safetensors"
    stored = metadata(path)
    ids = [torch.tensor(json.loads(stored[f"ids_{i}"])) for i in range(4)]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    kwargs = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    return (), kwargs, tensors(path)["embedding_fp32"]
