"""The way to a GPU, with a driver that runs what it is given on the CPU."""

import ctypes
import gc
import json

import pytest
import torch

import effc
from effc.backends.base import Options, find_backend
from effc.backends.cuda import CudaBackend
from effc.backends.cuda.lowering import CUDA
from effc.backends.gpu import GPU, products
from effc.backends.gpu.device import Gpu
from effc.backends.gpu.driver import CUDA as CUDA_NAMES
from effc.backends.gpu.driver import GRAPHS, HIP, Driver
from effc.backends.gpu.program import launching
from effc.backends.plan.planner import make_plan
from effc.codegen.gpu.devices import DEVICES, device_like
from effc.codegen.triton.compile import Compiled, target
from effc.codegen.triton.kernel import TritonKernel
from effc.codegen.triton.schedules import GFX942, SM_90
from effc.ir import EffcError, InputError, OptionError, UnsupportedError, interpret, parse

from .host_gpu import MIXED, HostBackend

GRAPH = """
def graph(x: f32[N, 24], z: f32[24]):
    w0: f32[24] = weight("w", digest="")
    a = add(x, z)
    b = gelu(a)
    c = mul(b, w0)
    d = permute(c, (1, 0))
    e = exp(d)
    return c, e
"""


@pytest.fixture
def graph():
    return parse(GRAPH, weights={"w": torch.randn(24)})


def inputs_of(rows: int) -> list[torch.Tensor]:
    return [torch.randn(rows, 24), torch.randn(24)]


def test_a_plan_reaches_the_driver_and_comes_back(graph):
    backend = HostBackend()
    bound = backend.compile(graph).bind()
    for rows in (5, 1, 64, 0):
        inputs = inputs_of(rows)
        for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
            torch.testing.assert_close(got, want)
    launched = [k.launches for k in backend.driver.kernels.values()]
    assert all(count >= 3 for count in launched), "three sizes launch; none of a size of 0 does"


def test_streams_have_frames_of_their_own(graph, monkeypatch):
    executable = HostBackend().compile(graph)
    bound, gpu = executable.bind(), executable.program.gpu
    inputs = inputs_of(3)
    first = bound(inputs)
    assert len(bound._by_stream) == 1
    monkeypatch.setattr(type(gpu), "stream", lambda self: 78)  # which the driver refuses
    with pytest.raises(EffcError, match="a launch fails: wrong stream"):
        bound(inputs)
    assert len(bound._by_stream) == 2
    monkeypatch.undo()
    torch.testing.assert_close(bound(inputs), first)


def test_inputs_at_odd_addresses_are_moved(graph):
    """Kernels are compiled for addresses that are multiples of 16."""
    odd = torch.randn(1 + 4 * 24)[1:].view(4, 24)
    inputs = [odd, torch.randn(25)[1:]]
    got = HostBackend().compile(graph).bind()(inputs)
    torch.testing.assert_close(got, interpret(graph, inputs))


def test_wrong_inputs_are_named(graph):
    with pytest.raises(InputError, match="x"):
        HostBackend().compile(graph).bind()([torch.randn(3, 24).double(), torch.randn(24)])


class Library:
    """Functions of CUDA's driver that note how they are called. context: of this thread."""

    def __init__(self, context: int = 0, fails: str = "") -> None:
        self.calls, self.context, self.fails = [], context, fails

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*args):
            seen = [getattr(a, "value", a) for a in args if not hasattr(a, "_obj")]
            self.calls.append((name, *seen))
            for i, out in enumerate(a._obj for a in args if hasattr(a, "_obj")):
                if isinstance(out, ctypes.c_char_p):
                    out.value = b"not today"
                elif name == "cuCtxGetCurrent":
                    out.value = self.context or None
                else:
                    out.value = 1000 + i
            if name == "cuCtxSetCurrent":
                self.context = seen[0]
            return 1 if name == self.fails else 0

        return function


def compiled(shared: int = 0, scratch: int = 0) -> Compiled:
    return Compiled(
        TritonKernel("k", "", ()), target("cuda:sm_80"), "", b"code", shared, 4, scratch
    )


