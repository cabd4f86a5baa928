"""Passes: efficiency papers as graph rewrites, and the analyses they read."""

from . import (
    cache,
    choose_layout,
    compose_pointwise,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    fold,
    fold_batch_norm,
    fold_constants,
    fold_norm_affine,
    fuse_regions,
    join_slices,
    merge_qkv,
    raise_ops,
    simplify,
    stack_pointwise,
)

__all__ = [
    "cache",
    "choose_layout",
    "compose_pointwise",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "fold",
    "fold_batch_norm",
    "fold_constants",
    "fold_norm_affine",
    "fuse_regions",
    "join_slices",
    "merge_qkv",
    "raise_ops",
    "simplify",
    "stack_pointwise",
]
