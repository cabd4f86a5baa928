"""The ways a model is run: eager PyTorch, Inductor, ONNX Runtime, OpenVINO and effc.

A peer that cannot run here says why (`available`), and one that cannot take a model raises
`Unable` with the reason; both end up in the results. All get the same module of tensors to a
tensor, the same inputs and the same number of threads.

Settings that would disturb the ways beside them are off, and named in `notes`: the pool of ONNX
Runtime does not spin while it waits, and OpenVINO does not pin the calling thread to a core.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Precision: TypeAlias = Literal["fp32", "bf16"]
Prepared: TypeAlias = Callable[[], Any]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


class Unable(Exception):
    """This peer cannot take this model; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One way of running a model.

    family: what `--peers` also selects it by. matmul: torch.set_float32_matmul_precision while it
    is prepared and called.
    """

    name: str
    family: str = ""
    matmul: str = "highest"
    notes: str = ""

    def available(self) -> str | None:
        """Why it cannot run on this machine; None when it can."""
        return None

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        """A callable of no arguments that runs the model once. Raises Unable."""
        raise NotImplementedError


# ------------------------------------------------------------------ PyTorch


@dataclass(frozen=True)
class Eager(Peer):
    """PyTorch itself; `channels_last` moves weights and images to NHWC."""

    channels_last: bool = False

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        model, args = in_precision(model, args, precision)
        if self.channels_last:
            if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
                raise Unable("the model has no 2-d convolution")
            model = nn.Module.to(copy.deepcopy(model), memory_format=torch.channels_last)  # type: ignore
            args = tuple(
                a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in args
            )
        return lambda: model(*args)


@dataclass(frozen=True)
class Inductor(Peer):
    """torch.compile with its own backend and the given options."""

    options: tuple[tuple[str, Any], ...] = ()

    def available(self) -> str | None:
        return no_compiler()

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        model, args = in_precision(model, args, precision)
        # options={} is not None to torch.compile: it would be part of another cache key
        fast = torch.compile(model, options=dict(self.options) or None)
        return lambda: fast(*args)


@dataclass(frozen=True)
class Effc(Peer):
    """torch.compile(model, backend="effc"), on the float32 model."""

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        from effc import dynamo_backend

        # Of this peer alone: Dynamo would take what another one compiled by the same function, and
        # that was for another precision.
        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return dynamo_backend(gm, inputs)

        fast = torch.compile(model, backend=backend)
        return lambda: fast(*args)


# ------------------------------------------------------------------ other runtimes


@dataclass(frozen=True)
class OnnxRuntime(Peer):
    """ONNX Runtime's CPU provider, on what torch.onnx exports."""

    notes: str = "session.intra_op.allow_spinning=0: its waiting threads would slow other ways"

    def available(self) -> str | None:
        return _not_installed("onnxruntime") or _not_installed("onnxscript")

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory(prefix="effc-bench-") as folder:
            path = export_onnx(model, args, Path(folder) / "model.onnx")
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        return lambda: session.run(None, feed)[0]


@dataclass(frozen=True)
class OpenVino(Peer):
    """OpenVINO's CPU plugin, on the program that torch.export gives, or on its ONNX."""

    notes: str = "ENABLE_CPU_PINNING off: it would pin the thread that all ways run on"

    def available(self) -> str | None:
        return _not_installed("openvino")

    def prepare(
        self, model: nn.Module, args: tuple[Tensor, ...], precision: Precision, threads: int
    ) -> Prepared:
        import openvino

        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        found = _converted(model, args)
        compiled = openvino.Core().compile_model(
            found, "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False,
            },
        )  # fmt: skip
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken != hint:
            raise Unable(f"asked for {hint} it runs {taken} on this CPU")
        request = compiled.create_infer_request()
        feed = [a.numpy() for a in args]
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def _converted(model: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """OpenVINO's graph of a model; through ONNX where its reader of torch programs lacks an op."""
    import openvino

    with quiet():
        try:
            return openvino.convert_model(torch.export.export(model, args, strict=False))
        except Exception as first:  # its own classes, which differ between releases
            with tempfile.TemporaryDirectory(prefix="effc-bench-") as folder:
                try:
                    path = export_onnx(model, args, Path(folder) / "model.onnx")
                    # read whole: the folder is gone when the model is compiled
                    return openvino.Core().read_model(str(path))
                except Exception as second:
                    raise second from first


def export_onnx(model: nn.Module, args: tuple[Tensor, ...], path: Path) -> Path:
    """Write the model as ONNX, its weights beside it."""
    with quiet():
        program = torch.onnx.export(model, args, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path), external_data=True)
    return path


