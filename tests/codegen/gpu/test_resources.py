"""What is read from binaries of kernels whose make-up is known."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import pytest

from effc.codegen.gpu import resources
from effc.codegen.triton.compile import Compiled, compile_kernels, target
from effc.codegen.triton.kernel import Pointer, Schedule, TritonKernel
from effc.ir import EffcError, UnsupportedError

TARGETS = ("cuda:sm_80", "cuda:sm_90", "hip:gfx942")


def made(name: str, lines: str, warps: int = 4) -> TritonKernel:
    body = f"@triton.jit\ndef @NAME@(y, x):\n{lines}"
    return TritonKernel(name, body, (Pointer("y", "*fp32"), Pointer("x", "*fp32")),
                        schedule=Schedule(warps, 2))  # fmt: skip


# Each thread copies one element.
COPY = made("copy", "    i = tl.arange(0, 128)\n    tl.store(y + i, tl.load(x + i))\n")
# A thread holds 512 elements until it knows their greatest: no GPU here has so many registers.
HOLDS = made("holds", """    i = tl.arange(0, 16384)
    held = tl.load(x + i * 3)
    tl.store(y + i * 5, held - tl.max(held, 0))
""", warps=1)  # fmt: skip
# A product of 64 x 64 with 32 deep, in 16-bit floats.
PRODUCT = made("product", """    i = tl.arange(0, 64)
    k = tl.arange(0, 32)
    a = tl.load(x + i[:, None] * 32 + k[None, :]).to(tl.float16)
    b = tl.load(x + k[:, None] * 64 + i[None, :]).to(tl.float16)
    tl.store(y + i[:, None] * 64 + i[None, :], tl.dot(a, b))
""")  # fmt: skip


def compiled(kernel: TritonKernel, to: str) -> Compiled:
    return compile_kernels([kernel], target(to))[0]


@pytest.mark.parametrize("to", TARGETS)
def test_a_copy_loads_and_stores_once(to) -> None:
    found = resources(compiled(COPY, to))
    assert (found.count("loads"), found.count("stores"), found.tensor) == (1, 1, 0)
    assert (found.spills, found.stack, found.shared, found.count("barriers")) == (0, 0, 0, 0)
    assert 2 <= found.registers <= 32
    assert found.threads == (256 if to.startswith("hip") else 128)
    assert found.total == sum(found.instructions.values()) > 4


@pytest.mark.parametrize("to", ["cuda:sm_80", "cuda:sm_90"])
def test_a_kernel_that_holds_too_much_spills(to) -> None:
    found = resources(compiled(HOLDS, to))
    assert found.spill_stores > 100 and found.spill_loads > 100
    assert found.stack >= 4 * 100, "bytes"


def test_spills_of_amd_are_those_of_both_kinds_of_registers() -> None:
    """Its compiler takes minutes for a kernel that spills, so that its report is changed here."""
    known = compiled(COPY, "hip:gfx942")
    text = known.assembly
    for line, spilled in (("vgpr_spill_count", 5), ("sgpr_spill_count", 2)):
        text = re.sub(rf"\.{line}:(\s*)0", rf".{line}:\g<1>{spilled}", text)
    assert resources(replace(known, assembly=text)).spills == 5 + 2


@pytest.mark.parametrize("to", TARGETS)
def test_a_product_uses_tensor_cores_and_shared_memory(to) -> None:
    found = resources(compiled(PRODUCT, to))
    # 64 x 64 x 32 products over 4 warps, 16 x 8 x 16 at a time, 64 x 64 x 16 or 32 x 32 x 8.
    most = {"cuda:sm_80": 64 * 64 * 32 // (16 * 8 * 16) // 4, "cuda:sm_90": 2, "hip:gfx942": 8}
    assert 0 < found.tensor <= most[to]
    assert found.spills == 0 and found.shared == compiled(PRODUCT, to).shared >= 64 * 32 * 2
    assert found.count("barriers") > 0


def test_missing_tools_are_named_with_what_to_do(monkeypatch) -> None:
    known = compiled(COPY, "cuda:sm_80")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="cuobjdump is not there") as caught:
        resources(known)
    assert "pip install" in str(caught.value)


def test_a_binary_that_is_none_is_refused() -> None:
    known = compiled(COPY, "cuda:sm_80")
    broken = Compiled(known.kernel, known.target, known.assembly, b"no ELF", 0, 4)
    with pytest.raises(EffcError, match="cuobjdump"):
        resources(broken)
    known = compiled(COPY, "hip:gfx942")
    broken = Compiled(known.kernel, known.target, "s_endpgm", known.binary, 0, 4)
    with pytest.raises(EffcError, match="vgpr_spill_count"):
        resources(broken)
