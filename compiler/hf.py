"""Causal language models of transformers: how they are called whole, and their own `generate()`.

`decoder.hf` is the model in transformers' eyes: its configuration and `generate()`, with a forward
that runs prefill and decode on a `SequenceCache`, which is a cache as the library's API has it and
holds a Sequence.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from effc.incremental import Form
from effc.ir import InputError
from effc.sequence import Sequence

if TYPE_CHECKING:
    from effc.decoding import Decoder

__all__ = ["SequenceCache", "ending_ids", "forms", "generating"]

# ------------------------------------------------------------------ called whole


def forms(model: PreTrainedModel) -> tuple[Form, Form | None]:
    """The model on ids alone; and on ids, mask and positions, where it takes them."""
    takes = inspect.signature(model.forward).parameters
    pads = {"attention_mask", "position_ids"} <= takes.keys()
    return Form(_Plain(model)), Form(_Padded(model), ("mask", "positions")) if pads else None


def ending_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a text."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


class _Plain(nn.Module):
    """ids -> logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        with _whole_attention(self.model):
            # With an empty cache it looks for no sequences that are packed one after another.
            result = self.model(input_ids=ids, past_key_values=_Passing(), use_cache=False)
        return result.logits


class _Padded(nn.Module):
    """ids, mask (0: padding), positions -> logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with _whole_attention(self.model):
            result = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                past_key_values=_Passing(), use_cache=False,
            )  # fmt: skip
        return result.logits


class _Passing(Cache):
    """Keeps nothing and gives keys and values back."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return query_length, 0


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask where attention is causal and nothing more: transformers' own way is to make one
    whenever a model is exported."""
    window, mask = kwargs.get("local_size"), kwargs.get("attention_mask")
    if mask is None and window is None and kwargs.get("allow_is_causal_skip", True):
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


WHOLE = "effc-whole"
AttentionInterface.register(WHOLE, sdpa_attention_forward)
AttentionMaskInterface.register(WHOLE, _mask)


@contextmanager
def _whole_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention as one operator, whatever way to compute it the model was loaded with."""
    before = model.config._attn_implementation
    if not model._supports_sdpa:
        yield
        return
    model.set_attn_implementation(WHOLE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ------------------------------------------------------------------ generate()


class SequenceCache(Cache):
    """A cache of transformers that is a Sequence of a decoder, begun by the first call with it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(layers=[])
        self.decoder = decoder
        self.sequence: Sequence | None = None

    def begun(self, batch: int) -> Sequence:
        if self.sequence is None:
            self.sequence = self.decoder.sequence(batch)
        return self.sequence

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.sequence is None else self.sequence.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.decoder.longest is None else self.decoder.longest

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.sequence = None

    def crop(self, tokens_to_remove: int) -> None:
        """tokens_to_remove: negative, or 0."""
        if self.sequence is not None:
            self.sequence.rollback(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.sequence is not None:
            self.sequence.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.sequence is not None:
            self.sequence.reorder(torch.arange(self.sequence.batch)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sequence is not None:
            self.sequence.reorder(torch.arange(self.sequence.batch).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return -1 if self.sequence is None else self.sequence.batch

    @property
    def is_initialized(self) -> bool:
        return self.sequence is not None

    def __repr__(self) -> str:
        return f"SequenceCache({self.sequence!r})"


def generating(decoder: Decoder) -> PreTrainedModel:
    """The decoder as a model of transformers, of the class that it was made of."""
    model: Any = decoder.model
    made = copy.copy(model)
    made.__class__ = _generating_class(type(model))
    made.__dict__["_decoder"] = decoder
    return made


def _generating_class(cls: type) -> type:
    names = {"forward": _forward, "_prepare_cache_for_generation": _prepare_cache}
    return type(cls.__name__, (cls,), names)


def _prepare_cache(self: Any, config: Any, kwargs: dict[str, Any], *args: Any) -> None:
    """generate() asks for the cache of a call that brings none."""
    if config.cache_implementation is not None:
        raise _own_cache(f"cache_implementation={config.cache_implementation!r}")
    if config.use_cache is not False and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = SequenceCache(self._decoder)


def _own_cache(given: str) -> InputError:
    return InputError(
        f"a decoder keeps its own cache and takes no {given}",
        fix="leave it out, or pass a SequenceCache (effc.hf)",
    )


def _forward(
    self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, past_key_values: Any = None,
    use_cache: bool | None = None, logits_to_keep: int = 0, **kwargs: Any,
) -> CausalLMOutputWithPast:  # fmt: skip
    """Logits after new tokens, on a SequenceCache, which is made where none is given."""
    if input_ids is None:
        raise InputError("a decoder takes input_ids, no embeddings")
    strange = [k for k, v in kwargs.items() if v not in (None, False) and k != "return_dict"]
    if strange:
        raise InputError(f"a decoder knows no {strange[0]}", fix="ask the model itself for it")
    cache = SequenceCache(self._decoder) if past_key_values is None else past_key_values
    if not isinstance(cache, SequenceCache):
        raise _own_cache(type(cache).__name__)
    batch, n = input_ids.shape
    sequence = cache.begun(batch)
    mask, positions = _padding(sequence, input_ids, attention_mask, position_ids)
    last = logits_to_keep == 1
    logits = sequence.append(input_ids, every=not last, mask=mask, positions=positions)
    kept = logits[:, None] if last else logits[:, n - (logits_to_keep or n) :]
    return CausalLMOutputWithPast(
        logits=kept, past_key_values=None if use_cache is False else cache
    )


def _padding(
    sequence: Sequence, ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of the new tokens and their positions, where they are not the usual ones."""
    n = ids.shape[1]
    if mask is not None and mask.dim() != 2:
        raise InputError(f"a decoder takes an attention_mask [batch, length], not {mask.dim()}-d")
    if mask is not None and sequence.mask is None and bool(mask.all()):
        mask = None
    if mask is None and positions is not None:
        usual = torch.arange(sequence.length, sequence.length + n)
        if sequence.mask is None and bool((positions == usual).all()):
            positions = None
    return None if mask is None else mask[:, -n:], positions