# ------------------------------------------------------------------ the list

# Inductor's C++ products need constant weights, so max-autotune stands beside freezing.
FREEZING = (("freezing", True),)
AUTOTUNE = (*FREEZING, ("max_autotune", True), ("max_autotune_gemm_backends", "CPP,ATEN"))

PEERS: dict[Precision, tuple[Peer, ...]] = {
    "fp32": (
        Eager("eager"),
        Eager("eager-channels-last", channels_last=True),
        Inductor("inductor"),
        Inductor("inductor-freezing", options=FREEZING),
        Inductor(
            "inductor-max-autotune", options=AUTOTUNE,
            notes="with freezing: its C++ products need constant weights",
        ),
        OnnxRuntime("onnxruntime"),
        OpenVino("openvino"),
        Effc("effc"),
    ),
    "bf16": (
        Eager("eager-bf16", "eager"),
        Inductor("inductor-bf16", "inductor"),
        Inductor("inductor-freezing-bf16", "inductor-freezing", options=FREEZING),
        OpenVino("openvino-bf16", "openvino"),
        Effc("effc-high", "effc", matmul="high"),
        Effc("effc-medium", "effc", matmul="medium"),
    ),
}  # fmt: skip
BASE = "eager"
"""Float32 eager: first in every entry, whatever its precision. Results are checked against it, and
ratios are to it."""


def chosen(precision: str, names: Sequence[str] = (), device: str = "cpu") -> list[Peer]:
    """Peers of a precision by name or family, all without names; the base always comes first."""
    base = PEERS["fp32"][0]
    rest = [p for p in _every(precision, device) if p.name != BASE]
    return [base, *(p for p in rest if not names or {p.name, p.family or p.name} & set(names))]


def _every(precision: str, device: str) -> Sequence[Peer]:
    if device == "cpu":
        return PEERS["bf16" if precision == "bf16" else "fp32"]
    from .gpu import peers

    return peers(precision)


def peer_names(device: str = "cpu") -> list[str]:
    """All that `--peers` knows: names and families."""
    every = [p for precision in PRECISIONS for p in _every(precision, device)]
    return list(dict.fromkeys(n for p in every for n in (p.name, p.family) if n))


# ------------------------------------------------------------------ helpers


def in_precision(
    model: nn.Module, args: tuple[Tensor, ...], precision: str
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and its inputs in 16 bits, on a copy; float32 (fp32, tf32) as they are."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        return model, args
    cast = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    return copy.deepcopy(model).to(dtype), cast


def as_tensor(output: Any) -> Tensor:
    """What a peer returned, as a float64 tensor of its own."""
    found = output if isinstance(output, Tensor) else torch.from_numpy(output)
    return found.detach().to(torch.float64, copy=True)


def relative_l2(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinity for another shape or values that are not numbers."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@contextlib.contextmanager
def quiet() -> Any:
    """Exporters warn about operators that nobody asked for."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _not_installed(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f'{module} is not installed: pip install "effc[bench]"'
    return None


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    from effc.codegen.toolchain import MissingToolchain, find_toolchain

    found = find_toolchain()
    return str(found) if isinstance(found, MissingToolchain) else None
