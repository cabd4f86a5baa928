"""Products of codes, as they are stored: exact sums, whole layers, look-ups, and what plans make of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from effc.backends import find_backend
from effc.backends.cpu import codes, operands
from effc.backends.cpu.features import CpuFeatures
from effc.codegen.cpp.products import TILES
from effc.ir import Graph, Input, Op, Tensor, Weight, interpret, parse
from effc.ir.formats import Encoded, GroupQuant, code_range
from effc.ir.rewrite import op
from effc.ir.symbols import symbol
from effc.ir.types import DTYPES, DType, bf16, f16, f32, i8, i64, u8

ROWS = (1, 2, 3, 7, 8, 9, 40)
BITS = [
    pytest.param(b, marks=[] if b in (4, 7, 8) else pytest.mark.slow) for b in range(1, 9)
]  # the slow ones build cores of their own, of the same parts


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def dtype_of(bits: int, signed: bool) -> DType:
    if bits == 8:
        return i8 if signed else u8
    return DTYPES[f"{'int' if signed else 'uint'}{bits}"]


def random_codes(dtype: DType, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Least and largest among them."""
    low, high = code_range(dtype)
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, tuple(shape), generator=made)
    if values.numel() > 1:
        values.view(-1)[0], values.view(-1)[-1] = low, high
    return values.to(dtype.torch)


def constant(
    key: str, shape: tuple[int, int], dtype: DType, f: GroupQuant, seed: int = 0, ones: bool = False
) -> Op:
    """Random codes, and scales that are all 1 or not."""
    t = Tensor(shape, dtype, format=f)
    made = torch.Generator().manual_seed(seed)
    parts: list[Op] = []
    for name, of in f.parts(t).items():
        if name == "codes":
            value = random_codes(dtype, shape, seed)
        elif name == "scale":
            value = torch.rand(of.shape, generator=made) + 0.5
            value = (torch.ones(of.shape) if ones else value).to(of.dtype.torch)
        else:
            value = random_codes(of.dtype, of.shape, seed + 1)
        parts.append(Weight.holding(f"{key}:{name}", value, of))
    return op.encoded(tuple(parts), of=t)


def value_of(node: Op) -> Encoded:
    return interpret(Graph.of((), (node,)), ())[0]


def compiled(graph: Graph):
    executable = find_backend("cpu").compile(graph)
    assert not executable.fallbacks, executable.text
    return executable


def calls(executable) -> list[str]:
    return [launch.call for launch in executable.launches if launch.kind != "view"]


M = symbol("M")
PER_TOKEN = GroupQuant(None, f32)


def coded_x(x: Op, dtype: DType = i8, f: GroupQuant = PER_TOKEN) -> Op:
    return op.decode(op.quantize(x, dtype, f))


# ------------------------------------------------------------------ sums are exact


@pytest.mark.parametrize("bits", BITS)
def test_sums_are_those_of_integers(bits) -> None:
    """All types of x with those of w, with zeros and without: scales are 1, so that results are the
    sums themselves."""
    rows, results, depth = max(ROWS), 13, 70
    inputs, outputs, numbers = [], [], []
    matrices = []
    for signed in (True, False):
        dtype = dtype_of(bits, signed)
        for zero in (None, dtype):
            w = constant(f"w{signed}{zero}", (results, depth), dtype,
                         GroupQuant(64, f32, zero), ones=True)  # fmt: skip
            matrices.append((op.decode(w), value_of(w).decode(torch.float64).long()))
    for p in range(1, 9):
        for signed in (True, False):
            dtype, holder = dtype_of(p, signed), i8 if signed else u8
            low, high = code_range(dtype)
            # without a zero the largest number is the largest code; with one, the range is all codes
            spans = {
                None: (-max(high, 1) if signed else 0, max(high, 1)),
                holder: (-3, high - low - 3),
            }
            for zero, (least, most) in spans.items():
                if zero is not None and not least <= 0 <= most:
                    continue
                values = torch.randint(least, most + 1, (rows, depth))
                values[:, 0], values[:, 1] = least, most
                if high == 0:  # codes are 0 and -1, of a scale of 1
                    values = -(values > 0).long()
                    values[:, 0] = -1
                x = Input(f"x{len(inputs)}", Tensor((M, depth), f32))
                inputs.append(x)
                numbers.append(values)
                for w, _ in matrices:
                    outputs.append(op.linear(coded_x(x, dtype, GroupQuant(None, f32, zero)), w))
    graph = Graph.of(inputs, outputs)
    executable = compiled(graph)
    assert set(calls(executable)) == {"effc_quantize", f"effc_linear_of_codes{bits}"}
    bound = executable.bind()
    for count in ROWS:
        got = iter(bound([v[:count].float() for v in numbers]))
        for x, values in zip(inputs, numbers, strict=True):
            for _, w in matrices:
                assert torch.equal(next(got), (values[:count] @ w.T).float()), (x, count)


