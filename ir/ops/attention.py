"""Attention and rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import Cost, Op, Value, op
from ..types import Tensor, Type, boolean
from .common import broadcast, check_fits, check_position, may_equal, promote


@op("attention")
class Attention(Op):
    """softmax(scale q k^T + mask) v over the last two dimensions; leading ones are batch and heads.

    q: [*, heads, n, d], k: [*, kv_heads, m, d], v: [*, kv_heads, m, dv]. mask: additive, or bool
    (True keeps). causal: key j is seen by query i when j <= i. gqa: heads = r * kv_heads, query
    head h reads key/value head h // r. scale: 1 / sqrt(d) when None.

    past: k and v are a cache of m >= past + n positions, of which those from past + n on do not
    exist, whatever memory holds there. Query i stands at position past + i: causal means
    j <= past + i. The mask, where given, has m columns.
    """

    q: Value
    k: Value
    v: Value
    mask: Value | None = None
    causal: bool = False
    scale: float | None = None
    gqa: bool = False
    past: Value | None = None  # i64, one number

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
        if self.past is not None:
            check_position(self, "past", self.past)
            check_fits(self, q.shape[-2], k.shape[-2])
        if self.gqa:
            lead = q.shape[:-2]
        else:
            lead = broadcast(self, q.shape[:-2], k.shape[:-2], v.shape[:-2])
        return Tensor((*lead, q.shape[-2], v.shape[-1]), q.dtype)

    def reference(self, q: Any, k: Any, v: Any, mask: Any, past: Any = None) -> Any:
        before, causal = 0, self.causal
        if past is not None:
            before = int(past)
            end = before + q.shape[-2]
            if not 0 <= before <= end <= k.shape[-2]:
                raise IndexError(f"positions {before}..{end} of a cache of {k.shape[-2]}")
            k, v = k[..., :end, :], v[..., :end, :]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :end]
        if causal and (mask is not None or before):  # torch takes one of them, and starts at 0
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(before)
            if mask is None:
                mask = seen
            elif mask.dtype == torch.bool:
                mask = mask & seen
            else:
                mask = mask.masked_fill(~seen, -torch.inf)
            causal = False
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=self.gqa
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
