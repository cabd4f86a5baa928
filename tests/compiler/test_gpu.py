"""`effc explain --target`: a model's kernels on GPUs that need not be here."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import effc
from effc.cli import cli
from effc.gpu import GpuExplanation, explain_graph, explain_records, find_target
from effc.ir import OptionError, parse
from effc.record import Record


class Net(nn.Module):
    """Two products, one of them with what follows it, and a row op."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return torch.softmax(self.b(torch.relu(self.a(x))).sort().values, -1)


@pytest.fixture(scope="module")
def compiled():
    with torch.no_grad():
        x = torch.randn(16, 32).half()
        return effc.compile(Net().half().eval(), example_inputs=(x,), measure=False)


@pytest.fixture(scope="module")
def found(compiled):
    return effc.explain(compiled, target=["cuda:sm_90", "mi300x"])


def test_every_kernel_has_what_compilers_say_and_an_estimate(found):
    assert [r.target for r in found.reports] == ["cuda:sm_90", "hip:gfx942"]
    for report in found.reports:
        assert report.launches == sum(k.launches for k in report.kernels) == 3
        assert list(report.hosted.values()) == [1], "the sort"
        products = [k for k in report.kernels if k.tensor]
        assert len(products) == 2, "tensor cores are used by both products"
        assert all(k.registers > 0 and not k.spills and 0 < k.occupancy <= 1 for k in products)
        # 2 m n k of a product, with a bias or an activation on top
        assert all(2 * 16 * 32 * 64 <= k.flops < 1.2 * 2 * 16 * 32 * 64 for k in products)
        # what any way must move: x, w and the result in half
        assert min(k.bytes for k in products) >= 2 * (16 * 32 + 32 * 64 + 16 * 64)
    assert [e.device for e in found.reports[0].kernels[0].estimates] == ["H100 SXM", "H200 SXM"]
    assert [e.device for e in found.reports[1].kernels[0].estimates] == ["MI300X"]
    slow, fast = found.reports[0].kernels[0].estimates
    assert slow.bound == "memory" and slow.seconds > fast.seconds > 0


def test_times_are_called_estimates(found):
    text = str(found)
    assert "estimate for H100 SXM: at least" in text and "not measured" in text
    assert "Net on cuda:sm_90: 3 launches of 3 kernels a forward" in text
    assert max(map(len, text.splitlines())) <= 100
    assert GpuExplanation.read(found.json()) == found


def test_a_graph_that_pytorch_runs_is_named():
    found = explain_records("Net", [Record("graph 0/0", refusal=Refused())], ["cuda:sm_90"])
    assert found.notes == ["graph 0/0 runs in PyTorch as a whole: it writes where it must not"]
    assert found.notes[0] in str(found) and not found.reports


class Refused:
    reason = "it writes where it must not"


def test_a_saved_model_and_a_dump_are_explained_alike(compiled, found, tmp_path):
    compiled.save(tmp_path / "model.effc")
    dumped = CliRunner().invoke(cli, ["dump", str(tmp_path / "model.effc"), str(tmp_path / "out")])
    assert dumped.exit_code == 0
    for name in ("model.effc", "out"):
        said = CliRunner().invoke(
            cli, ["explain", str(tmp_path / name), "--target", "h100", "--json"]
        )
        assert said.exit_code == 0, said.output
        report = json.loads(said.stdout)["reports"][0]
        assert [k["kernel"] for k in report["kernels"]] == [
            k.kernel for k in found.reports[0].kernels
        ]


def test_copies_count_bytes_and_no_flops():
    graph = parse("""
def graph(x: f32[64, 32]):
    a = permute(x, (1, 0))
    b = reshape(a, (2048,))
    c = softmax(b, 0)
    return c
""")
    (report,) = explain_graph("copy", graph, ["cuda:sm_80"])
    copy, rows = report.kernels
    assert (copy.flops, copy.bytes) == (0, 2 * 4 * 2048)
    assert rows.flops and rows.bytes == 2 * 4 * 2048


def test_sizes_that_vary_have_no_estimate_unless_they_are_given():
    graph = parse("def graph(x: f32[N, 32]):\n    a = exp(x)\n    return a\n")
    (report,) = explain_graph("open", graph, ["cuda:sm_80"])
    assert isinstance(report.kernels[0].bytes, str) and not report.kernels[0].estimates
    (report,) = explain_graph("closed", graph, ["cuda:sm_80"], sizes={"N": 4})
    assert report.kernels[0].bytes == 2 * 4 * 4 * 32 and report.kernels[0].estimates


def test_targets_are_kinds_or_devices():
    assert [d.name for d in find_target("cuda:sm_80")[1]] == ["A100 SXM 80GB", "A100 SXM 40GB"]
    assert [d.name for d in find_target("h200")[1]] == ["H200 SXM"]
    assert find_target("cuda:sm_75")[1] == []
    with pytest.raises(OptionError, match="nothing is known of a GPU 'h1000'"):
        find_target("h1000")
