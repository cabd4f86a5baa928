"""Matrix products, convolutions, attention."""

from __future__ import annotations

from typing import Any

from effc.importer import Call, converts
from effc.ir import Op, no
from effc.ir.ops.shape import Permute, Reshape
from effc.ir.ops.shape import Slice as SliceOp
from effc.ir.rewrite import op
from effc.ir.symbols import floordiv, product

from .pointwise import scaled
from .shapes import spread


@converts("aten.linear.default")
def _linear(call: Call, x: Op, weight: Op, bias: Op | None) -> Any:
    if weight.tensor.rank != 2:
        return no("a weight with {} dimensions", weight.tensor.rank)
    return op.linear(x, weight, bias)


@converts(
    "aten.mm.default",
    "aten.bmm.default",
    "aten.matmul.default",
    "aten.mv.default",
    "aten.dot.default",
)
def _matmul(call: Call, **operands: Op) -> Any:
    return op.matmul(*operands.values())


@converts("aten.addmm.default")
def _addmm(call: Call, x: Op, mat1: Op, mat2: Op, beta: Any, alpha: Any) -> Any:
    if (beta, alpha) == (1, 1) and x.tensor.rank == 1 and x.shape[0] == mat2.shape[1]:
        return op.linear(mat1, Permute(mat2, (1, 0)), x)
    return _sum_product(x, mat1, mat2, beta, alpha)


@converts("aten.baddbmm.default")
def _baddbmm(call: Call, x: Op, batch1: Op, batch2: Op, beta: Any, alpha: Any) -> Any:
    return _sum_product(x, batch1, batch2, beta, alpha)


def _sum_product(x: Op, a: Op, b: Op, beta: Any, alpha: Any) -> Any:
    product = scaled(op.matmul(a, b), alpha)
    return product if beta == 0 else op.add(scaled(x, beta), product)


@converts("aten.outer.default", "aten.ger.default")
def _outer(call: Call, x: Op, vec2: Op) -> Any:
    n, m = call.shape
    return op.mul(Reshape(x, (n, 1)), Reshape(vec2, (1, m)))


