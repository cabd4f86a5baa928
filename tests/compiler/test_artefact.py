"""Saved models: the same bits after loading, without the model's code or a compiler, or a reason."""

import collections
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import effc
from effc.artefact import read_artefact
from effc.artefact_file import read_file, work_folder, write_file
from effc.backends import cpu
from effc.codegen.build import BuildError
from effc.codegen.toolchain import MissingToolchain
from effc.ir import ArtefactError, InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, *, mask=None):
        y = torch.softmax(self.b(torch.nn.functional.gelu(self.a(x))), -1)
        return {"y": y if mask is None else y * mask, "rest": (x + 1, None, x.shape[0], "text")}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.effc"


def compiled(model, *args, **options):
    return effc.compile(model.eval(), example_inputs=args, measure=False, **options)


def same(got, want):
    """Equal to the last bit, in values, types, strides and nesting."""
    (got, of), (want, wanted) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert of == wanted
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)
        else:
            assert a == b


def round_trip(c, path, *args, **kwargs):
    c.save(path)
    loaded = effc.load(path)
    same(loaded(*args, **kwargs), c(*args, **kwargs))
    return loaded


# ------------------------------------------------------------------ the same results


def test_arguments_results_report_and_names_are_kept(path):
    net, x, mask = Net(), torch.randn(3, 6), torch.rand(3, 6)
    c = compiled(net, x, example_kwargs={"mask": mask})
    loaded = round_trip(c, path, x, mask=mask)
    assert isinstance(loaded, nn.Module) and not loaded.training
    assert set(loaded.state_dict()) == set(c.state_dict())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in c.named_parameters()]
    assert effc.explain(loaded).json() == effc.explain(c).json()
    with pytest.raises(InputError, match="not arranged as in the example call"):
        loaded(x)
    with pytest.raises(InputError, match="got size 4 in dimension 0"):
        loaded(torch.randn(4, 6), mask=mask)


def test_a_loaded_model_saves_to_the_same_bytes(path, tmp_path):
    c = compiled(Net(), torch.randn(3, 6))
    c.save(path)
    effc.load(path).save(tmp_path / "again.effc")
    assert path.read_bytes() == (tmp_path / "again.effc").read_bytes()


def test_convolutions_with_folded_norms(path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1),
        nn.PixelShuffle(2), nn.GroupNorm(1, 2), nn.MaxPool2d(2),
    )  # fmt: skip
    model[1].running_mean.normal_()
    x = torch.randn(2, 3, 16, 12)
    round_trip(compiled(model, x), path, x)


