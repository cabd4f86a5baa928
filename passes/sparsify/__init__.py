"""Fewer numbers: groups of weights left out, and what is left trained to make up for them."""

from . import prune_groups, tune_blocks, tune_scales

__all__ = ["prune_groups", "tune_blocks", "tune_scales"]
