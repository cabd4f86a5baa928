"""`effc.decoder(model)`: a causal model that generates, computing every token once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.calibration import argument_sets, asked_for
from effc.incremental import VARIANTS, Compiled, Form, Incremental, Variant
from effc.interop import Checkpoint, load
from effc.ir import InputError, OptionError
from effc.options import Options
from effc.passes.base import Pipeline
from effc.record import Record
from effc.report import StepRow
from effc.rows import Arena, Pages, Pool
from effc.sequence import Sequence
from effc.stepplan import Binding, Step, StepPlan
from effc.token_sampling import Sampler

__all__ = ["Decoder", "Sequence", "decoder"]


def decoder(
    model: nn.Module, recipe: str | None = None, calibrate: Iterable[Tensor] | None = None,
    weights: Checkpoint | str | os.PathLike[str] | None = None, **options: Any,
) -> Decoder:  # fmt: skip
    """Compile a causal model for generation.

    model: an nn.Module that maps ids int64 [B, T] to logits [B, T, vocabulary], or to something
    with `.logits` or with them first; it needs no code for caches. A causal language model of
    transformers may also be given prompts of different lengths in one batch. recipe: passes as
    pipeline text; the cache is inserted after them, or before the first that changes it
    (quantize-cache, page-kv-cache). calibrate: ids, for those of them that learn
    from data. weights: a quantised checkpoint in place of the model's weights, as for effc.compile.
    options: fields of effc.options.Options.

    Raises UnsupportedError where the forward cannot be captured as one graph, PassError where a
    result depends on later tokens, or on earlier ones by other means than causal attention.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be an nn.Module, not {type(model).__name__}")
    chosen = Options.of(options)
    if chosen.measure:
        raise OptionError(
            "measure=True needs an example call, which a decoder has not",
            fix="measure the recipe with effc.compile(model, recipe, example_inputs=(ids,))",
        )
    if model.training:
        raise OptionError(f"{type(model).__name__} is in training mode", fix="call model.eval()")
    recipe = "raised" if recipe is None else recipe
    asked_for(Pipeline.parse(recipe), calibrate)
    name, sets = type(model).__name__, None
    if calibrate is not None:
        given = argument_sets(calibrate)
        if any(len(args) != 1 or kwargs for args, kwargs in given):
            raise OptionError("an item of calibrate must be ids", fix="calibrate=[ids, ...]")
        sets = [args for args, _ in given]
    checkpoint = None if weights is None else load(model, weights)
    form, padded_form, eos = Form(_Logits(model)), None, ()
    if is_transformers(model):
        from effc.hf import ending_ids, forms

        hf: Any = model
        form, padded_form = forms(hf)
        eos = ending_ids(hf)
    padded = None
    if padded_form is not None and sets is None:  # what was learnt once need not come out alike
        padded = partial(
            Incremental.of, padded_form, name, recipe, chosen, checkpoint=checkpoint
        )  # fmt: skip
    graph = Incremental.of(form, name, recipe, chosen, sets, checkpoint)
    return Decoder(name, graph, padded, eos, model)


