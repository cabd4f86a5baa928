"""Products of codes in Triton kernels, run as PTX on the CPU, and what compilers make of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import effc
from effc.backends import find_backend
from effc.backends.base import Options
from effc.backends.gpu import GPU
from effc.backends.gpu.codes import Stored
from effc.backends.plan.planner import make_plan
from effc.codegen.triton.codes import UNIT, Coded
from effc.codegen.triton.compile import compile_kernels, target
from effc.codegen.triton.kernel import TritonKernel
from effc.examples.zoo.library import LIBRARY
from effc.ir import Graph, Input, Tensor, interpret
from effc.ir.formats import GroupQuant, code_range, quantize
from effc.ir.rewrite import op
from effc.ir.symbols import symbol
from effc.ir.types import DTYPES, f16, f32, i8
from effc.passes.pipelines import DEFAULT, RAISED

from .compressed import matrix, product, sparse
from .conftest import close
from .gpu_compiled import usage

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LOOSE = {"rtol": 2e-2, "atol": 2e-2}
CODES = [
    "uint1",
    "int2",
    "int2b",
    "uint3",
    "int3",
    "uint4",
    "int4",
    "int5",
    "uint6",
    "int7",
    "i8",
    "u8",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Hosted:
    """A graph on a target of the CPU; a call compares with the interpreter."""

    def __init__(self, graph: Graph, of: str = "ptx-host") -> None:
        self.graph = graph
        self.executable = find_backend(of).compile(graph)
        assert not self.executable.fallbacks, self.executable.text
        self.bound = self.executable.bind()

    @property
    def kinds(self) -> list[str]:
        return [launch.call.rsplit("_", 1)[0] for launch in self.executable.launches]

    def __call__(self, *inputs: torch.Tensor, **tolerance: float) -> tuple[torch.Tensor, ...]:
        got, want = self.bound(inputs), interpret(self.graph, inputs)
        for g, w in zip(got, want, strict=True):
            close(g, w, "output", **tolerance)
        return got


def ran(graph: Graph, of: str = "ptx-host") -> Hosted:
    """Run with random inputs."""
    run = Hosted(graph, of)
    of_inputs = [i.of for i in graph.inputs]
    half = any(t.dtype.bits == 16 for t in of_inputs)
    inputs = [torch.randn(t.shape).to(TYPES[t.dtype.name]) for t in of_inputs]
    run(*inputs, **(LOOSE if half else {"rtol": 1e-4, "atol": 1e-4}))
    return run


# ------------------------------------------------------------------ packing


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [8, 130])
def test_packed_codes_are_the_codes(name, size) -> None:
    """Every code of every unit is found where the kernels look for it."""
    dtype = DTYPES[name]
    least, largest = code_range(dtype)
    x = torch.rand(5, size) * (largest - least) + least
    t = Tensor((5, size), dtype, format=GroupQuant(None, f32, dtype))
    value = quantize(x, t)
    stored = Stored(t)
    walk = stored.walk
    k = torch.arange(size)
    found = torch.zeros(5, size, dtype=torch.int64)
    at = 0
    for j, bits in enumerate(walk.parts):
        words = stored.words(j, value).reshape(5, walk.row(j)).long()
        if bits == 8:
            found = words[:, :size] & 255
            break
        found |= (words[:, k // UNIT] >> k % UNIT * bits & (1 << bits) - 1) << at
        at += bits
    assert torch.equal(found + least, value["codes"].long())
    assert torch.equal(stored.zero(value).long() + least, value["zero"].flatten().long())


def test_a_weight_takes_the_bytes_of_its_codes() -> None:
    """Of rows of whole units: no copy of them is wider, and no dense one is made."""
    for name, bits in (("int3", 3), ("uint4", 4), ("int7", 7), ("i8", 8)):
        w = matrix("w", name, (64, 256), 32, name[0] == "u")
        plan = make_plan(product(1, w, "f16"), Options(), GPU)
        (value,) = interpret(Graph.of((), (w,)), ())
        packed = sum(p.make(value).nbytes for p in plan.packed)
        groups = 64 * 8 * (2 + (name[0] == "u"))
        assert packed == 64 * 256 * bits // 8 + groups and not plan.constants


# ------------------------------------------------------------------ weights alone

WEIGHTS = [
    ("uint4", 8, True, 3, "f16"), ("int4", None, False, 1, "f32"), ("u8", 32, True, 1, "bf16"),
    ("int3", 16, False, 2, "f16"), ("uint5", 12, True, 2, "f32"), ("i8", 32, False, 1, "f16"),
    ("uint1", None, True, 1, "f32"), ("int7", 24, False, 4, "bf16"), ("int2b", 40, False, 1, "f16"),
    ("uint4", 32, True, 20, "f16"), ("int3", None, False, 33, "f32"), ("u8", 7, True, 20, "f16"),
    ("i8", None, False, 17, "bf16"), ("int2b", 40, False, 20, "f32"), ("uint6", 64, True, 65, "f16"),
]  # fmt: skip
QUICK = (0,)


@pytest.mark.parametrize(
    "codes, group, zero, rows, dtype",
    [w if i in QUICK else pytest.param(*w, marks=pytest.mark.slow) for i, w in enumerate(WEIGHTS)],
)
def test_products_read_codes(codes, group, zero, rows, dtype) -> None:
    run = ran(product(rows, matrix("w", codes, (50, 200), group, zero), dtype))
    assert run.kinds[0] == "codes" and set(run.kinds) <= {"codes", "sums"}


def region(rows, dtype: str, w, v=None) -> Graph:
    """y = silu(x w + b) * (x v), or of w alone, + z, as one region."""
    of, (n, k) = DTYPES[dtype], w.shape
    types = {"x": (rows, k), "b": (n,), "z": (rows, n), "w": (n, k)}
    if v is not None:
        types["v"] = (n, k)
    leaves = {name: Input(name, Tensor(s, of)) for name, s in types.items()}
    h = op.silu(op.linear(leaves["x"], leaves["w"], leaves["b"]))
    if v is not None:
        h = op.mul(h, op.linear(leaves["x"], leaves["v"]))
    body = Graph.of(tuple(leaves.values()), (op.add(h, leaves["z"]),))
    outer = {name: Input(name, Tensor(types[name], of)) for name in "xbz"}
    values = (*outer.values(), *(op.decode(c, of) for c in (w, v) if c is not None))
    return Graph.of(tuple(outer.values()), (op.fused(values, body=body),))


def test_any_number_of_rows_with_what_follows() -> None:
    w, v = (matrix(n, "uint4", (70, 104), 32, True) for n in "wv")
    run = Hosted(region(symbol("M"), "f16", w, v))
    assert set(run.kinds) == {"codes"}
    for m in (0, 1, 16, 17, 80):
        run(*(torch.randn(s).half() for s in ((m, 104), (70,), (m, 70))), **LOOSE)


@pytest.mark.slow
def test_parts_of_the_depth_with_what_follows() -> None:
    run = Hosted(region(8, "f32", matrix("w", "int4", (40, 2000), 40, False)))
    assert run.kinds == ["codes", "sums"]
    inputs = [torch.randn(s) for s in ((8, 2000), (40,), (8, 40))]
    (first,), (again,) = (run(*inputs, rtol=1e-4, atol=1e-4) for _ in range(2))
    assert torch.equal(first, again)


# ------------------------------------------------------------------ codes on both sides

ZERO8, ZERO6 = GroupQuant(None, f32, DTYPES["u8"]), GroupQuant(32, f16, DTYPES["uint6"])
QUANTISED = [
    (i8, GroupQuant(None, f32), "f16"), (DTYPES["uint6"], ZERO6, "f32"), (DTYPES["u8"], ZERO8, "f32"),
    (DTYPES["int4"], GroupQuant(48, f16), "bf16"), (DTYPES["int2"], GroupQuant(None, f16), "f32"),
]  # fmt: skip


@pytest.mark.parametrize(
    "codes, form, dtype",
    [q if i == 1 else pytest.param(*q, marks=pytest.mark.slow) for i, q in enumerate(QUANTISED)],
    ids=str,
)
def test_quantised_rows_are_those_of_the_reference(codes, form, dtype) -> None:
    """To the bit, and their numbers are decoded for whoever reads them."""
    x = Input("x", Tensor((symbol("M"), 96), DTYPES[dtype]))
    graph = Graph.of((x,), (op.decode(op.quantize(x, codes, form)),))
    run = Hosted(graph)
    assert run.kinds == ["quantize", "decode"]
    for m in (1, 7):
        given = torch.randn(m, 96).to(TYPES[dtype]) * 3
        given[0, :40] = 0
        given[-1] *= 1e-3
        got, want = run.bound((given,)), interpret(graph, (given,))
        assert torch.equal(got[0], want[0])


BOTH = [
    ("uint4", 32, True, 20, "f32"), ("uint4", None, True, 1, "f16"), ("i8", None, False, 33, "f16"),
    ("int3", 64, False, 17, "bf16"), ("uint4", 16, True, 2, "f32"), ("int7", 96, True, 20, "f32"),
    ("uint5", None, True, 65, "f16"), ("int2b", 128, False, 20, "f32"),
]  # fmt: skip


@pytest.mark.parametrize(
    "codes, group, zero, rows, dtype",
    [b if i < 1 else pytest.param(*b, marks=pytest.mark.slow) for i, b in enumerate(BOTH)],
)
def test_codes_by_codes(codes, group, zero, rows, dtype) -> None:
    run = ran(product(rows, matrix("w", codes, (50, 200), group, zero), dtype, "int8"))
    assert run.kinds == ["quantize", "codes"]


def test_sums_are_scaled_before_they_are_rounded() -> None:
    """127 * 127 * 512 is no half, its product with both scales is."""
    w = matrix("w", "i8", (16, 512), None, False)
    run = Hosted(product(16, w, "f16", "int8"))
    run(torch.full((16, 512), 2.0).half(), **LOOSE)
    assert run.kinds == ["quantize", "codes"]


# ------------------------------------------------------------------ groups left out

SPARSE = [
    (1, (50, 128), 16, "bitmap", "uint4", True, "f16"), (3, (70, 256), 32, "gap", "uint4", True, "f32"),
    (2, (600, 512), 8, "u16", "int3", False, "f32"), (4, (33, 256), 128, "bitmap", "int7", False, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(
    "rows, shape, group, index, codes, zero, dtype",
    [s if i < 1 else pytest.param(*s, marks=pytest.mark.slow) for i, s in enumerate(SPARSE)],
)
def test_groups_in_equal_tasks(rows, shape, group, index, codes, zero, dtype) -> None:
    """Rows without a group, rows with all, and rows that several tasks share."""
    w = sparse("w", codes, shape, group, 0.5, index, zero)
    run = ran(product(rows, w, dtype, bias=True))
    assert run.kinds == ["sparse", "runs"]
    inputs = [torch.randn(i.of.shape).to(TYPES[dtype]) for i in run.graph.inputs]
    first, again = run.bound(inputs)[0].clone(), run.bound(inputs)[0]
    assert torch.equal(first, again)


# ------------------------------------------------------------------ what is not taken


def notes(graph: Graph) -> list[str]:
    return [s.launch.note for s in make_plan(graph, Options(), GPU).steps]


def test_what_is_not_taken_says_why() -> None:
    w = sparse("w", "uint4", (50, 128), 16, 0.5)
    (said,) = notes(product(9, w))
    assert "reads the dense weight: 9 rows; up to 4 read groups" in said
    (said,) = notes(product(1, sparse("w", "u8", (50, 128), 16, 0.5)))
    assert "reads the dense weight: groups of u8 are read by no kernel" in said
    wide = matrix("w", "uint4", (50, 128), 16, True)
    (said,) = notes(product(2, wide, "f64"))
    assert "codes are not multiplied with f64" in said
    plan = make_plan(product(20, wide, "f32", "int8"), Options(), GPU)
    assert [s.launch.call.split("_")[0] for s in plan.steps[:3]] == ["quantize", "decode", "codes"]


def test_a_value_that_is_also_read_as_numbers_is_decoded() -> None:
    x = Input("x", Tensor((20, 64), f32))
    a = op.decode(op.quantize(x, i8, GroupQuant(None, f32)))
    y = op.linear(a, op.decode(matrix("w", "int4", (24, 64), 32, False)))
    plan = make_plan(Graph.of((x,), (y, op.relu(a))), Options(), GPU)
    calls = [s.launch.call.split("_")[0] for s in plan.steps]
    assert calls.count("decode") == 1 and "codes" in calls


# ------------------------------------------------------------------ what compilers say


def triton_kernels(graph: Graph) -> list[TritonKernel]:
    steps = make_plan(graph, Options(), GPU).steps
    return [s.kernel for s in steps if isinstance(getattr(s, "kernel", None), TritonKernel)]


def machine_code(kernel: TritonKernel, to: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("no nvdisasm comes with this Triton")
    (made,) = compile_kernels([kernel], target(to))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.binary)
        file.flush()
        asked = [str(tool), "-c", file.name]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("to", ["cuda:sm_80", pytest.param("cuda:sm_90", marks=pytest.mark.slow)])
def test_compiled_products_spill_nothing_and_use_tensor_cores(to) -> None:
    w = matrix("w", "uint4", (256, 1024), 128, True)
    for rows, codes, instruction in ((64, "", "HG?MMA"), (64, "int8", "I[GM]MMA|IMMA")):
        kernel = triton_kernels(product(rows, w, "f16", codes))[bool(codes)]
        assert usage(kernel, to).spilled == 0
        assert re.search(rf"\b(?:{instruction})\.", machine_code(kernel, to))


def test_few_rows_exchange_nothing_between_threads() -> None:
    """Shared memory is for the sums of warps, once: none of it in the loop over the depth."""
    (kernel,) = triton_kernels(product(1, matrix("w", "uint4", (4096, 4096), 128, True), "f16"))
    code = machine_code(kernel, "cuda:sm_80")
    assert usage(kernel, "cuda:sm_80").spilled == 0
    assert len(re.findall(r"\bSTS\b", code)) <= 8 and not re.search(r"\b[HI]MMA\b", code)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["cuda:sm_80", "cuda:sm_90"])
@pytest.mark.parametrize("rows", [1, 4])
def test_compiled_tasks_spill_nothing(to, rows) -> None:
    for group, codes, dtype in ((16, "uint4", "f16"), (8, "int7", "f32"), (128, "int3", "bf16")):
        graph = product(rows, sparse("w", codes, (4096, 2048), group, 0.5), dtype)
        for kernel in triton_kernels(graph):
            assert usage(kernel, to).spilled == 0, kernel.source


# ------------------------------------------------------------------ models


def recipe(weights: str, activations: str = "") -> str:
    passes = [RAISED, "merge-qkv", f"quantize-weights{{{weights}}}"]
    return ",".join([*passes, *([activations] if activations else []), DEFAULT])


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights, activations, of",
    [("bits=4,group=32,zero=True", "", "ptx-host"), ("bits=4,group=32", "quantize-activations", "ptx-host"),
     ("bits=4", "quantize-activations", "cuda-host")],
)  # fmt: skip
def test_a_compressed_llama(weights, activations, of) -> None:
    """Every product but that of the tokens' scores reads codes, and nothing runs through ATen."""
    model, _, arguments = LIBRARY["llama"].build()
    options = {"target": of, "strict": True, "pipeline": recipe(weights, activations)}
    compiled = effc.compile(model, **options)
    with torch.no_grad():
        got, want = compiled(**arguments).logits, model(**arguments).logits
    executable = effc.explain(compiled).records[0].executable
    kinds = [launch.call.rsplit("_", 1)[0] for launch in executable.launches]
    assert kinds.count("codes") == 8 and kinds.count("product") == 1
    assert kinds.count("quantize") == (8 if activations else 0) and "decode" not in kinds
    outputs = interpret(executable.graph, [arguments["input_ids"]])
    (exact,) = (o for o in outputs if o.shape == got.shape)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    assert (got - want).norm() < 0.3 * want.norm()


def test_a_layout_names_its_parts() -> None:
    c = Coded(f32, bits=7, group=32, scale=f16, zero=DTYPES["u8"], size=130)
    assert c.parts == (4, 2, 1) and [c.row(j) for j in range(3)] == [32, 32, 32]
    assert [t.name for t in c.memory] == ["i32", "i16", "i8", "f16", "u8"] and c.groups == 5
