"""Samples of ops that move, make, hold and compress values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from effc.ir import (
    Graph,
    Input,
    Item,
    Op,
    Tensor,
    Weight,
    channels_last,
    row_major,
)
from effc.ir.formats import GroupQuant, GroupSparse
from effc.ir.ops.aten import Aten
from effc.ir.ops.region import Fused, Loop
from effc.ir.rewrite import op
from effc.ir.types import DTYPES, bf16, boolean, f32, f64, i8, i32, i64, u8
from tests.ir.samples import SHAPES, Maker, sampler

# ------------------------------------------------------------------ samples: movement


@sampler("reshape")
def reshape(t: Maker) -> Iterator[Op]:
    for dtype in (f32, bf16, i64, boolean):
        yield op.reshape(t(2, 3, 5, dtype=dtype), (5, 6))
    yield op.reshape(t(), (1, 1))
    yield op.reshape(t(1), ())
    yield op.reshape(t(0, 3), (7, 0, 2))
    yield op.reshape(t(2, 3, 4, 5, layout=channels_last), (2, 3, 20))
    yield op.reshape(t(2, 3, 4, 5, layout=channels_last), (2, 3, 4, 5))


@sampler("permute")
def permute(t: Maker) -> Iterator[Op]:
    for dims in itertools.permutations(range(3)):
        yield op.permute(t(2, 3, 5), dims)
    yield op.permute(t(), ())
    yield op.permute(t(2, 0), (1, 0))


@sampler("expand")
def expand(t: Maker) -> Iterator[Op]:
    yield op.expand(t(3, 1), (3, 5))
    yield op.expand(t(), (2, 0))
    yield op.expand(t(1), (0,))
    yield op.expand(t(1, 2), (4, 3, 2))
    yield op.expand(t(2, dtype=boolean), (2,))


@sampler("slice")
def slices(t: Maker) -> Iterator[Op]:
    yield op.slice(t(7, 3), 0, 1, 3, step=2)
    yield op.slice(t(7, 3), -1, 2, 1)
    yield op.slice(t(7, 3), 0, 0, 0)
    yield op.slice(t(7), 0, 7, 0)
    yield op.slice(t(7), 0, 6, 1, step=5)
    yield op.slice(t(2, 3, 4, 5, layout=channels_last), 2, 1, 2)
    yield op.slice(t(7, dtype=i64), 0, 3, 4)


@sampler("to_layout")
def to_layout(t: Maker) -> Iterator[Op]:
    for shape, layout in itertools.product(SHAPES, (channels_last, row_major)):
        yield op.to_layout(t(*shape), layout)
    yield op.to_layout(t(2, 3, 4, 5, layout=channels_last), row_major)
    yield op.to_layout(t(2, 3, 4, 5, layout=channels_last), channels_last)


@sampler("copy")
def copy(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield op.copy(t(*shape))
    yield op.copy(t(2, 3, 4, 5, layout=channels_last))


@sampler("stack")
def stack(t: Maker) -> Iterator[Op]:
    yield op.stack((t(2, 3), t(2, 3), t(2, 3)))
    yield op.stack((t(), t()))
    yield op.stack((t(0, 5),))
    yield op.stack((t(3, dtype=i64), t(3, dtype=i64)))


@sampler("cat")
def cat(t: Maker) -> Iterator[Op]:
    yield op.cat((t(2, 3), t(0, 3), t(5, 3)), 0)
    yield op.cat((t(2, 3), t(2, 1)), -1)
    yield op.cat((t(2, 3),), 1)
    yield op.cat((t(2, dtype=bf16), t(2)), 0)
    yield op.cat((t(2, dtype=i64), t(2, dtype=boolean)), 0)
    yield op.cat(tuple(t(2, c, 4, 5, layout=channels_last) for c in (3, 4)), 1)


@sampler("update")
def update(t: Maker) -> Iterator[Op]:
    at = t(dtype=i64, low=2, high=2)
    for dtype in (f32, bf16, i64, boolean):
        yield op.update(t(2, 7, 3, dtype=dtype), t(2, 5, 3, dtype=dtype), at, 1)
    yield op.update(t(1, 5, 3), t(1, 5, 1), at, -1)
    yield op.update(t(7), t(0), at, 0)
    yield op.update(t(2, 3, 5, 4, layout=channels_last), t(2, 3, 3, 4), at, 2)


@sampler("update_pages")
def update_pages(t: Maker) -> Iterator[Op]:
    for n, dtype in ((0, f32), (1, f32), (3, bf16)):
        table = t(2, 2, dtype=i64, low=0, high=4)
        yield op.update_pages(
            t(5, 3, 4, 2, dtype=dtype), t(2, 3, n, 2, dtype=dtype), table, t(dtype=i64)
        )


@sampler("gather_pages")
def gather_pages(t: Maker) -> Iterator[Op]:
    for dtype in (f32, bf16, i8):
        yield op.gather_pages(t(5, 3, 4, 2, dtype=dtype), t(2, 3, dtype=i64, low=0, high=4))


@sampler("pad")
def pad(t: Maker) -> Iterator[Op]:
    yield op.pad(t(2, 3), (0, 1), (2, 0))
    yield op.pad(t(2, 3), (0, 1), (0, 1), value=-math.inf)
    yield op.pad(t(4, 3), (-1, 0), (-2, 1), value=0.5)
    yield op.pad(t(2, dtype=i64), (1,), (1,), value=7)
    yield op.pad(t(2, dtype=boolean), (1,), (1,), value=True)
    yield op.pad(t(), (), ())
    yield op.pad(t(0, 2), (0, 0), (1, 0))
    yield op.pad(t(2, 3, 4, 5, layout=channels_last), (0, 0, 1, 1), (0, 0, 1, 1))


@sampler("flip")
def flip(t: Maker) -> Iterator[Op]:
    yield op.flip(t(2, 3, 5), (0, 2))
    yield op.flip(t(2, 3), (-1,))
    yield op.flip(t(0, 3), (0,))
    yield op.flip(t(2, 3), ())
    yield op.flip(t(2, 3, 4, 5, layout=channels_last), (1,))


# ------------------------------------------------------------------ samples: the rest


@sampler("embedding")
def embedding(t: Maker) -> Iterator[Op]:
    for shape, ids in itertools.product(((), (0,), (2, 3)), (i64, i32)):
        yield op.embedding(t(5, 3), t(*shape, dtype=ids, high=4))
    yield op.embedding(t(5, 1, dtype=bf16), t(7, dtype=i64, high=4))


@sampler("arange")
def arange(t: Maker) -> Iterator[Op]:
    yield op.arange(7, i64)
    yield op.arange(0, f32)
    yield op.arange(5, i32, start=3, step=-2)
    yield op.arange(5, f32, start=0.5, step=0.1)
    yield op.arange(3, bf16, start=1)
    yield op.arange(1, f64, step=0.25)


@sampler("full")
def full(t: Maker) -> Iterator[Op]:
    yield op.full((), 1.5, f32)
    yield op.full((2, 0), 3, i64)
    yield op.full((3,), True, boolean)
    yield op.full((2, 2), -math.inf, bf16)
    yield op.full((1,), math.nan, f64)
    yield op.full((2,), complex(1, -2), DTYPES["c64"])


@sampler("item")
def item(t: Maker) -> Iterator[Op]:
    x = t(5, 3)
    of = (Tensor((2, 3), f32), Tensor((2, 3), i64))
    many = Aten("aten.topk.default", (x, 2, 0), (), of=of)
    yield Item(many, 0)
    yield Item(many, 1)
    for i in range(3):
        yield Item(op.quantize(t(2, 8), DTYPES["uint4"], GroupQuant(4, f32, u8)), i)


@sampler("aten")
def aten(t: Maker) -> Iterator[Op]:
    yield Aten("aten.cumsum.default", (t(3, 2), 1), (), of=Tensor((3, 2), f32))
    yield Aten(
        "aten.sum.dim_IntList", (t(3, 2), (0, 1)), (("dtype", torch.float64),), of=Tensor((), f64)
    )
    yield Aten("aten.stack.default", ((t(3), t(3)), 1), (), of=Tensor((3, 2), f32))
    many = (Tensor((1, 3), f32), Tensor((2, 3), f32))
    yield Aten("aten.split_with_sizes.default", (t(3, 3), (1, 2)), (), of=many)
    kwargs = (("dtype", torch.float32), ("device", torch.device("cpu")))
    yield Aten("aten.zeros.default", ((2, 3),), kwargs, of=Tensor((2, 3), f32))
    of = Tensor((1, 2, 3, 3), f32, channels_last)
    memory = (("memory_format", torch.channels_last),)
    yield Aten("aten.clone.default", (t(1, 2, 3, 3),), memory, of=of)
    yield Aten("aten.nan_to_num.default", (t(3), None, math.inf), (), of=Tensor((3,), f32))


@sampler("fused")
def fused(t: Maker) -> Iterator[Op]:
    x, b = t(2, 3), t(3)
    inner = Input("a", x.of), Input("b", b.of)
    added = op.add(*inner)
    yield Fused((x, b), Graph.of(inner, (op.relu(added),), "body"))
    yield Fused((x, b), Graph.of(inner, (added, op.neg(added)), "body"))


@sampler("loop")
def loop(t: Maker) -> Iterator[Op]:
    x, table, w = t(2, 3), t(3), t(4, 3)
    inner = Input("a", x.of), Input("b", table.of), Input("c", table.of)
    added = op.add(inner[0], inner[1])
    scaled = op.mul(added, inner[2])
    for trip, body in ((4, Graph.of(inner, (scaled,))), (4, Graph.of(inner, (scaled, added)))):
        yield Loop((x,), (table,), (w,), body, trip)
    yield Loop((x,), (), (), Graph.of(inner[:1], (op.relu(inner[0]),)), 1)
    swapped = Graph.of(inner, (inner[0], inner[2], inner[1]))
    yield Loop((x, table, t(3)), (), (), swapped, 3)


@sampler("input")
def inputs(t: Maker) -> Iterator[Op]:
    for shape in SHAPES:
        yield t(*shape)
    yield t(2, 3, 4, 5, layout=channels_last)


@sampler("weight")
def weight(t: Maker) -> Iterator[Op]:
    for dtype, shape in itertools.product((f32, bf16, i64, boolean), SHAPES):
        yield Weight.holding(f"layer.{dtype}", torch.ones(shape, dtype=dtype.torch))


# ------------------------------------------------------------------ samples: compressed values

CODE_FORMATS = [
    (i8, GroupQuant(None, f32)), (DTYPES["int4"], GroupQuant(2)),
    (DTYPES["uint3"], GroupQuant(4, bf16, DTYPES["uint3"])), (DTYPES["int2b"], GroupQuant(3, f32)),
]  # fmt: skip


@sampler("encoded")
def encoded(t: Maker) -> Iterator[Op]:
    for (dtype, format), shape in itertools.product(CODE_FORMATS, [(3, 5), (7,), (0, 4)]):
        of = Tensor(shape, dtype, format=format)
        parts = tuple(t(*p.shape, dtype=p.dtype) for p in format.parts(of).values())
        yield op.encoded(parts, of=of)
    of = Tensor((3, 8), DTYPES["uint2"], format=GroupSparse(4, 2, "u16"))
    start, values = t(4, dtype=i32), t(2, 4, dtype=DTYPES["uint2"])
    yield op.encoded((start, t(2, dtype=DTYPES["i16"]), values), of=of)


@sampler("quantize")
def quantize(t: Maker) -> Iterator[Op]:
    for (dtype, format), shape in itertools.product(
        CODE_FORMATS, [(3, 5), (7,), (0, 4), (2, 3, 4)]
    ):
        yield op.quantize(t(*shape), dtype, format)
    yield op.quantize(t(2, 6, dtype=bf16), i8, GroupQuant(3, f32))


@sampler("decode")
def decode(t: Maker) -> Iterator[Op]:
    for node in quantize(t):
        for dtype in (f32, bf16):
            yield op.decode(node, dtype)
