"""A small causal language model that was trained, as a raised graph, and text of its language."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from effc.passes.fold.objective import Objective
from tests.passes.folding import VOCABULARY, Decoder, raised

LAYERS, STEPS = 2, 150


def text(batch: int, length: int, seed: int) -> torch.Tensor:
    """Ids of a language in which every token has four successors, the first the likeliest."""
    chain = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(1))
    made = torch.Generator().manual_seed(seed)
    choice = torch.tensor([0.7, 0.15, 0.1, 0.05]).multinomial(
        batch * length, replacement=True, generator=made
    )
    ids = [torch.randint(VOCABULARY, (batch,), generator=made)]
    for step in choice.view(length, batch)[1:]:
        ids.append(chain[ids[-1], step])
    return torch.stack(ids, 1)


@cache
def trained():
    """Its loss is near that of the language, 0.91 nats a token; a guess has 4.56."""
    torch.manual_seed(0)
    net = Decoder(LAYERS)
    for name, p in net.named_parameters():
        p.requires_grad_(True)
        if "norm" not in name:
            p.data.mul_(0.5)
    adam = torch.optim.Adam(net.parameters(), 8e-3)
    for step in range(STEPS):
        ids = text(12, 24, 100 + step)
        logits = net(ids)
        adam.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        adam.step()
    return raised(net.requires_grad_(False))


def batches(count: int = 4, first: int = 0) -> list[list[torch.Tensor]]:
    return [[text(4, 32, first + k)] for k in range(count)]


def loss(graph, over=None) -> float:
    """Nats a token on text that nothing is trained on."""
    return Objective(graph, batches(4, 1000) if over is None else over).mean(graph)
