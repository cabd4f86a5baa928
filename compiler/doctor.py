"""`effc doctor`: what this machine can build and run, and the command that fixes what it cannot."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from effc.show import amount, grid

__all__ = ["Finding", "as_json", "as_table", "examine", "usable"]

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 11)


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: "ok"; "missing": works with less; "broken": effc does not run."""

    name: str
    state: str
    value: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything, in the order in which it is needed."""
    found = [_python(), _torch()]
    if usable(found):  # all below imports torch
        found += [_registered(), *_cpu(), _compiler(), _openmp(), *_gpu(), _cuda(), _cache()]
        found += [_schedules(), *_targets(found)]
    return [*found, *_extras()]


def usable(findings: Iterable[Finding]) -> bool:
    return all(f.state != "broken" for f in findings)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {"usable": usable(findings), "findings": [asdict(f) for f in findings]}


def as_table(findings: list[Finding]) -> Table:
    table = grid("", "", "")
    styles = {"ok": "green", "missing": "yellow", "broken": "red"}
    for f in findings:
        value = Text(f.value)
        if f.fix:
            value.append(f"\nfix: {f.fix}", style="bold")
        table.add_row(f.name, Text(f.state, style=styles[f.state]), value)
    return table


# ------------------------------------------------------------------ what is looked at


def _python() -> Finding:
    shown = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "broken", shown, "install Python 3.10 or newer")
    return Finding("python", "ok", shown)


def _torch() -> Finding:
    need = ".".join(map(str, OLDEST_TORCH))
    fix = f'pip install "torch>={need}"'
    try:
        import torch
    except ImportError as e:
        return Finding("torch", "broken", f"cannot be imported: {e}", fix)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        return Finding("torch", "broken", f"{torch.__version__} is too old", fix)
    return Finding("torch", "ok", torch.__version__)


def _registered() -> Finding:
    names = {e.name for e in entry_points(group="torch_dynamo_backends")}
    if "effc" in names:
        return Finding("torch.compile", "ok", 'backend="effc" is registered')
    fix = "pip install effc (or `pip install -e .` in a checkout)"
    return Finding("torch.compile", "missing", 'backend="effc" is not registered', fix)


def _cpu() -> Iterator[Finding]:
    from effc.backends.cpu.features import UnsupportedCpu, detect

    cpu = detect()
    if isinstance(cpu, UnsupportedCpu):
        yield Finding("cpu", "missing", cpu.reason, cpu.fix)
        return
    extensions = ", ".join((cpu.level, *cpu.extensions))
    yield Finding("cpu", "ok", f"{cpu.model}: {_cores(cpu)}; {extensions}")
    for note in cpu.notes:
        yield Finding("cpu", "missing", note.reason, note.fix)


def _cores(cpu: Any) -> str:
    return f"{cpu.cores} cores, {cpu.threads} threads, {cpu.vector_bits}-bit vectors"


def _compiler() -> Finding:
    from effc.codegen.toolchain import MissingToolchain, find_toolchain

    found = find_toolchain()
    if isinstance(found, MissingToolchain):
        return Finding("compiler", "missing", found.reason, found.fix)
    return Finding("compiler", "ok", str(found))


def _openmp() -> Finding:
    from effc.codegen.openmp import MissingOpenMP, torch_runtime

    found = torch_runtime()
    if isinstance(found, MissingOpenMP):
        return Finding("openmp", "missing", found.reason, found.fix)
    return Finding("openmp", "ok", f"{found.name} ({found.path})")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        build = "this torch has no GPU support" if torch.version.cuda is None else "no GPU found"
        yield Finding("gpu", "missing", f"{build}; graphs run on the CPU")
    else:
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            yield Finding("gpu", "ok", f"{name}, compute capability {major}.{minor}")
    yield _driver()
    triton = _version("triton")
    if triton:
        yield Finding("triton", "ok", triton)
    else:
        yield Finding("triton", "missing", "not installed", 'pip install "effc[gpu]"')


def _driver() -> Finding:
    """What loads and launches kernels on a GPU."""
    import torch

    from effc.backends.gpu.driver import find_driver
    from effc.ir import No

    found = find_driver()
    if not isinstance(found, No):
        return Finding("gpu driver", "ok", str(found.library._name))
    fix = "run on a machine with a GPU; target ptx-host runs the same kernels on the CPU"
    if torch.version.cuda is None and torch.version.hip is None:
        fix = "install a build of torch with CUDA or ROCm (https://pytorch.org/get-started)"
    return Finding("gpu driver", "missing", str(found), fix)


def _cuda() -> Finding:
    from effc.codegen.cuda.toolchain import MissingCuda, find_cuda

    found = find_cuda()
    if isinstance(found, MissingCuda):
        return Finding("cuda", "missing", found.reason, found.fix)
    return Finding("cuda", "ok", str(found))


def _cache() -> Finding:
    from effc.codegen.store import cache_dir

    folder = cache_dir()
    shown = f"{folder}, {_size(folder)}"
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Finding("cache", "ok", shown)
    fix = "set EFFC_CACHE_DIR to a folder that can be written"
    return Finding("cache", "missing", f"{shown}: {place} cannot be written", fix)


def _schedules() -> Finding:
    from effc.backends.plan.tuning import stored

    folder, count = stored()
    return Finding("schedules", "ok", f"{folder}, problems timed: {count}")


def _size(folder: Path) -> str:
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if folder.exists() else []
    return f"{amount(sum(sizes), 'B')} in {len(sizes)} files" if sizes else "empty"


NEEDS = {  # what each target needs of the findings before it
    "cpu": ("cpu", "compiler"),
    "ptx-host": ("triton", "compiler"),
    "cuda-host": ("triton", "cuda", "compiler"),
    "triton": ("triton", "gpu driver", "compiler"),
    "cuda": ("triton", "cuda", "gpu driver", "compiler"),
}


def _targets(before: list[Finding]) -> Iterator[Finding]:
    """What each backend can do here."""
    from effc.backends import backend_names, find_backend
    from effc.ir import EffcError

    for name in backend_names():
        try:
            found = find_backend(name)
        except EffcError as e:
            yield Finding(f"target {name}", "missing", e.why or e.what, e.fix or "")
            continue
        needed = NEEDS.get(name, ())
        lacking = [f for f in before if f.name in needed and f.state != "ok" and f.fix]
        if lacking:
            what = "runs through ATen only" if name == "cpu" else f"lacks {lacking[0].name}"
            yield Finding(
                f"target {name}", "missing", f"{what}: {lacking[0].value}", lacking[0].fix
            )
        else:
            about = (type(found).__doc__ or name).strip().splitlines()[0]
            yield Finding(f"target {name}", "ok", about)


def _extras() -> Iterator[Finding]:
    for name, module, extra in (
        ("pillow", "PIL", "demo"), ("transformers", "transformers", "models"),
        ("diffusers", "diffusers", "models"),
    ):  # fmt: skip
        if importlib.util.find_spec(module) is None:
            yield Finding(name, "missing", "not installed", f'pip install "effc[{extra}]"')
        else:
            yield Finding(name, "ok", _version(name) or "installed")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