@pytest.mark.parametrize("bits", [8, pytest.param(7, marks=pytest.mark.slow)])
def test_the_largest_sums(bits) -> None:
    """Every product as large as it can be, where 16 bits would overflow first."""
    depth = 200
    for signed in (True, False):
        dtype = dtype_of(bits, signed)
        low, high = code_range(dtype)
        for code in (low, high):
            t = Tensor((9, depth), dtype, format=GroupQuant(None, f32))
            held = torch.full((9, depth), code, dtype=dtype.torch)
            parts = (Weight.holding("codes", held, Tensor((9, depth), dtype)),
                     Weight.holding("scale", torch.ones(9, 1)))  # fmt: skip
            x = Input("x", Tensor((M, depth), f32))
            graph = Graph.of((x,), (op.linear(coded_x(x, u8, GroupQuant(None, f32, u8)),
                                              op.decode(op.encoded(parts, of=t))),))  # fmt: skip
            bound = compiled(graph).bind()
            for rows in (1, 4, 9):
                values = torch.full((rows, depth), 255.0)
                values[:, 0] = 0
                (got,) = bound((values,))
                assert torch.equal(got, torch.full((rows, 9), 255.0 * code * (depth - 1)))


def test_sums_that_do_not_fit_are_refused() -> None:
    fits = codes.fits(i8, u8, 32896)
    assert fits and codes.fits(i8, DTYPES["uint4"], 500_000)
    answer = codes.fits(i8, u8, 32897)
    assert not answer and "at most 32896 fit" in str(answer)
    assert not codes.fits(i8, DTYPES["uint4"], 32897, u8), "its zeros have 8 bits"
    depth = 33000
    x = Input("x", Tensor((1, depth), f32))
    w = constant("w", (8, depth), u8, GroupQuant(None, f32))
    executable = find_backend("cpu").plan(Graph.of((x,), (op.linear(coded_x(x), op.decode(w)),)))
    (launch,) = [e for e in executable.launches if "linear" in e.call]
    assert "may leave 32 bits" in launch.note and launch.call == "effc_linear_of_codes_by_floats8"


# ------------------------------------------------------------------ whole layers


