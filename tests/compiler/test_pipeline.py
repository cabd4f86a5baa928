"""The driver keeps every stage, says why nothing happened, and names what failed and where."""

import pytest
import torch

from effc.instruments import Instrument
from effc.ir import PassError, PipelineError, no, parse, yes
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline, stages_diff
from effc.stagediff import graph_diff
from tests.compiler.small import SCALES, scales


def run(pipeline, graph=None, **options):
    return run_pipeline(graph or scales(), Pipeline.parse(pipeline), **options)


def test_every_stage_is_kept():
    graph = scales()
    stages = run("planted-loss,merge-scales", graph)
    assert [s.index for s in stages] == [0, 1, 2]
    assert [s.name for s in stages] == ["capture", "planted-loss", "merge-scales"]
    assert stages[0].graph is graph and graph == scales()  # a pass leaves its input as it was
    assert [s.rewrites for s in stages] == [0, 3, 0]
    assert [s.changed for s in stages] == [False, True, False]
    assert stages[1].title == "The same, declared."
    assert stages[1].rules[0].hits == 3
    assert parse(stages[1].text) == stages[1].graph


def test_empty_pipeline_is_the_capture():
    (stage,) = run("")
    assert stage.name == "capture" and stage.why_unchanged is None


def test_pass_that_matched_nothing_names_its_nearest_miss():
    graph = parse("def graph(x: f32[4], s: f32[4]):\n y0 = mul(x, s)\n y1 = mul(y0, 2)\n return y1")
    stage = run("merge-scales", graph)[1]
    assert not stage.changed
    assert stage.nearest_miss.checked
    assert stage.why_unchanged.startswith("matched nothing; nearest: MergeScales at mul: ")
    assert "are not both numbers" in stage.why_unchanged


def test_pass_whose_ops_are_absent_says_so():
    stage = run("merge-scales", parse("def graph(x: f32[4]):\n y0 = relu(x)\n return y0"))[1]
    assert stage.why_unchanged == "matched nothing: no op that its rules start at is here"


def test_supports_reaches_the_pass():
    def supports(node):
        return yes if node.name == "mul" else no("no kernel for {}", node.name, at=node)

    stage = run("ask-support", supports=supports)[1]
    assert stage.notes == ("mul: yes", "mul: yes", "relu: no kernel for relu")
    assert stage.why_unchanged is None  # its notes say more


def test_impossible_order_is_refused_before_any_pass_runs():
    with pytest.raises(PipelineError, match="need-packing needs packed weights"):
        run("fail-at-relu,need-packing")


def test_failure_names_pass_stage_node_and_lines_around(golden):
    with pytest.raises(PassError) as e:
        run("merge-scales,fail-at-relu")
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert str(e.value) == golden


def test_ctrl_c_passes_through():
    with pytest.raises(KeyboardInterrupt):
        run("interrupt")


def test_pass_without_return_is_told_to_return():
    with pytest.raises(PassError, match=r"forget-return failed.*NoneType, not a graph") as e:
        run("forget-return")
    assert e.value.fix == "return the graph"


def test_outputs_keep_their_shape():
    with pytest.raises(PassError, match=r"output 0 was f32\[N, 4\] and now is f32\[N, 2\]"):
        run("narrow-output")


def test_instruments_see_every_pass_and_the_failure():
    seen = []

    class Watch(Instrument):
        def start(self, run):
            seen.append("start")

        def before(self, run, p):
            seen.append(f"before {p}")

        def after(self, run, stage, journal):
            seen.append(f"after {stage.name}, {len(journal.rewrites)} rewrites")
            return stage

        def failed(self, run, error):
            seen.append(f"failed with {len(run.stages)} stages")

        def finish(self, run):
            seen.append("finish")

    run("merge-scales", instruments=[Watch()])
    assert seen == ["start", "before merge-scales", "after merge-scales, 3 rewrites", "finish"]
    seen.clear()
    with pytest.raises(PassError):
        run("merge-scales,fail-at-relu", instruments=[Watch()])
    assert seen[-2:] == ["before fail-at-relu", "failed with 2 stages"]


def test_sample_inputs_are_measured_without_being_asked():
    stages = run("merge-scales,planted-bug", sample_inputs=[torch.randn(3, 4)])
    assert stages[1].error.equal and stages[1].total_error.equal
    assert stages[2].error.equal  # nothing left to merge


# ------------------------------------------------------------------ differences of text


def test_diff_of_equal_stages_is_empty():
    stages = run("merge-scales,merge-scales")
    assert stages_diff(stages[1], stages[2]) == ""


def test_diff_is_not_drowned_by_renumbering(golden):
    stages = run("merge-scales")
    assert stages_diff(stages[0], stages[1]) == golden


def test_diff_shows_another_operand():
    before = "def graph(x: f32[4]):\n    y0: f32[4] = relu(x)\n    y1: f32[4] = relu(y0)\n"
    after = "def graph(x: f32[4]):\n    y0: f32[4] = relu(x)\n    y1: f32[4] = relu(x)\n"
    assert [row for row in graph_diff(before, after, "a", "b").splitlines() if "y1" in row] == [
        "-    y1: f32[4] = relu(y0)",
        "+    y1: f32[4] = relu(x)",
    ]


def test_header_says_what_made_the_stage():
    stage = run("merge-scales", sample_inputs=[torch.randn(3, 4)])[1]
    assert stage.header().startswith("stage 1: made by merge-scales, 3 rewrites, ")
    assert stage.header().endswith(" ms, equal")
    assert SCALES.count("mul") == 6
