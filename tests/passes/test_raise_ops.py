"""raise-ops: layers as models write them by hand become one op, and near misses say why not."""

import math

import pytest
import torch
from torch import nn

RAISE = "simplify,raise-ops"
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def left(ran):
    """Ops that run at every call, without those that only move elements."""
    moved = {"reshape", "permute", "expand", "slice"}
    nodes = (n for n in ran.after.nodes if n not in ran.after.constants)
    return [n.name for n in nodes if n.name not in moved]


@pytest.fixture
def raised(run, captured):
    def raised(fn, *inputs, pipeline=RAISE):
        return run(captured(fn, *inputs), pipeline, inputs=list(inputs))

    return raised


class Norm(nn.Module):
    def __init__(self, forward, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16).to(dtype))
        self.b = nn.Parameter(torch.randn(16).to(dtype))
        self.form = forward

    def forward(self, x):
        return self.form(self, x)


def rms(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# ------------------------------------------------------------------ norms

RMS_FORMS = {
    "hugging face": lambda m, x: m.w * rms(x.float()).to(x.dtype),
    "weight before the cast": lambda m, x: (m.w * rms(x.float())).to(x.dtype),
    "divided by the root": lambda m, x: (
        m.w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))
    ),
    "gemma": lambda m, x: (rms(x.float()) * (1.0 + m.w.float())).type_as(x),
    "t5": lambda m, x: (
        m.w * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6))
    ).to(x.dtype),
}


@pytest.mark.parametrize("form", RMS_FORMS)
def test_rms_norm(raised, form):
    ran = raised(Norm(RMS_FORMS[form]), X)
    assert left(ran) == ["rms_norm"]
    assert ran.after.outputs[0].weight is not None


@pytest.mark.parametrize(
    ("form", "ops"),
    [
        ("hugging face", ["rms_norm", "mul"]),
        ("weight before the cast", ["cast", "rms_norm", "cast"]),
        ("gemma", ["cast", "rms_norm", "cast"]),
        ("t5", ["cast", "rms_norm", "cast"]),
    ],
)
def test_rms_norm_in_bf16_keeps_every_rounding(raised, form, ops):
    ran = raised(Norm(RMS_FORMS[form], torch.bfloat16), X.bfloat16())
    assert left(ran) == ops


def test_rms_norm_in_bf16_throughout_is_left(raised):
    ran = raised(lambda x: rms(x), X.bfloat16())
    assert ran.reasons("RaiseRmsNorm")[0] == "a different order of roundings shows in bf16"


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (
            lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
            "the mean is not along rows",
        ),
        (
            lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6),
            "the mean is of abs, not of the square of x",
        ),
    ],
)
def test_near_misses_of_rms_norm(raised, fn, reason):
    assert raised(fn, X).reasons("RaiseRmsNorm")[0] == reason


def layer_norm(m, x):
    d = x - x.mean(-1, keepdim=True)
    return m.w * (d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)) + m.b


def test_layer_norm(raised):
    ran = raised(Norm(layer_norm), X)
    assert left(ran) == ["layer_norm"]
    assert ran.after.outputs[0].bias is not None


def test_a_modulation_per_sample_stays_outside(raised):
    ran = raised(
        lambda x, s: nn.functional.layer_norm(x, (16,)) * (1 + s[:, None]), X, torch.randn(2, 16)
    )
    assert left(ran) == ["layer_norm", "add", "mul"]
    assert ran.reasons("NormWeight")[0] == "the factor is not one f32 a column"


def test_softmax(raised):
    def softmax(x):
        e = torch.exp(x - x.amax(1, keepdim=True))
        return e / e.sum(1, keepdim=True)

    assert left(raised(softmax, X)) == ["softmax"]
    ran = raised(
        lambda x: x.exp() / x.exp().sum(1, keepdim=True),
        X,
        pipeline="eliminate-common-subexpressions,raise-ops",
    )
    assert ran.reasons("RaiseSoftmax")[0] == "the terms are not exp(x - amax(x))"


# ------------------------------------------------------------------ activations