def test_a_kernel_is_loaded_once_in_the_devices_context():
    library = Library()
    driver = Driver(library, CUDA_NAMES)
    function = driver.load(compiled(shared=60 << 10), 2)
    assert driver.load(compiled(shared=60 << 10), 2) is function
    assert [c[0] for c in library.calls] == [
        "cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleLoadData",
        "cuModuleGetFunction", "cuFuncSetAttribute",
    ]  # fmt: skip
    assert library.calls[1] == ("cuDevicePrimaryCtxRetain", 2)
    assert library.calls[-1] == ("cuFuncSetAttribute", 1000, 8, 60 << 10)
    assert (function.handle, function.threads, function.shared) == (1000, 128, 60 << 10)
    driver.unload(compiled(), 2)
    assert library.calls[-1] == ("cuModuleUnload", 1000) and not driver.loaded


def test_what_does_not_load_leaves_nothing_behind():
    library = Library(context=7, fails="cuFuncSetAttribute")
    driver = Driver(library, CUDA_NAMES)
    with pytest.raises(EffcError, match="kernel k: cuFuncSetAttribute fails: not today"):
        driver.load(compiled(shared=200 << 10), 0)
    assert library.calls[0] == ("cuCtxGetCurrent",) and library.calls[1][0] == "cuModuleLoadData"
    assert ("cuModuleUnload", 1000) in library.calls and not driver.loaded


def test_a_thread_without_a_context_gets_one_at_its_first_launch():
    library, launched = Library(), []

    class Native:
        def function(self, name, *types, restype):
            return lambda *args: launched.append(args) or (0 if library.context else 201)

    driver = Driver(library, CUDA_NAMES | {"launch": "launch"})
    library.launch = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    launching(Native(), Gpu(driver, 1, "Example", target("cuda:sm_80")))(10, 1, 20, 30)
    assert len(launched) == 2 and ("cuDevicePrimaryCtxRetain", 1) in library.calls


