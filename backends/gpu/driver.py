"""The GPU's driver, as far as launching needs it: modules, functions, graphs, errors. By ctypes.

torch has made the device's context and owns memory and streams; this loads our code into it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch

from effc.codegen.gpu.compile import AnyCompiled
from effc.codegen.triton.compile import Target
from effc.ir import EffcError, No, no

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ALWAYS = 48 * 1024  # bytes of shared memory that a launch gets without asking
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: the thread has none yet


class Function(ctypes.Structure):
    """A loaded kernel as the launcher reads it."""

    _fields_ = (
        ("handle", ctypes.c_void_p), ("threads", ctypes.c_int64), ("shared", ctypes.c_int64),
    )  # fmt: skip


@dataclass
class Driver:
    """One API in two dialects: `names` gives CUDA's or HIP's name of a function."""

    library: Any
    names: dict[str, str]
    loaded: dict[tuple[int, str], tuple[Function, Any]] = field(default_factory=dict)

    @property
    def launch(self) -> int:
        """The address of the function that launches."""
        return self.address("launch")

    @cached_property
    def graphs(self) -> Any:
        """Addresses of the functions for graphs, in the launcher's order; None: it has none."""
        if any(what not in self.names for what in GRAPHS):
            return None
        return (ctypes.c_void_p * len(GRAPHS))(*map(self.address, GRAPHS))

    def address(self, what: str) -> int:
        function = getattr(self.library, self.names[what])
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def load(self, compiled: AnyCompiled, device: int) -> Function:
        """The kernel on a device, torch's current one; loaded once a process."""
        name = compiled.kernel.name
        key = device, f"{name} {compiled.target}"
        if key not in self.loaded:
            if compiled.scratch:
                raise EffcError(f"kernel {name} wants scratch memory, which no launch here gives")
            self.ensure(device)
            module, handle = ctypes.c_void_p(), ctypes.c_void_p()
            self.call(f"kernel {name}", "load", ctypes.byref(module), compiled.binary)
            try:
                self.call(f"kernel {name}", "function", ctypes.byref(handle), module, name.encode())
                if compiled.shared > ALWAYS and "attribute" in self.names:
                    self.call(f"kernel {name}", "attribute", handle, MAX_DYNAMIC_SHARED,
                              compiled.shared)  # fmt: skip
            except EffcError:
                self.call(f"kernel {name}", "unload", module)
                raise
            self.loaded[key] = Function(handle, compiled.threads, compiled.shared), module
        return self.loaded[key][0]

    def unload(self, compiled: AnyCompiled, device: int) -> None:
        """Give back what `load` took; the kernel must not be running."""
        name = compiled.kernel.name
        found = self.loaded.pop((device, f"{name} {compiled.target}"), None)
        if found is not None:
            self.call(f"kernel {name}", "unload", found[1])

    def ensure(self, device: int) -> None:
        """Give this thread the device's context where it has none: torch, which makes it when it
        first uses the device, may not have done so, or have done so in another thread."""
        if "current" in self.names:
            context = ctypes.c_void_p()
            self.call("this thread", "current", ctypes.byref(context))
            if not context.value:
                self.enter(device)

    def enter(self, device: int) -> None:
        """Make the device's context that of this thread."""
        context = ctypes.c_void_p()
        self.call("this thread", "context", ctypes.byref(context), device)
        self.call("this thread", "enter", context)

    @cached_property
    def version(self) -> int:
        """As the driver numbers itself."""
        found = ctypes.c_int()
        self.call("the driver", "version", ctypes.byref(found))
        return found.value

    def error(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self.names["error"].startswith("hip"):
            get = getattr(self.library, self.names["error"])
            get.restype = ctypes.c_char_p
            return (get(status) or b"?").decode()
        getattr(self.library, self.names["error"])(status, ctypes.byref(text))
        return (text.value or b"?").decode()

    def call(self, about: str, what: str, *args: Any) -> None:
        """Raises EffcError with the driver's own words where it fails."""
        status = getattr(self.library, self.names[what])(*args)
        if status:
            raise EffcError(f"{about}: {self.names[what]} fails: {self.error(status)}")


# What the launcher calls to make and run graphs, in the order of its struct Graphs.
GRAPHS = ("graph", "node", "instantiate", "update", "run graph", "free instance", "free graph")
CUDA = {
    "load": "cuModuleLoadData", "unload": "cuModuleUnload", "function": "cuModuleGetFunction",
    "launch": "cuLaunchKernel", "attribute": "cuFuncSetAttribute", "error": "cuGetErrorString",
    "version": "cuDriverGetVersion", "context": "cuDevicePrimaryCtxRetain",
    "enter": "cuCtxSetCurrent", "current": "cuCtxGetCurrent",
    "graph": "cuGraphCreate", "node": "cuGraphAddKernelNode_v2",
    "instantiate": "cuGraphInstantiateWithFlags", "update": "cuGraphExecKernelNodeSetParams_v2",
    "run graph": "cuGraphLaunch", "free instance": "cuGraphExecDestroy",
    "free graph": "cuGraphDestroy",
}  # fmt: skip
# No graphs: hipGraphAddKernelNode does not take functions of modules.
HIP = {
    "load": "hipModuleLoadData", "unload": "hipModuleUnload", "function": "hipModuleGetFunction",
    "launch": "hipModuleLaunchKernel", "error": "hipGetErrorString",
    "version": "hipDriverGetVersion",
}  # fmt: skip


@lru_cache(maxsize=1)
def find_driver() -> Driver | No:
    """The driver of the device that torch uses here, or why there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch finds no GPU" if built else "this torch is built for CPUs only"
        return no("{}", why)
    hip = torch.version.hip is not None
    name = "libamdhip64.so" if hip else "libcuda.so.1"
    try:
        return Driver(ctypes.CDLL(name), HIP if hip else CUDA)
    except OSError as e:
        return no("{} cannot be loaded: {}", name, e)


def device_target(device: int) -> Target:
    """What code for a device of this machine is compiled for."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return Target("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return Target("cuda", properties.major * 10 + properties.minor)


__all__ = ["Driver", "Function", "device_target", "find_driver"]