ROOT = math.sqrt(2.0 / math.pi)
ACTIVATIONS = {
    "silu": lambda x: torch.sigmoid(x) * x,
    "erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf, late half": lambda x: 0.5 * (x * (1 + torch.erf(x * 0.7071067811865476))),
    "tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "tanh, product": lambda x: x * 0.5 * (1 + torch.tanh(ROOT * (x + 0.044715 * x * x * x))),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations(raised, form):
    expected = "silu" if form == "silu" else "gelu"
    assert left(raised(ACTIVATIONS[form], X)) == [expected]


def test_quick_gelu_stays_pointwise(raised):
    assert left(raised(lambda x: x * torch.sigmoid(1.702 * x), X)) == ["mul", "sigmoid", "mul"]


def test_another_constant_is_no_gelu(raised):
    ran = raised(lambda x: x * 0.5 * (1 + torch.erf(x / 1.5)), X)
    assert ran.reasons("RaiseGelu")[0] == "the argument of erf is not that of a gelu of x"


def test_activations_in_bf16_are_left(raised):
    ran = raised(ACTIVATIONS["silu"], X.bfloat16())
    assert ran.reasons("RaiseSilu")[0] == "a different order of roundings shows in bf16"


# ------------------------------------------------------------------ rotary embedding

Q = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(2))
COS, SIN = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3)).unbind(0)


def rotate_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_unbound(x):
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-imag, real], dim=-1).flatten(3)


@pytest.mark.parametrize("rotate", [rotate_half, rotate_pairs, rotate_unbound])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope(raised, rotate, dtype):
    x, cos, sin = Q.to(dtype), COS.to(dtype), SIN.to(dtype)
    ran = raised(lambda x, c, s: x * c + rotate(x) * s, x, cos, sin)
    assert left(ran) == ["rope"]
    assert ran.after.outputs[0].interleaved == (rotate is not rotate_half)
    assert ran.errors == [0.0]


def test_rope_of_flux_with_casts(raised):
    def rope(x, c, s):
        return (x.float() * c + rotate_unbound(x).float() * s).to(x.dtype)

    ran = raised(rope, Q.bfloat16(), COS, SIN)
    assert left(ran) == ["cast", "rope", "cast"]
    assert ran.errors == [0.0]


def test_rope_over_a_part_of_the_head(raised):
    def partial(x, c, s):
        turning, rest = x[..., :8], x[..., 8:]
        return torch.cat((turning * c + rotate_half(turning) * s, rest), -1)

    ran = raised(partial, Q, COS[..., :8].contiguous(), SIN[..., :8].contiguous())
    assert left(ran) == ["rope", "cat"]


def test_complex_rope(raised):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("freqs", torch.polar(torch.ones(5, 8), torch.randn(5, 8)))

        def forward(self, x):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.freqs).flatten(3)

    assert left(raised(Complex(), Q)) == ["rope"]


def test_rotation_the_other_way_is_no_rope(raised):
    def turned(x, c, s):
        half = x.shape[-1] // 2
        return x * c + torch.cat((x[..., half:], -x[..., :half]), -1) * s

    assert (
        raised(turned, Q, COS, SIN).reasons("RaiseRope")[0]
        == "neither factor is the other, rotated"
    )


# ------------------------------------------------------------------ attention

K, V = torch.randn(2, 2, 4, 5, 16, generator=torch.Generator().manual_seed(4)).unbind(0)
MASK = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(5))

ATTENTION = {
    "scaled": lambda q, k, v: ((q @ k.transpose(-1, -2)) * 0.25).softmax(-1) @ v,
    "divided": lambda q, k, v: ((q @ k.mT) / math.sqrt(16)).softmax(-1) @ v,
    "scaled queries": lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v,
    "scaled both": lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v,
    "unscaled": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
}


@pytest.mark.parametrize("form", ATTENTION)
def test_attention(raised, form):
    ran = raised(ATTENTION[form], Q, K, V)
    assert [n for n in left(ran) if n != "mul"] == ["attention"]


