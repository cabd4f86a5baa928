"""`effc build`: a saved model for GPUs elsewhere, and loading it there, with a driver on the CPU."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import effc
from effc.artefact import read_artefact
from effc.backends import base
from effc.backends.gpu import backend as room
from effc.backends.triton import TritonBackend
from effc.cli import cli, main
from effc.ir import ArtefactError, EffcError, OptionError
from tests.backends.host_gpu import HostBackend

TARGETS = ("cuda:sm_80", "hip:gfx942")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return torch.softmax(self.b(torch.relu(self.a(x))), -1)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


X = torch.linspace(-2, 2, 5 * 16).reshape(5, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.effc"
    torch.manual_seed(0)
    with torch.no_grad():
        c = effc.compile(Net().eval(), example_inputs=(X,), measure=False)
        c.save(path)
    return path


@pytest.fixture(scope="module")
def built(saved):
    out = saved.with_name("gpu.effc")
    effc.build(saved, TARGETS, out)
    return out


@pytest.fixture
def device(monkeypatch):
    """A machine with a GPU, on which nothing can be compiled."""
    backend = HostBackend()
    monkeypatch.setitem(base._registry.made, "triton", backend)
    for name in ("compile_kernels", "launcher", "triton_version"):
        monkeypatch.setattr(room, name, lambda *a: pytest.fail("something is compiled"))
    return backend


def test_a_built_model_holds_everything_for_every_target(built):
    a = read_artefact(built)
    assert a.facts["target"] == "triton"
    assert a.facts["machine"]["targets"] == list(TARGETS)
    kernels = [o.functions[0] for o in a.objects if o.target == "cuda:sm_80"]
    others = [o.functions[0] for o in a.objects if o.target == "hip:gfx942"]
    assert len(set(kernels)) == 3 and len(a.objects) == 1 + len(kernels) + len(others)
    for o in a.objects:
        assert o.code[:4] == b"\x7fELF"
        if o.target:
            assert f"def {o.functions[0]}(" in o.source
            mark = ".target sm_80" if o.target == "cuda:sm_80" else "gfx942"
            assert mark in o.assembly
    members = a.contents.members
    assert sum(n.endswith(".cubin") for n in members) == len(kernels)
    assert sum(n.endswith(".hsaco") for n in members) == len(others)
    assert sum(row.count for row in a.report.launches if row.kind == "kernel") == len(kernels)


def test_loading_it_compiles_nothing_and_gives_the_same_bits(built, device):
    loaded = effc.load(built)
    first = loaded(X)
    assert len(device.driver.taken) == 3
    torch.testing.assert_close(first, eager(built)(X))
    again = effc.load(built)
    assert torch.equal(again(X), first)


def eager(path):
    net = Net()
    net.load_state_dict(read_artefact(path).tensors)
    return net


def test_a_loaded_model_is_saved_and_loaded_again(built, device, tmp_path):
    loaded = effc.load(built)
    loaded.save(tmp_path / "again.effc")
    again = effc.load(tmp_path / "again.effc")
    assert torch.equal(again(X), loaded(X))
    assert {o.target for o in read_artefact(tmp_path / "again.effc").objects} == {"", "cuda:sm_80"}


def test_another_device_is_refused_naming_both(built, device):
    device.here = "cuda:sm_75"
    with pytest.raises(ArtefactError) as e:
        effc.load(built)
    assert e.value.why == (
        "it was built for cuda:sm_80 and hip:gfx942, and Example 1000 is a cuda:sm_75"
    )
    assert "rebuild=True" in e.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_no_device_is_a_sentence(built):
    with pytest.raises(
        ArtefactError, match="built for cuda:sm_80 and hip:gfx942, and here is no"
    ) as e:
        effc.load(built)
    assert e.value.fix == "load it on a machine with such a device"
    executable = TritonBackend().cross_compile(read_artefact(built).stages[-1].graph, [])
    with pytest.raises(EffcError, match="not for this machine"):
        executable.bind()


def test_a_model_compiled_with_cuda_kernels_is_built_with_them(tmp_path):
    c = effc.compile(nn.Softmax(-1), example_inputs=(X,), measure=False, target="cuda-host")
    c.save(tmp_path / "model.effc")
    effc.build(tmp_path / "model.effc", ["cuda:sm_80"], tmp_path / "gpu.effc")
    a = read_artefact(tmp_path / "gpu.effc")
    assert a.facts["target"] == "cuda"
    (o,) = (o for o in a.objects if o.target)
    assert "__global__" in o.source and o.code[:4] == b"\x7fELF"
    assert f"kernels/{o.name}.cu" in a.contents.members
    with pytest.raises(OptionError, match="sm_80 and newer, not hip:gfx942"):
        effc.build(tmp_path / "model.effc", ["hip:gfx942"], tmp_path / "gpu.effc")


def test_a_damaged_file_is_refused(built, device, tmp_path):
    data = bytearray(built.read_bytes())
    where = data.index(b"\x7fELF") + 100
    data[where] ^= 1
    path = tmp_path / "bad.effc"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"bad\.effc is damaged"):
        effc.load(path)


def test_a_kernel_of_another_text_is_refused(built, device, monkeypatch):
    monkeypatch.setattr(room, "_kernels", lambda plan: [Other(k) for k in _KERNELS(plan)])
    with pytest.raises(ArtefactError) as e:
        effc.load(built)
    assert "is not the one that this effc makes" in e.value.why


_KERNELS = room._kernels


class Other:
    """A kernel of the same name whose text has changed."""

    def __init__(self, kernel):
        self.name, self.code = kernel.name, kernel.code + " "


def test_the_command_writes_it_and_says_what_is_in_it(saved, tmp_path):
    out = tmp_path / "out.effc"
    said = CliRunner().invoke(
        cli, ["build", str(saved), "--target", "cuda:sm_80", "-o", str(out)], catch_exceptions=False
    )
    assert said.exit_code == 0 and out.exists()
    assert "built for   cuda:sm_80" in said.stdout and ".cubin" in said.stdout
    assert f"wrote {out}" in said.stderr


def test_its_dump_has_source_and_assembly_of_every_kernel(built, tmp_path):
    files = {p.name for p in (read_artefact(built).dump(tmp_path / "out") / "kernels").iterdir()}
    for o in read_artefact(built).objects:
        if o.target:
            text = "ptx" if o.target.startswith("cuda") else "amdgcn"
            assert {f"{o.name}.py", f"{o.name}.{text}"} <= files


def test_mistakes(saved, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["build", str(saved), "--target", "cuda:9", "-o", str(tmp_path / "x.effc")])
    assert e.value.code == 1
    said = capsys.readouterr().err
    assert "unknown GPU 'cuda:9'" in said and "say it as cuda:sm_80" in said
    with pytest.raises(OptionError):
        effc.build(saved, ["gfx942"], tmp_path / "x.effc")
    assert not (tmp_path / "x.effc").exists()
