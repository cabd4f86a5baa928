"""Fused regions: the first way that can compute the body as one takes it."""

from ..plan.lowering import Way, Ways
from . import anchored, attention, codes, group_norm, pointwise, rows, sparse
from .lowering import lowers

WAYS = Ways((
    Way(attention.concerns, attention.check, attention.lower),
    Way(codes.concerns, anchored.check, sparse.lower),
    Way(anchored.concerns, anchored.check, anchored.lower),
    Way(group_norm.concerns, group_norm.check, group_norm.lower),
    Way(rows.concerns, rows.check, rows.lower),
    Way(lambda node: True, pointwise.check, pointwise.lower),
))  # fmt: skip
lowers("fused", check=WAYS.check)(WAYS.lower)