def test_scratch_memory_that_a_kernel_wants_is_an_error():
    with pytest.raises(EffcError, match="wants scratch memory"):
        Driver(Library(), CUDA_NAMES).load(compiled(scratch=64), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_without_a_gpu_the_target_says_what_to_do(name, graph):
    with pytest.raises(UnsupportedError, match=f"target '{name}' runs on a GPU") as e:
        find_backend(name).compile(graph)
    assert "ptx-host" in e.value.fix


# ------------------------------------------------------------------ both languages


def test_kernels_of_both_languages_run_in_one_plan():
    graph = parse(MIXED)
    backend = HostBackend(CUDA)
    executable = backend.compile(graph)
    sources = executable.kernels.values()
    assert sum("__global__" in s for s in sources) == 2
    assert sum("@triton.jit" in s for s in sources) == 2
    x, w, g = (torch.randn(*shape).bfloat16() for shape in ((20, 64), (64, 64), (64,)))
    (got,) = executable.bind()([x, w, g])
    (want,) = interpret(graph, [x, w, g])
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert len(backend.driver.taken) == 4


def test_cuda_objects_are_saved_as_cuda_and_come_back():
    graph = parse(MIXED)
    made = CudaBackend().cross_compile(graph, [target("cuda:sm_80")])
    files = {n: data for o in made.objects for n, data in o.files.items()}
    assert sum(n.endswith(".cu") for n in files) == 2 and sum(n.endswith(".py") for n in files) == 2
    rows = [o.row for o in made.objects]
    objects = [type(made.objects[0]).read(json.loads(json.dumps(row)), files) for row in rows]
    assert tuple(objects) == made.objects
    machine = json.loads(json.dumps(made.machine))
    backend = HostBackend(CUDA)
    assert backend.runs(machine)
    loaded = backend.load(graph, objects, machine)
    x, w, g = (torch.randn(*shape).bfloat16() for shape in ((20, 64), (64, 64), (64,)))
    torch.testing.assert_close(
        loaded.bind()([x, w, g])[0], interpret(graph, [x, w, g])[0], rtol=2e-2, atol=2e-2
    )


def test_a_product_of_warp_groups_is_tritons():
    graph = parse(MIXED)
    made = CudaBackend().cross_compile(graph, [target("cuda:sm_90")])
    first, second, *_ = made.launches
    assert "warp groups" in first.note and "@triton.jit" in made.kernels[first.call]
    assert "__global__" in made.kernels[second.call], "rows are CUDA's on every device"


@pytest.mark.parametrize("to", ["hip:gfx942", "cuda:sm_75"])
def test_cuda_kernels_are_refused_for_other_devices(to):
    with pytest.raises(OptionError, match="CUDA C\\+\\+ kernels are for sm_80") as e:
        CudaBackend().cross_compile(parse(MIXED), [target(to)])
    assert "triton" in e.value.fix


# ------------------------------------------------------------------ CUDA graphs

CHAIN = """
def graph(x: f32[N, 24], z: f32[24]):
    w0: f32[24] = weight("w", digest="")
    a = softmax(x, 1)
    b = permute(a, (1, 0))
    c = softmax(b, 1)
    d = permute(c, (1, 0))
    e = add(d, z)
    f = softmax(e, 1)
    g = mul(f, w0)
    return g, a
"""


@pytest.fixture
def chain():
    return parse(CHAIN, weights={"w": torch.randn(24)})


def test_from_the_second_call_on_a_segment_is_one_graph(chain):
    backend = HostBackend()
    executable = backend.compile(chain, {"cuda_graphs": True})
    assert len(executable.launches) >= 3
    bound, driver = executable.bind(), backend.driver
    before = driver.graph_counts
    held = []
    for turn in range(5):
        inputs = [torch.randn(6, 24), torch.randn(24)]
        got = bound(inputs)
        for g, want in zip(got, interpret(chain, inputs), strict=True):
            torch.testing.assert_close(g, want)
        held.append((inputs, got, [g.clone() for g in got]))
        made, _, run, _ = (a - b for a, b in zip(driver.graph_counts, before))
        assert (made, run) == (min(turn, 1), turn)
    for _, got, copies in held:  # nothing that a later call did has touched them
        assert all(torch.equal(g, c) for g, c in zip(got, copies, strict=True))


def test_only_kernels_whose_operands_moved_are_told(chain):
    backend = HostBackend()
    bound = backend.compile(chain, {"cuda_graphs": True}).bind()
    x, z = torch.randn(6, 24), torch.randn(24)
    for _ in range(2):
        kept = bound([x, z])
    told = backend.driver.graph_counts[1]
    bound([x, z])  # while `kept` lives, the results of this call lie elsewhere
    more = backend.driver.graph_counts[1] - told
    assert 0 < more < len(backend.driver.kernels)
    del kept


def test_every_size_has_a_graph_of_its_own_and_gives_it_back(chain):
    gc.collect()
    backend = HostBackend()
    before = backend.driver.graph_counts[3]
    bound = backend.compile(chain, {"cuda_graphs": True}).bind()
    for rows in (3, 5, 3, 5, 0, 0, 5, 3):
        inputs = [torch.randn(rows, 24), torch.randn(24)]
        for got, want in zip(bound(inputs), interpret(chain, inputs), strict=True):
            torch.testing.assert_close(got, want)
    assert backend.driver.graph_counts[3] - before == 3
    del bound
    gc.collect()
    assert backend.driver.graph_counts[3] == before


def test_while_somebody_captures_calls_are_launched_one_by_one(chain, monkeypatch):
    backend = HostBackend()
    executable = backend.compile(chain, {"cuda_graphs": True})
    bound, inputs = executable.bind(), [torch.randn(6, 24), torch.randn(24)]
    monkeypatch.setattr(type(executable.program), "capturing", lambda self: True)
    before = backend.driver.graph_counts
    for _ in range(3):
        torch.testing.assert_close(bound(inputs), interpret(chain, inputs))
    assert backend.driver.graph_counts == before


def test_graphs_are_off_unless_asked_for(chain):
    backend = HostBackend()
    bound, before = backend.compile(chain).bind(), backend.driver.graph_counts
    for _ in range(3):
        bound([torch.randn(6, 24), torch.randn(24)])
    assert backend.driver.graph_counts == before


def test_a_driver_without_graphs_is_a_sentence(chain):
    with pytest.raises(UnsupportedError, match="makes no graphs") as e:
        HostBackend(graphs=False).compile(chain, {"cuda_graphs": True})
    assert e.value.fix == "drop cuda_graphs=True"
    assert set(GRAPHS) <= CUDA_NAMES.keys() and not set(GRAPHS) & HIP.keys()


def test_targets_without_graphs_refuse_them():
    with pytest.raises(OptionError, match="target 'cpu' has no CUDA graphs"):
        effc.compile(torch.nn.Softmax(-1), example_inputs=(torch.randn(2, 3),), cuda_graphs=True)


# ------------------------------------------------------------------ other devices


def on(here: str) -> Gpu:
    return Gpu(None, 0, "Example", target(here))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "built, portable, here, what",
    [
        ("cuda:sm_80", True, "cuda:sm_80", "code"),
        ("cuda:sm_80", True, "cuda:sm_86", "code"),
        ("cuda:sm_80", True, "cuda:sm_90", "assembly"),
        ("cuda:sm_89", True, "cuda:sm_120", "assembly"),
        ("cuda:sm_80", True, "cuda:sm_87", "assembly"),  # Tegra
        ("cuda:sm_86", True, "cuda:sm_80", ""),
        ("cuda:sm_90", True, "cuda:sm_89", ""),
        ("cuda:sm_90", False, "cuda:sm_90", "code"),
        ("cuda:sm_90", False, "cuda:sm_100", ""),
        ("cuda:sm_100", False, "cuda:sm_103", ""),
        ("hip:gfx942", True, "hip:gfx942", "code"),
        ("hip:gfx942", True, "hip:gfx950", ""),
        ("hip:gfx942", True, "cuda:sm_90", ""),
        ("cuda:sm_80", True, "hip:gfx942", ""),
    ],
)  # fmt: skip
def test_which_code_runs_where(built, portable, here, what):
    assert on(here).runs(built, portable) == what


