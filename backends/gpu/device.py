"""A GPU of this machine: its driver, what code for it is compiled for, and what decides times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from effc.codegen.gpu.devices import device_like
from effc.codegen.triton.compile import Target
from effc.codegen.triton.schedules import ANY, Device
from effc.ir import No

from .driver import Driver, device_target, find_driver

TEGRA = (72, 87, 101, 110)  # their binaries and a desktop's never run on each other
COVER = 4  # times the L2 cache: what is written before a run that is timed, so that it finds none


@dataclass(frozen=True, eq=False)
class Gpu:
    """The device that torch uses, and its driver.

    model: what schedules are made for. shared: bytes that a block may have; 0: not known. facts:
    all of it that decides times.
    """

    driver: Driver
    index: int
    name: str
    target: Target
    model: Device = ANY
    shared: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> torch.device:
        return torch.device("cuda", self.index)

    def stream(self) -> int:
        """torch's current stream."""
        return torch._C._cuda_getCurrentRawStream(self.index)

    def current(self) -> AbstractContextManager[Any]:
        """Makes the device torch's current one, where it is not."""
        if torch.cuda.current_device() == self.index:
            return nullcontext()
        return torch.cuda.device(self.index)

    def seconds(self, run: Callable[[], None]) -> float:
        """What the device takes for what `run` queues, with nothing of it in the L2 cache."""
        size = COVER * max(int(self.facts.get("l2", 0)), 1 << 24)
        cover = torch.empty(size, dtype=torch.uint8, device=self.place)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cover.zero_()  # meanwhile `run` is queued: what that takes is not measured
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def runs(self, target: str, portable: bool) -> str:
        """What of an object for a target runs here: its "code", its "assembly", or "", neither.

        CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility": a binary runs on
        devices of its major version whose minor one is not below, and PTX is compiled by the driver
        for any newer device, but for Tegra and for what uses features of one architecture.
        """
        if target == str(self.target):
            return "code"
        backend, _, arch = target.partition(":sm_")
        here = self.target.arch
        if backend != "cuda" or not isinstance(here, int) or not portable:
            return ""
        if not arch.isdecimal() or int(arch) > here:
            return ""
        apart = int(arch) // 10 != here // 10 or int(arch) in TEGRA or here in TEGRA
        return "assembly" if apart else "code"


def find_gpu() -> Gpu | No:
    """The device that torch uses now, or why there is none."""
    driver = find_driver()
    if isinstance(driver, No):
        return driver
    index = torch.cuda.current_device()
    target, p = device_target(index), torch.cuda.get_device_properties(index)
    shared = int(getattr(p, "shared_memory_per_block_optin", 0))
    if target.backend == "hip":  # ROCm tells what CUDA calls opt-in as what a block has anyway
        shared = int(getattr(p, "shared_memory_per_block", 0))
    l2 = int(getattr(p, "L2_cache_size", 0))
    units = p.multi_processor_count
    sheet = device_like(str(target), p.name, units, p.total_memory, l2, shared)
    facts = {
        "gpu": p.name, "target": str(target), "units": units, "memory": p.total_memory, "l2": l2,
        "shared": shared, "clock": int(getattr(p, "clock_rate", 0)), "driver": driver.version,
        "runtime": torch.version.cuda or torch.version.hip,
    }  # fmt: skip
    return Gpu(driver, index, p.name, target, Device.of(sheet), shared, facts)


__all__ = ["Gpu", "find_gpu"]
