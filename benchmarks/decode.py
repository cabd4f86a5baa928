"""`effc bench decode`: language models that generate, beside transformers and llama.cpp.

Every way is handed the same weights and prompt and generates the same number of tokens greedily;
none stops at an end token. It tells each token once it has it, so that a sample is two times: to
the first token, and of a token after it. Over dozens of tokens roundings lead to other texts, so a
way is right if each token it chose has, for eager in float32 after the same tokens, a logit next to
the best one.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import llama_cpp
from .peers import Peer, Unable, no_compiler
from .stats import summarise, usable
from .suites import Built, Case, case
from .timing import WORTH, Series, interleave
from .work import Work
from .worker import Tell, attempt, serve, with_times

WORKER = "effc.benchmarks.decode"
PROMPT, NEW = 64, 64  # tokens
TEXT = """\
The lighthouse stood at the end of a long spit of sand, and nobody in the village could remember who
had built it. On clear nights its beam swept over the roofs and out to sea, and the fishermen set
their clocks by it. One autumn, when the herring had come early, the light went out. """
TOLERANCE = {"fp32": 0.01, "bf16": 1.0}
"""Nats by which a chosen token's logit may fall short of the best one. Logits here are some tens
large: float32 is within 1e-4 of them, bfloat16 within some tenths, and a wrong kernel's choice is
off by several."""

BURST = 0.25  # seconds; shorter generations are repeated until a sample takes about as long

Told = Callable[[int], object]
Generate = Callable[[Told], object]


# ------------------------------------------------------------------ what is timed


def cases() -> list[Case]:
    return [Case("smollm2-135m", "decode", _smollm2), Case("stories260k", "decode", _stories)]


def _smollm2() -> Built:
    from effc.examples.zoo import smollm2

    source = smollm2.source()
    ids = smollm2.tokenizer(source).encode(TEXT).ids[:PROMPT]
    return smollm2.load(source), (torch.tensor([ids]),)


def _stories() -> Built:
    from effc.examples.zoo import stories260k

    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm-stories260k"
    if not folder.is_dir():
        raise FileNotFoundError("stories260k needs ../shared/data/llm-stories260k")
    _, kwargs, _ = stories260k.golden(folder)
    return stories260k.load(folder), (kwargs["input_ids"][:, :PROMPT],)


def work_of(model: nn.Module) -> Work:
    """FLOPs and bytes of weights of one token, in float32: an embedding apart is one row of it."""
    apart = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    apart -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    count = sum(p.numel() for p in model.parameters() if id(p) not in apart)
    return Work(2 * count, 4 * count)


# ------------------------------------------------------------------ ways


@dataclass(frozen=True)
class Generator(Peer):
    """One way of generating."""

    def generator(
        self, model: Any, ids: Tensor, count: int, precision: str, threads: int
    ) -> Generate:
        """A callable that tells its argument `count` greedy tokens after ids [1, T]."""
        raise NotImplementedError


def _in_precision(model: Any, precision: str) -> Any:
    """A copy that no end token stops."""
    from transformers import GenerationConfig

    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(torch.bfloat16) if precision == "bf16" else model


@dataclass(frozen=True)
class Transformers(Generator):
    """The library's own generate(); `static` compiles decode steps by Inductor over its cache."""

    static: bool = False

    def available(self) -> str | None:
        return no_compiler() if self.static else None

    def generator(
        self, model: Any, ids: Tensor, count: int, precision: str, threads: int
    ) -> Generate:
        model, how = _in_precision(model, precision), {}
        if self.static:
            from transformers import CompileConfig

            compiled = CompileConfig(mode="default", dynamic=False)
            compiled._compile_all_devices = True  # it compiles by itself on GPUs only
            how = {"cache_implementation": "static", "compile_config": compiled}

        def generate(told: Told) -> None:
            model.generate(ids, max_new_tokens=count, streamer=_Streamer(told), **how)

        return generate


class _Streamer:
    """What generate() is told by: first the prompt, then every token."""

    def __init__(self, told: Told) -> None:
        self.told, self.begun = told, False

    def put(self, ids: Tensor) -> None:
        if self.begun:
            self.told(int(ids))
        self.begun = True

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class LlamaCpp(Generator):
    """llama.cpp, on the weights written as GGUF of a kind in llama_cpp.KINDS."""

    kind: str = "F32"

    def available(self) -> str | None:
        return llama_cpp.missing()

    def generator(
        self, model: Any, ids: Tensor, count: int, precision: str, threads: int
    ) -> Generate:
        with tempfile.TemporaryDirectory(prefix="effc-bench-") as folder:
            try:
                path = llama_cpp.write(model, Path(folder) / "model.gguf", self.kind)
            except ValueError as e:
                raise Unable(str(e)) from e
            session = llama_cpp.Session(
                path, threads, ids.shape[1] + count, half=self.kind != "F32"
            )
        return lambda told: session.generate(ids[0].tolist(), count, told)


