"""Which token comes next: greedy, or drawn by temperature, top-k and top-p from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from effc.ir import OptionError

__all__ = ["Sampler"]


@dataclass
class Sampler:
    """Logits [batch, vocabulary] -> ids [batch]. Draws advance its generator, one for each row.

    temperature: 0 takes the likeliest token (the first of equals); else logits are divided by it.
    top_k: only the k likeliest, and what ties with the last of them; 0: all. top_p: of those, the
    fewest whose probabilities reach p (nucleus sampling); the likeliest always stays. seed: None is
    torch's global generator.

    Raises OptionError for a temperature below 0, a negative k, or p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise OptionError(f"temperature is {self.temperature}", fix="use 0 or more")
        if self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k}", fix="use 0 for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}", fix="use more than 0, at most 1")

    def __call__(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        if self.seed is not None and self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self.seed)
        weights = self.probabilities(logits)
        return torch.multinomial(weights, 1, generator=self._generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[batch, vocabulary] of float32 from which the next tokens are drawn."""
        scores = logits.float()
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ranked, order = scores.sort(descending=True)
            shares = ranked.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= self.top_p  # those before reach p already
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return scores.softmax(-1)
