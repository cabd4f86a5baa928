"""A GPU whose driver is the CPU: it takes the PTX that comes with a binary and runs that."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from effc.backends.gpu.backend import GpuBackend
from effc.backends.gpu.device import Gpu
from effc.backends.gpu.driver import Driver, Function
from effc.backends.gpu.program import GpuProgram
from effc.backends.ptx_host import FAILED, SCHEDULER, host_kernel
from effc.codegen.build import Unit, build_many
from effc.codegen.triton.compile import target
from effc.codegen.triton.schedules import SM_80

# A plan of target `cuda` has kernels of both languages for it.
MIXED = """
def graph(x: bf16[20, 64], w: bf16[64, 64], g: bf16[64]):
    y0 = linear(x, w)
    y1 = rms_norm(y0, g)
    y2 = permute(y1, dims=(1, 0))
    y3 = add(y2, 1.0)
    y4 = sin(y3)
    return y4
"""

# A driver's functions over kernels of ptx-host: arguments come one address each, as CUDA takes them,
# pointers first. A graph copies the arguments of its nodes when it is told them, as CUDA's do.
DRIVER = """
#include <cstddef>
#include <cstdint>
#include <vector>
#define EXPORT extern "C" __attribute__((visibility("default")))
struct Kernel { void (*run)(char* const*, const int64_t*, int64_t); int64_t pointers, numbers, scheduler, failed, launches; };
struct Node { Kernel* function; unsigned gx, gy, gz, bx, by, bz, shared; void** arguments; void **more, *kernel, *context; };
static Kernel* const BROKEN = reinterpret_cast<Kernel*>(13);
static int64_t counts[4];  // graphs made, nodes told anew, graphs launched, graphs that there are

EXPORT int launch(
    void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** arguments, void** more) {
  if (stream != reinterpret_cast<void*>(77) || more || by != 1 || bz != 1) return 1;
  if (function == BROKEN) return 701;
  Kernel& k = *static_cast<Kernel*>(function);
  std::vector<char*> p;
  std::vector<int64_t> n{gx, gy, gz, k.scheduler, k.failed};
  for (int64_t i = 0; i < k.pointers; ++i) p.push_back(*static_cast<char**>(arguments[i]));
  for (int64_t i = 0; i < k.numbers; ++i) n.push_back(*static_cast<int64_t*>(arguments[k.pointers + i]));
  ++k.launches;
  k.run(p.data(), n.data(), 1);
  return 0;
}
EXPORT int explain(int status, const char** text) {
  *text = status == 701 ? "too many resources" : status == 1 ? "wrong stream" : "something";
  return 0;
}