def test_attention_of_heads_folded_into_the_batch(raised):
    q, k, v = (t.flatten(0, 1) for t in (Q, K, V))
    mask = torch.randn(5, 5)

    def bmm(q, k, v, mask):
        scores = torch.baddbmm(mask[None].expand(8, 5, 5), q * 0.25, k.transpose(1, 2))
        return torch.bmm(torch.softmax(scores, -1), v)

    assert left(raised(bmm, q, k, v, mask)) == ["attention"]


def test_attention_with_a_mask(raised):
    ran = raised(lambda q, k, v, m: (q @ k.mT * 0.25 + m).softmax(-1) @ v, Q, K, V, MASK)
    assert left(ran) == ["attention"] and ran.after.outputs[0].mask is not None


def test_attention_with_a_filled_mask(raised):
    low = torch.finfo(torch.float32).min

    def filled(q, k, v, keep):
        return torch.where(keep, q @ k.mT * 0.25, torch.full([], low)).softmax(-1) @ v

    def masked_fill(q, k, v, keep):
        return (q @ k.mT * 0.25).masked_fill(~keep, low).softmax(-1) @ v

    keep = torch.randn(2, 1, 5, 5) > 0
    keep[:, :, 2] = False  # a row without keys: every score is the lowest number
    for form in (filled, masked_fill):
        ran = raised(form, Q, K, V, keep)
        assert [n for n in left(ran) if n != "bitwise_not"] == ["where", "attention"]


def test_scores_filled_with_a_number_in_their_range_stay(raised):
    ran = raised(
        lambda q, k, v, m: (q @ k.mT).masked_fill(m, -9.0).softmax(-1) @ v, Q, K, V, MASK > 0
    )
    assert "not below all others" in ran.reasons("RaiseAttention")[0]


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (
            lambda q, k, v, m: ((q @ k.mT + m) * 0.25).softmax(-1) @ v,
            "the scale is applied after the mask",
        ),
        (lambda q, k, v, m: (q @ k.mT).softmax(-2) @ v, "the softmax is along dimension 2"),
        (lambda q, k, v, m: (q @ k.mT + m + m).softmax(-1) @ v, "two masks are added"),
        (lambda q, k, v, m: (q @ k.mT * q[..., :1]).softmax(-1) @ v, "the scale is not a number"),
        (lambda q, k, v, m: (s := q @ k.mT, s.softmax(-1) @ v), "matmul is also used elsewhere"),
        (
            lambda q, k, v, m: (q @ k.mT).tanh().softmax(-1) @ v,
            "tanh is not a product of queries and keys",
        ),
    ],
)
def test_near_misses_of_attention(raised, fn, reason):
    ran = raised(fn, Q, K, V, MASK)
    assert "attention" not in left(ran)
    assert reason in ran.reasons("RaiseAttention")


def test_probabilities_that_are_returned_keep_the_product(raised):
    def returned(q, k, v):
        p = (q @ k.mT).softmax(-1)
        return p @ v, p

    assert raised(returned, Q, K, V).reasons("RaiseAttention")[0] == "softmax is also an output"


def test_attention_in_bf16_is_left(raised):
    ran = raised(ATTENTION["scaled"], Q.bfloat16(), K.bfloat16(), V.bfloat16())
    assert ran.reasons("RaiseAttention")[0] == "a different order of roundings shows in bf16"


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


@pytest.mark.parametrize("whole", [True, False])
def test_repeated_heads_become_groups(raised, whole):
    def grouped(q, k, v):
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        if whole:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(2, 3) * 0.25).softmax(-1) @ v

    ran = raised(grouped, Q, K[:, :2].contiguous(), V[:, :2].contiguous())
    assert left(ran) == ["attention"] and ran.after.outputs[0].gqa


def test_heads_repeated_in_another_order_stay(raised):
    def tiled(q, k, v):
        k, v = (t[:, None].expand(2, 2, 2, 5, 16).reshape(2, 4, 5, 16) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v)

    ran = raised(tiled, Q, K[:, :2].contiguous(), V[:, :2].contiguous())
    assert ran.reasons("GroupHeads")[0] == "k or v is not repeated over heads"


