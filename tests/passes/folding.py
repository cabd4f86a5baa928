"""Small decoders as raised graphs, for the tests of passes that fold depth."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import effc.aten
import effc.passes  # noqa: F401  registers the passes
from effc.capture import capture_exported
from effc.importer import import_captured
from effc.ir import Weight, interpret
from effc.passes.base import Context, Pipeline
from effc.pipeline import run_pipeline

VOCABULARY, WIDTH, INNER, HEADS, LAYERS = 96, 32, 56, 4, 6


class Block(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-5), nn.RMSNorm(WIDTH, 1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            w(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A small causal language model with random weights, of which every block matters."""

    def __init__(self, layers=LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, 1e-5)
        for name, p in self.named_parameters():
            p.requires_grad_(False).normal_(float("norm" in name), 0.1 if "norm" in name else 0.3)
        self.eval()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


@cache
def decoder():
    """The raised graph of such a model; exporting it takes seconds, so once for all tests."""
    return raised(Decoder())


def with_weights(graph, change):
    """The graph with the values change(key, data) of its weights."""
    return graph.substitute(
        {w: Weight.holding(w.key, change(w.key, w.data), w.of) for w in graph.weights}
    )


def weakened(graph, out):
    """The graph with blocks in `out` that add next to nothing."""
    ends = tuple(f"layers.{i}.{end}.weight" for i in out for end in ("o", "down"))
    return with_weights(graph, lambda key, data: data * 1e-3 if key.endswith(ends) else data)


def told(graph, batch=2, length=12, seed=0):
    """Ids that the graph itself goes on with, so that what it foretells is true."""
    said = ids(batch, 1, seed)
    for _ in range(length - 1):
        said = torch.cat([said, logits(graph, said)[:, -1:].argmax(-1)], 1)
    return said


def ids(batch=2, length=12, seed=0):
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def raised(net, example=None):
    """The graph of net(ids) before any fold, any batch, any length."""
    auto = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    given = {"input_ids": ids() if example is None else example}
    program = torch.export.export(net, (), given, strict=False, dynamic_shapes=auto)
    captured = import_captured(capture_exported(program)).graph
    return run_pipeline(captured, Pipeline.parse("raised"))[-1].graph


def ran(graph, pipeline, calibration=None, **context):
    """(graph after the passes, context of the last)."""
    uncompressed = graph
    for p in Pipeline.parse(pipeline):
        ctx = Context(calibration=calibration, uncompressed=uncompressed, **context)
        graph = p.run(graph, ctx)
    return graph, ctx


def logits(graph, example):
    with torch.no_grad():
        return interpret(graph, [example])[0]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