def test_sizes_may_vary_after_loading(path):
    class Pooled(nn.Module):
        def forward(self, x):
            return x.softmax(-1).mean(0), x.shape[0] * 2, x.reshape(-1)

    dim = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("width")}}
    c = compiled(Pooled(), torch.randn(3, 6), dynamic_shapes=dim)
    loaded = round_trip(c, path, torch.randn(3, 6))
    for n, k in ((2, 5), (7, 3), (16, 64)):
        x = torch.randn(n, k)
        same(loaded(x), c(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_element_types(path, dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8)).to(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    round_trip(compiled(model, x), path, x)


class Tied(nn.Module):
    """One table as input and output embedding, and a matrix that lies in memory transposed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.randn(16, 8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("turn", torch.randn(8, 8).T)
        self.register_buffer("indices", torch.arange(4, dtype=torch.int32))

    def forward(self, ids):
        return self.head(self.table(ids) @ self.turn) + self.indices.sum()


def test_shared_and_transposed_weights_stay_so(path):
    model, ids = Tied(), torch.tensor([[1, 3, 5]])
    loaded = round_trip(compiled(model, ids), path, ids)
    assert loaded.module.turn.stride() == (1, 8)
    (table,) = loaded.module.parameters()
    model.table.weight.mul_(2)
    table.mul_(2)  # noticed, at both ends of the model
    same(loaded(ids), compiled(model, ids)(ids))


# ------------------------------------------------------------------ what a call writes


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x, y):
        self.count += x
        y.mul_(2)
        return self.count * 2, y, x


def test_state_and_written_arguments(path):
    model, x = Counter(), torch.arange(3.0)
    c = compiled(model, x, torch.ones(3))
    c(x, torch.ones(3))
    c.save(path)
    loaded = effc.load(path)
    assert torch.equal(loaded.module.count, x)
    for _ in range(2):
        y, z = torch.randn(3), torch.empty(3)
        z.copy_(y)
        got, want = loaded(x, y), c(x, z)
        same(got, want)
        same(y, z)
        assert got[1] is y and got[2] is x
    assert torch.equal(loaded.module.count, model.count)


def test_written_arguments_that_overlap_are_refused(path):
    c = compiled(Counter(), torch.ones(3), torch.ones(3))
    c.save(path)
    x = torch.ones(3)
    with pytest.raises(InputError, match="shares memory with another argument"):
        effc.load(path)(x, x)


def test_gradients_and_training_have_no_model_to_run(path):
    compiled(Net(), torch.randn(3, 6)).save(path)
    loaded = effc.load(path)
    with torch.enable_grad(), pytest.raises(ArtefactError, match="cannot compute gradients"):
        loaded(torch.randn(3, 6, requires_grad=True))
    with pytest.raises(ArtefactError, match="Net was loaded from an artefact"):
        loaded.train()(torch.randn(3, 6))


# ------------------------------------------------------------------ without code, without compiler


def test_loads_without_the_model_and_without_a_compiler(path, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "some_model.py").write_text(
        textwrap.dedent("""
            import torch, effc
            from torch import nn

            class Some(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.fc, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

                def forward(self, x):
                    return {"y": torch.nn.functional.gelu(self.norm(self.fc(x)))}

            x = torch.linspace(-1, 1, 12).reshape(2, 6)
            with torch.no_grad():
                c = effc.compile(Some().eval(), example_inputs=(x,))
                c.save("model.effc")
                torch.save(c(x), "want.pt")
        """)
    )
    check = textwrap.dedent("""
        import importlib.util, torch, effc
        from effc.codegen.toolchain import find_toolchain
        assert not find_toolchain() and importlib.util.find_spec("some_model") is None
        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        loaded = effc.load("model.effc")
        assert torch.equal(loaded(x)["y"], torch.load("want.pt")["y"])
        assert "kernel" in str(effc.explain(loaded))
        print("same")
    """)
    bare = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
    bare |= {"PATH": "", "EFFC_CACHE_DIR": str(tmp_path / "cache")}
    script = tmp_path / "models" / "some_model.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=bare, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr


def test_a_model_of_a_machine_without_a_compiler(path, monkeypatch):
    x = torch.randn(3, 6)
    with monkeypatch.context() as m:
        m.setattr(cpu, "find_toolchain", lambda: MissingToolchain("no compiler", "get one"))
        c = compiled(Net(), x)
    loaded = round_trip(c, path, x)
    assert not read_artefact(path).objects
    assert {f.reason for f in effc.explain(loaded).reports[0].fallbacks} != set()
    rebuilt = effc.load(path, rebuild=True)
    assert effc.explain(rebuilt).reports[0].fallbacks == []
    torch.testing.assert_close(rebuilt(x)["y"], c(x)["y"])


def test_other_targets(path):
    x = torch.randn(3, 6)
    round_trip(compiled(Net(), x, target="reference"), path, x)


# ------------------------------------------------------------------ other machines


def has_more_than_sse2():
    found = cpu.detect()
    return getattr(found, "level", "default") != "default"


needs_avx = pytest.mark.skipif(not has_more_than_sse2(), reason="needs a CPU with AVX2")


@needs_avx
def test_a_lesser_cpu_refuses_and_rebuilds(path, monkeypatch):
    x = torch.randn(3, 6)
    c = compiled(Net(), x)
    c.save(path)
    monkeypatch.setenv("EFFC_CPU", "default")
    with pytest.raises(ArtefactError, match="cannot be loaded") as caught:
        effc.load(path)
    assert "it was built for a CPU with avx2" in str(caught.value)
    assert "effc.load(path, rebuild=True)" in str(caught.value)
    rebuilt = effc.load(path, rebuild=True)
    torch.testing.assert_close(rebuilt(x)["y"], c(x)["y"])
    rebuilt.save(path)
    assert read_artefact(path).facts["machine"]["capability"] == "x86_64+default"
    same(effc.load(path)(x), rebuilt(x))


@needs_avx
def test_a_greater_cpu_loads_and_computes_the_same(path, monkeypatch):
    """Kernels, and the order of the weights that they read, are those of the lesser CPU."""
    model = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 20, 1), nn.GELU(),
        nn.Flatten(2), nn.Linear(64, 37), nn.Softmax(-1),
    )  # fmt: skip
    x = torch.randn(1, 16, 8, 8)
    with monkeypatch.context() as m:
        m.setenv("EFFC_CPU", "default")
        c = compiled(model, x)
        want = c(x)
    c.save(path)
    assert read_artefact(path).facts["machine"]["capability"] == "x86_64+default"
    same(effc.load(path)(x), want)
    same(c(x.clone()), want)  # nor does a compiled model follow a setting that changes later


def edited(path, change, facts=None):
    """The file with other members, and hashes that hold."""
    contents = read_file(path)
    members = change(dict(contents.members))
    with work_folder(path) as folder:
        write_file(folder, path, {**contents.facts, **(facts or {})}, members)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("header", "0", "its kernels were built by another version of effc"),
        ("openmp", "libother.so", "it was built for libother.so, torch here brings"),
        ("capability", "riscv64+v", r"a CPU with riscv64\+v, which this one lacks"),
        ("features", {"level": "avx2"}, "does not say which CPU it was built for"),
    ],
)
def test_what_a_machine_must_share(path, key, value, said):
    compiled(Net(), torch.randn(3, 6)).save(path)
    machine = {**read_file(path).facts["machine"], key: value}
    edited(path, lambda members: members, {"machine": machine})
    with pytest.raises(ArtefactError, match=said):
        effc.load(path)
    effc.load(path, rebuild=True)


def without(name):
    return lambda members: {n: c for n, c in members.items() if n != name}


def replaced(name, old, new):
    return lambda members: {**members, name: members[name].replace(old, new)}


def kernel_of(path, suffix):
    return next(
        n for n in read_file(path).members if n.endswith(suffix) and "runner" not in n
    )  # fmt: skip


def test_kernels_that_are_not_what_the_plan_calls(path):
    c = compiled(Net(), torch.randn(3, 6))
    c.save(path)
    edited(path, replaced(kernel_of(path, ".cpp"), b"float", b"double"))
    with pytest.raises(ArtefactError, match="is not the one that this effc makes"):
        effc.load(path)
    c.save(path)
    edited(path, lambda m: {**m, kernel_of(path, ".so"): b"\x7fELF of somebody"})
    with pytest.raises(ArtefactError, match="cannot be loaded"):
        effc.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("report.json"), "has no report.json"),
        (without("weights.safetensors"), "has no weights.safetensors"),
        (replaced("graph.py", b"def graph", b"def graph("), "its graph.py cannot be read"),
        (replaced("graph.py", b"return", b"import os; return"), "not a graph statement"),
        (replaced("graph.py", b'"a.weight"', b'"c.weight"'), "of weight 'c.weight' are not"),
        (replaced("module.json", b'"a.weight"', b'"a.w"'), "its weights cannot be read"),
        (replaced("module.json", b'"output": 0', b'"output": -1'), "-1 is no index"),
        (replaced("module.json", b'"offset": 0', b'"offset": 9999'), "its weights cannot be read"),
        (replaced("module.json", b"{", b"["), "its description cannot be read"),
        (replaced("report.json", b'"version": 1', b'"version": 9'), "not a report of effc"),
        (replaced("module.json", b"builtins.dict", b"os.system"), "import os before loading"),
    ],
)  # fmt: skip
def test_members_that_make_no_sense_are_named(path, change, said):
    compiled(Net(), torch.randn(3, 6)).save(path)
    edited(path, change)
    with pytest.raises(ArtefactError) as caught:
        effc.load(path)
    assert said in str(caught.value)


def test_a_target_that_is_not_here(path):
    compiled(Net(), torch.randn(3, 6)).save(path)
    edited(path, lambda m: m, {"target": "abacus"})
    with pytest.raises(ArtefactError, match="unknown backend 'abacus'"):
        effc.load(path)


def test_rebuilding_needs_a_compiler(path, monkeypatch):
    compiled(Net(), torch.randn(3, 6)).save(path)
    monkeypatch.setattr(cpu, "find_toolchain", lambda: MissingToolchain("no compiler", "get one"))
    with pytest.raises((ArtefactError, BuildError), match="cannot be rebuilt") as caught:
        effc.load(path, rebuild=True)
    assert "no compiler" in str(caught.value)


# ------------------------------------------------------------------ what cannot be saved


Pair = collections.namedtuple("Pair", "a b")


class Box:
    def __init__(self, x):
        self.x = x


pytree.register_pytree_node(Box, lambda b: ([b.x], None), lambda xs, _: Box(*xs))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda x: Box(x + 1), "Box"),
        (lambda x: Pair(x + 1, x), "Pair"),
        (lambda x: {(1, 2): x + 1}, "keys"),
    ],
)
def test_results_without_a_text_form(path, result, said):
    c = effc.compile(result, example_inputs=(torch.randn(3),))
    with pytest.raises(ArtefactError, match="cannot be saved") as caught:
        c.save(path)
    assert said in str(caught.value)
    assert list(path.parent.iterdir()) == []


def test_what_is_not_compiled_whole_says_what_to_do(path):
    for c in (effc.compile(Net()), torch.compile(Net(), backend="effc"), Net()):
        with pytest.raises(ArtefactError, match="cannot be saved") as caught:
            effc.save(c, path)
        assert "effc.compile(model, example_inputs=(...)).save(path)" in str(caught.value)
    assert not path.exists()


def test_a_graph_that_pytorch_runs_says_why(path):
    def grown(x):
        return torch.nonzero(x)

    c = effc.compile(grown, example_inputs=(torch.ones(3),))
    with pytest.raises(ArtefactError, match="PyTorch runs it as a whole") as caught:
        c.save(path)
    assert "unbacked-size" in str(caught.value)


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    c = compiled(Net(), torch.randn(3, 6))
    c.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtefactError, match="cannot write") as caught:
        c.save(path)
    assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    c = compiled(Net(), torch.randn(3, 6))
    with pytest.raises(ArtefactError, match="name a file in a folder that exists"):
        c.save(tmp_path / "none" / "model.effc")
    with pytest.raises(ArtefactError, match="cannot write"):
        c.save(tmp_path)
    with pytest.raises(ArtefactError, match="cannot read"):
        effc.load(tmp_path / "none.effc")


# ------------------------------------------------------------------ to look at


def test_a_dump_of_a_file_reads_and_runs_as_any_dump(path, tmp_path):
    c = compiled(Net(), torch.randn(3, 6))
    c.save(path)
    out = read_artefact(path).dump(tmp_path / "out")
    names = {p.name for p in out.iterdir()}
    assert {"000_capture.py", "report.json", "manifest.json", "index.html", "kernels"} <= names
    assert "weights.safetensors" in names
    stages = sorted(out.glob("0*.py"))
    assert len(stages) == 2 and "test_artefact.py:" in stages[1].read_text()
    sources = {p.stem: p.read_text() for p in (out / "kernels").glob("*.cpp")}
    assert all(
        k in "".join(sources.values()) for k in effc.explain(c).records[0].executable.kernels
    )
    ran = subprocess.run([sys.executable, stages[1]], capture_output=True, text=True)
    assert ran.returncode == 0 and "no weights" not in ran.stdout, ran.stderr