def attend(mask):
    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, mask())

    return attend


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (lambda: torch.arange(5)[:, None] >= torch.arange(5), True),
        (lambda: torch.full((5, 5), float("-inf")).triu(1)[None, None], True),
        (lambda: torch.where(torch.arange(5)[:, None] >= torch.arange(5), 0.0, -3.4e38), True),
        (lambda: torch.ones(2, 1, 5, 5, dtype=torch.bool), False),
    ],
)
def test_constant_masks(raised, mask, causal):
    ran = raised(attend(mask), Q, K, V)
    attention = ran.after.outputs[0]
    assert attention.mask is None and attention.causal == causal


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda: torch.arange(5)[:, None] > torch.arange(5) - 2, "the mask is of another shape"),
        (
            lambda: torch.where(torch.arange(5)[:, None] >= torch.arange(5), 0.5, -3.4e38),
            "the mask is neither zero nor lowest everywhere",
        ),
    ],
)
def test_near_misses_of_constant_masks(raised, mask, reason):
    ran = raised(attend(mask), Q, K, V)
    assert ran.after.outputs[0].mask is not None
    assert ran.reasons("ConstantMask")[0] == reason


def test_masks_from_inputs_and_weights_stay(raised):
    ran = raised(lambda q, k, v, m: attend(lambda: m)(q, k, v), Q, K, V, MASK)
    assert ran.reasons("ConstantMask")[0] == "the mask is computed from inputs"

    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("m", torch.ones(5, 5, dtype=torch.bool).tril())

        def forward(self, q, k, v):
            return attend(lambda: self.m)(q, k, v)

    ran = raised(Buffer(), Q, K, V)
    assert ran.reasons("ConstantMask")[0] == "the mask is a weight, or computed from one"


def test_multihead_attention(raised):
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    ran = raised(SelfAttention(module), X)
    assert [n for n in left(ran) if n not in ("mul", "copy", "div")] == [
        "linear",
        "attention",
        "linear",
    ]


class SelfAttention(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x, x, need_weights=True)[0]


# ------------------------------------------------------------------ layers


def test_pixel_shuffle(raised):
    def shuffle(x):
        b, c, h, w = x.shape
        return (
            x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, h * 2, w * 2)
        )

    ran = raised(shuffle, torch.randn(2, 8, 3, 5))
    assert left(ran) == ["pixel_shuffle"] and ran.errors == [0.0]


def test_linear_over_rows(raised):
    class Conv1D(nn.Module):  # as GPT-2 has it
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return torch.addmm(self.b, x.view(-1, 16), self.w).view(2, 5, 8)

    ran = raised(Conv1D(), X, pipeline=f"{RAISE},simplify")
    assert ran.ops() == ["permute", "linear"]


def test_pooling_over_the_image(raised):
    ran = raised(lambda x: nn.functional.avg_pool2d(x, (3, 5)), torch.randn(2, 8, 3, 5))
    assert left(ran) == ["mean"]
    ran = raised(lambda x: nn.functional.avg_pool2d(x, 2), torch.randn(2, 8, 4, 6))
    assert ran.reasons("PoolAllToMean")[0] == "the window (2, 2) is not the image"


def test_nothing_to_do_is_the_same_graph(run):
    assert run("def graph(x: f32[4]):\n    y = exp(x)\n    return y,\n", "raise-ops").unchanged


class Matrix(nn.Module):
    def __init__(self, bias=8):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(bias))

    def forward(self, x):
        return x @ self.w + self.b


def test_a_product_with_a_constant_matrix_is_a_linear_layer(raised):
    ran = raised(Matrix(), X)
    assert left(ran) == ["linear"] and ran.after.outputs[0].bias is not None
    ran = raised(Matrix(bias=1), X)
    assert ran.reasons("AddToBias")[0] == "f32[1] is not one value an output feature"


def test_padding_before_a_convolution(raised):
    conv = nn.Conv2d(3, 4, 3, padding=(0, 1))
    ran = raised(nn.Sequential(nn.ZeroPad2d(2), conv), torch.randn(2, 3, 5, 6))
    assert left(ran) == ["conv2d"] and ran.after.outputs[0].padding == (2, 3)
    ran = raised(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv), torch.randn(2, 3, 5, 6))
    assert ran.reasons("PadIntoConv")[0] == "it pads (0, 0) before and (1, 1) after"
