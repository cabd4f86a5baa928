"""Attention written by hand, repeated key/value heads and constant masks: rules of raise-ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from effc.ir import Graph, Match, No, Op, Rule, Weight, interpret, no, yes
from effc.ir.rewrite import op as ops
from effc.ir.types import boolean

from .analysis.index_values import LOW, AtMost, Where, value_at
from .common import is_number, reassociates

AND = ("bitwise_and", "logical_and")
LARGEST_MASK = 1 << 24  # elements of a mask that is evaluated to see whether it is causal


@dataclass(frozen=True)
class Scores:
    """scale * q k^T + mask, taken apart. `inner` lists the nodes on the way to the product."""

    q: Op
    kt: Op
    scale: float = 1.0
    mask: Op | None = None
    inner: tuple[Op, ...] = ()


def scores(node: Any) -> Scores | No:
    """Take a softmax's operand apart; a refusal where it is something else."""
    if not isinstance(node, Op):
        return no("{} is a number", node)
    found: Scores | No = no("{} is not a product of queries and keys", node.name, at=node)
    if node.name == "matmul":
        if min(node.a.tensor.rank, node.b.tensor.rank) < 2:
            return no("a vector is not a row of queries", at=node)
        (q, a), (kt, b) = _unscaled(node.a), _unscaled(node.b)
        return Scores(q, kt, a * b, None, (node,))
    if node.name in ("mul", "div"):
        found = _scaled(node)
    elif node.name == "add":
        found = _masked(node, ((node.a, node.b), (node.b, node.a)))
    elif node.name == "where":
        found = _filled(node)
    return replace(found, inner=(node, *found.inner)) if isinstance(found, Scores) else found


def _unscaled(node: Op) -> tuple[Op, float]:
    """q * c => q, c for a number c."""
    if node.name in ("mul", "div") and is_number(node.b) and node.a.type == node.type and node.b:
        return node.a, node.b if node.name == "mul" else 1 / node.b
    if node.name == "mul" and is_number(node.a) and node.b.type == node.type:
        return node.b, node.a
    return node, 1.0


def _scaled(node: Any) -> Scores | No:
    inner, factor = _unscaled(node)
    if inner is node:
        return no("the scale is not a number", at=node)
    found = scores(inner)
    if isinstance(found, Scores) and found.mask is not None:
        return no("the scale is applied after the mask", at=node)
    return found if isinstance(found, No) else replace(found, scale=found.scale * factor)


def _masked(node: Op, orders: Any) -> Scores | No:
    answer: Scores | No = no("no operand is a product", at=node)
    for inner, mask in orders:
        found = scores(inner)
        if isinstance(found, No):
            continue
        if found.mask is not None:
            answer = no("two masks are added", at=node)
        elif not isinstance(mask, Op) or mask.tensor.rank < 2:
            answer = no("the addend is not a mask over queries and keys", at=node)
        elif mask.dtype != node.dtype or inner.type != node.type:
            answer = no("the mask {} changes the type of the scores", mask.type, at=mask)
        else:
            return replace(found, mask=mask)
    return answer


def _filled(node: Any) -> Scores | No:
    """where(keep, scores, low): low swallows any score, so it is as good as added."""
    for inner, low, first in ((node.a, node.b, False), (node.b, node.a, True)):
        low = low.value if isinstance(low, Op) and low.name == "full" else low
        found = scores(inner) if isinstance(inner, Op) else None
        if isinstance(found, Scores) and found.mask is None and inner.type == node.type:
            if not is_number(low) or low > -1e30 or node.cond.tensor.rank < 2:
                return no("scores are replaced by {}, which is not below all others", low, at=node)
            zero = ops.full((), 0.0, node.dtype)
            mask = ops.where(node.cond, *((low, zero) if first else (zero, low)))
            return replace(found, mask=mask) if mask.dtype == node.dtype else no("{}", mask.type)
    return no("neither side is a product of queries and keys", at=node)


