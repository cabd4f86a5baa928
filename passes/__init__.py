"""Passes: efficiency papers as graph rewrites, and the analyses they read."""

from . import (
    compose_pointwise,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    fold_batch_norm,
    fold_constants,
    fuse_regions,
    simplify,
    stack_pointwise,
)

__all__ = [
    "compose_pointwise",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "fold_batch_norm",
    "fold_constants",
    "fuse_regions",
    "simplify",
    "stack_pointwise",
]
