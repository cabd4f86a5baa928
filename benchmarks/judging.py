"""How good a compressed model still is: perplexity, a ranking task, embeddings beside float ones.

A judge holds its questions and is asked with a function, values of the graph's inputs -> its first
output, so that the interpreter and compiled plans answer alike. Questions depend on texts and a
seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.examples.zoo import text
from effc.ir import Graph, Op, Weight, interpret
from effc.ir import Tensor as TensorType
from effc.ir.types import Dense

Answering = Callable[[Sequence[Tensor]], Tensor]

# ------------------------------------------------------------------ language


@dataclass(frozen=True)
class Question:
    """Which of the candidates follows? context: ids [C]; candidates: ids [K, L]."""

    context: Tensor
    candidates: Tensor
    right: int

    @property
    def rows(self) -> Tensor:
        """[K, C + L]"""
        return torch.cat([self.context.expand(len(self.candidates), -1), self.candidates], 1)


@dataclass(frozen=True)
class Language:
    """texts: ids [T] each, judged by themselves. questions: all of K candidates."""

    texts: Sequence[Tensor]
    questions: Sequence[Question]

    def __call__(self, answering: Answering) -> dict[str, Any]:
        found: dict[str, Any] = {"texts": len(self.texts), "questions": len(self.questions)}
        if self.texts:
            loss, tokens = self.loss(answering)
            found |= {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
        if self.questions:
            right = sum(chosen(answering, q) == q.right for q in self.questions)
            found |= {
                "accuracy": right / len(self.questions),
                "chance": 1 / len(self.questions[0].candidates),
            }
        return found

    def loss(self, answering: Answering) -> tuple[float, int]:
        """Mean nats a token, and of how many; infinite where a logit is not a number."""
        total, tokens = 0.0, 0
        for ids in self.texts:
            mean = float(text.next_token_loss(answering([ids[None]]), ids[None]))
            total += (len(ids) - 1) * (mean if math.isfinite(mean) else math.inf)
            tokens += len(ids) - 1
        return total / tokens, tokens


@torch.no_grad()
def chosen(answering: Answering, question: Question) -> int:
    """The candidate that is likeliest after the context; all have the same number of tokens."""
    rows, size = question.rows, question.candidates.shape[1]
    logits = answering([rows])[:, -size - 1 : -1]
    each = F.cross_entropy(logits.flatten(0, 1), rows[:, -size:].flatten(), reduction="none")
    return int(each.view(len(rows), size).sum(1).nan_to_num(math.inf).argmin())


def next_pieces(
    documents: Sequence[Tensor], count: int, candidates: int, context: int, size: int, seed: int
) -> list[Question]:
    """`count` questions: which piece of `size` tokens follows `context` tokens of a document?

    The wrong ones are later pieces of the same document, so that neither its topic nor its style
    tells them apart; documents too short for that are left out. Raises ValueError where all are.
    """
    least = context + candidates * size
    long = [d for d in documents if len(d) >= least]
    if not long:
        raise ValueError(f"no text has {least} tokens, for {candidates} pieces of {size}")
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = draw.choice(long)
        start = draw.randrange(len(ids) - least + 1)
        rest = ids[start + context :]
        last = len(rest) // size - 1
        places = [0, *sorted(draw.sample(range(1, last + 1), candidates - 1))]
        draw.shuffle(places)
        pieces = torch.stack([rest[p * size : (p + 1) * size] for p in places])
        found.append(Question(ids[start : start + context], pieces, places.index(0)))
    return found


def articles(wikitext: str) -> list[str]:
    """The articles of wikitext-2, each from its title line ` = Title = ` on."""
    found: list[list[str]] = []
    for line in wikitext.splitlines():
        title = line.startswith(" = ") and not line.startswith(" = =")
        if title or not found:
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


# ------------------------------------------------------------------ embeddings


@dataclass(frozen=True)
class Embeddings:
    """Of batches of (ids, mask), beside `wanted`, the float model's [sentences, C].

    cosine: between a sentence's two embeddings. rank_correlation: Spearman's, of the similarities
    of all pairs of sentences. nearest: how many have the same nearest sentence.
    """

    batches: Sequence[Sequence[Tensor]]
    wanted: Tensor

    def __call__(self, answering: Answering) -> dict[str, Any]:
        got = torch.cat([answering(batch) for batch in self.batches])
        cosine = F.cosine_similarity(got, self.wanted)
        near, far = similarities(got), similarities(self.wanted)
        above = torch.ones_like(near, dtype=torch.bool).triu(1)
        return {
            "sentences": len(got),
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "rank_correlation": spearman(near[above], far[above]),
            "nearest": float((near.argmax(1) == far.argmax(1)).float().mean()),
        }


def similarities(vectors: Tensor) -> Tensor:
    """Cosines of all pairs; a sentence is not compared with itself."""
    unit = F.normalize(vectors)
    return (unit @ unit.T).fill_diagonal_(-2)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of ranks; values that are equal to the last bit do not occur often here."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# ------------------------------------------------------------------ who answers


def interpreting(graph: Graph) -> Answering:
    """The reference interpreter, with what no input changes computed once (weights decoded)."""
    settled = with_settled(graph)

    @torch.no_grad()
    def answer(values: Sequence[Tensor]) -> Tensor:
        return interpret(settled, values)[0]

    return answer


@torch.no_grad()
def with_settled(graph: Graph) -> Graph:
    """The same results, every dense constant that is computed held as a weight instead."""
    read = {o for n in graph.nodes if n not in graph.constants for o in n.operands}
    edge = [
        n
        for n in graph.nodes
        if n in graph.constants and (n in read or n in graph.outputs)
        and not isinstance(n, Weight) and isinstance(n.type, TensorType)
        and isinstance(n.type.format, Dense)
    ]  # fmt: skip
    values = interpret(Graph.of((), edge), ())
    new: dict[Op, Op] = {
        n: Weight.holding(f"settled.{i}", value)
        for i, (n, value) in enumerate(zip(edge, values, strict=True))
    }
    return graph.substitute(new)