@dataclass(frozen=True)
class Effc(Generator):
    """effc.decoder."""

    def generator(
        self, model: Any, ids: Tensor, count: int, precision: str, threads: int
    ) -> Generate:
        import effc

        decoder = effc.decoder(_in_precision(model, precision))

        def generate(told: Told) -> None:
            for token in decoder.stream(ids[0], count, eos=()):
                told(token)

        return generate


PEERS: dict[str, tuple[Generator, ...]] = {
    "fp32": (
        Transformers("eager"),
        Transformers("inductor", static=True),
        LlamaCpp("llama.cpp"),
        Effc("effc"),
    ),
    "bf16": (
        Transformers("eager-bf16", "eager"),
        Transformers("inductor-bf16", "inductor", static=True),
        LlamaCpp("llama.cpp-f16", "llama.cpp", kind="F16"),
        LlamaCpp("llama.cpp-bf16", "llama.cpp", kind="BF16"),
        Effc("effc-bf16", "effc"),
    ),
}


def chosen(precision: str, names: Sequence[str] = ()) -> list[Generator]:
    """Those of a precision, or of them those named, by name or family."""
    return [p for p in PEERS[precision] if not names or {p.name, p.family or p.name} & set(names)]


def peer_names() -> list[str]:
    """All that `--peers` knows: names and families."""
    every = [p for peers in PEERS.values() for p in peers]
    return list(dict.fromkeys(n for p in every for n in (p.name, p.family) if n))


# ------------------------------------------------------------------ the worker's side


@dataclass
class Generation(Series):
    """Samples are milliseconds a token after the first, `first` those to the first token."""

    generate: Generate
    first: list[float | None] = field(default_factory=list)

    def settle(self) -> None:
        start = time.perf_counter()
        self._once()
        self.burst = max(1, round(BURST / (time.perf_counter() - start)))

    def sample(self) -> float:
        runs = [self._once() for _ in range(self.burst)]
        first, after = (sum(times) / self.burst * 1e3 for times in zip(*runs))
        self.first.append(first)
        return after

    def _once(self) -> tuple[float, float]:
        """Seconds to the first token, and of each after it."""
        told: list[float] = []
        start = time.perf_counter()
        self.generate(lambda _: told.append(time.perf_counter()))
        return told[0] - start, (told[-1] - told[0]) / (len(told) - 1)


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The entry of a job; see worker.run. Times of a way are those of a token after the first."""
    torch.set_num_threads(job["threads"])
    model, (ids,) = case("decode", job["name"]).build()
    entry: dict[str, Any] = {k: job[k] for k in ("name", "precision", "threads")}
    entry |= {"group": "decode", "prompt": ids.shape[1], "new": NEW, "ways": {}}
    entry["work"] = asdict(work_of(model))
    ways: dict[str, Generation] = {}
    with torch.no_grad():
        for peer in chosen(job["precision"], job["peers"]):
            tell("prepare", way=peer.name)
            found, generate = _prepare(peer, model, ids, job)
            entry["ways"][peer.name] = found
            if generate is not None:
                ways[peer.name] = Generation(generate)
        tell("time", rounds=job["rounds"])
        scaling = interleave(ways, job["rounds"], job["threads"], lambda n: tell("round", done=n))
    entry = with_times(entry, ways, scaling)
    for name, way in ways.items():
        taken, _ = usable(way.first, scaling, WORTH)
        samples = [None if s is None else float(f"{s:.5g}") for s in way.first]
        entry["ways"][name]["first"] = {**summarise(taken).as_json(), "samples": samples}
        entry["ways"][name]["tokens_per_s"] = float(f"{1e3 / entry['ways'][name]['ms']:.4g}")
    return entry


def _prepare(
    peer: Generator, model: Any, ids: Tensor, job: dict[str, Any]
) -> tuple[dict[str, Any], Generate | None]:
    """What to keep of a way, and the callable to time if what it generates is right."""

    def make() -> tuple[Generate, list[int]]:
        generate, told = peer.generator(model, ids, NEW, job["precision"], job["threads"]), []
        generate(told.append)
        return generate, told

    found, made = attempt(peer, make, job["skip"].get(peer.name))
    if made is None:
        return found, None
    generate, told = made
    if len(told) != NEW:
        reason = f"it generated {len(told)} tokens of {NEW}"
        return {**found, "status": "wrong", "reason": reason}, None
    found["error"] = error = float(f"{shortfall(model, ids, told):.3g}")
    if not error <= TOLERANCE[job["precision"]]:
        reason = f"it chose a token whose logit is {error:.2g} below the best one's"
        return {**found, "status": "wrong", "reason": reason}, None
    return found, generate


def shortfall(model: Any, ids: Tensor, told: Sequence[int]) -> float:
    """By how much a logit of the tokens chosen after ids [1, T] is below the best at its place, at
    most, as the float32 model sees it."""
    chosen = torch.tensor([told])
    logits = model(input_ids=torch.cat([ids, chosen], 1)).logits[:, ids.shape[1] - 1 : -1].double()
    taken = logits.gather(-1, chosen[..., None])[..., 0]
    return float((logits.amax(-1) - taken).max())


if __name__ == "__main__":
    serve(run)