@pytest.fixture(scope="module")
def elsewhere():
    graph = parse("def graph(x: f32[7, 24]):\n    a = softmax(x, 1)\n    return a,\n")
    targets = [target(t) for t in ("cuda:sm_80", "cuda:sm_90")]
    made = find_backend("triton").cross_compile(graph, targets)
    return graph, made, json.loads(json.dumps(made.machine))


@pytest.mark.parametrize(
    "here, jit", [("cuda:sm_86", False), ("cuda:sm_89", False), ("cuda:sm_120", True)]
)
def test_code_for_an_older_device_is_taken_with_a_sentence(elsewhere, here, jit):
    graph, made, machine = elsewhere
    assert machine["portable"] == ["cuda:sm_80"], "sm_90's is for that architecture alone"
    backend = HostBackend()
    backend.here = here
    assert backend.runs(machine)
    how = "is compiled anew by the driver" if jit else "runs as it is"
    with pytest.warns(
        RuntimeWarning, match=f"the code for cuda:sm_80 {how} on Example 1000, a {here}"
    ):
        loaded = backend.load(graph, made.objects, machine)
    (image,) = backend.driver.images
    if jit:
        assert image.endswith(b"\0") and b".target sm_80" in image
    else:
        assert image[:4] == b"\x7fELF"
    x = torch.randn(7, 24)
    torch.testing.assert_close(loaded.bind()([x])[0], x.softmax(1))
    assert [o.code[:4] for o in loaded.objects if o.target] == [b"\x7fELF"], "saved as it came"


@pytest.mark.filterwarnings("error")
def test_the_devices_own_code_is_taken_in_silence(elsewhere):
    graph, made, machine = elsewhere
    backend = HostBackend()
    backend.here, backend.model = "cuda:sm_90", SM_90
    backend.load(graph, made.objects, machine)


@pytest.mark.parametrize("here", ["cuda:sm_75", "hip:gfx942"])
def test_code_for_a_newer_device_is_refused(elsewhere, here):
    backend = HostBackend()
    backend.here = here
    answer = backend.runs(elsewhere[2])
    assert str(answer) == (
        f"it was built for cuda:sm_80 and cuda:sm_90, and Example 1000 is a {here}"
    )


