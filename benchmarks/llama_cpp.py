"""llama.cpp: a Llama's weights as GGUF, and greedy decoding by the C API in `llama-cpp-python`.

That package is built from source. `python -m effc.benchmarks.llama_cpp` prints the CMake options
for this CPU: llama.cpp's own choice, -march=native, takes AMX wherever the CPU lists it, which ends
the process on virtual machines that do not allow it.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from effc.backends.cpu.features import LEVELS, CpuFeatures, detect

KINDS = ("F32", "F16", "BF16")
LEVEL_OPTIONS = {"default": (), "avx2": ("AVX", "AVX2", "BMI2", "FMA", "F16C"),
                 "avx512": ("AVX512",)}  # fmt: skip
EXTENSION_OPTIONS = {
    "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16",
}  # fmt: skip


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


def write(model: Any, path: Path, kind: str) -> Path:
    """A transformers Llama as a GGUF file without a vocabulary: matrices as `kind`, norms float32.

    Raises ValueError for what a GGUF of architecture llama cannot say.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = model.config
    theta = _theta(config)
    w = GGUFWriter(path, "llama")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(theta)
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


def _theta(config: Any) -> float:
    """Of rotary embedding, where the rest is as GGUF takes it to be."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not written, only 'default'")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError("heads that are not an equal part each of the hidden size are not written")
    return rope["rope_theta"]


def _renamed(name: str) -> str:
    """transformers -> llama.cpp"""
    from effc.examples.zoo.gguf_llama import NAMES, OUTER

    stem, _, last = name.rpartition(".")
    inner = stem.split(".", 3)[3] if stem.startswith("model.layers.") else None
    for ours, theirs in (OUTER if inner is None else NAMES).items():
        if theirs == (inner or stem):
            return f"{ours}.{last}" if inner is None else f"blk.{stem.split('.')[2]}.{ours}.{last}"
    raise ValueError(f"{name} has no place in a GGUF of a llama")


def _pairs(name: str, w: Tensor, config: Any) -> Tensor:
    """Rows of q and k from RoPE on halves to RoPE on adjacent pairs (0, 1), (2, 3)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return w.contiguous()
    return w.reshape(count, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


# ------------------------------------------------------------------ generation


class Session:
    """A model and a sequence of at most `capacity` tokens.

    half: keys and values are kept in float16, which is llama.cpp's own choice. Raises RuntimeError
    where llama.cpp refuses the file; what it says of it is on stderr.
    """

    def __init__(self, path: Path, threads: int, capacity: int, half: bool = True) -> None:
        import llama_cpp as library

        self._library: Any = library
        library.llama_backend_init()
        how = library.llama_model_default_params()
        how.load_mode = library.LLAMA_LOAD_MODE_NONE  # into memory: the file may go away
        how.n_gpu_layers = 0
        model = library.llama_model_load_from_file(str(path).encode(), how)
        if model is None:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        weakref.finalize(self, library.llama_model_free, model)
        of = library.llama_context_default_params()
        of.n_ctx = of.n_batch = of.n_ubatch = capacity
        of.n_threads = of.n_threads_batch = threads
        of.type_k = of.type_v = library.GGML_TYPE_F16 if half else library.GGML_TYPE_F32
        self._context = library.llama_init_from_model(model, of)
        if self._context is None:
            raise RuntimeError(f"llama.cpp cannot run {path.name} with {capacity} tokens")
        weakref.finalize(self, library.llama_free, self._context)  # runs before the model's
        self._greedy = library.llama_sampler_init_greedy()
        weakref.finalize(self, library.llama_sampler_free, self._greedy)

    def generate(self, prompt: Sequence[int], count: int, told: Callable[[int], object]) -> None:
        """Tell the `count` most probable tokens after a prompt, each when it is known."""
        library, context = self._library, self._context
        library.llama_memory_clear(library.llama_get_memory(context), True)
        ids = (library.llama_token * len(prompt))(*prompt)
        for made in range(count):
            if code := library.llama_decode(context, library.llama_batch_get_one(ids, len(ids))):
                raise RuntimeError(f"llama_decode returned {code} after {made} tokens")
            token = library.llama_sampler_sample(self._greedy, context, -1)
            told(token)
            ids = (library.llama_token * 1)(token)


if __name__ == "__main__":
    print(" ".join(cmake_options(detect())))  # noqa: T201
