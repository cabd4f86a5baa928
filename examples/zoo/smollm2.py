"""SmolLM2-135M-Instruct: transformers' Llama with the stored 4-bit weights as float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .files import dequantised_nibbles, dequantised_rows, filled, tensors


def load(folder: Path) -> LlamaForCausalLM:
    """The language model, 540 MB in float32; the head shares the embedding's weight."""
    stored = json.loads((folder / "config.json").read_text())
    theta = stored.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    net = LlamaForCausalLM(LlamaConfig(**stored, rope_parameters=rope))
    state = tensors(*sorted(folder.glob("model-*.safetensors")))
    state = {**dequantised_rows(state), **dequantised_nibbles(state)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return filled(net, state)


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """The prompt "Gravity is" and the logits after it."""
    stored = tensors(folder / "golden.safetensors")
    kwargs = {"input_ids": stored["prompt_ids"][None], "use_cache": False, "logits_to_keep": 1}
    return (), kwargs, stored["logits_last"][None, None]
