"""`effc bench gpu`: kernels and models on a GPU, beside PyTorch's own ways and the device's sheet.

Times are CUDA events around calls in a row, so that a call of less than some microseconds is
bounded by how fast the host launches; inputs of the last call may still lie in the second-level
cache. The limit is the roofline of the data sheet (codegen/gpu/devices.py), not a measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.codegen.gpu import DEVICES, Device, estimate
from effc.ir.op import Cost

from .peers import BASE, Eager, Inductor, Peer, Prepared, Unable, in_precision
from .stats import times
from .suites import SUITES, Case, Operator, attention, convolution, operator
from .work import Work

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
KINDS = {"fp32": "f32", "tf32": "tf32", "bf16": "bf16", "fp16": "f16"}
"""Element types of products, as devices name their peaks."""

# ------------------------------------------------------------------ what is timed


def cases() -> list[Case]:
    """Operators at the sizes of a GPU, then the models of `effc bench models`."""
    return [*_products(), *_others(), *SUITES["models"]()]


def _products() -> list[Case]:
    shapes = {  # rows x inputs x outputs: one token, a small batch, a prompt
        "linear-1x4096x14336": (1, 4096, 14336),
        "linear-16x4096x4096": (16, 4096, 4096),
        "linear-2048x4096x4096": (2048, 4096, 4096),
    }
    return [
        *(operator(f"matmul-{n}", "matmul", torch.matmul, [(n, n)] * 2) for n in (1024, 4096)),
        *(
            operator(name, "matmul", F.linear, [(m, k)], [(n, k), (n,)])
            for name, (m, k, n) in shapes.items()
        ),
    ]


def _others() -> list[Case]:
    wide, row = (16384, 4096), (4096,)
    return [
        operator("conv3x3-64-64-32x56x56", "convolution", convolution(padding=1),
                 [(32, 64, 56, 56)], [(64, 64, 3, 3), (64,)]),
        operator("conv1x1-64-256-32x56x56", "convolution", convolution(), [(32, 64, 56, 56)],
                 [(256, 64, 1, 1), (256,)]),
        operator("attention-causal-32x128-2048", "attention", attention, [(1, 32, 2048, 128)] * 3),
        operator("attention-causal-16x64-8192", "attention", attention, [(1, 16, 8192, 64)] * 3),
        operator("layer-norm-16384x4096", "memory", lambda x, w, b: F.layer_norm(x, row, w, b),
                 [wide], [row] * 2),
        operator("rms-norm-16384x4096", "memory", lambda x, w: F.rms_norm(x, row, w), [wide],
                 [row]),
        operator("softmax-16384x4096", "memory", lambda x: F.softmax(x, -1), [wide]),
        operator("silu-mul-16384x4096", "memory", lambda x, y: F.silu(x) * y, [wide, wide]),
        operator("bias-gelu-16384x4096", "memory", lambda x, b: F.gelu(x + b), [wide], [row]),
    ]  # fmt: skip


# ------------------------------------------------------------------ ways


@dataclass(frozen=True)
class EffcGpu(Peer):
    """effc's target triton."""

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Any, threads: int
    ) -> Prepared:
        model, args = in_precision(model, args, precision)
        fast = torch.compile(model, backend="effc", options={"target": "triton"})
        return lambda: fast(*args)


@dataclass(frozen=True)
class Cublas(Peer):
    """torch.mm or torch.addmm into memory that is there already: the library's own time."""

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Any, threads: int
    ) -> Prepared:
        model, args = in_precision(model, args, precision)
        if not isinstance(model, Operator) or model.fn not in (torch.matmul, F.linear):
            raise Unable("it is more than one product")
        out = model(*args)
        if model.fn is torch.matmul:
            return lambda: torch.mm(*args, out=out)
        w, b = model.weights
        return lambda: torch.addmm(b, args[0], w.t(), out=out)


@dataclass(frozen=True)
class Sdpa(Peer):
    """torch's attention by one of its backends, of `torch.nn.attention.SDPBackend`."""

    backend: str = "FLASH_ATTENTION"

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Any, threads: int
    ) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model, args = in_precision(model, args, precision)
        if not isinstance(model, Operator) or model.fn is not attention:
            raise Unable("it is more than one attention")
        chosen = getattr(SDPBackend, self.backend)

        def run() -> Tensor:
            with sdpa_kernel(chosen):
                return model(*args)

        return run


AUTOTUNE = (("max_autotune", True),)


def peers(precision: str) -> tuple[Peer, ...]:
    """Float32 eager first, then every way in the precision. tf32: float32 with torch's "high"."""
    matmul = "high" if precision == "tf32" else "highest"
    own = () if precision == "fp32" else (Eager(f"eager-{precision}", matmul=matmul),)
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    return (
        Eager(BASE),
        *own,
        Inductor("inductor", matmul=matmul),
        Inductor("inductor-max-autotune", matmul=matmul, options=AUTOTUNE),
        Cublas("cublas", matmul=matmul),
        *(Sdpa(f"sdpa-{b.partition('_')[0].lower()}", "sdpa", matmul, backend=b) for b in backends),
        EffcGpu("effc", matmul=matmul),
    )


def clocked(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of so many calls in a row on the device, by its own events."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


# ------------------------------------------------------------------ the device and its sheet

DIFFERENT = ("PCIe", "NVL", "Laptop", "4090 D")  # of the same name, with another sheet


def sheet_of(name: str, memory: int) -> Device | None:
    """What is published of the device that torch calls so; None where nothing here fits it."""
    spoken = f" {name} ".replace("-", " ")
    if any(word in name for word in DIFFERENT):
        return None
    found = [d for d in DEVICES.values() if f" {d.name.partition(' SXM')[0]} " in spoken]
    return min(found, key=lambda d: abs(d.memory - memory), default=None)


def describe() -> dict[str, Any]:
    """The device here, for the results."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {"name": p.name, "memory": p.total_memory, "units": p.multi_processor_count}
    sheet = sheet_of(p.name, p.total_memory)
    if sheet is not None:
        found["sheet"] = {k: v for k, v in asdict(sheet).items() if k != "limits"}
    return found


def with_roofline(entry: dict[str, Any], sheet: Device | None) -> dict[str, Any]:
    """Add the least possible time by the sheet, and the part of it that each way reaches."""
    if sheet is None or "flops" not in entry["work"]:
        return entry
    work = Work(**entry["work"])
    for way, ms in times(entry).items():
        precision = "fp32" if way == BASE else entry["precision"]
        sized = work.in_precision(precision)
        least = estimate(Cost(sized.flops, sized.bytes), KINDS[precision], sheet)
        assert least is not None  # both are numbers
        entry["ways"][way]["fraction"] = round(least.seconds * 1e3 / ms, 4)
        if precision == entry["precision"]:
            entry["bound"] = {"ms": float(f"{least.seconds * 1e3:.4g}"), "by": least.bound}
    return entry


def jobs(
    names: Sequence[str], precisions: Sequence[str], rounds: int, only: Sequence[str]
) -> list[dict[str, Any]]:
    """What to hand to workers, in order."""
    return [
        {"suite": "gpu", "name": name, "precision": precision, "threads": 1, "device": "cuda",
         "rounds": rounds, "peers": list(only)}
        for name in names for precision in PRECISIONS
        if not precisions or precision in precisions
    ]  # fmt: skip


if __name__ == "__main__":
    from effc.cli import main

    main(["bench", "gpu", *sys.argv[1:]])
