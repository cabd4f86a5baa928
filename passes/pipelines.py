"""Pipelines by name, as text: what torch.compile runs, and the short form for reading a graph."""

from __future__ import annotations

# Only names and shapes: bit for bit the captured program, without its clutter.
CANONICAL = "simplify,eliminate-common-subexpressions,eliminate-dead-code"

# Layers recognised, nothing folded or joined yet: what papers about layers and blocks start from.
RAISED = f"simplify,raise-ops,{CANONICAL}"

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

NAMED = {"canonical": CANONICAL, "raised": RAISED, "default": DEFAULT, "none": ""}