def exact(graph: Graph, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a graph of one linear layer gives in float64, of the numbers that its operands decode to."""
    layer = graph.outputs[0]
    x, w, *bias = interpret(Graph(graph.inputs, graph.nodes, layer.operands), inputs)
    return torch.nn.functional.linear(x.double(), w.double(), *(b.double() for b in bias))


LAYERS = [
    ("uint4", GroupQuant(32, f16, DTYPES["uint4"]), PER_TOKEN, i8),
    ("int4", GroupQuant(128, bf16), PER_TOKEN, DTYPES["int5"]),
    ("int4", GroupQuant(96, f32), GroupQuant(64, f16), i8),
    ("i8", GroupQuant(None, f32), GroupQuant(None, f16, u8), u8),
    ("u8", GroupQuant(64, f16, u8), GroupQuant(32, f32), i8),
    ("i8", GroupQuant(64, f16, i8), GroupQuant(None, f32, i8), DTYPES["int6"]),
    ("uint4", GroupQuant(None, bf16, DTYPES["uint3"]), PER_TOKEN, u8),
]


@pytest.mark.parametrize("name, f, xf, xtype", LAYERS)
@pytest.mark.parametrize("floats", [False, True])
def test_layers(name, f, xf, xtype, floats) -> None:
    """Ragged sizes, any number of rows and threads, with x in codes and in floats."""
    draw = random.Random(0)
    for results, depth in ((45, 200), (8, 32), (1, 1), (130, 75), (0, 64), (5, 0)):
        x = Input("x", Tensor((M, depth), f32))
        w = op.decode(constant("w", (results, depth), DTYPES[name], f))
        bias = Weight.holding("b", torch.randn(results))
        graph = Graph.of((x,), (op.linear(x if floats else coded_x(x, xtype, xf), w, bias),))
        executable = compiled(graph)
        assert "effc_linear" in calls(executable)[-1] and "of_codes" in calls(executable)[-1]
        bound = executable.bind()
        for rows in (*ROWS, 100, 0):
            torch.set_num_threads(draw.choice((1, 2, 3)))
            value = torch.randn(rows, depth) + 0.5
            (got,), want = bound((value,)), exact(graph, (value,))
            assert got.shape == want.shape
            if got.numel():
                assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_16_bit_activations(dtype) -> None:
    """Codes of them, or they themselves, by codes; nothing but the result is rounded."""
    x = Input("x", Tensor((M, 96), dtype))
    w = op.decode(constant("w", (50, 96), DTYPES["int4"], GroupQuant(32, f16)), dtype)
    codes_of_x = op.decode(op.quantize(x, i8, PER_TOKEN), dtype)
    graph = Graph.of((x,), (op.linear(x, w), op.linear(codes_of_x, w)))
    bound = compiled(graph).bind()
    for rows in (1, 3, 20):
        value = torch.randn(rows, 96).to(dtype.torch)
        for got, want in zip(bound((value,)), interpret(graph, (value,)), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))


def test_what_follows_is_computed_on_the_sums() -> None:
    """A fused region around a product of codes; its operands may lie in any way."""
    x, z = Input("x", Tensor((2, M, 64), f32)), Input("z", Tensor((2, M, 40), f32))
    a, w = coded_x(x), op.decode(constant("w", (40, 64), DTYPES["int4"], GroupQuant(32, f16)))
    left, right, other = Input("a", a.type), Input("w", w.type), Input("z", z.type)
    body = Graph.of((left, right, other), (op.mul(op.silu(op.linear(left, right)), other),))
    graph = Graph.of((x, z), (op.fused((a, w, z), body=body),))
    executable = compiled(graph)
    assert calls(executable) == ["effc_quantize", "effc_linear_of_codes4"]
    bound = executable.bind()
    for rows in (1, 5, 40):
        value, factor = torch.randn(2, 64, rows).transpose(1, 2), torch.randn(2, rows, 40)
        (got,), (want,) = bound((value, factor)), interpret(graph, (value, factor))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_no_number_gives_no_number() -> None:
    x = Input("x", Tensor((2, 64), f32))
    w = op.decode(constant("w", (8, 64), DTYPES["int4"], GroupQuant(32, f16)))
    bound = compiled(Graph.of((x,), (op.linear(coded_x(x), w), op.linear(x, w)))).bind()
    value = torch.ones(2, 64)
    value[1, 5] = float("nan")
    for got in bound((value,)):
        assert got[0].isfinite().all() and got[1].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["default", "wide"])
def test_other_instruction_sets(level, monkeypatch) -> None:
    """Plain C++, and the lanes of AVX-512 on any machine."""
    if level == "wide":
        plain = CpuFeatures.flags
        monkeypatch.setattr(CpuFeatures, "flags", lambda *a: (*plain(*a), "-DEFFC_WIDE"))
        monkeypatch.setattr(operands, "tile", lambda: TILES["avx512"])
        monkeypatch.setattr(codes, "tile", lambda: TILES["avx512"])
    else:
        monkeypatch.setenv("EFFC_CPU", level)
    x, ids = Input("x", Tensor((M, 200), f32)), Input("ids", Tensor((3,), i64))
    outputs: list[Op] = []
    for name, f in (("int8", GroupQuant(64, f16, i8)), ("int7", GroupQuant(None, f32)),
                    ("uint4", GroupQuant(32, bf16, DTYPES["uint4"]))):  # fmt: skip
        dtype = i8 if name == "int8" else DTYPES[name]
        w = op.decode(constant(name, (45, 200), dtype, f))
        outputs += [op.linear(x, w), op.linear(coded_x(x), w), op.embedding(w, ids)]
    graph = Graph.of((x, ids), outputs)
    bound = compiled(graph).bind()
    for rows in ROWS:
        given = torch.randn(rows, 200), torch.randint(45, (3,))
        for got, want in zip(bound(given), interpret(graph, given), strict=True):
            assert (got - want).abs().max() <= 2e-6 * want.abs().max()


# ------------------------------------------------------------------ quantising


@pytest.mark.parametrize("f, dtype", [
    (PER_TOKEN, i8), (GroupQuant(32, f16), DTYPES["int4"]), (GroupQuant(64, bf16), i8),
    (GroupQuant(None, f32, u8), u8), (GroupQuant(None, f16, i8), DTYPES["int6"]),
])  # fmt: skip
def test_codes_are_those_of_the_reference(f, dtype) -> None:
    """The very same bits; and decoded they are numbers for whoever reads no codes."""
    for depth in (1, 64, 200) if f.group is None else (64, 192):
        x = Input("x", Tensor((M, depth), f32))
        a = op.decode(op.quantize(x, dtype, f))
        graph = Graph.of((x,), (a, op.relu(a)))
        bound = compiled(graph).bind()
        for rows in (1, 7, 0):
            value = torch.randn(rows, depth)
            value[:1] = 0
            for got, want in zip(bound((value,)), interpret(graph, (value,)), strict=True):
                assert torch.equal(got, want)


# ------------------------------------------------------------------ tables


def test_a_table_shared_with_the_last_layer() -> None:
    """Look-ups read the rows asked for, from the codes that the layer reads too."""
    for name, f in (("uint4", GroupQuant(32, f16, DTYPES["uint4"])), ("i8", GroupQuant(None, f32)),
                    ("int4", GroupQuant(64, bf16))):  # fmt: skip
        table = op.decode(constant("w", (50, 70), DTYPES[name], f))
        ids = Input("ids", Tensor((M, 3), i64))
        rows = op.embedding(table, ids)
        graph = Graph.of((ids,), (rows, op.linear(coded_x(rows), table)))
        executable = compiled(graph)
        bits = DTYPES[name].bits
        assert calls(executable) == [
            f"effc_embedding_of_codes{bits}", "effc_quantize", f"effc_linear_of_codes{bits}"
        ]  # fmt: skip
        bound = executable.bind()
        assert len(bound.packed) == (2 if f.zero is None else 3) and not bound.constants
        for count in (1, 9):
            given = torch.randint(50, (count, 3))
            got, want = bound((given,)), interpret(graph, (given,))
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(
                got[1], want[1], rtol=1e-5, atol=1e-5 * float(want[1].abs().max())
            )
        for wrong in (-1, 50):
            with pytest.raises(IndexError):
                bound((torch.full((1, 3), wrong),))


# ------------------------------------------------------------------ plans


def test_what_is_packed_takes_the_bytes_of_the_codes() -> None:
    t = Tensor((64, 256), DTYPES["uint4"], format=GroupQuant(32, f16, DTYPES["uint4"]))
    x = Input("x", Tensor((1, 256), f32))
    w = constant("w", (64, 256), t.dtype, t.format)
    bound = compiled(Graph.of((x,), (op.linear(x, op.decode(w)),))).bind()
    held = sum(v.numel() * v.element_size() for v in bound.packed.values())
    assert not bound.constants and t.nbytes <= held <= 1.03 * t.nbytes


@pytest.mark.parametrize("f, why", [
    (GroupQuant(16, f16), "groups of 16 are no multiple of 32"),
    (GroupQuant(32, DTYPES["f64"]), "scales of f64"),
    (GroupQuant(32, f16, f32), "zeros of f32"),
    (GroupQuant(32, f16, i8), "zeros of i8 for uint4"),
])  # fmt: skip
def test_what_no_core_reads_is_decoded_once(f, why) -> None:
    """Right, and the plan says why the weight is dense."""
    x = Input("x", Tensor((M, 64), f32))
    t = Tensor((5, 64), DTYPES["uint4"], format=f)
    made = constant("w", (5, 64), t.dtype, GroupQuant(f.group, f16))
    parts = list(made.xs)
    parts[1] = Weight.holding("s", torch.ones(f.parts(t)["scale"].shape, dtype=f.scale.torch))
    if f.zero is not None:
        parts.append(Weight.holding("z", torch.ones(f.parts(t)["zero"].shape, dtype=f.zero.torch)))
    graph = Graph.of((x,), (op.linear(coded_x(x), op.decode(op.encoded(tuple(parts), of=t))),))
    executable = compiled(graph)
    (launch,) = [e for e in executable.launches if "linear" in e.call]
    assert launch.call in ("effc_linear", "torch.linear") and why in launch.note
    value = torch.randn(3, 64)
    torch.testing.assert_close(executable.bind()((value,)), interpret(graph, (value,)))


def test_without_kernels_values_of_parts_are_objects() -> None:
    """Everything through torch: formatted values pass from node to node in one piece."""
    x = Input("x", Tensor((M, 64), f32))
    w = op.decode(constant("w", (5, 64), DTYPES["uint4"], GroupQuant(32, f16)))
    graph = Graph.of((x,), (op.linear(coded_x(x), w),))
    bound = find_backend("cpu").compile(graph, {"kernels": False}).bind()
    value = torch.randn(3, 64)
    assert torch.equal(bound((value,))[0], interpret(graph, (value,))[0])


PARTS = """
def graph(c: i8[M, 8], s: f32[M, 1], x: f32[M, 8]):
    y0 = mul(s, 2.0)
    y1: i8[M, 8] @ GroupQuant(group=None, scale=f32, zero=None) = encoded((c, y0))
    y2 = relu(y0)
    y3 = decode(y1)
    y4 = add(y3, x)
    return y4, y2
"""


@pytest.mark.parametrize("kernels", [True, False])
def test_parts_live_as_long_as_the_value_they_make(kernels) -> None:
    """Nothing overwrites a part between `encoded` and who reads it."""
    graph = parse(PARTS)
    bound = find_backend("cpu").compile(graph, {"kernels": kernels}).bind()
    for rows in (1, 5):
        given = (random_codes(i8, (rows, 8)), torch.rand(rows, 1), torch.randn(rows, 8))
        for got, want in zip(bound(given), interpret(graph, given), strict=True):
            torch.testing.assert_close(got, want)
