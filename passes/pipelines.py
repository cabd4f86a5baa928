"""Pipelines with names, as text: what torch.compile runs, and the short form for reading a graph."""

from __future__ import annotations

# Only names and shapes: bit for bit the captured program, without its clutter.
CANONICAL = "simplify,eliminate-common-subexpressions,eliminate-dead-code"

# Everything exact, nothing to configure. Folds before layouts, layouts before regions.
DEFAULT = ",".join(
    (
        "simplify",
        "raise-ops",
        "fold-batch-norm",
        "compose-pointwise",
        "stack-pointwise",
        "fold-constants",
        "simplify",
        "eliminate-common-subexpressions",
        "eliminate-dead-code",
        "fuse-regions",
    )
)

NAMED = {"canonical": CANONICAL, "default": DEFAULT, "none": ""}