def test_a_kernel_that_needs_more_shared_memory_than_there_is_is_named():
    graph = parse(
        "def graph(x: f16[512, 512], w: f16[512, 512]):\n    y = linear(x, w)\n    return y,\n"
    )
    made = find_backend("triton").cross_compile(graph, [target("cuda:sm_80")])
    backend = HostBackend()
    backend.here, backend.shared = "cuda:sm_86", 1 << 10
    with (
        pytest.warns(RuntimeWarning, match="runs as it is"),
        pytest.raises(EffcError, match="bytes of shared memory") as e,
    ):
        backend.load(graph, made.objects, made.machine)
    assert e.value.why == "a block of Example 1000 has 1024"


# ------------------------------------------------------------------ what plans are made for


def test_a_device_of_which_nothing_is_known_is_like_its_kin():
    known = device_like("cuda:sm_90", "NVIDIA H200", 132, 150 * 10**9)
    assert known is DEVICES["H200 SXM"]
    assert device_like("cuda:sm_80", "", 0, 0) is DEVICES["A100 SXM 80GB"]
    found = device_like("cuda:sm_86", "NVIDIA A10", 64, 24 * 10**9, 6 << 20, 99 << 10)
    kin = DEVICES["RTX 4090"]
    assert (found.name, found.units, found.l2) == ("NVIDIA A10", 64, 6 << 20)
    assert found.peak["f16"] == kin.peak["f16"] / 2 and found.bandwidth == kin.bandwidth / 2
    assert found.limits.shared_block == 99 << 10 and found.limits.shared == 100 << 10
    assert "in proportion" in found.source
    assert device_like("hip:gfx950", "MI355X", 256, 1).limits.warp == 64


def test_few_and_many_rows_have_launches_of_their_own(monkeypatch):
    """A length that only a call knows is mostly one, or hundreds."""
    monkeypatch.setattr(products, "PAYS", 0.5)  # worth it for any product
    graph = parse(
        "def graph(x: f16[N, 64], w: f16[512, 64]):\n    y = linear(x, w)\n    return y,\n"
    )
    backend = HostBackend()
    executable = backend.compile(graph)
    few, many = executable.launches
    assert few.note.endswith("for at most 16 rows") and "rows" not in many.note
    bound, w = executable.bind(), torch.randn(512, 64).half()
    for rows, taken in ((1, few), (16, few), (17, many), (40, many)):
        before = {name: k.launches for name, k in backend.driver.kernels.items()}
        x = torch.randn(rows, 64).half()
        torch.testing.assert_close(bound([x, w])[0], x @ w.T, rtol=2e-2, atol=2e-2)
        ran = [name for name, k in backend.driver.kernels.items() if k.launches > before[name]]
        assert ran == [taken.call]


def test_rows_have_one_launch_where_two_do_not_pay():
    text = "def graph(x: f16[{}, 64], w: f16[512, 64]):\n    y = linear(x, w)\n    return y,\n"
    for rows in ("4", "640", "20*N", "N"):  # the last takes no longer by tiles for many rows
        assert len(make_plan(parse(text.format(rows)), Options(), GPU).launches) == 1
    large = text.replace("512", "16384").replace("64", "4096").format("N")
    assert len(make_plan(parse(large), Options(), GPU).launches) == 2


def test_each_target_has_a_plan_of_its_own():
    """Schedules of one device need not fit another: AMD's have 64 KB of shared memory."""
    graph = parse(
        "def graph(x: f16[4096, 4096], w: f16[4096, 4096]):\n    y = linear(x, w)\n    return y,\n"
    )
    targets = [target(t) for t in ("cuda:sm_90", "hip:gfx942")]
    made = find_backend("triton").cross_compile(graph, targets)
    by_target = {o.target: o for o in made.objects if o.target}
    assert by_target["cuda:sm_90"].functions != by_target["hip:gfx942"].functions
    assert (
        by_target["hip:gfx942"].launch["shared"]
        <= 64 << 10
        < (by_target["cuda:sm_90"].launch["shared"])
    )
    assert made.machine["devices"]["hip:gfx942"]["name"] == GFX942.name