@converts("aten.einsum.default")
def _einsum(call: Call, equation: str, tensors: tuple[Op, ...], path: Any = None) -> Any:
    """One or two operands, no letter twice in one: a permutation, or a matrix product."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    distinct = all(len(set(t)) == len(t) and t.isalpha() for t in terms)
    if not arrow or len(terms) > 2 or not distinct:
        return no("einsum {}", equation)
    sizes = {
        c: s for t, x in zip(terms, tensors, strict=True) for c, s in zip(t, x.shape) if s != 1
    }
    if any(x.shape[i] != sizes.get(c, 1) for t, x in zip(terms, tensors) for i, c in enumerate(t)):
        return no("einsum {} with broadcast sizes", equation)
    both = set(terms[0]) & set(terms[-1])
    summed: list[Op] = []
    for term, x in zip(terms, tensors):
        alone = tuple(
            i for i, c in enumerate(term) if c not in out and (len(terms) == 1 or c not in both)
        )
        summed.append(op.sum(x, alone) if alone else x)
    letters = ["".join(c for c in t if c in out or (len(terms) == 2 and c in both)) for t in terms]
    if len(terms) == 1:
        return Permute(summed[0], tuple(letters[0].index(c) for c in out))

    def grouped(x: Op, term: str, *groups: str) -> Op:
        x = Permute(x, tuple(term.index(c) for g in groups for c in g))
        each = [sizes.get(c, 1) for c in groups[0]]
        return Reshape(
            x, (*each, *(product(tuple(sizes.get(c, 1) for c in g)) for g in groups[1:]))
        )

    batch = "".join(c for c in out if c in both)
    inner = "".join(c for c in letters[0] if c in both and c not in out)
    rows = "".join(c for c in letters[0] if c not in both)
    columns = "".join(c for c in letters[1] if c not in both)
    y = op.matmul(
        grouped(summed[0], letters[0], batch, rows, inner),
        grouped(summed[1], letters[1], batch, inner, columns),
    )
    made = batch + rows + columns
    y = Reshape(y, tuple(sizes.get(c, 1) for c in made))
    return Permute(y, tuple(made.index(c) for c in out))


@converts("aten.conv_transpose2d.input")
def _conv_transpose(
    call: Call, x: Op, weight: Op, bias: Op | None, stride: Any, padding: Any, output_padding: Any,
    groups: int, dilation: Any,
) -> Any:  # fmt: skip
    """Windows side by side, as where a size doubles: a 1x1 convolution, then a pixel shuffle."""
    into, out, *kernel = weight.shape
    moved = (*as_tuple(padding, 2), *as_tuple(output_padding, 2), groups - 1)
    apart = tuple(kernel) == as_tuple(stride, 2) and kernel[0] == kernel[1]
    if not apart or any(moved) or as_tuple(dilation, 2) != (1, 1) or x.tensor.rank != 4:
        return no("transposed convolution with a {} kernel and stride {}", tuple(kernel), stride)
    taps = kernel[0] * kernel[1]
    w = Reshape(Permute(weight, (1, 2, 3, 0)), (out * taps, into, 1, 1))
    if bias is not None:
        bias = Reshape(spread(Reshape(bias, (out, 1)), 1, taps), (out * taps,))
    return op.pixel_shuffle(op.conv2d(x, w, bias), kernel[0])


@converts("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def _conv(
    call: Call,
    x: Op,
    weight: Op,
    bias: Op | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    spatial = weight.tensor.rank - 2
    made = {1: op.conv1d, 2: op.conv2d, 3: op.conv3d}[spatial]
    batched = x.tensor.rank == spatial + 2
    x = x if batched else Reshape(x, (1, *x.shape))
    sizes = (as_tuple(v, spatial) for v in (stride, padding, dilation))
    y = made(x, weight, bias, *sizes, groups)
    return y if batched else Reshape(y, y.shape[1:])


@converts("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def _conv_padding(
    call: Call,
    x: Op,
    weight: Op,
    bias: Op | None,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Any:
    spatial = weight.tensor.rank - 2
    if padding == "valid":
        return _conv(call, x, weight, bias, stride, (0,), dilation, groups)
    total = [d * (k - 1) for d, k in zip(as_tuple(dilation, spatial), weight.shape[2:])]
    if any(t % 2 for t in total):
        return no('padding "same" of an even kernel is not symmetric')
    return _conv(call, x, weight, bias, stride, tuple(t // 2 for t in total), dilation, groups)


def as_tuple(value: Any, n: int) -> tuple[Any, ...]:
    value = (
        value
        if isinstance(value, tuple)
        else (tuple(value) if isinstance(value, list) else (value,))
    )
    return value * n if len(value) == 1 else value


@converts("aten.scaled_dot_product_attention.default")
def _attention(
    call: Call, query: Op, key: Op, value: Op, attn_mask: Op | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Any:  # fmt: skip
    if dropout_p:
        return no("dropout {} inside attention", dropout_p)
    scale = None if scale is None else float(scale)
    return op.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)


@converts("aten._transformer_encoder_layer_fwd.default")
def _encoder_layer(
    call: Call, src: Op, embed_dim: int, num_heads: int, qkv_weight: Op, qkv_bias: Op,
    proj_weight: Op, proj_bias: Op, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Op, norm_bias_1: Op, norm_weight_2: Op, norm_bias_2: Op, ffn_weight_1: Op,
    ffn_bias_1: Op, ffn_weight_2: Op, ffn_bias_2: Op, mask: Op | None, mask_type: int | None,
) -> Any:  # fmt: skip
    """The one call that torch.nn.TransformerEncoderLayer makes in inference."""
    if mask is not None or src.tensor.rank != 3:
        return no("an encoder layer with {}", "a mask" if mask is not None else "packed sequences")
    batch, length, width = src.shape

    def attended(x: Op) -> Op:
        qkv = op.linear(x, qkv_weight, qkv_bias)
        parts = Reshape(qkv, (batch, length, 3, num_heads, floordiv(width, num_heads)))
        parts = Permute(parts, (2, 0, 3, 1, 4))
        q, k, v = (
            Reshape(SliceOp(parts, dim=0, start=i, size=1), parts.shape[1:]) for i in range(3)
        )
        y = Permute(op.attention(q, k, v), (0, 2, 1, 3))
        return op.linear(Reshape(y, src.shape), proj_weight, proj_bias)

    def fed(x: Op) -> Op:
        h = op.linear(x, ffn_weight_1, ffn_bias_1)
        return op.linear(op.gelu(h) if use_gelu else op.relu(h), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Op) -> Op:
        return op.layer_norm(x, norm_weight_1, norm_bias_1, 1, float(eps))

    def norm_2(x: Op) -> Op:
        return op.layer_norm(x, norm_weight_2, norm_bias_2, 1, float(eps))

    if norm_first:
        x = op.add(src, attended(norm_1(src)))
        return op.add(x, fed(norm_2(x)))
    x = norm_1(op.add(src, attended(src)))
    return norm_2(op.add(x, fed(x)))
