"""The named pipelines on captured models: they parse, keep the numbers, and come to rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effc.ir import Item, interpret, parse, verify
from effc.ir.ops.region import Fused
from effc.passes.base import Context, Pipeline
from effc.passes.pipelines import CANONICAL, DEFAULT, NAMED


@pytest.mark.parametrize("name", NAMED)
def test_named_pipelines_parse_and_are_possible(name):
    pipeline = Pipeline.parse(NAMED[name])
    pipeline.check()
    assert str(pipeline) == NAMED[name]


class ResidualBlock(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 12, 3, padding=1)

    def forward(self, x):
        h = F.leaky_relu(self.head(x), 0.05)
        h = h + self.b(F.relu(self.norm(self.a(h))))
        return F.pixel_shuffle(self.tail(h), 2)


class Block(nn.Module):
    """A Llama-like layer: hand-written norm and rotary embedding, grouped heads, gated layer."""

    def __init__(self, d=32, heads=4, kv=2):
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, d // heads
        self.g1, self.g2 = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))
        self.q = nn.Linear(d, d, bias=False)
        self.k, self.v = (nn.Linear(d, kv * self.size, bias=False) for _ in range(2))
        self.o = nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, 2 * d, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * d, d, bias=False)

    def rms(self, x, g):
        return g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def rope(self, x):
        t = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(self.size // 2)
        c, s = torch.cat((t, t), -1).cos(), torch.cat((t, t), -1).sin()
        half = self.size // 2
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    def forward(self, x):
        b, n, d = x.shape
        h = self.rms(x, self.g1)
        q, k, v = (
            layer(h).view(b, n, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = self.rope(q), self.rope(k)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, 4, n, -1) for t in (k, v))
        mask = torch.full((n, n), float("-inf")).triu(1)
        p = (q @ k.transpose(2, 3) / self.size**0.5 + mask).softmax(-1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(b, n, d))
        h = self.rms(x, self.g2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


MODELS = {
    "residual": (ResidualBlock, torch.rand(1, 3, 9, 7)),
    "block": (Block, torch.randn(2, 6, 32)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        torch.randn(2, 6, 32),
    ),
}


@pytest.fixture(params=MODELS)
def model(request, captured):
    torch.manual_seed(0)
    make, x = MODELS[request.param]
    return captured(make(), x), x


@pytest.mark.parametrize("pipeline", [CANONICAL, DEFAULT])
def test_models_keep_their_numbers(run, model, pipeline):
    graph, x = model
    ran = run(graph, pipeline, inputs=[x])
    assert parse(ran.after.text) == ran.after


def test_default_finds_what_there_is(run, captured):
    ran = run(captured(Block(), MODELS["block"][1]), DEFAULT, inputs=[MODELS["block"][1]])
    found = {rule for rule in ran.ctx.stats if ran.hits(rule)}
    assert {
        "RaiseRmsNorm",
        "NormWeight",
        "RaiseRope",
        "RaiseAttention",
        "GroupHeads",
        "ConstantMask",
        "MergeSiblings",
        "FuseEpilogue",
    } <= found
    ran = run(
        captured(ResidualBlock(), MODELS["residual"][1]), DEFAULT, inputs=[MODELS["residual"][1]]
    )
    found = {rule for rule in ran.ctx.stats if ran.hits(rule)}
    assert {"BatchNormIntoConv", "ChannelsLast", "FuseEpilogue"} <= found


def test_every_pass_comes_to_rest(model):
    graph, _ = model
    for p in Pipeline.parse(DEFAULT):
        graph = p.run(graph, Context())
        again = p.run(graph, Context())
        assert again is graph or again == graph, p.name


def test_inner_values_can_still_be_observed(model):
    graph, x = model
    for p in Pipeline.parse(DEFAULT):
        graph = verify(p.run(graph, Context()))
    seen = []
    interpret(graph, [x], observe=lambda node, value: seen.append(node))
    assert len(seen) == len(graph.nodes)
    assert all(isinstance(n.x, Fused) for n in graph.nodes if isinstance(n, Item))