class RaiseAttention(Rule):
    """matmul(softmax(scale * q k^T + mask), v) => attention(q, k, v, mask, scale)"""

    def pattern(self, op, s, v):
        return op.matmul(op.softmax(s).named("softmax"), v)

    def check(self, m, s, v):
        found = scores(s)
        if isinstance(found, No):
            return found
        if m.softmax.dim % s.tensor.rank != s.tensor.rank - 1:
            return no("the softmax is along dimension {}", m.softmax.dim, at=m.softmax)
        if v.tensor.rank < 2:
            return no("v is a vector", at=v)
        for node in found.inner:
            if m.uses(node) > 1:
                return no("{} is also used elsewhere", node.name, at=node)
        if not (found.q.dtype == found.kt.dtype == v.dtype):
            return no("q, k and v have different element types")
        answer = reassociates(v.dtype)
        if not answer:
            return answer
        made = self.build(found, v)
        return yes if made.type == m.root.type else no("attention would give {}", made.type)

    def build(self, found: Scores, v: Op) -> Op:
        return ops.attention(found.q, _transposed(found.kt), v, found.mask, scale=found.scale)

    def rewrite(self, op, m, s, v):
        found = scores(s)
        assert isinstance(found, Scores)
        return self.build(found, v)


def _transposed(kt: Any) -> Op:
    """kt with its last two dimensions swapped; one permute where kt is a permute itself."""
    rank = kt.tensor.rank
    swap = (*range(rank - 2), rank - 1, rank - 2)
    if kt.name != "permute":
        return ops.permute(kt, swap)
    dims = tuple(kt.dims[d] for d in swap)
    return kt.x if dims == tuple(range(rank)) else ops.permute(kt.x, dims)


def repeated(node: Any) -> tuple[Op, int] | None:
    """k and r where node is k with every head (dimension -3) repeated r times in place."""
    if node.name != "reshape":
        return None
    wide = node.x.x if node.x.name == "copy" else node.x
    if wide.name != "expand" or wide.x.name != "reshape":
        return None
    k = wide.x.x
    if k.tensor.rank < 3 or wide.tensor.rank != k.tensor.rank + 1:
        return None
    *lead, heads, rows, width = k.shape
    times = wide.shape[-3]
    if not isinstance(times, int) or not isinstance(heads, int):
        return None
    split = wide.x.shape == (*lead, heads, 1, rows, width)
    spread = wide.shape == (*lead, heads, times, rows, width)
    joined = node.shape == (*lead, heads * times, rows, width)
    return (k, times) if split and spread and joined else None


class GroupHeads(Rule):
    """attention(q, repeat(k), repeat(v)) => attention(q, k, v, gqa=True)"""

    def pattern(self, op, q, k, v):
        return op.attention(q, k, v, mask=op.any, gqa=False)

    def check(self, m, q, k, v):
        key, value = repeated(k), repeated(v)
        if key is None or value is None:
            return no("k or v is not repeated over heads", at=k if key is None else v)
        if key[1] != value[1] or key[0].shape[-3] != value[0].shape[-3]:
            return no("k is repeated {} times, v {} times", key[1], value[1], at=k)
        if q.tensor.rank != k.tensor.rank or q.shape[-3] != k.shape[-3]:
            return no("q is {}, k is {}", q.type, k.type, at=q)
        return yes

    def rewrite(self, op, m, q, k, v):
        key, value = repeated(k), repeated(v)
        assert key is not None and value is not None
        return m.root.replace(k=key[0], v=value[0], gqa=True)


class ConstantMask(Rule):
    """attention(q, k, v, lower triangle) => attention(q, k, v, causal=True); all visible => no mask

    Only masks made of sizes alone are looked at: weights are never read here.
    """

    def __init__(self) -> None:
        self.seen: dict[Op, str] = {}

    def pattern(self, op, q, k, v, mask):
        return op.attention(q, k, v, mask, causal=False)

    def check(self, m, q, k, v, mask):
        if mask not in m.graph.constants:
            return no("the mask is computed from inputs", at=mask)
        if mask not in self.seen:
            self.seen[mask] = self.kind(m, mask)
        if self.seen[mask] not in ("all", "causal"):
            return no("the mask is {}", self.seen[mask], at=mask)
        if self.seen[mask] == "causal" and q.shape[-2] != k.shape[-2]:
            return no("{} queries, {} keys", q.shape[-2], k.shape[-2], at=mask)
        return yes

    def kind(self, m: Match, mask: Op) -> str:
        needed = Graph.of((), (mask,))
        if any(isinstance(n, Weight) for n in needed.nodes):
            return "a weight, or computed from one"
        if not isinstance(mask.tensor.numel, int) or mask.tensor.numel > LARGEST_MASK:
            return f"too large to look at, {mask.type}"
        (value,) = interpret(needed, ())
        return mask_kind(value)

    def rewrite(self, op, m, q, k, v, mask):
        return m.root.replace(mask=None, causal=self.seen[mask] == "causal")


