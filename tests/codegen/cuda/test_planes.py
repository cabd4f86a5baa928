"""Products of codes by their bits: exact for all widths, with and without signs and zeros."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from effc.backends import find_backend
from effc.backends.base import Options
from effc.backends.cuda import CUDA
from effc.backends.plan.planner import make_plan
from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cuda.compile import compile_kernels, target
from effc.codegen.cuda.planes import BitProduct, bit_product, packed_planes, planes_of
from effc.codegen.triton.schedules import SM_90, SM_100
from effc.ir import interpret
from effc.ir.formats import BitPlanes, GroupQuant
from effc.ir.types import DTYPES, Tensor, f16, f32
from tests.backends.compressed import matrix, product
from tests.backends.conftest import close
from tests.codegen.cuda.running import by_host, by_ptx

F32, I8, U8 = (DTYPES[n] for n in ("f32", "i8", "u8"))


def code_type(bits: int, signed: bool):
    name = f"{'' if signed else 'u'}int{bits}"
    return DTYPES[name] if bits < 8 else I8 if signed else U8


def random_codes(bits: int, signed: bool, *shape: int) -> torch.Tensor:
    """With the least and the largest code among them."""
    least = -(1 << bits - 1) if signed else 0
    made = torch.randint(least, least + (1 << bits), shape)
    made.view(-1)[:2] = torch.tensor([least, least + (1 << bits) - 1])
    return made


def without_scales(rows: int, columns: int, depth: int, p: int, q: int, **of) -> BitProduct:
    return BitProduct(rows, columns, depth, p, q, scales=(F32, F32), **of)


def assert_exact(s: BitProduct, how) -> None:
    """Scales of 1: what is stored is the sum of integers, which float32 holds here."""
    torch.manual_seed(s.p * 8 + s.q)
    x = random_codes(s.p, s.x_signed, s.rows, s.depth)
    w = random_codes(s.q, s.w_signed, s.columns, s.depth)
    held = I8 if s.x_signed else U8
    (planes,) = BitPlanes().encode(Tensor(w.shape, code_type(s.q, s.w_signed)), w)
    of_x = torch.full((s.x_words,), -1, dtype=torch.int32)  # a column that nobody fills is not read
    sums = torch.zeros(s.rows, dtype=torch.int32)
    made = planes_of(s, held, s.depth)
    how(made.kernel, made.numbers[0], [of_x, sums, x.to(held.torch)])
    assert torch.equal(sums.long(), x.sum(1))
    y = torch.full((s.rows, s.columns), float("nan"))
    one = torch.ones(max(y.shape))
    args = [y, of_x, packed_planes(planes), one, one]
    x_zero, w_zero = torch.zeros(s.rows, 1).long(), torch.zeros(s.columns, 1).long()
    if s.x_zero is not None:
        x_zero = random_codes(s.p, s.x_signed, s.rows + 1, 1)[1:]
        args += [x_zero.to(held.torch), w.sum(1).int()]
    if s.w_zero:
        w_zero = random_codes(s.q, s.w_signed, s.columns, 1)
        args += [w_zero.int(), sums]
    made = bit_product(s, Nest(y.shape, (Operand(F32, (s.columns, 1)),)), [], lambda t, v: v)
    how(made.kernel, made.numbers[0], args)
    assert torch.equal(y, ((x - x_zero) @ (w - w_zero).T).float())


@pytest.mark.parametrize("how", [by_ptx, pytest.param(by_host, marks=pytest.mark.slow)])
def test_every_access_of_a_product_with_all_that_there_is(how) -> None:
    """Sizes inside a tile and a step in all directions; two blocks of planes; zeros on both sides."""
    s = without_scales(3, 35, 300, 5, 2, x_signed=False, w_signed=True, x_zero=U8, w_zero=True)
    assert_exact(s, how)


@pytest.mark.slow
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("q", range(1, 9))
def test_all_widths_are_exact(p, q) -> None:
    """Each of two signs and two zeros comes with every width; rows as many as fit."""
    x_signed, w_signed, zeros = bool(p + q & 1), bool(q & 2), bool(p & 2)
    rows = (1, 64 // p, 4)[(p + q) % 3]
    s = without_scales(
        rows, 17 + q, 256 * (1 + p % 2) + q, p, q, x_signed=x_signed, w_signed=w_signed,
        x_zero=(I8 if x_signed else U8) if zeros else None, w_zero=bool(q & 1),
    )  # fmt: skip
    assert_exact(s, by_ptx)


def test_fragments_lie_as_the_instruction_takes_them() -> None:
    """Lane l = 4 g + t holds rows g and g + 8, words t and t + 4 (PTX ISA, mma.m16n8k256)."""
    bits, rows, words = 3, 21, 11
    planes = torch.randint(-(1 << 31), 1 << 31, (bits, rows, words)).int()
    found = packed_planes(planes).view(2, bits, 2, 32, 4)
    whole = np.zeros((bits, 32, 16), np.int32)
    whole[:, :rows, :words] = planes
    for register, (down, along) in enumerate(((0, 0), (8, 0), (0, 4), (8, 4))):
        for lane in (0, 1, 5, 31):
            for tile, plane, step in np.ndindex(2, bits, 2):
                row, word = tile * 16 + lane // 4 + down, step * 8 + lane % 4 + along
                assert found[tile, plane, step, lane, register] == whole[plane, row, word]


def test_sums_of_more_than_32_bits_do_not_fit() -> None:
    """ABQ-LLM, section 6.7: 33025 codes of 8 bits by as many."""
    of = {"x_signed": False, "w_signed": False}
    assert without_scales(1, 16, 33025, 8, 8, **of).fits
    assert not without_scales(1, 16, 33026, 8, 8, **of).fits
    assert without_scales(1, 16, 2_800_000, 8, 2, **of).fits


# ------------------------------------------------------------------ in plans


def calls(graph, of=CUDA) -> list[str]:
    steps = make_plan(graph, Options(), of).steps
    return [s.launch.call.rsplit("_", 1)[0] for s in steps]


def ran(graph, *inputs: torch.Tensor, **tolerance: float) -> None:
    executable = find_backend("cuda-host").compile(graph)
    assert not executable.fallbacks and "planes" in executable.text
    for got, want in zip(executable.bind()(inputs), interpret(graph, inputs), strict=True):
        close(got, want, "output", **tolerance)


def test_few_rows_are_multiplied_by_planes() -> None:
    form = GroupQuant(None, f32, DTYPES["uint3"])
    graph = product(3, matrix("w", "uint2", (50, 200), None, True), "f16", "uint3", form, bias=True)
    assert calls(graph) == ["quantize", "planes_pack", "planes"]
    ran(graph, torch.randn(3, 200).half(), torch.randn(50).half(), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("codes, dtype", [("int3", "f32"), ("i8", "bf16"), ("uint1", "f32")])
def test_layers_on_the_cpu(codes, dtype) -> None:
    form = GroupQuant(None, f16) if codes == "i8" else GroupQuant(None, f32, DTYPES["uint6"])
    of_x = "int5" if codes == "i8" else "uint6"
    graph = product(5, matrix("w", codes, (33, 300), None, codes[0] == "u"), dtype, of_x, form)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    ran(graph, torch.randn(5, 300).to(DTYPES[dtype].torch), **loose)


def test_what_planes_do_not_take_is_the_gpus() -> None:
    whole, grouped = (matrix("w", "uint4", (50, 200), g, True) for g in (None, 32))
    assert calls(product(8, whole, codes="int8"))[-1] == "planes"
    assert calls(product(9, whole, codes="int8"))[-1] == "codes"  # 72 planes
    assert calls(product(1, grouped, codes="int8"))[-1] == "codes"
    assert calls(product(1, whole))[-1] == "codes"
    assert calls(product(1, whole, codes="int8"), CUDA.on(SM_90))[-1] == "planes"
    assert calls(product(1, whole, codes="int8"), CUDA.on(SM_100))[-1] == "codes"


def test_planes_are_made_once_for_all_that_read_them() -> None:
    from effc.ir import Graph, Input
    from effc.ir.rewrite import op

    x = Input("x", Tensor((1, 128), f32))
    a = op.decode(op.quantize(x, I8, GroupQuant(None, f32)))
    ys = [op.linear(a, op.decode(matrix(n, "int4", (32, 128), None, False))) for n in "uvw"]
    assert sorted(calls(Graph.of((x,), tuple(ys)))) == ["planes"] * 3 + ["planes_pack", "quantize"]


# ------------------------------------------------------------------ what the compiler says


@pytest.mark.parametrize("to", ["cuda:sm_80", pytest.param("cuda:sm_90", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows, p, q", [(8, 8, 8), pytest.param(1, 8, 4, marks=pytest.mark.slow)])
def test_compiled_for_binary_tensor_cores(to, rows, p, q) -> None:
    s = without_scales(rows, 4096, 4096, p, q, x_signed=True, w_signed=True)
    made = bit_product(s, Nest((rows, 4096), (Operand(F32, (4096, 1)),)), [], lambda t, v: v)
    (compiled,) = compile_kernels([made.kernel], target(to))
    assert compiled.spills == 0 and compiled.registers <= 64
    assert "and.popc" in compiled.assembly
    triton = pytest.importorskip("triton", reason="its wheel has the disassembler")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("no nvdisasm comes with this Triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        asked = [str(tool), "-c", file.name]
        code = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bBMMA\.168256\.AND\.POPC", code) and not re.search(r"\bIMMA\b", code)
