"""`effc race`: kernels of a saved model and of PTX files, clean ones and ones with a planted bug."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import effc
from effc import racing
from effc.cli import cli, main
from effc.ir import InputError, OptionError, interpret, parse
from effc.racing import race_graph, race_ptx

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry shift(.param .u64 out, .param .u32 n)
.reqntid 64
{
  .reg .b32 %r<6>;
  .reg .b64 %rd<4>;
  .shared .align 4 .b8 buffer[256];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, buffer;
  shl.b32 %r2, %r0, 2;
  add.u32 %r2, %r1, %r2;
  ld.param.u32 %r5, [n];
  add.u32 %r3, %r0, %r5;
  st.shared.u32 [%r2], %r3;
  BARRIER
  xor.b32 %r3, %r0, 63;
  shl.b32 %r3, %r3, 2;
  add.u32 %r3, %r1, %r3;
  ld.shared.u32 %r4, [%r3];
  ld.param.u64 %rd0, [out];
  mul.wide.u32 %rd1, %r0, 4;
  add.u64 %rd0, %rd0, %rd1;
  st.global.u32 [%rd0], %r4;
  ret;
}
"""


@pytest.fixture
def ptx(tmp_path):
    def write(barrier):
        path = tmp_path / "shift.ptx"
        path.write_text(PTX.replace("BARRIER", barrier))
        return path

    return write


def run(*arguments):
    return CliRunner().invoke(cli, ["race", *map(str, arguments)], catch_exceptions=False)


def test_a_clean_entry_and_one_without_its_barrier(ptx):
    arguments = ("--arg", "i32[64]", "--arg", "7")
    done = run(ptx("bar.sync 0;"), *arguments)
    assert (done.exit_code, done.stdout) == (
        0, "kernel shift: nothing found under 6 schedules\n",
    )  # fmt: skip
    done = run(ptx(""), "shift", *arguments)
    assert done.exit_code == 1 and "no barrier between" in done.stdout
    done = run(ptx("bar.sync 0;"), "--arg", "i32[63]", "--arg", "7")
    assert done.exit_code == 1, "the last thread writes past the end"


def test_mistakes_with_ptx(ptx, capsys):
    path = ptx("bar.sync 0;")
    with pytest.raises(InputError, match=r"takes 2 arguments, 1 were given") as e:
        race_ptx(path, None, (1,), None, ["i32[64]"])
    assert ".u64 out, .u32 n" in e.value.why
    with pytest.raises(InputError, match="not an argument: 'i33"):
        race_ptx(path, None, (1,), None, ["i33[64]", "7"])
    with pytest.raises(SystemExit) as stop:
        main(["race", str(path), "shfit", "--arg", "i32[64]", "--arg", "7"])
    assert stop.value.code == 1 and "no entry 'shfit'" in capsys.readouterr().err
    assert run(path, "--grid", "a").exit_code == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A product whose tiles go through shared memory, and rows."""
    path = tmp_path_factory.mktemp("saved") / "model.effc"
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Softmax(-1)).half().eval()
    with torch.no_grad():
        x = torch.randn(3, 32).half()
        effc.compile(net, example_inputs=(x,), measure=False).save(path)
    return path


def test_every_launch_of_a_model_is_raced_with_its_operands(saved):
    done = run(saved)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and len(lines) == 2
    assert all("nothing found under 6 schedules" in line for line in lines)
    name = lines[1].split()[2].rstrip(":")
    assert run(saved, name).stdout.splitlines() == [lines[1]]
    with pytest.raises(InputError, match="the graph has no size N"):
        run(saved, "--size", "N=3")


def test_a_planted_bug_in_a_model_is_found(saved, monkeypatch):
    compiled = racing.PtxHostBackend.compiled

    def without_barriers(self, kernels):
        made = compiled(self, kernels)
        return [
            dataclasses.replace(c, assembly=c.assembly.replace("bar.sync \t0;", "")) for c in made
        ]

    with_barriers = run(saved)
    monkeypatch.setattr(racing.PtxHostBackend, "compiled", without_barriers)
    done = run(saved)
    assert (with_barriers.exit_code, done.exit_code) == (0, 1)
    assert "no barrier between" in done.stdout


def test_launches_get_the_values_of_the_plan():
    """The second kernel reads what the first wrote, and results after a race are the plan's."""
    graph = parse("""
def graph(x: f32[N, 40]):
    a = softmax(x, 1)
    b = permute(a, (1, 0))
    c = softmax(b, 1)
    return c
""")
    x = torch.randn(6, 40)
    found = race_graph(graph, [x])
    assert len(found) >= 2 and not any(r.report for r in found)
    (want,) = interpret(graph, [x])
    result = next(a for a in found[-1].report.results if isinstance(a, torch.Tensor))
    torch.testing.assert_close(result.view(40, 6), want)


def test_an_unknown_kernel_is_refused():
    graph = parse("def graph(x: f32[64]):\n    a = exp(x)\n    return a\n")
    with pytest.raises(OptionError, match="launches no kernel 'pointwise'"):
        race_graph(graph, [torch.randn(64)], only="pointwise")