class _Logits(nn.Module):
    """Logits alone of a model that returns more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        result = self.model(ids)
        if isinstance(result, (tuple, list)):
            return result[0]
        return getattr(result, "logits", result)


@dataclass(frozen=True)
class _Generation:
    """What is asked for."""

    sampler: Sampler
    limit: int
    eos: frozenset[int]
    plan: StepPlan | None


class Decoder:
    """Made by effc.decoder or effc.load. Threads may share it; every generation has a Sequence of
    its own.

    graph: over ids alone. padded: makes the one that is told of padding, when it is first needed.
    eos: ids that end a text. model: None: there is none, it was loaded.
    """

    def __init__(
        self, name: str, graph: Incremental, padded: Callable[[], Incremental] | None = None,
        eos: Items[int] = (), model: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.name, self.graph, self.model = name, graph, model
        self.eos = tuple(eos)
        self._make_padded = padded
        self._padded: Incremental | None = None
        self._lock = threading.Lock()
        self._first = StepRow("to the first token")
        self.longest = graph.longest
        self._pool: Pool | None = None
        for run in self.plan().executables:
            self.compiled(VARIANTS[run])

    # -------------------------------------------------------------- what runs

    @property
    def pads(self) -> bool:
        """Whether rows of a batch may have different lengths."""
        return self._make_padded is not None

    def compiled(self, variant: Variant) -> Compiled:
        """The graph for these sizes; compiled when it is first asked for."""
        graph = self._with_padding() if variant.padded else self.graph
        return graph.variant(variant)

    def _with_padding(self) -> Incremental:
        if self._padded is not None:
            return self._padded
        if self._make_padded is None:
            raise InputError(
                f"{self.name} cannot be told of padding",
                why="its forward takes no attention_mask and position_ids, its recipe learnt from "
                "data, or it was saved without having been asked for padding",
                fix="give rows of equal length, or each row a sequence of its own",
            )
        with self._lock:
            if self._padded is None:
                self._padded = self._make_padded()
            return self._padded

    def sequence(self, batch: int = 1, capacity: int | None = None) -> Sequence:
        """An empty sequence. capacity: room for so many tokens and no more; None: it grows."""
        return Sequence(self, batch, capacity)

    def rows(self, batch: int, capacity: int) -> Arena | Pages:
        """Room for keys and values of so many tokens in each of `batch` sequences."""
        cache = self.graph.cache
        if cache.table is None:
            axes = [s.shape.index(cache.capacity) for s in cache.states]
            return Arena(self.graph.states, axes, batch, capacity)
        with self._lock:
            if self._pool is None:
                self._pool = Pool(self.graph.pool, cache.page)
        return Pages(self._pool, batch, capacity)

    def plan(self, batch: int = 1, padded: bool = False) -> StepPlan:
        """The steps of a generation; it holds for any number of rows but one, or for one."""
        names = [str(Variant(decode, batch == 1, padded)) for decode in (False, True)]
        return StepPlan(
            self.name,
            (
                Step("prefill", names[0], resets=("cache",)),
                Step("decode", names[1], until=("eos", "length")),
            ),
        )

    @property
    def binding(self) -> Binding:
        """What plans for this decoder are bound to; looks at every weight."""
        passes = f"{self.graph.pipeline},{self.graph.options.pipeline}"
        return Binding.of(self.graph.text(), passes)

    def refresh(self) -> None:
        """Fold and pack weights anew (needed only after writes through `tensor.data`)."""
        for graph in self.graphs:
            graph.refresh()

    @property
    def graphs(self) -> list[Incremental]:
        """What was captured: on ids alone, and told of padding where that was asked for."""
        return [self.graph] if self._padded is None else [self.graph, self._padded]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write graphs, weights and the kernels of what has been planned to one file, which
        `effc.load` makes a decoder of.

        Raises ArtefactError for what cannot be saved, with the reason.
        """
        from effc.artefact_decoder import save_decoder

        save_decoder(self, path)

    # -------------------------------------------------------------- generation

    def generate(
        self, prompt: Tensor | Items[Any], max_new_tokens: int, *,
        eos: int | Items[int] | None = None, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int | None = None, plan: StepPlan | None = None,
    ) -> list[Any]:  # fmt: skip
        """The ids that follow a prompt: a list; or each of several prompts: a list of lists.

        prompt: ids, or several lists of ids, which may differ in length. eos: ids that end a row
        and are its last; None: the model's own, () none. temperature, top_k, top_p, seed: see
        Sampler; temperature 0 is greedy. plan: other steps than `self.plan()`.

        Raises StepPlanError for a plan of another model or pipeline.
        """
        rows, one = _prompts(prompt)
        sampler = Sampler(temperature, top_k, top_p, seed)
        asked = self._asked(max_new_tokens, eos, sampler, plan)
        together = self.pads or len({len(r) for r in rows}) == 1
        batches = [rows] if together else [[r] for r in rows]
        found = [ids for batch in batches for ids in self._whole(batch, asked)]
        return found[0] if one else found

    def stream(
        self, prompt: Tensor | Items[int], max_new_tokens: int, *,
        eos: int | Items[int] | None = None, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int | None = None, plan: StepPlan | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The ids that `generate` gives for one prompt, one by one."""
        rows, one = _prompts(prompt)
        if not one:
            raise InputError("a stream has one prompt", fix="generate takes several")
        sampler = Sampler(temperature, top_k, top_p, seed)
        asked = self._asked(max_new_tokens, eos, sampler, plan)
        return (ids[0] for ids in self._tokens(rows, asked))

    def _asked(
        self, limit: int, eos: int | Items[int] | None, sampler: Sampler, plan: StepPlan | None
    ) -> _Generation:
        if limit < 0:
            raise InputError(f"max_new_tokens is {limit}", fix="use 0 or more")
        if plan is not None:
            bound = plan.binding != Binding()
            plan.check(self.binding if bound else Binding(), VARIANTS, ("eos", "length"))
        ids = self.eos if eos is None else [eos] if isinstance(eos, int) else eos
        return _Generation(sampler, limit, frozenset(ids), plan)

    def _whole(self, rows: list[Tensor], asked: _Generation) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        for ids in self._tokens(rows, asked):
            for row, token in zip(found, ids):
                if not row or row[-1] not in asked.eos:
                    row.append(token)
        return found

    def _tokens(self, rows: list[Tensor], asked: _Generation) -> Iterator[list[int]]:
        """One id for each row, call by call of the plan, until all rows have ended."""
        batch, made, ended = len(rows), 0, [False] * len(rows)
        ids, mask = _left_padded(rows, self.graph.device)
        plan = asked.plan or self.plan(batch, mask is not None)
        variants = {name: VARIANTS[name] for name in plan.executables}
        for variant in variants.values():
            self.compiled(variant)
        sequence = self.sequence(batch)
        conditions = {"eos": lambda: all(ended), "length": lambda: made >= asked.limit}
        start = perf_counter()
        for step, count in plan.walk(lambda name: conditions[name]()):
            if made >= asked.limit:
                return
            if step.resets and not count:
                sequence.reset()
            logits = sequence.call(variants[step.run], ids, mask)
            chosen = asked.sampler(logits[:, -1])
            tokens = chosen.tolist()
            if not made:
                self._first_token(batch, perf_counter() - start)
            made, ids, mask = made + 1, chosen.view(batch, 1), None
            if asked.eos:
                ended = [e or t in asked.eos for e, t in zip(ended, tokens)]
            yield tokens

    @cached_property
    def hf(self) -> Any:
        """A model of transformers whose own `generate()` runs on this decoder.

        Raises InputError where the model is none of transformers'.
        """
        if not is_transformers(self.model):
            what = "was loaded without its model" if self.model is None else "is none of its models"
            raise InputError(f"transformers' generate() cannot run: {self.name} {what}",
                             fix="use decoder.generate")  # fmt: skip
        from effc.hf import generating

        return generating(self)

    # -------------------------------------------------------------- what was done

    @property
    def _effc_steps(self) -> list[StepRow]:
        rows = [StepRow(c.name, c.calls, c.tokens, c.seconds) for c in self._all()]
        return [*(r for r in rows if r.calls), self._first] if self._first.calls else rows

    @property
    def _effc_records(self) -> list[Record]:
        return [c.record for c in self._all()]

    def _all(self) -> list[Compiled]:
        return [c for graph in self.graphs for c in graph.compiled.values()]

    def _first_token(self, rows: int, seconds: float) -> None:
        with self._lock:
            f = self._first
            self._first = StepRow(f.run, f.calls + 1, f.tokens + rows, f.seconds + seconds)


def is_transformers(model: Any) -> bool:
    """Whether it is a model of the transformers library, without importing that."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _prompts(prompt: Tensor | Items[Any]) -> tuple[list[Tensor], bool]:
    """Rows of ids, and whether it was one without a batch."""
    if not isinstance(prompt, Tensor):
        one = len(prompt) > 0 and not isinstance(prompt[0], (Tensor, Items))
        rows = [prompt] if one else prompt
    else:
        one = prompt.dim() == 1
        rows = [prompt] if one else prompt
    found = [torch.as_tensor(r) for r in rows]
    if not found:
        raise InputError("there is no prompt")
    for row in found:
        if row.dim() != 1 or not len(row) or row.dtype.is_floating_point:
            raise InputError(
                f"a prompt must be a list of ids, at least one, got {row.dtype}{list(row.shape)}"
            )
    return [r.long() for r in found], one


def _left_padded(rows: list[Tensor], device: str) -> tuple[Tensor, Tensor | None]:
    """ids [B, T], and which of them are none of the padding; None where all are."""
    longest = max(map(len, rows))
    short = [longest - len(r) for r in rows]
    ids = torch.stack([F.pad(r, (n, 0)) for r, n in zip(rows, short)])
    if not any(short):
        return ids.to(device), None
    mask = (torch.arange(longest) >= torch.tensor(short)[:, None]).long()
    return ids.to(device), mask.to(device)
