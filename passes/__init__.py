"""Passes: efficiency papers as graph rewrites, and the analyses they read."""

from . import (
    eliminate_common_subexpressions,
    eliminate_dead_code,
    fold_batch_norm,
    fold_constants,
    simplify,
)

__all__ = [
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "fold_batch_norm",
    "fold_constants",
    "simplify",
]
