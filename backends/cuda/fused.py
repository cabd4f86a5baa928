"""Fused regions: products and rows by CUDA kernels where they take them, else as on any GPU."""

from ..plan.lowering import Way, Ways
from . import products, rows
from .lowering import prefer

WAYS = Ways((
    Way(products.concerns, products.check, products.lower),
    Way(rows.concerns, rows.check, rows.lower),
))  # fmt: skip
prefer("fused", WAYS.check, WAYS.lower, products.concerns)
