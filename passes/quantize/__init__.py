"""Fewer bits: weights, activations and caches as codes with scales."""

from . import (
    assign_bits,
    calibrate_blocks,
    fold_scales,
    quantize_activations,
    quantize_cache,
    quantize_weights,
)

__all__ = [
    "assign_bits",
    "calibrate_blocks",
    "fold_scales",
    "quantize_activations",
    "quantize_cache",
    "quantize_weights",
]
