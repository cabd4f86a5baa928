"""llama.cpp: a Llama's weights as GGUF, and greedy decoding by the C API in `llama-cpp-python`.

That package is built from source. `python -m effc.benchmarks.llama_cpp` prints the CMake options
for this CPU: llama.cpp's own choice, -march=native, takes AMX wherever the CPU lists it, which ends
the process on virtual machines that do not allow it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from effc.backends.cpu.features import LEVELS, CpuFeatures, detect
from effc.examples.zoo import gguf_llama

KINDS = ("F32", "F16", "BF16")
LEVEL_OPTIONS = {"default": (), "avx2": ("AVX", "AVX2", "BMI2", "FMA", "F16C"),
                 "avx512": ("AVX512",)}  # fmt: skip
EXTENSION_OPTIONS = {
    "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16",
}  # fmt: skip
FIXED = ("rope_type", "default")


def missing() -> str | None:
    """Why it cannot be used here, with the command that installs it; None where it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        options = " ".join(cmake_options(detect()))
        return f'llama_cpp is not installed: CMAKE_ARGS="{options}" pip install "effc[llama]"'
    return None


def cmake_options(cpu: Any) -> list[str]:
    """For CMAKE_ARGS: the instructions of a CpuFeatures, AMX left out; for another CPU none."""
    options = ["-DLLAVA_BUILD=OFF"]  # of images
    if not isinstance(cpu, CpuFeatures):
        return options
    names = [n for level in LEVELS[: LEVELS.index(cpu.level) + 1] for n in LEVEL_OPTIONS[level]]
    names += [name for extension, name in EXTENSION_OPTIONS.items() if cpu.has(extension)]
    return [*options, "-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in names)]


# ------------------------------------------------------------------ weights


def write(model: LlamaForCausalLM, path: Path, kind: str) -> Path:
    """The model as a GGUF file without a vocabulary: matrices as `kind`, norms in float32.

    Raises ValueError for what a GGUF of architecture llama cannot say.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = model.config
    _check(config)
    w = GGUFWriter(path, "llama")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_vocab_size(config.vocab_size)
    w.add_tokenizer_model("none")
    for name, value in model.named_parameters():  # a head tied to the embedding comes once
        data = _pairs(name, value.detach().float(), config).numpy()
        stored = GGMLQuantizationType[kind if value.dim() == 2 else "F32"]
        w.add_tensor(_renamed(name), quants.quantize(data, stored), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _check(config: LlamaConfig) -> None:
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") != "default":
        raise ValueError(f"rope_type {rope.get('rope_type')!r} is not written, only 'default'")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError("heads that are not an equal part each of the hidden size are not written")


INNER = {theirs: ours for ours, theirs in gguf_llama.NAMES.items()}
OUTER = {theirs: ours for ours, theirs in gguf_llama.OUTER.items()}


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{OUTER[stem]}.{last}"
    _, _, layer, inner = stem.split(".", 3)
    if inner not in INNER:
        raise ValueError(f"{name} has no place in a llama")
    return f"blk.{layer}.{INNER[inner]}.{last}"


def _pairs(name: str, w: Tensor, config: LlamaConfig) -> Tensor:
    """Rows of q and k from RoPE on halves to RoPE on adjacent pairs (0, 1), (2, 3)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return w.contiguous()
    return w.reshape(count, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


# ------------------------------------------------------------------ generation


class Session:
    """A model and one sequence. half: whether keys and values are kept in float16."""

    def __init__(self, path: Path, threads: int, capacity: int, half: bool) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.said: list[str] = []
        # ctypes' own pointer to it must live as long as the library may call it
        self._log = llama_cpp.llama_log_callback(lambda level, text, _: self.said.append(text))
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        read = llama_cpp.llama_model_default_params()
        read.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # the file is gone when it is used
        read.n_gpu_layers = 0
        self._model = self._made(
            llama_cpp.llama_model_load_from_file(str(path).encode(), read), path.name
        )