struct Step { Node node; std::vector<int64_t> values; };
struct Graph { std::vector<Step*> steps; };
static void tell(Step* step, const Node* node) {
  step->node = *node;
  step->values.clear();
  const int64_t count = node->function->pointers + node->function->numbers;
  for (int64_t i = 0; i < count; ++i) step->values.push_back(*static_cast<int64_t*>(node->arguments[i]));
}
EXPORT int create(Graph** graph, unsigned flags) { return *graph = new Graph, ++counts[3], flags; }
EXPORT int add(Step** made, Graph* graph, Step* const* before, std::size_t count, const Node* node) {
  if ((count == 0) != graph->steps.empty() || (count && *before != graph->steps.back())) return 2;
  graph->steps.push_back(*made = new Step);
  tell(*made, node);
  return 0;
}
EXPORT int instantiate(Graph** instance, Graph* graph, unsigned long long flags) {
  return ++counts[0], *instance = graph, flags;
}
EXPORT int update(Graph*, Step* step, const Node* node) { return ++counts[1], tell(step, node), 0; }
EXPORT int run_graph(Graph* graph, void* stream) {
  ++counts[2];
  for (Step* s : graph->steps) {
    std::vector<void*> arguments;
    for (int64_t& value : s->values) arguments.push_back(&value);
    const Node& n = s->node;
    if (int status = launch(n.function, n.gx, n.gy, n.gz, n.bx, n.by, n.bz, n.shared, stream, arguments.data(), nullptr)) return status;
  }
  return 0;
}
EXPORT int free_instance(Graph*) { return 0; }
EXPORT int free_graph(Graph* graph) { return delete graph, --counts[3], 0; }
EXPORT int64_t* graphs() { return counts; }
"""

NAMES = {
    "launch": "launch", "error": "explain", "graph": "create", "node": "add",
    "instantiate": "instantiate", "update": "update", "run graph": "run_graph",
    "free instance": "free_instance", "free graph": "free_graph",
}  # fmt: skip


class HostKernel(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("run", "pointers", "numbers", "scheduler", "failed", "launches")
    )


class HostDriver(Driver):
    """taken: names of the kernels that were loaded; broken: of those that no launch takes."""

    def __init__(self, graphs: bool = True) -> None:
        (library,) = build_many([Unit(DRIVER, "driver")])
        names = NAMES if graphs else {n: NAMES[n] for n in ("launch", "error")}
        super().__init__(library.cdll, dict(names))
        self.taken, self.kept, self.kernels = [], [library], {}
        self.unloaded, self.images, self.broken = [], [], set()

    def load(self, compiled, device):
        name = compiled.kernel.name
        self.taken.append(name)
        self.images.append(compiled.binary)
        kernel = host_kernel(replace(compiled, binary=b""))
        scheduler, library = build_many(
            [Unit(k.code, k.name, k.flags) for k in (SCHEDULER, kernel)]
        )
        run, entry = (
            ctypes.cast(getattr(lib.cdll, symbol), ctypes.c_void_p).value
            for lib, symbol in ((library, kernel.name), (scheduler, SCHEDULER.name))
        )
        counts = len(compiled.kernel.pointers), len(compiled.kernel.numbers)
        hosted = self.kernels[name] = HostKernel(run, *counts, entry, FAILED.address, 0)
        self.kept += [scheduler, library, hosted]
        handle = 13 if name in self.broken else ctypes.addressof(hosted)
        made = Function(handle, compiled.threads, compiled.shared)
        self.loaded[device, f"{name} {compiled.target}"] = made, None
        return made

    def unload(self, compiled, device):
        if self.loaded.pop((device, f"{compiled.kernel.name} {compiled.target}"), None):
            self.unloaded.append(compiled.kernel.name)

    @property
    def graph_counts(self) -> list[int]:
        """Graphs made, nodes told anew, graphs launched, graphs that there are."""
        function = self.library.graphs
        function.restype = ctypes.POINTER(ctypes.c_int64)
        return function()[:4]


@dataclass(frozen=True, eq=False)
class HostGpu(Gpu):
    """On the CPU's memory, and on a stream of a number that the driver asks for."""

    stream_number: int = 77

    @property
    def place(self):
        return torch.device("cpu")

    def stream(self):
        return self.stream_number

    def current(self):
        return nullcontext()

    def seconds(self, run):
        began = perf_counter()
        run()
        return perf_counter() - began


class OnHost(GpuProgram):
    """A program on such a GPU."""

    def error_word(self):
        return torch.zeros(1, dtype=torch.int64)

    def capturing(self):
        return False


class HostBackend(GpuBackend):
    """A GPU target with a device of the CPU's."""

    name, device, program = "triton", "cpu", OnHost
    here, shared, model, title = "cuda:sm_80", 0, SM_80, "Example 1000"

    def __init__(self, lowerings=None, graphs: bool = True):
        if lowerings is not None:
            self.lowerings = lowerings
        self.driver = HostDriver(graphs)

    def gpu(self):
        facts = {"gpu": self.title, "target": self.here, "driver": 1}
        to = target(self.here)
        return HostGpu(self.driver, 0, self.title, to, self.model, self.shared, facts)
