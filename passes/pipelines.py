"""Pipelines by name, as text: what torch.compile runs, and the short form for reading a graph."""

from __future__ import annotations

# Only names and shapes: bit for bit the captured program, without its clutter.
CANONICAL = "simplify,eliminate-common-subexpressions,eliminate-dead-code"

# Everything exact, nothing to configure. Layers are recognised first and folded next; layouts come
# after folds, which make and unmake convolutions; regions come last, over what is left.
DEFAULT = ",".join(
    (
        "simplify",
        "raise-ops",
        "simplify",
        "eliminate-common-subexpressions",
        "fold-batch-norm",
        "compose-pointwise",
        "stack-pointwise",
        "fold-constants",
        "merge-qkv",
        "join-slices",
        "choose-layout",
        CANONICAL,
        "fuse-regions",
    )
)

NAMED = {"canonical": CANONICAL, "default": DEFAULT, "none": ""}
