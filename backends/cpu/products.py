"""Matrix products and convolutions in our own kernels, with what follows computed on the sums.

Taken: `attention`, `linear` and `matmul` with a matrix, of float32 and, where torch has no
instructions for them or the rows are few, of 16-bit floats; and float32 `conv2d` in channels-last
memory with a constant weight, of one group or depthwise. 3x3 convolutions of stride 1 may go
through Winograd's transform; its interpolation points keep the error that of a plain sum
(core/winograd.cpp). A measurement or the cost model below says whether that pays, and in which
schedule (tuning.py). Everything else is a library routine (library.py).

On a CPU with AMX, `attention`, and `linear` and `conv2d` of one group with a constant weight go to
its tiles where bf16 products are allowed: operands are bf16 themselves, or the precision of float32
products is below `highest` (core/convolution_bf16.cpp, core/attention_bf16.cpp).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from effc.codegen.cpp.loops import Nest, Operand
from effc.codegen.cpp.products import BF16, F16, F32, core, epilogue
from effc.codegen.cpp.region import Statements
from effc.ir import DType, No, Op, no, symbols, yes
from effc.ir.rewrite import Answer
from effc.ir.symbols import Dim
from effc.ir.types import channels_last

from ..plan.builder import Builder
from ..plan.memory import Ref, permuted, whole
from ..plan.regions import broadcast, layout_order
from . import caches, codes
from .features import CpuFeatures, detect
from .operands import BLOCK, Product, lined_up, tile, unit, up
from .tuning import Problem, Schedule

FEW_CHANNELS = 8  # fewer hardly fill a run of products: pixels may be gathered first
POINTS, OUT = 36, 4  # of Winograd's F(4x4, 3x3)


def takes(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Answer:
    """Whether a kernel here computes the anchor; operands are its values in the plan."""
    if not b.kernels:
        return no("no kernels are built", at=node)
    if codes.takes(b, node, operands):
        return yes
    if node.name not in MAKERS:
        return no("{} goes to a library", node.name, at=node)
    if not _ours(node) and not _on_tiles(b, node, operands):
        return no("{} of {} goes to a library", node.name, node.tensor.dtype, at=node)
    return _takes_convolution(b, node, operands) if node.name == "conv2d" else yes


def _ours(node: Any) -> bool:
    """Whether the element type is one that our plain cores are as fast in as the library is.

    They compute 16-bit floats in float32, on one of them at a time: eight times as fast as torch
    without instructions for the type, and by far slower than torch with them. Few rows take the
    time of reading the weight, whatever computes them.
    """
    dtype = node.tensor.dtype
    if dtype == F32 or node.name not in OF:
        return dtype == F32
    return dtype in OF[node.name] and (not _instructions(dtype) or _few(node))


def _instructions(dtype: DType) -> bool:
    """Whether torch multiplies the 16-bit type with instructions for it here."""
    cpu = detect()
    return isinstance(cpu, CpuFeatures) and cpu.has(f"avx512_{'bf16' if dtype == BF16 else 'fp16'}")


def _few(node: Any) -> bool:
    if node.name == "attention":
        return node.past is not None or _known(node.q.shape[-2]) <= FEW_QUERIES
    rows = symbols.product((node.x if node.name == "linear" else node.a).shape[:-1])
    return _known(rows) <= FEW_ROWS


def _known(size: Dim) -> float:
    return size if isinstance(size, int) else math.inf


FEW_ROWS = 8  # of a product that takes little longer than reading its weight


def _takes_convolution(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Answer:
    if node.groups != 1 and not _is_depthwise(node):
        return no("a convolution of {} groups goes to a library", node.groups, at=node)
    if node.x.tensor.layout != channels_last or node.tensor.layout != channels_last:
        return no("a convolution in row-major memory goes to a library", at=node)
    if not b.is_constant(operands[node.w]):
        return no("the weight is no constant", at=node)
    return yes


def find(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    """The call that computes the anchor, or None where a library does."""
    product = codes.find(b, node, operands)
    if product is not None:
        return product
    if not takes(b, node, operands):
        return None
    if _on_tiles(b, node, operands):
        return TILED[node.name](b, node, operands)
    return MAKERS[node.name](b, node, operands)


def lower(
    b: Builder, shown: Op, anchor: Any, product: Product, operands: Mapping[Op, Op],
    leaves: Mapping[Op, Ref], rest: Sequence[Op], result: Op, comment: Sequence[str] = (),
) -> Ref:  # fmt: skip
    """Compute the anchor and the pointwise nodes `rest`, and give where their result is.

    leaves: what `rest` reads besides the anchor.
    """
    t = anchor.tensor
    goes_on = shown.tensor.shape != t.shape  # other steps finish what is shown
    refs = {leaf: broadcast(b, ref, t.shape) for leaf, ref in leaves.items()}
    # Memory of its own: writing over a dead operand of the epilogue measured 5 % slower.
    out = whole(b.own(result if goes_on else shown, result.tensor, product.strides))
    bias_of = getattr(anchor, "bias", None)
    if bias_of is not None:
        channel = 1 if anchor.name == "conv2d" else t.rank - 1
        bias = b.ref(operands[bias_of])
        strides = tuple(bias.strides[0] if a == channel else 0 for a in range(t.rank))
        refs[_BIAS] = bias.with_(shape=t.shape, strides=strides)

    def body(s: Statements, total: tuple[Any, ...]) -> Any:
        s.values[anchor] = total[0], t.dtype, True
        if bias_of is not None:
            text = f"{total[0]} + {s.values[_BIAS][0]}"
            s.values[anchor] = s.let(t.dtype, text, True)
        for n in rest:
            s.add(n)
        return s.values[result]

    order = layout_order(t)
    walked = [Operand(r.dtype, tuple(r.strides[a] for a in order)) for r in (out, *refs.values())]
    nest = Nest(tuple(t.shape[a] for a in order), tuple(walked))
    first = 1 + len(product.refs)
    made = epilogue(nest, list(refs), body, first=first, comment=comment)
    numbers = (made.kernel, *product.numbers, *made.numbers)
    b.kernel(product.core, shown, [out], [*product.refs, *refs.values()], numbers,
             note=product.note)  # fmt: skip
    return out


_BIAS: Any = "bias"  # stands for the anchor's bias among leaves, which are nodes


# ------------------------------------------------------------------ linear


def _linear(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    made = _times(b, operands[node.x], b.ref(operands[node.w]))
    return made and replace(made, note=codes.remark(b, node, operands))


def _matmul(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    """With a matrix on the right: a linear layer whose weight is stored turned."""
    if node.b.tensor.rank != 2 or node.a.tensor.rank < 2:
        return None
    b.must_equal((node.a.shape[-1], node.b.shape[0]))
    return _times(b, operands[node.a], permuted(b.ref(operands[node.b]), (1, 0)))


def _times(b: Builder, value: Op, w: Ref) -> Product | None:
    """Rows of the value times w[results, depth], which lies by rows or by columns."""
    turned = not unit(w, -1)
    if turned and not unit(w, 0):
        return None
    x, rows = lined_up(b, value)
    step = w.strides[1] if turned else w.strides[0]
    numbers = (rows.sizes[0], *w.shape, rows.operands[0].strides[0], step, BLOCK,
               up(64, tile().panel), int(turned))  # fmt: skip
    return Product(core(OF["linear"][w.dtype]), (x, w), numbers)


# Cores by the type of what they read; 16-bit floats become float32 on the way.
OF = {
    "linear": {F32: "linear", BF16: "linear_of_bf16", F16: "linear_of_f16"},
    "attention": {F32: "attention", BF16: "attention_of_bf16", F16: "attention_of_f16"},
}
OF["matmul"] = OF["linear"]


# ------------------------------------------------------------------ convolutions


def _convolution(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    x = b.ref(operands[node.x])
    channels = node.x.tensor.shape[1]
    results, _, tall, broad = node.w.tensor.shape
    if not unit(x, 1) or not all(isinstance(n, int) for n in (channels, results, tall, broad)):
        return None
    sizes, window = _image(node, x)
    constant = operands[node.w]
    if node.groups != 1:
        w = b.derived_ref(constant, "taps", depthwise_taps, tall * broad * results)
        return Product(core("depthwise"), (x, w), (*sizes, *window))
    taken, note = b.schedules.pick(*_schedules(node, x, sizes, window))
    what, pack = PACKING[taken.core.name]
    _, (_, count) = taken.reads
    w = b.derived_ref(constant, what, pack, count, tile())
    return Product(taken.core, (x, w), taken.numbers, note)


def _image(node: Any, x: Ref) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Numbers that every core of convolutions takes: sizes and steps of images, and the window."""
    batch, channels, height, width = node.x.tensor.shape
    results, _, tall, broad = node.w.tensor.shape
    _, _, high, wide = node.tensor.shape
    steps = (x.strides[0], x.strides[2], x.strides[3])
    sizes = (batch, height, width, channels, results, high, wide, *steps)
    return sizes, (tall, broad, *node.stride, *node.padding, *node.dilation)


