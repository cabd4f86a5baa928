"""The way to a GPU, with a driver that runs what it is given on the CPU."""

import ctypes

import pytest
import torch

from effc.backends.base import Options, find_backend
from effc.backends.cpu import build_units
from effc.backends.gpu import GPU
from effc.backends.gpu.driver import Driver, Function
from effc.backends.plan.planner import make_plan
from effc.backends.ptx_host import ARCH, FAILED, SCHEDULER, host_kernel
from effc.backends.triton import LAUNCHER, GpuExecutable, GpuProgram, compile_plan
from effc.codegen.build import Unit
from effc.ir import EffcError, InputError, UnsupportedError, interpret, parse

# A driver's launch function over kernels of ptx-host: arguments come one address each, as CUDA
# takes them, pointers first.
DRIVER = """
#include <cstdint>
#include <vector>
struct Kernel { void (*run)(char* const*, const int64_t*, int64_t); int64_t pointers, numbers, scheduler, failed, launches; };
extern "C" __attribute__((visibility("default"))) int launch(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** more) {
  Kernel& k = *static_cast<Kernel*>(function);
  if (stream != reinterpret_cast<void*>(77) || more || by != 1 || bz != 1) return 1;
  std::vector<char*> p;
  std::vector<int64_t> n{gx, gy, gz, k.scheduler, k.failed};
  for (int64_t i = 0; i < k.pointers; ++i) p.push_back(*static_cast<char**>(arguments[i]));
  for (int64_t i = 0; i < k.numbers; ++i) n.push_back(*static_cast<int64_t*>(arguments[k.pointers + i]));
  ++k.launches;
  k.run(p.data(), n.data(), 1);
  return 0;
}
extern "C" __attribute__((visibility("default"))) int explain(int status, const char** text) {
  *text = "wrong stream";
  return 0;
}
"""


class HostKernel(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("run", "pointers", "numbers", "scheduler", "failed", "launches")
    )


class OnHost(GpuProgram):
    """On the CPU's memory, and on a stream of a number that the driver asks for."""

    stream = 77

    def resource(self):
        return self.stream

    def error_word(self):
        return torch.zeros(1, dtype=torch.int64)


def on_host(graph):
    """(executable, kernels by name): a plan for a GPU whose driver is the CPU."""
    plan = make_plan(graph, Options(), GPU)
    compiled = compile_plan(plan, ARCH)
    hosted = [host_kernel(c) for c in compiled]
    units = [Unit(LAUNCHER.read_text(), "launcher"), Unit(DRIVER, "driver")]
    units += [Unit(k.code, k.name, k.flags) for k in (SCHEDULER, *hosted)]
    launcher, driver, scheduler, *libraries = build_units(units)

    def address(library, name):
        return ctypes.cast(getattr(library.cdll, name), ctypes.c_void_p).value

    kernels = {}
    for c, library in zip(compiled, libraries, strict=True):
        counts = len(c.kernel.pointers), len(c.kernel.numbers)
        entry = address(scheduler, SCHEDULER.name)
        run = address(library, c.kernel.name)
        kernels[c.kernel.name] = HostKernel(run, *counts, entry, FAILED.address, 0)
    names = {"launch": "launch", "error": "explain"}
    program = OnHost(plan, 1, launcher, device="cpu")
    program.gpu, program.index = Driver(driver.cdll, names), 0
    program.kept = libraries, scheduler, driver, kernels
    program.functions = {
        c.kernel.name: Function(ctypes.addressof(kernels[c.kernel.name]), c.threads, c.shared)
        for c in compiled
    }
    return GpuExecutable(plan, program, graph, True, {}), kernels


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


def test_a_plan_reaches_the_driver_and_comes_back():
    graph = parse(GRAPH, weights={"w": torch.randn(24)})
    executable, kernels = on_host(graph)
    bound = executable.bind()
    for rows in (5, 1, 64, 0):
        inputs = [torch.randn(rows, 24), torch.randn(24)]
        for got, want in zip(bound(inputs), interpret(graph, inputs), strict=True):
            torch.testing.assert_close(got, want)
    launched = [k.launches for k in kernels.values()]
    assert all(count >= 3 for count in launched), "three sizes launch; none of a size of 0 does"


def test_streams_have_frames_of_their_own():
    graph = parse(GRAPH, weights={"w": torch.randn(24)})
    executable, _ = on_host(graph)
    bound = executable.bind()
    inputs = [torch.randn(3, 24), torch.randn(24)]
    first = bound(inputs)
    assert len(bound._by_stream) == 1
    executable.program.stream = 78  # which the driver refuses
    with pytest.raises(EffcError, match="a launch fails: wrong stream"):
        bound(inputs)
    assert len(bound._by_stream) == 2
    executable.program.stream = 77
    torch.testing.assert_close(bound(inputs), first)


def test_inputs_at_odd_addresses_are_moved():
    """Kernels are compiled for addresses that are multiples of 16."""
    graph = parse(GRAPH, weights={"w": torch.randn(24)})
    executable, _ = on_host(graph)
    odd = torch.randn(1 + 4 * 24)[1:].view(4, 24)
    inputs = [odd, torch.randn(25)[1:]]
    got = executable.bind()(inputs)
    torch.testing.assert_close(got, interpret(graph, inputs))


def test_wrong_inputs_are_named():
    graph = parse(GRAPH, weights={"w": torch.randn(24)})
    executable, _ = on_host(graph)
    with pytest.raises(InputError, match="x"):
        executable.bind()([torch.randn(3, 24).double(), torch.randn(24)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_the_target_says_what_to_do():
    with pytest.raises(UnsupportedError, match="ptx-host"):
        find_backend("triton").compile(parse(GRAPH))
