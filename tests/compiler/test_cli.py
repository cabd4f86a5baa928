"""The command line: what it prints, what goes to stderr, and its mistakes without tracebacks."""

import json
import subprocess
import sys
import types

import pytest
import torch
from click.testing import CliRunner

import effc
from effc.cli import cli, main
from effc.dump import Dump
from effc.instruments import Measure
from effc.ir import parse
from effc.passes.base import PASSES, Pipeline
from effc.pipeline import run_pipeline
from effc.record import Record
from tests.compiler.small import SCALES, scales

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli, list(map(str, arguments)), input=stdin, catch_exceptions=False)


def fails(capsys, *arguments):
    """Exit code and stderr of the real entry point."""
    with pytest.raises(SystemExit) as e:
        main(list(map(str, arguments)))
    return e.value.code, capsys.readouterr().err


@pytest.fixture
def dumped(tmp_path):
    run_pipeline(
        scales(), Pipeline.parse("planted-bug,merge-scales"),
        instruments=[Measure([X]), Dump(tmp_path / "out", weights=True)],
    )  # fmt: skip
    return tmp_path / "out"


# ------------------------------------------------------------------ opt


def test_opt_prints_the_graph_and_counts_apart():
    done = run("opt", "-p", "merge-scales", stdin=SCALES)
    assert done.exit_code == 0
    graph = parse(done.stdout)
    assert [n.name for n in graph.nodes] == ["mul", "relu", "mul", "relu", "mul"]
    assert done.stderr.startswith("merge-scales: 3 rewrites, ")
    assert "  3 × MergeScales: mul(mul(x, a), b) => mul(x, a * b)\n" in done.stderr


def test_opt_says_why_nothing_happened():
    done = run("opt", "-p", "merge-scales,merge-scales", "--verify", stdin=SCALES)
    assert "matched nothing; nearest: MergeScales at mul: expected mul, found relu" in done.stderr


def test_opt_diff_measure_and_output(tmp_path, dumped):
    done = run("opt", dumped / "000_capture.py", "-p", "planted-bug", "--diff", "--measure")
    assert "+    y2: f32[N, 4] = mul(y1, 5)" in done.stdout
    assert "declared exact (rounding), found max_abs" in done.stderr
    done = run("opt", dumped / "000_capture.py", "-p", "merge-scales", "-o", tmp_path / "new.py",
               "--dump", tmp_path / "story")  # fmt: skip
    assert done.stdout == ""
    assert len(parse((tmp_path / "new.py").read_text()).nodes) == 5
    assert (tmp_path / "story" / "001_merge-scales.py").exists()


def test_opt_mistakes(capsys, tmp_path, golden):
    graph = tmp_path / "graph.py"
    graph.write_text(SCALES)
    bad = tmp_path / "bad.py"
    bad.write_text("def graph(x: f32[4]):\n    y0 = rellu(x)\n    return y0\n")
    said = []
    for arguments in (
        (graph, "-p", "merge-scale"),
        (graph, "-p", "simplify{speed=3}"),
        (graph, "-p", "merge-scales", "-o", tmp_path / "no" / "where.py"),
        (bad, "-p", "simplify"),
    ):
        code, error = fails(capsys, "opt", *arguments)
        assert code == 1 and "Traceback" not in error
        said.append(error.replace(str(tmp_path), "TMP"))
    assert "".join(said) == golden


# ------------------------------------------------------------------ passes


def test_passes_are_listed_with_what_they_promise():
    done = run("passes")
    assert "simplify  exact (bit-equal)\n" in done.stdout
    assert all(name in done.stdout for name in PASSES)
    assert "merge-scales  exact (bit-equal)  from tests\n" in done.stdout  # not one of ours


def test_one_pass_shows_options_and_needs():
    done = run("passes", "fuse-regions")
    assert done.stdout.startswith("fuse-regions  exact (bit-equal)\n")
    assert "default" in done.stdout
    assert "needs: packed weights" in run("passes", "need-packing").stdout


