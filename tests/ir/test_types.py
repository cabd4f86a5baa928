"""Types of values: element types, layouts, formats, and their text."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import pytest
import torch

from effc.ir import (
    DType,
    Format,
    Number,
    ParseError,
    Tensor,
    channels_last,
    evaluate,
    row_major,
    symbol,
)
from effc.ir.symbols import floordiv
from effc.ir.types import (
    DTYPES,
    FORMATS,
    bf16,
    boolean,
    f16,
    f32,
    i64,
    parse_type,
    type_of,
    type_text,
)

N, H = symbol("N"), symbol("H")


@dataclass(frozen=True)
class PackedForTest(Format):
    """A format of a plug-in: groups of elements with a scale each, perhaps of another format."""

    group: int
    scale: DType = f16
    inner: Format | None = None
    note: str = ""

    def nbytes(self, tensor: Tensor):
        groups = floordiv(tensor.numel + self.group - 1, self.group)
        return floordiv(tensor.numel * tensor.dtype.bits, 8) + groups * self.scale.bits // 8


@pytest.fixture(autouse=True, scope="module")
def _unregister():
    yield
    FORMATS.pop("PackedForTest")


def parsed(text: str):
    return parse_type(ast.parse(text, mode="eval").body)


# ------------------------------------------------------------------ text

TEXTS = [
    (Tensor((), f32), "f32[()]"),
    (Tensor((3,), boolean), "bool[3]"),
    (Tensor((0, 1), i64), "i64[0, 1]"),
    (Tensor((N, 64, H + 1, floordiv(H, 2)), bf16), "bf16[N, 64, H + 1, H // 2]"),
    (Tensor((N, 3, H, H), f32, channels_last), "f32[N, 3, H, H] @ channels_last"),
    (Tensor((8,), DTYPES["int4"]), "int4[8]"),
    (Number(), "size"),
    (Number(False), "number"),
    ((), "()"),
    ((Tensor((2,), f32),), "(f32[2],)"),
    ((Tensor((2,), f32), (Number(), Tensor((), i64))), "(f32[2], (size, i64[()]))"),
    (
        Tensor((8,), DTYPES["uint3"], format=PackedForTest(4, bf16, note="it's")),
        'uint3[8] @ PackedForTest(group=4, scale=bf16, inner=None, note="it\'s")',
    ),
    (
        Tensor((2, 3, 4, 5), f32, channels_last, PackedForTest(4, inner=PackedForTest(2))),
        "f32[2, 3, 4, 5] @ channels_last @ PackedForTest(group=4, scale=f16, "
        "inner=PackedForTest(group=2, scale=f16, inner=None, note=''), note='')",
    ),
]


@pytest.mark.parametrize("t, text", TEXTS, ids=[text for _, text in TEXTS])
def test_types_print_and_come_back(t, text: str) -> None:
    assert type_text(t) == text
    assert parsed(text) == t and type_text(parsed(text)) == text


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_element_type_has_a_text(name: str) -> None:
    t = parsed(f"{name}[2]")
    assert t == Tensor((2,), DTYPES[name]) and str(t) == f"{name}[2]"


REFUSED = [
    ("f33[2]", "unknown element type 'f33' (did you mean 'f32'?): f33[2]"),
    ("number[2]", "unknown element type 'number' (known: {}): number[2]".format(
        ", ".join(sorted(DTYPES)))),
    ("f32", "not a type: f32"),
    ("f32[2] @ chanels_last", "unknown layout 'chanels_last' (did you mean 'channels_last'?): "
     "f32[2] @ chanels_last"),
    ("size @ channels_last", "only a tensor has a layout or format: size @ channels_last"),
    ("f32[2] @ PackedForTests()", "unknown format 'PackedForTests' (did you mean 'PackedForTest'?):"
     " f32[2] @ PackedForTests()"),
    ("f32[2] @ PackedForTest(4)", "PackedForTest: options are given by name: "
     "f32[2] @ PackedForTest(4)"),
    ("f32[2] @ PackedForTest(groups=4)", "PackedForTest: PackedForTest.__init__() got an unexpected"
     " keyword argument 'groups': f32[2] @ PackedForTest(groups=4)"),
    ("f32['N']", "not a size: 'N'"),
]  # fmt: skip


@pytest.mark.parametrize("text, what", REFUSED, ids=[text for text, _ in REFUSED])
def test_what_is_no_type_is_refused(text: str, what: str) -> None:
    with pytest.raises(ParseError) as e:
        parsed(text)
    assert e.value.what == what and e.value.where == "line 1"


# ------------------------------------------------------------------ element types


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if not d.is_code], ids=str)
def test_element_types_agree_with_torch(dtype: DType) -> None:
    assert DType.of(dtype.torch) is dtype
    if dtype.bits >= 8:
        assert dtype.bits == 8 * dtype.torch.itemsize
    assert dtype.is_float == dtype.torch.is_floating_point
    assert (dtype.kind == "complex") == dtype.torch.is_complex


def test_a_torch_type_without_a_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        DType.of(torch.qint8)


# ------------------------------------------------------------------ layout and size


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5), (2, 3, 5, 7), (2, 3, 4, 5, 6)])
def test_strides_are_those_of_torch(shape) -> None:
    assert Tensor(shape, f32).strides == torch.empty(shape).stride()
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    packed = Tensor(shape, f32, channels_last)
    if memory:
        assert packed.strides == torch.empty(shape).to(memory_format=memory).stride()
    assert sorted(channels_last.order(len(shape))) == list(range(len(shape)))
    assert sorted(row_major.order(len(shape))) == list(range(len(shape)))


def test_symbolic_strides_and_sizes() -> None:
    t = Tensor((N, 3, H, 5), f32, channels_last)
    assert t.strides == (15 * H, 1, 15, 3)
    assert t.numel == 15 * N * H and t.nbytes == 60 * N * H
    assert type(Tensor((2, 3), f32).numel) is int and Tensor((), f32).numel == 1


@pytest.mark.parametrize("bits", range(1, 8))
def test_elements_below_a_byte_are_packed(bits: int) -> None:
    dtype = DTYPES[f"int{bits}"]
    for n in (0, 1, 7, 8, 9):
        want = (n * bits + 7) // 8
        assert Tensor((n,), dtype).nbytes == want
        assert evaluate(Tensor((N,), dtype).nbytes, {N: n}) == want


def test_a_format_says_how_many_bytes_it_takes() -> None:
    assert Tensor((64,), DTYPES["int4"], format=PackedForTest(16)).nbytes == 32 + 4 * 2

    class Silent(Format):
        pass

    FORMATS.pop("Silent")
    with pytest.raises(NotImplementedError, match="Silent must say of what parts it is"):
        Tensor((1,), f32, format=Silent()).nbytes


def test_types_are_values() -> None:
    a = Tensor((N, 3), f32)
    assert a == Tensor((symbol("N"), 3), f32) and hash(a) == hash(Tensor((N, 3), f32))
    assert a != a.with_(layout=channels_last) and a != a.with_(dtype=f16)
    with pytest.raises(AttributeError):
        a.dtype = f16


def test_type_of_a_real_tensor_is_row_major() -> None:
    value = torch.zeros(2, 3, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last)
    assert type_of(value) == Tensor((2, 3, 4, 5), f16)
