"""Verifying, measuring and dumping around passes; finding the rewrite that is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from effc import dump as dumps
from effc.bisection import bisect
from effc.difference import Difference, compare, violation
from effc.dump import Dump, check_folder, write_dump
from effc.instruments import Measure, Verify
from effc.ir import InputError, OptionError, PassError, parse
from effc.ir import Tensor as TensorType
from effc.ir.formats import GroupQuant, quantize
from effc.ir.types import f32, i8
from effc.passes.base import Pipeline, bounded, exact, lossy
from effc.pipeline import run_pipeline
from effc.record import Record
from effc.report import Report
from effc.rerun import rerun
from tests.compiler.small import scales

X = torch.linspace(-1, 1, 12).reshape(3, 4)

LAYERS = """
def graph(x: f32[N, 4], n: size):
    w0: f32[8, 4] = weight("fc.weight")
    w1: i64[8] = weight("fc.steps")
    y0 = linear(x, w0)
    y1 = mul(y0, w1)
    y2 = mul(y1, n)
    return y2, n
"""


def run(pipeline, graph=None, **options):
    return run_pipeline(graph or scales(), Pipeline.parse(pipeline), **options)


# ------------------------------------------------------------------ verify


def test_verify_names_the_pass_that_made_an_invalid_graph():
    with pytest.raises(PassError) as e:
        run("merge-scales,drop-first-node", instruments=[Verify()])
    assert e.value.what == "drop-first-node (stage 2) made an invalid graph"
    assert "is not computed before it" in e.value.why


def test_verify_compares_the_text_with_the_graph(monkeypatch):
    other = parse("def graph(x: f32[N, 4]):\n y0 = mul(x, 5)\n return y0")
    monkeypatch.setattr("effc.instruments.parse", lambda text: other)
    with pytest.raises(PassError, match="its text parses to another graph"):
        run("", instruments=[Verify()])
    run("", instruments=[Verify(round_trip=False)])


# ------------------------------------------------------------------ differences


@pytest.mark.parametrize(
    ("a", "b", "max_abs", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0),
        ([3.0, 4.0], [3.0, 4.5], 0.5, 0.1),
        ([math.nan, math.inf], [math.nan, math.inf], 0, 0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf, math.inf),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf, math.inf),
        ([0.0, 0.0], [0.0, 2.0], 2, 1),
        ([], [], 0, 0),
    ],
)
def test_compare_numbers(a, b, max_abs, relative):
    found = compare([torch.tensor(a)], [torch.tensor(b)])
    assert found.max_abs == pytest.approx(max_abs)
    assert found.relative_l2 == pytest.approx(relative)


def test_compare_other_kinds_of_results():
    true = torch.tensor([True, False])
    assert compare([true, 3], [true, 3]).equal
    assert compare([3], [4]).max_abs == 1
    assert compare([torch.ones(2)], [torch.ones(3)]).max_abs == math.inf
    assert compare([torch.ones(2)], [torch.ones(2).double()]).max_abs == math.inf
    assert compare([(torch.ones(2), true)], [(torch.ones(2), ~true)]).max_abs == 1
    assert compare([torch.ones(2) * 1j], [torch.ones(2) * 2j]).max_abs == 1
    assert compare([torch.ones(2)], []).max_abs == math.inf
    t = TensorType((2, 4), i8, format=GroupQuant(None, f32))
    a, b = (quantize(torch.ones(2, 4) * size, t) for size in (1, 3))
    assert compare([a], [a]).equal
    assert compare([a], [b]).max_abs == pytest.approx(2)
    worst = compare([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)])
    assert worst.output == 1


def test_violation_follows_the_contract():
    one_ulp = Difference(1e-7, 1e-7, eps=1.2e-7)
    assert violation(exact(), one_ulp) and not violation(exact("rounding"), one_ulp)
    assert violation(exact("rounding"), Difference(1e-3, 1e-3, eps=1.2e-7))
    assert not violation(exact("rounding"), Difference(1e-2, 1e-2, eps=7.8e-3))  # bfloat16
    assert violation(bounded("max_abs", 0.5), Difference(0.6, 0.0))
    assert not violation(bounded("max_abs", 0.5), Difference(0.4, 9.0))
    assert not violation(lossy("max_abs"), Difference(math.inf, math.inf))
    assert violation(bounded("max_abs", 0.5), Difference(math.inf, math.inf))


def test_planted_bug_is_found_by_the_difference_of_its_pass():
    stages = run("merge-scales,negate-outputs", sample_inputs=[X])
    assert stages[1].error.equal and stages[1].violation is None
    assert stages[2].error.relative_l2 == pytest.approx(2)
    stages = run("planted-bug,negate-outputs,negate-outputs", sample_inputs=[X])
    assert stages[1].violation.startswith("declared exact (rounding), found max_abs")
    assert stages[1].error == stages[1].total_error
    assert stages[3].error.relative_l2 == pytest.approx(2)
    assert stages[3].total_error.relative_l2 == pytest.approx(1 / 6)  # 5 instead of 6


def test_planted_bug_is_found_at_its_node():
    stage = run("planted-bug", sample_inputs=[X])[1]
    assert [n.before.partition(":")[0] for n in stage.node_errors] == ["y1", "y4", "y7"]
    first, second, third = stage.node_errors
    assert first.error.equal and first.after.startswith("y0: f32[N, 4] = mul(x, 4)")
    assert second.error.relative_l2 == pytest.approx(1 / 6)
    assert second.where == "layer3  model.py:13"
    assert third.error.relative_l2 == pytest.approx(1 / 6)  # inherited: it comes later


def test_strict_refuses_and_names_the_first_wrong_node(golden):
    with pytest.raises(PassError) as e:
        run("merge-scales", sample_inputs=[X], instruments=[Measure(strict=True)])
        run("planted-bug", sample_inputs=[X], instruments=[Measure(strict=True)])
    assert str(e.value) == golden


def test_declared_loss_is_no_violation_and_a_broken_bound_is():
    strict = Measure(strict=True)
    assert run("planted-loss", sample_inputs=[X], instruments=[strict])[1].violation is None
    with pytest.raises(PassError, match="breaks its numeric contract"):
        run("planted-bound", sample_inputs=[X], instruments=[strict])
    assert run("planted-bound", sample_inputs=[X / 100], instruments=[strict])[1].error.max_abs


def test_worst_of_several_samples_counts():
    one, many = (run("planted-bug", sample_inputs=s)[1].error for s in ([X], [(X,), (10 * X,)]))
    assert many.max_abs == pytest.approx(10 * one.max_abs)


def test_random_ops_draw_the_same_before_and_after():
    graph = parse(
        "def graph(x: f32[4]):\n y0: f32[4] = aten.rand_like.default(x)\n y1 = mul(y0, 2)\n"
        " y2 = mul(y1, 3)\n return y2"
    )
    state = torch.random.get_rng_state()
    assert run("merge-scales", graph, sample_inputs=[torch.ones(4)])[1].error.relative_l2 < 1e-6
    assert torch.equal(state, torch.random.get_rng_state())


def test_measuring_without_weights_is_refused_before_any_pass():
    with pytest.raises(InputError, match=r"weight 'fc.weight' has no values"):
        run("fail-at-relu", parse(LAYERS), sample_inputs=[X, 3])


# ------------------------------------------------------------------ bisection


def test_bisect_names_pass_and_rewrite(golden):
    found = bisect(scales(), "merge-scales", [X])
    assert found is None
    found = bisect(scales(), "negate-outputs,negate-outputs,planted-bug", [X])
    assert found.stage == 1 and found.name == "negate-outputs"
    found = bisect(scales(), "planted-bug,negate-outputs", [X])
    assert (found.stage, found.rewrite, found.rewrites) == (1, 2, 3)
    assert str(found) == golden


def test_bisect_ignores_what_is_within_tolerance():
    assert bisect(scales(), "planted-bug", [X], tolerance=0.2) is None
    assert bisect(scales(), "planted-bug", [X], tolerance=0.5, metric="max_abs").rewrite == 2
    with pytest.raises(InputError, match="metric must be"):
        bisect(scales(), "planted-bug", [X], metric="cosine")


def test_bisect_blames_the_pass_where_it_uses_no_rules():
    found = bisect(scales(), "merge-scales,negate-outputs", [X])
    assert (found.stage, found.rewrite) == (2, None)
    assert str(found).startswith("negate-outputs (stage 2) breaks the result: max_abs")


# ------------------------------------------------------------------ dumps


def test_dump_reads_as_a_story(tmp_path):
    out = tmp_path / "out"
    run("merge-scales,planted-bug", sample_inputs=[X], instruments=[Dump(out)])
    assert sorted(os.listdir(out)) == [
        "000_capture.py", "001_merge-scales.py", "002_planted-bug.py", "index.html",
        "inputs.safetensors", "report.json",
    ]  # fmt: skip
    head = (out / "001_merge-scales.py").read_text().splitlines()
    assert head[0].startswith("# stage 1: made by merge-scales, 3 rewrites, ")
    assert head[1:4] == [
        "# Multiply neighbouring factors.", "# numerics: exact (bit-equal)",
        "from __future__ import annotations",
    ]  # fmt: skip
    report = Report.read((out / "report.json").read_text())
    assert [s.rewrites for s in report.stages] == [0, 3, 0]
    assert oct(out.stat().st_mode & 0o700) == "0o700"
    assert not [n for n in os.listdir(tmp_path) if n != "out"]  # nothing half-made beside it


def test_file_of_a_dump_runs_on_its_own(tmp_path):
    run("merge-scales", sample_inputs=[X], instruments=[Dump(tmp_path / "out")])
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "001_merge-scales.py"], capture_output=True, text=True
    )
    want = 4 * 6 * 4 * X.clamp(min=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "001_merge-scales.py: 5 nodes\n"
        f"f32[N, 4]: mean {want.mean().item():.6g}, norm {want.norm().item():.6g}\n"
    )


def layers():
    weights = {"fc.weight": torch.randn(8, 4), "fc.steps": torch.arange(8)}
    return parse(LAYERS, weights), weights


def test_dump_keeps_weights_by_digest_where_asked(tmp_path):
    graph, weights = layers()
    stages = run("", graph, sample_inputs=[X, 3], instruments=[Dump(tmp_path / "a", weights=True)])
    saved = load_file(tmp_path / "a" / "weights.safetensors")
    assert saved.keys() == {w.content for w in stages[0].graph.weights}
    want = X @ weights["fc.weight"].T * weights["fc.steps"] * 3
    assert f"norm {want.norm().item():.6g}" in rerun(tmp_path / "a" / "000_capture.py")
    run("", graph, instruments=[Dump(tmp_path / "b")])
    said = rerun(tmp_path / "b" / "000_capture.py", ["N=5", "n=2"])
    assert "random values for 2 weights" in said and "random inputs, N=5, n=2" in said
    assert "size: 2" in said


def test_rerun_refuses_what_the_graph_does_not_have(tmp_path):
    run("", instruments=[Dump(tmp_path / "a")])
    file = tmp_path / "a" / "000_capture.py"
    assert "random inputs, N=16" in rerun(file)
    with pytest.raises(InputError, match="the graph has no size M"):
        rerun(file, ["M=2"])
    with pytest.raises(InputError, match="not a size: 'N'"):
        rerun(file, ["N"])


def test_dump_of_a_failed_pipeline_holds_what_was_reached(tmp_path):
    with pytest.raises(PassError):
        run("merge-scales,fail-at-relu", instruments=[Dump(tmp_path / "out")])
    assert (tmp_path / "out" / "001_merge-scales.py").exists()
    report = Report.read((tmp_path / "out" / "report.json").read_text())
    assert "fail-at-relu failed at stage 2 of 2" in report.error
    assert "ZeroDivisionError: planted" in (tmp_path / "out" / "index.html").read_text()


def test_dump_holds_the_stage_that_an_instrument_refuses(tmp_path):
    with pytest.raises(PassError):
        run("planted-bug", sample_inputs=[X],
            instruments=[Measure(strict=True), Dump(tmp_path / "out")])  # fmt: skip
    assert "mul(y1, 5)" in (tmp_path / "out" / "001_planted-bug.py").read_text()
    with pytest.raises(PassError):  # that graph has no text
        run("drop-first-node", instruments=[Verify(), Dump(tmp_path / "out")])
    assert not (tmp_path / "out" / "001_drop-first-node.py").exists()


def test_only_a_dump_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run("", instruments=[Dump(out)])
    run("merge-scales", instruments=[Dump(out)])
    assert (out / "001_merge-scales.py").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="cannot write a dump") as e:
        run("fail-at-relu", instruments=[Dump(out)])  # before any pass
    assert e.value.why == "it holds files that are not of a dump: notes.txt"
    assert (out / "notes.txt").read_text() == "mine"


def test_place_that_cannot_be_written_is_refused_before_compiling(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OptionError, match="cannot write a dump") as e:
        run("fail-at-relu", instruments=[Dump(file)])
    assert e.value.why == "it is a file"
    with pytest.raises(OptionError, match="cannot write a dump"):
        run("fail-at-relu", instruments=[Dump(file / "below")])
    assert file.read_text() == ""


def test_unwritable_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OptionError) as e:
        check_folder(tmp_path / "a" / "b")
    assert e.value.why == f"{tmp_path} is not writable"


def test_failed_write_leaves_the_old_dump(tmp_path, monkeypatch):
    out = tmp_path / "out"
    run("merge-scales", instruments=[Dump(out)])
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(path, content):
        if path.name == "index.html":
            raise OSError(28, "No space left on device")
        path.write_text(content)

    monkeypatch.setattr(dumps, "_put", full)
    with pytest.raises(OptionError) as e:
        run("", instruments=[Dump(out)])
    assert e.value.why == "No space left on device"
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_dump_is_completed_with_kernels(tmp_path):
    record = Record("model")
    instrument = Dump(tmp_path / "out", record)
    run("merge-scales", instruments=[instrument])
    kernels = {"scale": "extern void scale();\n", "a/b": "__global__ void f() {}\n"}
    record.executable = SimpleNamespace(kernels=kernels, text="kernel s0 y0 = scale(x)\n")
    instrument.complete()
    folder = tmp_path / "out" / "kernels"
    assert sorted(os.listdir(folder)) == ["a_b.cu", "plan.txt", "scale.cpp"]
    assert (folder / "scale.cpp").read_text() == kernels["scale"]


def test_graphs_of_one_model_get_folders_of_their_own(tmp_path):
    for name in ("graph 0/0", "graph 1/2"):
        run("", instruments=[Dump(tmp_path / "out", Record(name))])
    assert sorted(os.listdir(tmp_path / "out")) == ["graph_0_0", "graph_1_2"]


def test_page_is_self_contained_and_escaped(tmp_path):
    graph = scales()
    stages = run("planted-bug", graph, sample_inputs=[X])
    write_dump(tmp_path / "out", Record("<script>", "planted-bug", stages=stages))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page
    assert '<span class="del">-    y3&#39;: f32[N, 4] = mul(y1, 3)' in page
    assert '<span class="add">+    y2: f32[N, 4] = mul(y1, 5)' in page
    assert "declared exact (rounding), found max_abs" in page
    json.loads((tmp_path / "out" / "report.json").read_text())