class CausalMask(Rule):
    """attention(q, k, v, (j <= i) & rest) => attention(q, k, v, rest, causal=True)

    Masks made of positions, at sizes that only a call knows; `rest` may be anything. An additive
    mask stands for what it lets through, unless a row of it could be lowest everywhere.
    """

    def pattern(self, op, q, k, v, mask):
        return op.attention(q, k, v, mask, causal=False)

    def check(self, m, q, k, v, mask):
        if q.shape[-2] != k.shape[-2]:
            return no("{} queries, {} keys", q.shape[-2], k.shape[-2], at=mask)
        if not m.graph.all_symbols:
            return no("the sizes are known: see ConstantMask")
        found = visible(mask)
        if isinstance(found, No):
            return found
        if not any(map(_is_causal, found)):
            return no("no part of the mask is j <= i", at=mask)
        return yes

    def rewrite(self, op, m, q, k, v, mask):
        found = visible(mask)
        assert not isinstance(found, No)
        rest: Op | None = None
        for term in found:
            if isinstance(term, Op):
                rest = term if rest is None else op.bitwise_and(rest, term)
        return m.root.replace(mask=rest, causal=True)


def visible(mask: Any) -> list[Op | AtMost] | No:
    """What must hold for a query to see a key, all of it; tests of positions as such.

    A test that is kept stands as its node, and what always holds is left out.
    """
    if mask.dtype == boolean:
        return _terms(mask)
    at = value_at(mask)
    if isinstance(at, Where) and at.number <= LOW:
        return [at.test.negated()]
    if mask.name != "where":
        return no("the mask is {}", mask.name, at=mask)
    low = mask.b.value if isinstance(mask.b, Op) and mask.b.name == "full" else mask.b
    zero = mask.a.value if isinstance(mask.a, Op) and mask.a.name == "full" else mask.a
    if not (is_number(low) and is_number(zero)) or zero or low > LOW:
        return no("the mask chooses between {} and {}", zero, low, at=mask)
    found = _terms(mask.cond)
    if low != -torch.inf and not all(map(_sees_itself, found)):
        return no("a row of the mask may be {} everywhere", low, at=mask)
    return found


def _terms(node: Any) -> list[Op | AtMost]:
    """The parts of a conjunction."""
    if node.name in AND and len(node.operands) == 2 and node.a.dtype == node.b.dtype == boolean:
        return [*_terms(node.a), *_terms(node.b)]
    if node.name == "expand" and node.x.name in AND:
        return _terms(node.x)
    at = value_at(node)
    if not isinstance(at, AtMost):
        return [node]
    if at.known:
        return []
    return [at] if _is_causal(at) else [node]


def _is_causal(term: Op | AtMost) -> bool:
    """key <= query"""
    if not isinstance(term, AtMost):
        return False
    *lead, query, key = term.value.aligned(2).coefs
    return key > 0 and query == -key and not any(lead) and 0 >= term.value.const > -key


def _sees_itself(term: Op | AtMost) -> bool:
    """Whether the test holds for every query and the key at its own position."""
    at = value_at(term) if isinstance(term, Op) else term
    if not isinstance(at, AtMost):
        return False
    *lead, query, key = at.value.aligned(2).coefs
    return query + key == 0 and not any(lead) and at.value.const <= 0


def mask_kind(value: torch.Tensor) -> str:
    """One of all, causal, or words for something else."""
    keep = value if value.dtype == torch.bool else value == 0
    if value.is_floating_point():
        low = torch.finfo(value.dtype).min / 2
        if not ((value == 0) | (value <= low)).all():
            return "neither zero nor lowest everywhere"
    if keep.all():
        return "all"
    n, k = value.shape[-2:]
    causal = torch.ones(n, k, dtype=torch.bool).tril()
    return "causal" if n == k and (keep == causal).all() else "of another shape"