def test_unknown_pass_names_the_nearest(capsys):
    assert fails(capsys, "passes", "simplfy") == (
        1, "effc: unknown pass 'simplfy'\n  fix   did you mean 'simplify'?\n",
    )  # fmt: skip


# ------------------------------------------------------------------ dump, explain


def test_dump_shows_stages_and_files(dumped):
    done = run("dump", dumped)
    assert "1  planted-bug" in done.stdout and "002_merge-scales.py" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_dump_of_a_graph_counts_its_ops(dumped):
    done = run("dump", dumped / "000_capture.py")
    assert done.stdout.startswith("def graph(x: f32[N, 4]):\n")
    assert "8 nodes; 32*N FLOP" in done.stdout
    assert "6 ×  mul" in done.stdout


def test_explain_a_dump(dumped):
    text = run("explain", dumped).stdout
    assert text == run("explain", dumped / "report.json").stdout
    assert "planted-bug: declared exact (rounding), found" in text
    rule = run("explain", dumped, "--rule", "AddScales").stdout
    assert rule.startswith("stage 1, planted-bug\nAddScales  3 of")
    assert json.loads(run("explain", dumped, "--json").stdout)["version"] == 1


@pytest.fixture
def saved(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
    effc.compile(net, example_inputs=(X,)).save(tmp_path / "model.effc")
    return tmp_path / "model.effc"


def test_dump_and_explain_a_saved_model(saved, tmp_path):
    done = run("dump", saved)
    assert done.exit_code == 0 and "written by  effc 0." in done.stdout
    assert "weights.safetensors" in done.stdout and "x86_64" in done.stdout
    done = run("dump", saved, tmp_path / "out")
    assert "000_capture.py" in done.stdout and "manifest.json" in done.stdout
    assert run("dump", saved, tmp_path / "out").exit_code == 0  # a dump of ours may be replaced
    assert run("explain", saved).stdout == run("explain", tmp_path / "out").stdout


def test_mistakes_with_saved_models(capsys, saved, tmp_path, dumped):
    data = saved.read_bytes()
    saved.write_bytes(data[:-1])
    for command in ("dump", "explain"):
        code, error = fails(capsys, command, saved)
        assert code == 1 and "model.effc is damaged" in error
    code, error = fails(capsys, "dump", dumped / "report.json", tmp_path / "out")
    assert code == 1 and "report.json is not an artefact of effc" in error
    code, error = fails(capsys, "dump", dumped, tmp_path / "other")
    assert code == 1 and "cannot read" in error


def test_explain_several_graphs(tmp_path):
    for name in ("graph 0/0", "graph 10/0", "graph 2/0"):
        run_pipeline(scales(), Pipeline.parse(""), instruments=[Dump(tmp_path, Record(name))])
    done = run("explain", tmp_path)
    places = [done.stdout.index(f"graph {n}/0") for n in (0, 2, 10)]
    assert places == sorted(places)
    assert "3 graphs" in done.stdout


def test_explain_mistakes(capsys, tmp_path, dumped):
    code, error = fails(capsys, "explain", tmp_path)
    assert code == 1 and "is no dump: it has no report.json" in error
    code, error = fails(capsys, "explain", dumped / "000_capture.py")
    assert code == 1 and "is no report" in error
    code, error = fails(capsys, "explain", dumped, "--rule", "AddScale")
    assert code == 1 and "did you mean 'AddScales'?" in error
    code, error = fails(capsys, "explain", tmp_path / "none")
    assert code == 2 and "does not exist" in error


# ------------------------------------------------------------------ doctor


def test_doctor_as_text_and_json(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    done = run("doctor")
    assert done.exit_code == 0
    assert torch.__version__ in done.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["usable"]
    by_name = {f["name"]: f for f in found["findings"]}
    assert {"python", "torch", "cpu", "compiler", "openmp", "cache"} <= by_name.keys()
    assert by_name["cache"]["value"].startswith(str(tmp_path / "cache"))
    assert by_name["target reference"]["state"] == "ok"


def test_doctor_names_the_fix_for_a_missing_compiler(monkeypatch):
    from effc.codegen import toolchain

    missing = toolchain.MissingToolchain("no C++ compiler found", "apt-get install g++")
    monkeypatch.setattr(toolchain, "find_toolchain", lambda: missing)
    found = json.loads(run("doctor", "--json").stdout)
    assert found["usable"]  # everything runs through ATen
    by_name = {f["name"]: f for f in found["findings"]}
    assert by_name["compiler"]["fix"] == by_name["target cpu"]["fix"] == "apt-get install g++"
    assert by_name["target cpu"]["state"] == "missing"


def test_doctor_names_what_each_gpu_target_lacks(monkeypatch):
    from effc import doctor as room
    from effc.backends.gpu import driver
    from effc.ir import no

    version = room._version
    monkeypatch.setattr(room, "_version", lambda name: None if name == "triton" else version(name))
    monkeypatch.setattr(driver, "find_driver", lambda: no("torch finds no GPU"))
    by_name = {f.name: f for f in room.examine()}
    assert by_name["gpu driver"].value == "torch finds no GPU" and by_name["gpu driver"].fix
    for target in ("ptx-host", "cuda-host", "triton"):
        found = by_name[f"target {target}"]
        assert found.state == "missing" and found.fix
    assert by_name["target ptx-host"].fix == 'pip install "effc[gpu]"'
    monkeypatch.setattr(room, "_version", lambda name: "3.9.0" if name == "triton" else None)
    by_name = {f.name: f for f in room.examine()}
    assert by_name["target ptx-host"].state == "ok"
    assert by_name["target triton"].value == "lacks gpu driver: torch finds no GPU"


def test_doctor_starts_without_torch():
    """A subprocess in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from effc.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert 'fix: pip install "torch>=2.11"' in done.stdout


# ------------------------------------------------------------------ cache, demo, help


def test_cache_shows_and_clears(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path))
    for kind in ("objects", "locks"):
        (tmp_path / "v1" / kind / "ab").mkdir(parents=True)
        (tmp_path / "v1" / kind / "ab" / "file").write_bytes(b"x" * 2000)
    (tmp_path / "mine.txt").write_text("mine")
    assert "objects  1 files, 2 kB" in run("cache").stdout
    assert run("cache", "clear").stdout == f"removed 2 kB from {tmp_path}\n"
    assert not (tmp_path / "v1" / "objects").exists()
    assert (tmp_path / "v1" / "locks" / "ab" / "file").exists()  # another process may hold it
    assert (tmp_path / "mine.txt").exists()
    assert "objects" not in run("cache", "info").stdout


def test_demo_is_handed_its_arguments(monkeypatch, tmp_path):
    given = []
    module = types.ModuleType("effc.demo")
    module.main = lambda *arguments: given.append(arguments) or 0
    monkeypatch.setitem(sys.modules, "effc.demo", module)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"")
    assert run("demo", picture, "--out", "there").exit_code == 0
    assert run("demo").exit_code == 0
    assert given == [(str(picture), None, "there"), (None, None, "out")]


def test_demo_without_its_packages_says_what_to_install(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("No module named 'PIL'", name="PIL")

    monkeypatch.setitem(sys.modules, "effc.demo", Broken("effc.demo"))
    done = run("demo")
    assert done.exit_code == 1
    assert "No module named 'PIL'; fix: pip install \"effc[demo]\"" in done.stderr


def test_unknown_command_names_the_nearest(capsys):
    code, error = fails(capsys, "dctor")
    assert code == 2 and "unknown command 'dctor': did you mean 'doctor'?" in error


@pytest.mark.parametrize("command", ["opt", "passes", "dump", "explain", "build", "race", "demo"])
def test_help_has_examples(command):
    done = run(command, "--help")
    assert f"\n    effc {command}" in done.stdout
