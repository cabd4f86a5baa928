"""Attention and rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..types import Tensor, Type, boolean
from .common import broadcast, may_equal, promote


@op("attention")
class Attention(Op):
    """softmax(scale q k^T + mask) v over the last two dimensions; leading ones are batch and heads.

    q: [*, heads, n, d], k: [*, kv_heads, m, d], v: [*, kv_heads, m, dv]. mask: additive, or bool
    (True keeps). causal: key j is seen by query i when j <= i. gqa: heads = r * kv_heads, query
    head h reads key/value head h // r. scale: 1 / sqrt(d) when None.
    """

    q: Value
    k: Value
    v: Value
    mask: Value | None = None
    causal: bool = False
    scale: float | None = None
    gqa: bool = False

    def infer(self) -> Type:
        q, k, v = self.q.tensor, self.k.tensor, self.v.tensor
        if min(q.rank, k.rank, v.rank) < 2:
            raise self.fail("q, k and v need at least two dimensions")
        if not q.dtype == k.dtype == v.dtype:
            raise self.fail(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}")
        if not (may_equal(q.shape[-1], k.shape[-1]) and may_equal(k.shape[-2], v.shape[-2])):
            raise self.fail("q and k differ in their last size, or k and v in the one before")
        if self.mask is not None and self.mask.dtype not in (q.dtype, boolean):
            raise self.fail(f"the mask is {self.mask.dtype}, neither {q.dtype} nor bool")
        if self.gqa:
            lead = q.shape[:-2]
        else:
            lead = broadcast(self, q.shape[:-2], k.shape[:-2], v.shape[:-2])
        return Tensor((*lead, q.shape[-2], v.shape[-1]), q.dtype)

    def reference(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        if self.causal and mask is not None:  # torch takes one of them
            past = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
            return F.scaled_dot_product_attention(
                q, k, v, mask, scale=self.scale, enable_gqa=self.gqa
            )
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.gqa
        )

    def cost(self) -> Cost:
        scores = self.tensor.numel * self.k.shape[-2]
        share = 2 if self.causal else 1
        return Cost(4 * scores // share, self.bytes_moved())


@op("rope")
class Rope(Op):
    """x * cos + rotate(x) * sin, with cos and sin broadcast to x.

    rotate: halves swap, (-x2, x1), or with `interleaved` neighbours swap, (-x[2i+1], x[2i]).
    """

    x: Value
    cos: Value
    sin: Value
    interleaved: bool = False

    def infer(self) -> Type:
        x = self.x.tensor
        size = x.shape[-1] if x.rank else 1
        if isinstance(size, int) and size % 2:
            raise self.fail(f"the last dimension ({size}) must be even")
        shape = broadcast(self, x.shape, self.cos.shape, self.sin.shape)
        return Tensor(shape, promote(self.x, self.cos, self.sin))

    def reference(self, x: Any, cos: Any, sin: Any) -> Any:
        if self.interleaved:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            half = x.shape[-1] // 2
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + turned * sin

    def cost(self) -> Cost:
        return Cost(3 * self.tensor.numel, self.bytes_moved())
