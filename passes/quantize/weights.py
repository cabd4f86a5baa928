"""Matrices of layers as compressed values: which can be, of what types, and the ops that read them.

layers(graph, ctx)                     what there is to compress, with reasons for the rest
weight_type(shape, bits=4, group=32)   uint4[N, K] @ GroupQuant(group=32, scale=f16)
encoded_weight(key, value)             weights `key:codes`, `key:scale`, and `encoded` of them
with_weight(layer, encoded)            for Graph.substitute: all readers read decode(encoded)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from effc.ir import Graph, Op, PassError, Tensor, Weight, interpret, nearest, no, yes
from effc.ir.formats import Encoded, GroupQuant
from effc.ir.rewrite import Answer, op
from effc.ir.types import DTYPES, DType
from effc.passes.analysis.blocks import weights_below
from effc.passes.base import Context
from effc.passes.common import dense_constants, missed

SCALES = ("f16", "bf16", "f32")
FIVE_LEVELS = "2b"


@dataclass(frozen=True)
class Layer:
    """A matrix [N, K] that can be compressed, once for all who read it.

    key: the name of its weight in the model. w: the constant; a weight, or computed from one (a
    transposed one). linears: layers y = x w^T, in program order. lookups: embeddings with w as
    their table. head: whether it makes the scores of a language model, or is its table alone.
    """

    key: str
    w: Op
    linears: tuple[Any, ...]
    lookups: tuple[Any, ...] = ()
    head: bool = False

    @property
    def value(self) -> torch.Tensor:
        """The numbers, f32[N, K]."""
        with torch.no_grad():
            return interpret(Graph.of((), (self.w,)), ())[0].detach().float()

    @property
    def readers(self) -> tuple[Any, ...]:
        return (*self.linears, *self.lookups)


# ------------------------------------------------------------------ which are taken


def layers(
    graph: Graph, ctx: Context, rule: str = "CompressWeight",
    title: str = "linear(x, w) => linear(x, decode(encoded(codes, scale)))", *,
    head: bool = False, skip: str = "", only: str = "",
) -> tuple[Layer, ...]:  # fmt: skip
    """Matrices of the graph's linear layers that can be compressed, in program order.

    head: that of a language model's scores too, and the table that its tokens are looked up in.
    skip, only: patterns on keys, `*` for anything, several with `|` between them. A reason for each
    that is not taken goes to ctx.missed under `rule`.
    """
    found: dict[Op, Op] = {}
    for node in graph.nodes:
        if node.name == "linear" and node not in graph.constants:
            found.setdefault(node.w, node)
    heads = score_layers(graph)
    if head:
        rows = {h.w.shape[0] for h in heads}
        for node in _lookups(graph):
            if node.table.shape[0] in rows:
                found.setdefault(node.table, node)
    taken, keys = [], set[str]()
    for w, node in found.items():
        layer = _layer(graph, w, heads)
        answer = _legal(graph, layer, head, skip, only)
        if answer and layer.key in keys:
            answer = no("another part of weight {!r} is compressed already", layer.key, at=w)
        if answer:
            keys.add(layer.key)
            taken.append(layer)
        else:
            missed(ctx, rule, title, graph, node, answer)
    if not found:
        ctx.note("no linear layer")
    return tuple(taken)


def score_layers(graph: Graph) -> tuple[Any, ...]:
    """Linear layers whose results are outputs, one number for each row of a table of tokens."""
    rows = {node.table.shape[0] for node in _lookups(graph)}
    found: dict[Any, None] = {}
    stack, seen = list(graph.outputs), set[Op]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name == "linear" and node.w.shape[0] in rows:
            found[node] = None
        elif node.view or node.pointwise:
            stack += node.operands
    return tuple(found)


def _lookups(graph: Graph) -> Iterator[Any]:
    for node in graph.nodes:
        if node.name == "embedding" and node.table in graph.constants:
            yield node


def _layer(graph: Graph, w: Op, heads: Sequence[Op]) -> Layer:
    users = dict.fromkeys(graph.users[w])
    linears = tuple(u for u in users if u.name == "linear" and u.w is w)
    lookups = tuple(u for u in users if u.name == "embedding" and u.table is w)
    below = weights_below([w])
    key = below[0].key if below else ""
    return Layer(key, w, linears, lookups, any(n in heads for n in linears) or not linears)


def _legal(graph: Graph, layer: Layer, head: bool, skip: str, only: str) -> Answer:
    w = layer.w
    if isinstance(w.type, Tensor) and any(n.name == "decode" for n in _above(w)):
        return no("its weight is compressed already", at=w)
    answer = dense_constants(graph, w)
    if not answer:
        return answer
    if not w.dtype.is_float:
        return no("its weight is {}", w.dtype, at=w)
    for below in weights_below([w]):
        if below.data is None:
            return no("weight {!r} has no values", below.key, at=below)
    if not layer.key:
        return no("its weight is computed from no weight of the model", at=w)
    if not w.tensor.numel:
        return no("its weight has no elements", at=w)
    if layer.head and not head:
        return no("{!r} makes the model's scores: option head compresses it too", layer.key, at=w)
    if named(layer.key, skip):
        return no("{!r} is left out by skip={}", layer.key, skip, at=w)
    if only and not named(layer.key, only):
        return no("{!r} is not among only={}", layer.key, only, at=w)
    others = [u.name for u in graph.users[w] if u not in layer.readers]
    if others or w in graph.outputs:
        return no("its weight is also read by {}", ", ".join(others) or "the caller", at=w)
    return yes


def _above(constant: Op) -> Iterator[Op]:
    """A constant and all that it is computed from."""
    seen, stack = set[Op](), [constant]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += node.operands


def named(key: str, patterns: str) -> bool:
    """Whether a key is meant by one of the patterns, which stand with `|` between them."""
    return any(fnmatchcase(key, p) for p in patterns.split("|") if p)


# ------------------------------------------------------------------ types


def code_type(bits: int | str, zero: bool) -> DType:
    """The element type of codes: 1 to 8 bits, with a sign where there is no zero point; or "2b",
    the five levels -2 to 2. Raises PassError for others."""
    if bits == FIVE_LEVELS:
        if zero:
            why = "five levels lie around 0"
            raise PassError("bits=2b with zero=True", why=why, fix="zero=False")
        return DTYPES["int2b"]
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise PassError(f"bits={bits}", fix="1 to 8, or 2b for the five levels -2 to 2")
    if bits == 8:
        return DTYPES["u8" if zero else "i8"]
    return DTYPES[f"uint{bits}" if zero else f"int{bits}"]


def weight_type(
    shape: Sequence[Any], bits: int | str = 4, group: int | None = None, zero: bool = False,
    scale: str = "f16",
) -> Tensor:  # fmt: skip
    """Of a matrix [N, K] as codes with a scale (and zero point, in as many bits as a code) for
    every `group` of a row, by default for each row. Raises PassError for what no type can be."""
    if group is not None and group < 1:
        raise PassError(f"group={group}", fix="at least 1, or None: a row is one group")
    if scale not in SCALES:
        raise PassError(f"scale={scale}", fix=nearest(scale, SCALES))
    codes = code_type(bits, zero)
    if group is not None and isinstance(shape[-1], int) and group >= shape[-1]:
        group = None
    format = GroupQuant(group, DTYPES[scale], codes if zero else None)
    return Tensor(tuple(shape), codes, format=format)


# ------------------------------------------------------------------ ops


def encoded_weight(key: str | Weight, value: Encoded) -> Op:
    """`encoded` of weights that hold the parts of a value: `key:codes`, `key:scale`, and so on.

    key: of the weight that it stands for, or the weight. Parts of a part have the part's name
    before their own (`key:values:codes`).
    """
    name = key.key if isinstance(key, Weight) else key
    parts = []
    for part, of in value.type.format.parts(value.type).items():
        held = value[part]
        if isinstance(held, Encoded):
            parts.append(encoded_weight(f"{name}:{part}", held))
        else:
            parts.append(Weight.holding(f"{name}:{part}", held.contiguous(), of))
    return op.encoded(tuple(parts), value.type)


def with_weight(layer: Layer, encoded: Op) -> dict[Op, Op]:
    """For Graph.substitute: all that read the layer's matrix read the numbers of `encoded`."""
    held = op.decode(encoded, layer.w.dtype)
    new: dict[Op, Op] = {n: n.replace(w=held) for n in layer.linears}
    return new | {n: n.replace(table=held) for n in layer.lookups}


def encoded_below(w: Op) -> Op | None:
    """The compressed value whose numbers a constant is, None where it is none."""
    return w.x if w.name == "decode" else None  # type: ignore[attr-defined]


def stored_bits(values: Iterable[Op]) -> float:
    """Bits for each element of compressed values, scales and indices included."""
    found = [v.tensor for v in values]
    elements = sum(t.numel for t in found)  # type: ignore[misc]
    return 8 * sum(t.nbytes for t in found) / elements if elements else 0.0  # type: ignore[misc]


__all__ = [
    "Layer", "code_type", "encoded_below", "encoded_weight", "layers", "named", "score_layers",
    "stored_bits", "weight_type", "with_weight",
]  # fmt: skip
