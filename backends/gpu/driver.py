"""The GPU's driver, as far as launching needs it: modules, functions, errors. By ctypes.

torch has made the device's context and owns memory and streams; this loads our code into it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from effc.codegen.triton.compile import Compiled, Target
from effc.ir import EffcError, No, no

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ALWAYS = 48 * 1024  # bytes of shared memory that a launch gets without asking


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
    loaded: dict[tuple[int, str], Function] = field(default_factory=dict)

    @property
    def launch(self) -> int:
        """The address of the function that launches."""
        function = getattr(self.library, self.names["launch"])
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def load(self, compiled: Compiled, device: int) -> Function:
        """The kernel on a device; loaded once a process. Its context must be current."""
        key = device, f"{compiled.kernel.name} {compiled.target}"
        if key not in self.loaded:
            module, handle = ctypes.c_void_p(), ctypes.c_void_p()
            name = compiled.kernel.name
            self._call(name, "load", ctypes.byref(module), compiled.binary)
            self._call(name, "function", ctypes.byref(handle), module, name.encode())
            if compiled.shared > ALWAYS and "attribute" in self.names:
                self._call(name, "attribute", handle, MAX_DYNAMIC_SHARED, compiled.shared)
            self.loaded[key] = Function(handle, compiled.threads, compiled.shared)
        return self.loaded[key]

    def error(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self.names["error"].startswith("hip"):
            get = getattr(self.library, self.names["error"])
            get.restype = ctypes.c_char_p
            return (get(status) or b"?").decode()
        getattr(self.library, self.names["error"])(status, ctypes.byref(text))
        return (text.value or b"?").decode()

    def _call(self, kernel: str, what: str, *args: Any) -> None:
        status = getattr(self.library, self.names[what])(*args)
        if status:
            raise EffcError(f"kernel {kernel}: {self.names[what]} fails: {self.error(status)}")


CUDA = {
    "load": "cuModuleLoadData", "function": "cuModuleGetFunction", "launch": "cuLaunchKernel",
    "attribute": "cuFuncSetAttribute", "error": "cuGetErrorString",
}  # fmt: skip
HIP = {
    "load": "hipModuleLoadData", "function": "hipModuleGetFunction",
    "launch": "hipModuleLaunchKernel", "error": "hipGetErrorString",
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
