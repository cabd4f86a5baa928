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


def quantized(weights: int | str, activations: int | None = None) -> str:
    """Weights of so many bits ("2b": five levels), activations of so many or as they are.

    Before activations are rounded, scales move into weights: far where those have 8 bits to spare.
    Layers that read one value become one layer, whose codes are made together. 8 bits have a scale
    a row, fewer one for every 64 numbers.
    """
    codes = [f"bits={weights}"] if weights != 4 else []
    codes += ["group=64"] if weights != 8 else []
    codes += ["zero=True"] if weights not in (8, "2b") else []
    codes += ["method=gptq"] if weights != 8 else []
    passes = ["merge-qkv", f"quantize-weights{{{','.join(codes)}}}"]
    if activations is not None:
        passes.insert(0, "fold-scales{alpha=0.7}" if weights == 8 else "fold-scales")
        options = [f"bits={activations}"] if activations != 8 else []
        options += ["zero=True"] if activations < 8 else []
        passes.append("quantize-activations" + (f"{{{','.join(options)}}}" if options else ""))
    return ",".join([RAISED, *passes, DEFAULT])


BITS = (8, 6, 4, 3, "2b", 2)
NAMED = {
    "canonical": CANONICAL, "raised": RAISED, "default": DEFAULT, "none": "",
    **{f"w{w}": quantized(w) for w in BITS},
    **{f"w{w}a8": quantized(w, 8) for w in BITS},
    **{f"w{b}a{b}": quantized(b, b) for b in (6, 4)},
}  # fmt: skip
