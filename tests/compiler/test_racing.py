"""`effc race`: kernels of a saved model and of PTX files, clean ones and ones with a planted bug."""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import effc
from effc import racing
from effc.backends.gpu import attention
from effc.cli import cli, main
from effc.codegen.ptx import Schedule, race
from effc.codegen.ptx.runtime import EVENT
from effc.codegen.triton.kernel import Schedule as Blocks
from effc.codegen.triton.schedules import Choice
from effc.ir import InputError, OptionError, interpret, parse
from effc.racing import race_graph, race_ptx

from .conflicts import conflicts

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


# ------------------------------------------------------------------ every barrier of ours matters

PRODUCT = """
def graph(x: f16[{rows}, {depth}], w: f16[{depth}, {columns}]):
    y = matmul(x, w)
    return y
"""
ATTENTION = """
def graph(q: {t}[2, {queries}, 16], k: {t}[1, {keys}, 16], v: {t}[1, {keys}, 16]):
    y = attention(q, k, v, causal=True)
    return y
"""
SOFTMAX = """
def graph(x: f32[2, {size}]):
    y = softmax(x, 1)
    return y
"""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One of a plan, and what was found in it as it is."""

    kernel: object
    grid: object
    args: list
    report: object


def launches(source, blocks=None):
    """Those of a graph's plan on random inputs. blocks: an attention's schedule."""
    found = []

    def keep(kernel, grid, args, **kw):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        found.append(Launch(kernel, grid, copies, race(kernel, grid, args, **kw)))
        return found[-1].report

    graph = parse(source)
    torch.manual_seed(0)
    inputs = [torch.randn(i.shape).to(i.dtype.torch) for i in graph.inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "race", keep)
        if blocks is not None:
            choice = Choice(blocks, 0.0, 0, 0, "asked for")
            patch.setattr(attention, "schedules", lambda a, device: [choice])
        race_graph(graph, inputs)
    return found


def defined(launch, without=None):
    """Races on shared memory by their definition, of one schedule."""
    events = np.zeros(1 << 18, EVENT)
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in launch.args]
    schedule = Schedule(without=without)
    launch.kernel.run(launch.grid, args, check=True, schedule=schedule, events=events)
    used = int(np.count_nonzero(events["size"]))  # every event has one
    return conflicts(events[:used])


def needed(launch):
    """A letter for each barrier and wait, in the order of the text: large where the launch needs
    it, small where nothing conflicts without it and all schedules give the same bits.

    The detector must say what the definition says; b is a block's barrier, s a warp's, w a wait.
    """
    assert launch.report.clean, launch.report
    kernel, places = launch.kernel, launch.kernel.unit.places
    usual = defined(launch)  # lanes that hold copies of one value store it together
    assert all(a == b and places[a].name == "st" for a, b in usual)
    marks = ""
    for barrier in kernel.barriers:
        report = race(kernel, launch.grid, launch.args, without=barrier)
        more = defined(launch, barrier) - usual
        assert bool(report.findings) == bool(more), (
            f"without {barrier}, {barrier.location}: {report}"
        )
        if not more:
            assert not report.differences
            for mine, theirs in zip(report.results, launch.report.results, strict=True):
                assert not isinstance(mine, torch.Tensor) or torch.equal(mine, theirs)
        mark = "w" if barrier.name == "cp" else "s" if "warp" in barrier.parts else "b"
        marks += mark.upper() if more else mark
    return marks


def tiles(rows, keys, warps, stages, splits=1):
    sizes = ("rows", rows), ("keys", keys), ("piece", 16), ("splits", splits)
    return Blocks(warps, stages, sizes)


def test_removing_any_barrier_of_a_product_is_noticed():
    """But those at the head of the pipelined loop: they repeat what its end, or what comes before
    it, has just waited for. One of the two waits at the end, where factors arrive separately, is
    enough too."""
    (launch,) = launches(PRODUCT.format(rows=16, depth=512, columns=32))
    assert needed(launch) == "WB" + "wb" + "B" + "wwB" + "WB" + "S"


def test_removing_any_barrier_of_an_attention_is_noticed():
    """Of the barriers between the two loops, and after them, one is not needed: tiles that were
    begun past the end are filled with zeros by the very threads that fill them next, or lie beside
    what comes after. Only the wait between the loops is: those copies may still be under way."""
    (launch,) = launches(ATTENTION.format(t="f16", queries=40, keys=75), tiles(16, 16, 2, 2))
    assert needed(launch) == "WBB" + "Wb" + "WBB" + "wb" + "B"


def test_removing_any_barrier_of_a_row_kernel_is_noticed():
    (launch,) = launches(SOFTMAX.format(size=5000))
    assert needed(launch) == "BBB"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        (PRODUCT.format(rows=17, depth=520, columns=40), None),
        (PRODUCT.format(rows=33, depth=70, columns=20), None),
        (PRODUCT.format(rows=70, depth=96, columns=70).replace("f16", "f32"), None),
        (ATTENTION.format(t="f16", queries=40, keys=75), None),
        (ATTENTION.format(t="bf16", queries=40, keys=75), tiles(32, 32, 4, 3)),
        (ATTENTION.format(t="f16", queries=40, keys=75), tiles(16, 32, 2, 3, splits=2)),
        (ATTENTION.format(t="f16", queries=1, keys=520), tiles(16, 16, 2, 2, splits=32)),
        (ATTENTION.format(t="f32", queries=40, keys=75), tiles(32, 16, 1, 2)),
        (SOFTMAX.format(size=40000), None),
        (SOFTMAX.format(size=300), None),
    ],
)
def test_the_detector_says_what_the_definition_says(source, blocks):
    """For each barrier of each kernel."""
    found = [needed(launch) for launch in launches(source, blocks)]
    assert any(found) or "300" in source  # a row of 300 is one warp's, in registers


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        (PRODUCT.format(rows=16, depth=512, columns=32), None),
        (ATTENTION.format(t="f16", queries=75, keys=75), tiles(16, 16, 2, 2)),
        (SOFTMAX.format(size=5000), None),
    ],
    ids=["product", "attention", "softmax"],
)
def test_an_access_past_the_end_names_the_array_and_the_line(source, blocks):
    """Each array in turn is one element shorter than the kernel takes it to be."""
    (launch,) = launches(source, blocks)
    for i, name in enumerate(launch.kernel.names):
        args = [a[:-1].clone() if i == j else a for j, a in enumerate(launch.args)]
        report = race(launch.kernel, launch.grid, args)
        (finding,) = (f for f in report.findings if f.kind == "out of bounds")
        size = args[i].numel() * args[i].element_size()
        access, call = ("reads", "tl.load(") if i else ("writes", "tl.store(")
        assert f" {access} " in str(finding)
        assert f"of array argument {i} ({name}), which has {size}" in str(finding)
        where = finding.instruction.location
        assert (
            where.file == f"<{launch.kernel.name}>" and call in str(finding).partition(" in `")[2]
        )
