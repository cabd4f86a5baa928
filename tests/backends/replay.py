"""A plan's native calls as a C++ program of its own, for checks that a Python process cannot hold.

Every value gets memory of exactly its size, so that a sanitizer sees each read or write outside.
Inputs and weights come from a file; what library routines would compute is left as it was filled.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effc.backends.cpu.features import detect
from effc.backends.plan.executable import BoundPlan
from effc.backends.plan.memory import Root, packed
from effc.backends.plan.steps import KernelCall
from effc.codegen.compile import BASE_FLAGS, HEADERS
from effc.codegen.cpp.kernel import Kernel
from effc.codegen.toolchain import find_toolchain

MAIN = """#include "effc.h"
#include <stdio.h>
#include <vector>

typedef void (*Call)(char* const*, const int64_t*, int64_t);
{declared}

static std::vector<char*> roots;

static void root(int64_t bytes, FILE* data) {{
  char* p = static_cast<char*>(malloc(bytes));
  if (data) {{
    if (fread(p, 1, bytes, data) != static_cast<size_t>(bytes)) abort();
  }} else {{
    for (int64_t i = 0; i + 4 <= bytes; i += 4) {{
      const float x = 0.25f;
      memcpy(p + i, &x, 4);
    }}
  }}
  roots.push_back(p);
}}

int main(int, char** argv) {{
  FILE* data = fopen(argv[1], "rb");
{body}
  for (char* p : roots) free(p);
  printf("{calls} calls\\n");
  return 0;
}}
"""


class Recorder:
    """Keeps the frames that bound plans make while it is active, with the inputs of the call."""

    def __init__(self, monkeypatch: Any) -> None:
        self.made: list[tuple[Any, Sequence[Any]]] = []
        plain = BoundPlan._make

        def make(bound: BoundPlan, key: Any, inputs: Sequence[Any]) -> Any:
            frame = plain(bound, key, inputs)
            self.made.append((frame, inputs))
            return frame

        monkeypatch.setattr(BoundPlan, "_make", make)


def write(frame: Any, inputs: Sequence[Any], folder: Path, threads: int = 2) -> Path:
    """main.cpp, the kernels' sources and data.bin in `folder`; main.cpp's path."""
    plan, lines, blob = frame.plan, [], bytearray()
    known = _known(frame, inputs)
    for r in plan.numbered:
        if r in known:
            blob += known[r]
        lines.append(f"  root({_extent(frame, r)}, {'data' if r in known else 'nullptr'});")
    calls = [s for s in plan.steps if isinstance(s, KernelCall)]
    for call in calls:
        size = max(1, len(call.refs))
        refs = ", ".join(
            f"roots[{ref.root.number}] + {frame.numbers(ref.offset) * (ref.dtype.bits // 8)}"
            for ref in call.refs
        )
        numbers = ", ".join(_number(frame, n) for n in call.numbers) or "0"
        lines.append(
            f"  {{ char* p[{size}] = {{{refs}}}; const int64_t n[] = {{{numbers}}};"
            f" {call.kernel.name}(p, n, {threads}); }}"
        )
    declared = []
    for kernel in plan.kernels.values():
        if kernel.name.startswith("epilogue"):
            arguments = "char* const*, const int64_t*, const float*" + ", int64_t" * 5
        else:
            arguments = "char* const*, const int64_t*, int64_t"
        declared.append(f'extern "C" void {kernel.name}({arguments});')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.bin").write_bytes(blob)
    small = [k.source for k in plan.kernels.values() if not k.alone]
    (folder / "kernels.cpp").write_text("\n".join(['#include "effc.h"', *small]))
    for kernel in plan.kernels.values():
        if kernel.alone:
            (folder / f"{kernel.name}.cpp").write_text(kernel.source)
    text = MAIN.format(declared="\n".join(declared), body="\n".join(lines), calls=len(calls))
    (folder / "main.cpp").write_text(text)
    return folder / "main.cpp"


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Build the folder's kernels with `flags` and run the program."""
    toolchain, cpu = find_toolchain(), detect()
    base = [f for f in BASE_FLAGS if f not in ("-O3", "-fPIC", "-fno-semantic-interposition")]
    command = [*toolchain.command, *base, *cpu.flags(toolchain), "-fopenmp", "-DEFFC_OPENMP"]
    command.append(f"-I{HEADERS}")
    sources = sorted(folder.glob("*.cpp"))
    objects = [
        _object(s, [*command, *(["-O0"] if s.name == "main.cpp" else ["-O1", "-g1", *flags])])
        for s in sources
    ]
    _built([*command, *flags, *objects, "-o", folder / "program"])
    return subprocess.run(
        [folder / "program", folder / "data.bin"], capture_output=True, text=True, timeout=600
    )


def _object(source: Path, command: list[Any]) -> Path:
    """What it is compiled to; of plans that have a kernel in common, one compiles it."""
    key = hashlib.sha256("\0".join([*map(str, command), source.read_text()]).encode()).hexdigest()
    made = Path(os.environ["EFFC_CACHE_DIR"]) / "replay" / f"{source.stem}-{key[:16]}.o"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = source.with_suffix(".o")
        _built([*command, "-c", source, "-o", partial])
        shutil.copy(partial, new := made.with_suffix(f".{os.getpid()}"))
        new.replace(made)  # another process may make the same
    return made


def _built(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _known(frame: Any, inputs: Sequence[Any]) -> dict[Root, bytes]:
    """Contents of inputs, weights and what was packed of them."""
    found: dict[Root, bytes] = {}
    given = {r: x for r, x in zip(frame.plan.inputs, inputs, strict=True) if isinstance(r, Root)}
    for r in frame.plan.numbered:
        t = given.get(r)
        if r.kind in ("const", "packed"):
            t = frame.values[r.slot]
        if r.kind == "error":
            found[r] = bytes(8)
        elif t is not None:
            t = packed(t.detach(), frame.numbers(r.strides))
            size, width = _extent(frame, r), t.element_size()
            flat = t.as_strided((size // width,), (1,)).clone()
            found[r] = flat.view(torch.uint8).numpy().tobytes()
    return found


def _extent(frame: Any, r: Root) -> int:
    """Bytes from the first element to behind the last one."""
    shape, strides = frame.numbers(r.shape), frame.numbers(r.strides)
    if 0 in shape:
        return 0
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return (last + 1) * (r.dtype.bits // 8)


def _number(frame: Any, n: Any) -> str:
    if isinstance(n, Kernel):
        return f"reinterpret_cast<int64_t>(&{n.name})"
    value = frame.numbers(n)
    if isinstance(value, float):
        return f"effc::bit_cast<int64_t>({value!r})"
    return f"INT64_C({int(value)})"
