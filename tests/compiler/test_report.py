"""A report says what happened to every pass, rule and node; it saves, loads and reads well."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from effc.backends import Launch
from effc.difference import Difference, NodeError
from effc.ir import InputError, OptionError, no, parse
from effc.passes.base import Pipeline
from effc.pipeline import run_pipeline
from effc.record import Break, Guard, Record
from effc.render import rule_parts
from effc.report import Explanation, Report
from effc.show import amount, as_text, counted, duration
from tests.compiler.small import scales


def stages(pipeline="planted-bug,merge-scales,ask-support", **options):
    made = run_pipeline(scales(), Pipeline.parse(pipeline), **options)
    return [dataclasses.replace(s, seconds=0.001 * s.index) for s in made]  # a golden has no clock


def executable(graph):
    nodes = graph.nodes
    reason = no("no kernel for {}", "relu", at=nodes[1])
    launches = (
        Launch("kernel", "scale_4", nodes[0]),
        Launch("kernel", "scale_4", nodes[2]),
        Launch("library", "mkldnn.linear", nodes[4], note="oneDNN is faster here"),
        Launch("aten", "relu", nodes[1], reason=reason),
        Launch("aten", "relu", nodes[3], reason=reason),
    )
    return SimpleNamespace(
        launches=launches, kernels={"scale_4": "a\nb\nc\n"}, memory=4096, text="",
        fallbacks=tuple((e.node, e.reason) for e in launches if e.reason is not None),
    )  # fmt: skip


@pytest.fixture
def record():
    made = Record("graph 0/1", "planted-bug,merge-scales,ask-support", "cpu")
    made.stages = stages(sample_inputs=[torch.linspace(-1, 1, 12).reshape(3, 4)])
    made.executable = executable(made.stages[-1].graph)
    made.seconds = {"capture": 0.25, "passes": 1.5}
    made.guards = [Guard("2 <= N", "model.py:3")]
    made.recompile_cause = "0/0: tensor 'x' size mismatch at index 0. expected 3, actual 5"
    made.sizes = {"N": 3}
    return made


def test_report_as_text(record, golden):
    assert str(record.report()) == golden


def test_text_is_plain_and_100_columns_wide(record):
    text = str(record.report())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_json_comes_back(record):
    report = record.report()
    assert Report.read(report.json()) == report
    data = json.loads(report.json())
    assert data["version"] == 1
    assert list(data) == [
        "name", "pipeline", "target", "seconds", "refusal", "stages", "launches", "fallbacks",
        "memory", "sizes", "guards", "recompile_cause", "graph_break", "error",
        "version", "runs",
    ]  # fmt: skip
    assert list(data["stages"][1]) == [
        "index", "name", "title", "numerics", "seconds", "rewrites", "changed", "nodes", "flops",
        "bytes", "error", "total_error", "violation", "unchanged", "notes", "rules", "node_errors",
        "stored",
    ]  # fmt: skip


def test_infinite_error_survives_json(record):
    wrong = Difference(math.inf, math.inf)
    record.stages[1] = dataclasses.replace(
        record.stages[1], error=wrong, node_errors=(NodeError("a", "b", "", wrong),)
    )
    text = record.report().json()
    assert "Infinity" not in text
    assert Report.read(text).stages[1].error.relative_l2 == math.inf


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "it has no version"),
        ("{}", "it has no version"),
        ('{"version": 99}', "it has version 99, this effc reads 1"),
        ('{"version": 1, "colour": 3}', "KeyError: 'colour'"),
        ('{"version": 1}', "missing 1 required positional argument"),
    ],
)
def test_reading_anything_else_is_refused(text, why):
    with pytest.raises(InputError, match="not a report of effc") as e:
        Report.read(text)
    assert why in e.value.why


def test_fallbacks_are_grouped_by_reason_and_place(record):
    (group,) = record.report().fallbacks
    assert (group.op, group.reason, len(group.nodes)) == ("relu", "no kernel for relu", 2)
    assert [n.where for n in group.nodes] == ["layer2  model.py:12", "layer5  model.py:15"]
    assert group.nodes[0].text == "y1: f32[N, 4] = relu(y0)"


def test_costs_are_numbers_where_sizes_are_known(record):
    first = record.report().stages[0]
    assert first.flops == 8 * 12 and isinstance(first.bytes, int)
    record.sizes = {}
    assert record.report().stages[0].flops == "32*N"


def test_rule_is_found_by_name(record):
    report = record.report()
    ((stage, rule),) = report.rule("MergeScales")
    assert (stage.name, rule.hits) == ("merge-scales", 0)
    with pytest.raises(OptionError, match="no rule 'MergeScale' ran") as e:
        report.rule("MergeScale")
    assert "did you mean 'MergeScales'?" in e.value.fix


def test_near_misses_show_node_reason_and_line(golden):
    graph = parse("def graph(x: f32[4], s: f32[4]):\n y0 = mul(x, s)\n y1 = mul(y0, 2)\n return y1")
    made = run_pipeline(graph, Pipeline.parse("merge-scales"))
    report = Report.of(Record("near", stages=made))
    assert as_text(rule_parts(report.rule("MergeScales"))) == golden


def test_rewrites_without_the_engine_are_counted_in_times():
    made = run_pipeline(scales(), Pipeline.parse("negate-outputs"))
    assert "\n  Negate  1 time  y => neg(y)\n" in str(Report.of(Record("n", stages=made)))


def test_refused_graph_says_so():
    record = Record("graph 1/0", refusal=SimpleNamespace(kind="alias", reason="why", where=None))
    text = str(record.report())
    assert "Runs in PyTorch as a whole\n  alias: why\n" in text


def test_explanation_of_several_graphs(record, golden):
    first = Record("graph 0/0", graph_break=Break("print", "model.py:4"))
    explanation = Explanation(
        "Net", [first.report(), record.report()], [first.graph_break], ["a remark"],
        records=[first, record],
    )  # fmt: skip
    assert str(explanation).split("\ngraph 0/1")[0] == golden
    assert Explanation.read(explanation.json()) == explanation
    assert len(explanation.rule("AddScales")) == 1
    with pytest.raises(OptionError, match="no rule 'X' ran"):
        explanation.rule("X")


def test_phases_add_up():
    record = Record("a")
    for _ in range(2):
        with record.phase("import"):
            pass
    assert list(record.seconds) == ["import"] and record.seconds["import"] > 0


@pytest.mark.parametrize(
    ("name", "part"),
    [("graph 0/1", "graph_0_1"), ("graph 12/0 [x]", "graph_12_0"), ("Net", ""), ("graph", "")],
)
def test_one_of_several_graphs_has_a_folder_name(name, part):
    assert Record(name).part == part


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (1.5e13, "15 T" + "B"),
     ("4*N", "4*N B")],
)  # fmt: skip
def test_amounts(value, shown):
    assert amount(value, "B") == shown


def test_durations_and_counts():
    assert (duration(0.0021), duration(2)) == ("2.1 ms", "2.00 s")
    assert (counted(1, "pass", "passes"), counted(2, "pass", "passes"), counted(0, "node")) == (
        "1 pass", "2 passes", "0 nodes",
    )  # fmt: skip
