"""Depth: blocks of a model left out, stored once, or made of one another."""

from . import dedup_params, distil, drop_blocks, roll_blocks, share_blocks

__all__ = ["dedup_params", "distil", "drop_blocks", "roll_blocks", "share_blocks"]
