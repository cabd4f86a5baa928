"""Op declarations, one file a family. Importing this package declares them all."""

from . import (
    aten,
    attention,
    conv,
    image,
    index,
    linear,
    norm,
    pages,
    pointwise,
    quantize,
    reduce,
    region,
    shape,
)

__all__ = [
    "aten", "attention", "conv", "image", "index", "linear", "norm", "pages", "pointwise",
    "quantize", "reduce", "region", "shape",
]  # fmt: skip
