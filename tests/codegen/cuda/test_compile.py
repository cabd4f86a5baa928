"""Compiling ahead of time: what comes out, what it costs, and errors people can read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from effc.codegen.compile import BuildError
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cuda import compile as compiling
from effc.codegen.cuda.compile import compile_kernels, key_of, target
from effc.codegen.cuda.product import SCHEDULES, SHARED_LIMIT, Matrix, product
from effc.codegen.cuda.rows import row_kernel
from effc.ir import OptionError
from effc.ir.types import DTYPES
from tests.codegen.cuda.running import SM80, text

ARCHES = ("sm_80", "sm_90", "sm_100")
BF16, F32 = DTYPES["bf16"], DTYPES["f32"]


def machine_code(made) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("needs nvdisasm, which Triton's wheel brings")
    file = Path(os.environ["EFFC_CACHE_DIR"], f"{made.kernel.name}.cubin")
    file.write_bytes(made.binary)
    return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


def linear(schedule, turned=False, m=4096, n=4096, k=4096):
    """gelu(a b + bias) + z."""
    walked = (Operand(BF16, (n, 1)), Operand(BF16, (n, 1)), Operand(BF16, (0, 1)))

    def body(s, total):
        y = s.let(BF16, f"effc::gelu({total[0]} + {s.values['bias'][0]})", True)
        return s.let(BF16, f"{y[0]} + {s.values['z'][0]}", True)

    right = Matrix(BF16, n if turned else k, turned=turned)
    return product(Nest((m, n), walked), k, Matrix(BF16, k), right, ["z", "bias"], body,
                   by=schedule).kernel  # fmt: skip


def test_what_comes_out():
    (made,) = compile_kernels([text("out", "  y[l] = 1.0f;", "float")], SM80)
    assert ".entry out" in made.assembly and ".target sm_80" in made.assembly
    assert made.binary[:4] == b"\x7fELF"
    assert (made.threads, made.shared, made.spills) == (32, 0, 0)
    assert 0 < made.registers <= 32 and "ptxas info" in made.log


def test_the_second_time_it_is_read_from_the_cache(monkeypatch):
    kernel = text("cached", "  y[l] = 2.0f;", "float")
    (first,) = compile_kernels([kernel], SM80)
    monkeypatch.setattr(compiling, "_build", lambda *_: pytest.fail("compiled again"))
    assert compile_kernels([kernel], SM80)[0] == first


def test_the_key_covers_text_target_and_compiler():
    by = compiling.compiler()
    kernel = text("key", "  y[l] = 2.0f;", "float")
    other = text("key", "  y[l] = 3.0f;", "float")
    sm90 = target("cuda:sm_90")
    keys = {key_of(kernel, SM80, by), key_of(other, SM80, by), key_of(kernel, sm90, by)}
    assert len(keys) == 3


def test_an_error_shows_the_lines():
    kernel = text("wrong", "  const float v = x0[l];\n  y[l] = effc::nosuch(v);", "float", "float")
    with pytest.raises(BuildError) as caught:
        compile_kernels([kernel], SM80)
    shown = str(caught.value)
    assert caught.value.what == (
        'kernel wrong: the CUDA compiler failed for cuda:sm_80: namespace "effc" has no member '
        '"nosuch"'
    )
    assert ">     8 |   y[l] = effc::nosuch(v);" in shown or "|   y[l] = effc::nosuch(v);" in shown
    assert "kernel.cu(" in shown and "--gpu-architecture=sm_80" in shown


@pytest.mark.parametrize("where", ["hip:gfx942", "cuda:sm_75"])
def test_other_gpus_are_refused(where):
    with pytest.raises(OptionError, match="sm_80 and newer, not"):
        compile_kernels([], target(where))


@pytest.mark.parametrize("arch", ARCHES)
def test_the_largest_product_fits_the_registers(arch):
    assert_good(linear(SCHEDULES[0]), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("turned", [False, True])
def test_every_schedule_fits_the_registers(arch, turned):
    for schedule in SCHEDULES:
        assert_good(linear(schedule, turned), arch)


def assert_good(kernel, arch):
    assert kernel.shared <= SHARED_LIMIT
    (made,) = compile_kernels([kernel], target(f"cuda:{arch}"))
    assert made.spills == 0
    # So that two blocks, or one of the largest, fit a multiprocessor's 65536 registers.
    assert made.registers * made.threads * 2 <= 1 << 16
    code = machine_code(made)
    for instruction in ("HMMA.16816.F32.BF16", "LDSM", "LDGSTS", "STG.E.128"):
        assert instruction in code, instruction


@pytest.mark.slow
@pytest.mark.parametrize("op, native", [("and", {"sm_80", "sm_90"}), ("xor", {"sm_80"})])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_binary_products_are_instructions(arch, op, native):
    body = f"""  uint32_t a[4], b[2] = {{x0[l], x0[l + 32]}};
  int32_t d[4] = {{}};
  for (int i = 0; i < 4; ++i) a[i] = x0[64 + 32 * i + l];
  effc::mma_b1_{op}(d, a, b);
  for (int i = 0; i < 4; ++i) y[32 * i + l] = d[i];"""
    (made,) = compile_kernels(
        [text(f"b1_{op}", body, "int32_t", "uint32_t")], target(f"cuda:{arch}")
    )
    code = machine_code(made)
    assert (f"BMMA.168256.{op.upper()}.POPC" in code) == (arch in native)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("n", [1024, pytest.param(8192, marks=pytest.mark.slow)])
def test_rows_are_kept_in_registers(arch, n):
    def body(p):
        x = p.nodes["x"]
        squares = p.reduce("sum", p.let(F32, "{0} * {0}", x), F32)
        scale = p.let(F32, f"effc::rsqrt({{0}} / {float(n)}f + 1e-6f)", squares)
        return [p.let(F32, "{0} * {1} * {2}", x, scale, p.nodes["w"])]

    walked = (Operand(BF16, (n, 1)), Operand(BF16, (n, 1)), Operand(BF16, (0, 1)))
    leaves = [("x", True), ("w", True)]
    made = row_kernel(Nest((4096, n), walked), leaves, 1, (1,), (0, 1), body)
    (compiled,) = compile_kernels([made.kernel], target(f"cuda:{arch}"))
    code = machine_code(compiled)
    vectors = n // 8 // compiled.threads
    assert compiled.spills == 0 and compiled.registers <= 80
    assert code.count("LDG.E.128") == 2 * vectors  # x and w once each
    assert code.count("STG.E.128") == vectors and code.count("LDG.E.") == 2 * vectors


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("n", [512, 4096, 16001, 16384, 24576, 32768])
def test_long_rows_spill_no_registers(arch, dtype, n):
    """A layer norm: three passes, the elements kept from the first one."""

    def body(p):
        x = p.cast(p.nodes["x"], F32)
        y = p.let(F32, "effc::gelu({0} + {1})", x, p.cast(p.nodes["z"], F32), work=12)
        mean = p.let(F32, "{0} / elements", p.reduce("sum", y, F32))
        away = p.let(F32, "{0} - {1}", y, mean)
        squares = p.reduce("sum", p.let(F32, "{0} * {0}", away), F32)
        scale = p.let(F32, "effc::rsqrt({0} / elements + 1e-6f)", squares)
        return [p.cast(y, dtype), p.let(F32, "{0} * {1}", away, scale)]

    walked = (Operand(dtype, (n, 1)),) * 4
    made = row_kernel(Nest((64, n), walked), [("x", True), ("z", True)], 2, (1,), (0, 1), body)
    (compiled,) = compile_kernels([made.kernel], target(f"cuda:{arch}"))
    assert compiled.spills == 0
