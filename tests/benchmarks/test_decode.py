"""`effc bench decode`: a small Llama through every way that is here, wrong ones, tables, archive."""

import json

import pytest
import torch
from click.testing import CliRunner

from effc.benchmarks import command, decode, llama_cpp, plots, suites, worker
from effc.benchmarks.archive import Key, Results
from effc.benchmarks.command import with_bounds
from effc.benchmarks.suites import Case
from effc.benchmarks.tables import as_parts
from effc.benchmarks.timing import Series
from effc.cli import cli
from effc.show import as_text

from .test_tables import LIMITS, timed

pytest.importorskip("transformers")
NEW = 6
NEEDS_LLAMA_CPP = pytest.mark.skipif(llama_cpp.missing() is not None, reason="needs llama_cpp")


def small(tied=True):
    """A Llama with logits some units apart, so that a wrong token is seen to be one, and with no
    token that would not end a text; 5 ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(config.vocab_size))
    return model, (torch.tensor([[3, 1, 4, 1, 5]]),)


@pytest.fixture
def job(monkeypatch):
    """What to run of a small Llama in a short time: `job(precision, peer, ...)`."""
    monkeypatch.setitem(suites.SUITES, "decode", lambda: [Case("small", "decode", small)])
    monkeypatch.setattr(decode, "NEW", NEW)
    monkeypatch.setattr(decode, "BURST", 0.0)
    return lambda precision, *peers, **more: {
        "suite": "decode", "name": "small", "precision": precision, "threads": 1, "rounds": 2,
        "peers": list(peers), "skip": {}, **more,
    }  # fmt: skip


def run(job):
    return decode.run(job, lambda *_, **__: None)


def reference(ids, count=NEW):
    """Greedy tokens by whole forwards, without a cache."""
    model, _ = suites.case("decode", "small").build()
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()


# ------------------------------------------------------------------ ways


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_way_that_is_here_generates_and_is_timed(job, precision):
    quick = [p.name for p in decode.chosen(precision) if "inductor" not in (p.name, p.family)]
    entry = run(job(precision, *quick))
    assert list(entry["ways"]) == quick and (entry["prompt"], entry["new"]) == (5, NEW)
    for peer in decode.chosen(precision, quick):
        found = entry["ways"][peer.name]
        if reason := peer.available():
            assert found == {"status": "absent", "reason": reason}
            continue
        assert found["status"] == "timed", found
        assert found["error"] < {"fp32": 1e-4, "bf16": 0.5}[precision]
        assert len(found["samples"]) == len(found["first"]["samples"]) == 2
        assert found["tokens_per_s"] == pytest.approx(1e3 / found["ms"], rel=1e-3)
        assert found["first"]["ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inductor_over_a_static_cache_generates_and_is_timed(job, precision):
    (found,) = run(job(precision, "inductor"))["ways"].values()
    assert found["status"] == "timed", found


@pytest.mark.parametrize("name", ["eager", pytest.param("llama.cpp", marks=NEEDS_LLAMA_CPP)])
def test_ways_tell_the_greedy_tokens_one_by_one(job, name):
    model, (ids,) = suites.case("decode", "small").build()
    (peer,) = decode.chosen("fp32", [name])
    generate = peer.generator(model, ids, NEW, "fp32", 1)
    for _ in range(2):
        told = []
        generate(told.append)
        assert told == reference(ids)
    assert len(model.generation_config.eos_token_id) == 96, "the case's own model is as it was"


def test_inductor_is_asked_to_compile_the_steps(job, monkeypatch):
    model, (ids,) = suites.case("decode", "small").build()
    asked, plain = [], torch.compile

    def compiled(f, **options):
        asked.append(options)
        return plain(f, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    (peer,) = decode.chosen("fp32", ["inductor"])
    told = []
    peer.generator(model, ids, NEW, "fp32", 1)(told.append)
    assert told == reference(ids)
    (options,) = asked
    assert options["backend"] == "inductor" and options["dynamic"] is False


class Stuck(decode.Generator):
    """The first token again and again."""

    def generator(self, model, ids, count, precision, threads):
        return lambda told: [told(0) for _ in range(self.of(count))]

    def of(self, count):
        return count


class Short(Stuck):
    def of(self, count):
        return count - 1


class Broken(Stuck):
    def of(self, count):
        raise ValueError("no such\nthing")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_way_that_is_wrong_or_fails_is_not_timed_and_says_why(job, monkeypatch, precision):
    right = decode.Transformers("right")
    ways = (Stuck("stuck"), Short("short"), Broken("broken"), Stuck("gone"), right)
    monkeypatch.setitem(decode.PEERS, precision, ways)
    found = run(job(precision, skip={"gone": "ended by SIGILL"}))["ways"]
    said = {name: (way["status"], way.get("reason")) for name, way in found.items()}
    assert said.pop("stuck")[1].startswith("it chose a token whose logit is ")
    assert said == {
        "short": ("wrong", f"it generated {NEW - 1} tokens of {NEW}"),
        "broken": ("failed", "ValueError: no such"),
        "gone": ("failed", "ended by SIGILL"),
        "right": ("timed", None),
    }
    assert all("ms" not in way for name, way in found.items() if name != "right")


def test_a_choice_short_of_the_best_is_measured_in_logits(job):
    model, (ids,) = suites.case("decode", "small").build()
    best = reference(ids)
    assert decode.shortfall(model, ids, best) == 0
    logits = model(input_ids=ids).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    assert decode.shortfall(model, ids, [second]) == pytest.approx(
        float(logits.max() - logits[second]), rel=1e-4
    )


def test_samples_are_of_tokens_after_the_first_and_short_runs_repeat(monkeypatch):
    now, runs = [0.0], []
    monkeypatch.setattr(decode.time, "perf_counter", lambda: now[0])

    def generate(told):
        runs.append(1)
        now[0] += 0.05
        for _ in range(3):
            told(0)
            now[0] += 0.01

    way = decode.Generation(generate)
    assert isinstance(way, Series)
    way.settle()
    assert way.burst == round(decode.BURST / 0.08) == len(runs) + 2
    assert way.sample() == pytest.approx(10.0)
    assert way.first == [pytest.approx(50.0)]


# ------------------------------------------------------------------ bytes


def test_a_step_reads_every_weight_but_an_embedding_that_is_no_head():
    tied, _ = small()
    apart, _ = small(tied=False)
    every = sum(p.numel() for p in tied.parameters())
    assert decode.work_of(tied).bytes == decode.work_of(apart).bytes == 4 * every
    assert decode.work_of(tied).flops == 2 * every


# ------------------------------------------------------------------ llama.cpp


@pytest.mark.parametrize("tied", [True, False])
def test_a_written_gguf_says_what_the_model_says(tmp_path, tied):
    gguf = pytest.importorskip("gguf")
    model, _ = small(tied)
    fields = gguf.GGUFReader(llama_cpp.write(model, tmp_path / "f32.gguf", "F32")).fields
    assert fields["llama.rope.freq_base"].contents() == 1e4
    assert fields["tokenizer.ggml.model"].contents() == "none"
    for kind, nearest in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        read = gguf.GGUFReader(llama_cpp.write(model, tmp_path / f"{kind}.gguf", kind))
        stored = {t.name: t for t in read.tensors}
        assert ("output.weight" in stored) == (not tied)
        norm = stored["blk.1.ffn_norm.weight"]
        assert norm.tensor_type.name == "F32"
        v = stored["blk.1.attn_v.weight"]
        got = torch.tensor(gguf.dequantize(v.data, v.tensor_type))
        want = model.model.layers[1].self_attn.v_proj.weight
        assert v.tensor_type.name == kind and torch.equal(got, want.to(nearest).float())


def test_what_a_gguf_cannot_say_is_refused_with_the_reason(job, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(llama_cpp, "missing", lambda: None)
    model, (ids,) = small()
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    way = decode.LlamaCpp("llama.cpp")
    found, made = worker.attempt(way, lambda: way.generator(model, ids, NEW, "fp32", 1))
    assert made is None
    assert found == {
        "status": "unable",
        "reason": "rope_type 'yarn' is not written, only 'default'",
    }


@NEEDS_LLAMA_CPP
def test_a_file_that_llama_cpp_refuses_is_an_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"cannot load bad\.gguf"):
        llama_cpp.Session(tmp_path / "bad.gguf", 1, 16)


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch):
    from effc.backends.cpu.features import CpuFeatures

    cpu = CpuFeatures(
        level="avx512", extensions=("avx512_vnni", "amx_tile", "amx_bf16"), cores=1, threads=1,
        l1d=1, l2=1, l3=1, model="",
    )  # fmt: skip
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(llama_cpp, "detect", lambda: cpu)
    said = llama_cpp.missing()
    assert said.startswith("llama_cpp is not installed: CMAKE_ARGS=")
    assert said.endswith('pip install "effc[llama]"')
    assert "GGML_NATIVE=OFF" in said and "GGML_AVX2=ON" in said and "GGML_AVX512_VNNI=ON" in said
    assert "AMX" not in said and "GGML_AVX512_BF16" not in said
    assert llama_cpp.cmake_options("no x86") == ["-DLLAVA_BUILD=OFF"]


# ------------------------------------------------------------------ tables, archive, command


def generated(ms, first):
    return {**timed(ms), "first": timed(first), "tokens_per_s": 1e3 / ms}


@pytest.fixture
def made_up():
    found = Results("decode", date="2000-01-01", limits=LIMITS)
    absent = {"status": "absent", "reason": 'llama_cpp is not installed: pip install "effc[llama]"'}
    for precision, ways in (
        ("fp32", {"eager": generated(40.0, 300.0), "llama.cpp": absent, "effc": generated(25.0, 200.0)}),
        ("bf16", {"eager-bf16": generated(80.0, 900.0), "llama.cpp-f16": generated(15.0, 90.0), "effc-bf16": generated(20.0, 200.0)}),
    ):  # fmt: skip
        entry = {"name": "one", "precision": precision, "threads": 1, "group": "decode", "prompt": 64,
                 "new": 64, "work": {"flops": 10**8, "bytes": 2 * 10**8}, "ways": ways}  # fmt: skip
        found.put(with_bounds(entry, LIMITS))
    return found


def test_tables_and_picture_of_made_up_results(made_up, tmp_path, golden):
    assert as_text(as_parts(made_up)) == golden
    pytest.importorskip("matplotlib")
    assert [p.name for p in plots.draw(made_up, tmp_path)] == ["decode.png", "decode.svg"]


def test_a_part_of_the_limit_is_that_of_the_bytes_in_the_precision(made_up):
    fp32, bf16 = made_up.entries
    assert fp32["bound"] == {"ms": 20.0, "by": "DRAM"} and bf16["bound"]["ms"] == 10.0
    assert fp32["ways"]["effc"]["fraction"] == pytest.approx(0.8)
    assert bf16["ways"]["eager-bf16"]["fraction"] == pytest.approx(10 / 80)


def test_the_command_keeps_every_entry_and_takes_it_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_limits_of", lambda options, console: LIMITS)
    monkeypatch.setattr(plots, "draw", lambda found, out: [])
    seen = []

    def run(job, tell, patience, worker):
        seen.append((job["name"], job["precision"], worker))
        peers = decode.chosen(job["precision"], job["peers"])
        return {
            **{k: job[k] for k in ("name", "precision", "threads")}, "group": "decode",
            "prompt": 64, "new": 64, "work": {"flops": 1, "bytes": 4},
            "ways": {p.name: generated(1.0, 2.0) for p in peers},
        }  # fmt: skip

    monkeypatch.setattr(command, "run_job", run)

    def bench(*more):
        arguments = ["bench", "decode", "--only", "stories260k", "--out", str(tmp_path), *more]
        return CliRunner().invoke(cli, arguments, catch_exceptions=False)

    assert bench("--peers", "effc,eager").exit_code == 0
    assert seen == [("stories260k", p, decode.WORKER) for p in ("fp32", "bf16")]
    (fp32, bf16) = Results.load(tmp_path / "decode.json").entries
    assert list(fp32["ways"]) == ["eager", "effc"] and list(bf16["ways"]) == [
        "eager-bf16",
        "effc-bf16",
    ]
    assert bench("--peers", "effc,eager", "--resume").exit_code == 0 and len(seen) == 2
    assert bench("--resume").exit_code == 0 and len(seen) == 4, "other ways are missing yet"
    ways = list(Results.load(tmp_path / "decode.json").entry(Key("stories260k", "bf16", 1))["ways"])
    assert ways == [p.name for p in decode.PEERS["bf16"]]
    with pytest.raises(Exception, match="no peer 'openvino'"):
        bench("--peers", "openvino")


@pytest.mark.slow
def test_stories_end_to_end_in_processes_of_their_own(tmp_path, monkeypatch, shared_data):
    monkeypatch.setattr(command, "_limits_of", lambda options, console: LIMITS)
    arguments = ["bench", "decode", "--only", "stories260k", "--precision", "fp32", "--rounds", "1",
                 "--peers", "eager,effc", "--out", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    (entry,) = json.loads((tmp_path / "decode.json").read_text())["entries"]
    assert {w["status"] for w in entry["ways"].values()} == {"timed"}, done.output
    assert entry["ways"]["effc"]["error"] < 0.01 and "tokens/s" in done.output