# ------------------------------------------------------------------ attention


def _attention(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    pair = caches.caches(node, operands)
    if isinstance(pair, No):  # decoded or gathered before
        pair = caches.Kept(operands[node.k]), caches.Kept(operands[node.v])
    q, k, v = b.ref(operands[node.q]), pair[0].part(b, 0), pair[1].part(b, 0)
    *lead, queries, results = node.tensor.shape
    keys, depth = node.k.tensor.shape[-2:]
    if len(lead) > 2 or not isinstance(depth, int) or not all(unit(r, -1) for r in (q, k, v)):
        return None
    heads = lead[-1] if lead else 1
    sharing: Dim = 1
    if node.gqa:
        kept = node.k.tensor.shape[-3] if lead else 1
        if not (isinstance(heads, int) and isinstance(kept, int)):
            return None
        sharing = heads // kept
    q = _with_heads(b, q, (*lead, queries, depth))
    shared = (*lead[:-1], heads // sharing) if lead else ()
    paged = pair[0].table is not None
    if not paged:
        k = _with_heads(b, k, (*shared, keys, depth))
        v = _with_heads(b, v, (*shared, keys, results))
    mask, kind, steps = q, 0, (0, 0, 0, 0)
    if node.mask is not None:
        mask = _with_heads(b, b.ref(operands[node.mask]), (*lead, queries, keys))
        kind, steps = MASKS.get(mask.dtype, 2), mask.strides
    scale = depth**-0.5 if node.scale is None and depth else node.scale or 0.0
    numbers = (
        *q.shape[:2], queries, keys, depth, results, sharing, _bits(scale), int(node.causal),
        kind, *q.strides[:3], *k.strides[:3], *v.strides[:3], *steps,
    )  # fmt: skip
    strides = _heads_inside(node.tensor.shape)
    if pair[0].plain and _on_tiles(b, node, operands):
        parts = _parts(b, node) or 0
        made, note = core("attention_bf16"), NOTES[parts]
        return Product(made, (q, k, v, mask), (*numbers, parts), note, strides)
    made, reads = core(OF["attention"][node.tensor.dtype]), (q, k, v, mask)
    numbers = (*numbers, int(node.past is not None))
    if node.past is None and pair[0].plain:
        return Product(made, reads, (*numbers, 0, 0, 0), strides=strides)
    reader, read, told = caches.more_reads(
        b, node, pair, lambda r: r if paged else _with_heads(b, r, (*shared, keys, 1)), operands
    )
    return Product(reader or made, (*reads, *read), (*numbers, *told), strides=strides)


MASKS = {F32: 1, BF16: 3, F16: 4}  # added; others keep a score or drop it


def _with_heads(b: Builder, ref: Ref, shape: tuple[Dim, ...]) -> Ref:
    """The ref along `shape`, as [batch, heads, rows, columns]."""
    ref = broadcast(b, ref, shape)
    more = 4 - len(shape)
    return ref.with_(shape=(1,) * more + ref.shape, strides=(0,) * more + ref.strides)


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _heads_inside(shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """Strides of [batch, rows, heads, size] for [batch, heads, rows, size], as torch gives them:
    what reads the result mostly joins heads and size."""
    if len(shape) != 4:
        return None
    _, heads, rows, size = shape
    return (rows * heads * size, size, heads * size, 1)


MAKERS = {
    "linear": _linear, "matmul": _matmul, "conv2d": _convolution, "attention": _attention,
}  # fmt: skip

# ------------------------------------------------------------------ bf16 products on AMX tiles


def amx() -> bool:
    """Whether this CPU multiplies bf16 tiles, and this process may."""
    cpu = detect()
    return isinstance(cpu, CpuFeatures) and cpu.has("amx_tile") and cpu.has("amx_bf16")


def _parts(b: Builder, node: Any) -> int | None:
    """bf16 parts of a float32 operand, 0 where it is bf16 itself; None: products are not bf16."""
    if node.tensor.dtype == BF16:
        return 0
    return PARTS.get(b.precision) if node.tensor.dtype == F32 else None


PARTS = {"high": 2, "medium": 1}
NOTES = {0: "bf16", 1: "bf16", 2: "bf16 x3"}  # how often a product is made of bf16 ones


def _on_tiles(b: Builder, node: Any, operands: Mapping[Op, Op]) -> bool:
    if node.name not in TILED or _parts(b, node) is None or not amx():
        return False
    if node.name == "attention":
        queries, depth = node.q.tensor.shape[-2:]
        few = node.past is not None or _known(queries) <= FEW_QUERIES
        return not few and isinstance(depth, int) and depth > 0
    sizes = node.w.tensor.shape
    if node.name == "conv2d" and node.groups != 1:
        return False
    return b.is_constant(operands[node.w]) and all(isinstance(n, int) and n for n in sizes)


def _linear_on_tiles(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    """A 1x1 convolution over a picture of one line, whose pixels are the rows."""
    x, rows = lined_up(b, operands[node.x])
    results, depth = node.w.tensor.shape
    count, step = rows.sizes[0], rows.operands[0].strides[0]
    sizes = (1, 1, count, depth, results, 1, count, 0, 0, step)
    return _tiled(b, node, operands, x, sizes, (1, 1, 1, 1, 0, 0, 1, 1))


def _convolution_on_tiles(b: Builder, node: Any, operands: Mapping[Op, Op]) -> Product | None:
    x = b.ref(operands[node.x])
    if not unit(x, 1):
        return None
    return _tiled(b, node, operands, x, *_image(node, x))


TILED = {"linear": _linear_on_tiles, "conv2d": _convolution_on_tiles, "attention": _attention}
FEW_QUERIES = 4  # keys are not turned into tiles for so few


def _tiled(
    b: Builder, node: Any, operands: Mapping[Op, Op], x: Ref, sizes: tuple[Dim, ...],
    window: tuple[Dim, ...],
) -> Product:  # fmt: skip
    results, channels, tall, broad = (*node.w.tensor.shape, 1, 1)[:4]
    parts = _parts(b, node) or 0
    together = pixels_together(channels, broad)
    deep = tall * broad // together * up(together * channels, DEEP)
    count = max(1, parts) * deep * up(results, 16)
    pack = partial(in_tiles, parts=parts)
    w = b.derived_ref(operands[node.w], "tiles", pack, count, parts, BF16)
    numbers = (*sizes, *window, up(min(results, 128), 32), together, _l2() // 2, parts)
    return Product(core("convolution_bf16"), (x, w), numbers, NOTES[parts])


DEEP = 32  # products of one step of a tile


def pixels_together(channels: int, broad: int) -> int:
    """Pixels under a line of the kernel that are put together, where that halves the products."""
    together = 2 * up(broad * channels, DEEP) <= broad * up(channels, DEEP)
    return broad if together else 1


# ------------------------------------------------------------------ packed weights


def _is_depthwise(node: Any) -> bool:
    return node.groups == node.x.tensor.shape[1] == node.w.tensor.shape[0]


def depthwise_taps(w: torch.Tensor) -> torch.Tensor:
    """[channels, 1, height, width] -> [height, width, channels], flat."""
    return w.permute(2, 3, 1, 0).flatten()


def panels(w: torch.Tensor) -> torch.Tensor:
    """[depth, results] in panels, the last one as wide as whole vectors need; flat."""
    shape = tile()
    depth, results = w.shape
    w = torch.nn.functional.pad(w, (0, up(results, shape.width) - results))
    full = w.shape[1] // shape.panel * shape.panel
    parts = w[:, :full].reshape(depth, -1, shape.panel).permute(1, 0, 2)
    return torch.cat([parts.flatten(), w[:, full:].flatten()])


def convolution_panels(w: torch.Tensor) -> torch.Tensor:
    """[results, channels, height, width] -> panels over (height, width, channels)."""
    return panels(w.permute(2, 3, 1, 0).flatten(0, 2))


def in_tiles(w: torch.Tensor, parts: int) -> torch.Tensor:
    """[results, channels, ...] as bf16 tiles for AMX: 16 pairs of k x 16 results, flat.

    In panels of two tiles' results, and a last one of a single tile; in a panel step after step of
    the products; of a step its parts; of a part its tiles. See tiles_product in effc_amx.h.
    """
    results, channels, tall, broad = (*w.shape, 1, 1)[:4]
    together = pixels_together(channels, broad)
    k = w.reshape(results, channels, tall, broad).permute(2, 3, 1, 0)
    k = k.reshape(tall * broad // together, together * channels, results)
    k = F.pad(k, (0, up(results, 16) - results, 0, up(k.shape[1], DEEP) - k.shape[1]))
    steps, tiles = k.shape[0] * k.shape[1] // DEEP, k.shape[2] // 16
    split = torch.stack(in_parts(k, parts)).reshape(max(1, parts), steps, 16, 2, tiles, 16)
    panels = split.permute(4, 1, 0, 2, 5, 3).split(2)
    return torch.cat([p.permute(1, 2, 0, 3, 4, 5).flatten() for p in panels])


def in_parts(x: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """bf16(x), and with two parts what that left out; no rest of an infinity."""
    high = x.bfloat16()
    rest = (x - high).bfloat16()
    return [high, rest.where(high.isfinite(), 0)][: max(1, parts)]


def at_points(w: torch.Tensor) -> torch.Tensor:
    """[results, channels, 3, 3] at Winograd's points, in panels: G w G^T, computed in float64.

    Row i of G evaluates 1, p, p^2 at point i over the product of its distances to the others; the
    last one is the point at infinity.
    """
    points = [0.0, 0.75, -0.75, 1.5, -1.5]
    rows = []
    for i, p in enumerate(points):
        scale = 1.0
        for j, q in enumerate(points):
            scale *= 1.0 if i == j else p - q
        rows.append([1 / scale, p / scale, p * p / scale])
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    made = torch.einsum("ia,kcab,jb->ijck", g, w.double(), g).flatten(0, 1).to(w.dtype)
    return torch.cat([panels(point) for point in made])


PACKING = {
    "effc_convolution": ("panels", convolution_panels), "effc_winograd": ("points", at_points),
}  # fmt: skip


# ------------------------------------------------------------------ schedules


def _schedules(
    node: Any, x: Ref, sizes: tuple[Dim, ...], window: tuple[Dim, ...]
) -> tuple[Problem, list[Schedule]]:
    """The convolution as a problem, and every way to compute it; the first is always there."""
    batch, height, width, channels, results, high, wide, *steps = sizes
    tall, broad = node.w.tensor.shape[2:]
    taps = tall * broad
    problem = Problem(
        f"conv2d {node.tensor.dtype} of {batch}x{channels}x{height}x{width} in steps of {steps} "
        f"with {results}x{tall}x{broad}, stride {node.stride}, padding {node.padding}, "
        f"dilation {node.dilation}",
        batch * high * wide, results, node.tensor.dtype,
    )  # fmt: skip
    seen = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
    packed = channels * up(results, tile().width)
    chunk = up(min(results, 128), tile().panel)
    reads = (x.dtype, seen), (x.dtype, taps * packed)
    cost = direct_cost(node)
    found = []
    for gather in (0, 1) if taps > 1 and channels < FEW_CHANNELS else (0,):
        suits = gather == (2 * channels <= broad)  # measured: 1 to 7 channels, 3x3 to 7x7
        found.append(
            Schedule(
                "direct", core("convolution"), (*sizes, *window, BLOCK, chunk, gather),
                cost * (1 if suits else 1.1), reads, "over gathered pixels" if gather else "",
            )
        )  # fmt: skip
    one = all(s == 1 for s in (*node.stride, *node.dilation))
    if (tall, broad) == (3, 3) and one and channels >= 8 and results >= 8:
        reads = (x.dtype, seen), (x.dtype, POINTS * packed)
        for run in runs(node):
            found.append(
                Schedule(
                    "Winograd F(4x4, 3x3)", core("winograd"), (*sizes, *node.padding, run),
                    winograd_cost(node, run), reads, f"in runs of {run}",
                )
            )  # fmt: skip
    return problem, found


RUNS = (2, 3, 4, 6, 8, 12, 16)  # times the rows of a register tile


def runs(node: Any) -> list[int]:
    """How many tiles Winograd's transform may take at once; none more than there are."""
    rows = tile().rows
    most = up(max(1, _tiles(node)), rows)
    return sorted({min(n * rows, most) for n in RUNS})


def direct_cost(node: Any) -> float:
    """Products of the plain sum and the way of its weights, counted in products of vectors, which
    the inner loops issue at the same rate."""
    results, channels, tall, broad = node.w.tensor.shape
    batch, _, high, wide = (_guess(n) for n in node.tensor.shape)
    return tall * broad * channels * results * (batch * high * wide + _away())


def winograd_cost(node: Any, run: int) -> float:
    """The same of Winograd's transforms and products over runs of so many tiles.

    Weights are read once a run. Measured with 6 to 192 tiles and 8 to 1280 channels: weights that a
    share of the third-level cache holds cost little, others their way from memory each time; what a
    run holds between its steps costs the more the less of it the second-level cache holds.
    """
    results, channels, _, _ = node.w.tensor.shape
    tiles, weights = _tiles(node), POINTS * channels * results
    held = POINTS * (channels + results) + OUT * OUT * results  # a tile, between the steps
    again = _away() if 4 * weights > _l3() // SHARE else NEAR if 4 * weights > _l2() else 0
    spilt = NEAR * held * math.log2(max(1.0, 4 * held * run / (0.6 * _l2())))
    work = tiles * (weights + TRANSFORM * (channels + results) + spilt)
    return work + weights * (_away() + (-(-tiles // run) - 1) * again)


NEAR = 1  # products in the time a number takes from the third-level cache
SHARE = 4  # of the third-level cache, what a core may count on: others use it, or it is not ours
TRANSFORM = 350  # operations a channel and tile, with their loads and stores


def _away() -> int:
    """Products in the time a number takes from memory: more the wider the vectors are. Twice what a
    quiet machine took, because threads and neighbours share its bandwidth."""
    return tile().width * 3 // 2


def _tiles(node: Any) -> int:
    batch, _, high, wide = (_guess(n) for n in node.tensor.shape)
    return batch * -(-high // OUT) * -(-wide // OUT)


def _l2() -> int:
    cpu = detect()
    return cpu.l2 if isinstance(cpu, CpuFeatures) else 512 << 10


def _l3() -> int:
    cpu = detect()
    return cpu.l3 if isinstance(cpu, CpuFeatures) else 8 << 20


def _guess(size: Dim) -> int:
    """A size not known yet is taken to be a picture of some extent."""
    return size if isinstance(size, int) else 64


__all__ = [
    "Product",
    "amx",
    "at_points",
    "convolution_panels",
    "find",
    "in_tiles",
    "lower",
    "panels",
    "takes",
]
