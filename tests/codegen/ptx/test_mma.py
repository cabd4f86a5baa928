"""Matrix instructions against torch's products. The layouts are written down here a second time,
from the figures of the PTX ISA (9.7.14, "Matrix fragments"): which element a lane's register holds."""

import numpy as np
import pytest
import torch

from .harness import kernel

# name: matrix shape, types as PTX names them, how numpy draws them
SHAPES = {
    "f16_k16": ("m16n8k16", "f32.f16.f16.f32", 16),
    "f16_k8": ("m16n8k8", "f32.f16.f16.f32", 16),
    "f16_f16": ("m16n8k16", "f16.f16.f16.f16", 16),
    "bf16_k16": ("m16n8k16", "f32.bf16.bf16.f32", 16),
    "tf32_k8": ("m16n8k8", "f32.tf32.tf32.f32", 32),
    "tf32_k4": ("m16n8k4", "f32.tf32.tf32.f32", 32),
    "s8_k32": ("m16n8k32", "s32.s8.s8.s32", 8),
    "u8s8_k16": ("m16n8k16", "s32.u8.s8.s32", 8),
    "s8_m8": ("m8n8k16", "s32.s8.s8.s32", 8),
    "s4_k64": ("m16n8k64", "s32.s4.s4.s32", 4),
    "u4_k32": ("m16n8k32", "s32.u4.u4.s32", 4),
    "and": ("m16n8k256", "s32.b1.b1.s32.and.popc", 1),
    "xor": ("m16n8k128", "s32.b1.b1.s32.xor.popc", 1),
}


def dims(shape):
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def draw(rng, kind, shape):
    if kind in ("f16", "bf16", "tf32"):
        return torch.from_numpy(rng.standard_normal(shape)).float().to(
            {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float16}[kind]
        ).double().numpy()  # fmt: skip
    lo, hi = {"s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16), "b1": (0, 2)}[kind]
    return rng.integers(lo, hi, shape).astype(np.float64)


def encode(values, kind):
    """Elements of one register, lowest first, to its bits."""
    if kind == "tf32":
        return int(np.float32(values[0]).view(np.uint32))
    if kind in ("f16", "bf16"):
        t = torch.tensor(values).to(torch.float16 if kind == "f16" else torch.bfloat16)
        parts = t.view(torch.int16).numpy().view(np.uint16)
        return int(parts[0]) | int(parts[1]) << 16
    bits = {"s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1}[kind]
    return sum((int(v) & ((1 << bits) - 1)) << bits * i for i, v in enumerate(values))


def fragments(a, kind, bits):
    """Registers [count, 32] of A (rows m) or of B's transpose (rows n): lane 4 g + t has the elements
    from column t * e on of rows g, g + 8, then the next columns."""
    e = 32 // bits
    rows, k = a.shape
    regs = []
    for column in range(0, k, 4 * e):
        for row in range(0, rows, 8):
            regs.append(
                [
                    encode(a[row + lane // 4, column + lane % 4 * e :][:e], kind)
                    for lane in range(32)
                ]
            )
    return np.array(regs, np.uint32)


def positions(m):
    """(row, column) of accumulator register r in a lane."""
    return [
        [(lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2) for lane in range(32)]
        for r in range(m // 4)
    ]


def body(name, na, nb, nc, at=0):
    shape, types, _ = SHAPES[name]
    regs = lambda base, n: "{" + ", ".join(f"%r{base + i}" for i in range(n)) + "}"  # noqa: E731
    lines = ["mad.wide.u32 %d0, %t, 4, %q1;", "mad.wide.u32 %d1, %t, 4, %q2;",
             "mad.wide.u32 %d2, %t, 4, %q3;", "mad.wide.u32 %d3, %t, 4, %q0;"]  # fmt: skip
    for base, n, d in ((0, na, 0), (20, nb, 1), (40, nc, 2)):
        lines += [f"ld.global.b32 %r{base + i}, [%d{d}+{at + 128 * i}];" for i in range(n)]
    lines.append(
        f"mma.sync.aligned.{shape}.row.col.{types} {regs(60, nc)}, {regs(0, na)}, {regs(20, nb)}, {regs(40, nc)};"
    )
    lines += [f"st.global.b32 [%d3+{at + 128 * i}], %r{60 + i};" for i in range(nc)]
    return "{\n" + "\n".join(lines) + "\n}"


def operands(name):
    """Registers of A, B and C for a shape, and what A B + C should be."""
    shape, types, bits = SHAPES[name]
    m, n, k = dims(shape)
    td, ka, kb, _ = types.split(".")[:4]
    rng = np.random.default_rng(3)
    a, b = draw(rng, ka, (m, k)), draw(rng, kb, (n, k))
    c = np.round(rng.standard_normal((m, n)) * 8)
    if "popc" in types:
        x, y = a.astype(int)[:, None, :], b.astype(int)[None]
        product = ((x ^ y) if "xor" in types else (x & y)).sum(-1)
    else:
        product = a @ b.T
    return fragments(a, ka, bits), fragments(b, kb, bits), accumulators(c, m, td), product + c


@pytest.fixture(scope="module")
def products():
    """All shapes in one kernel: each has 16 rows of 32 registers in every array."""
    arrays = [np.zeros((len(SHAPES), 16, 32), np.uint32) for _ in range(4)]
    text = ""
    for i, name in enumerate(SHAPES):
        *regs, _ = operands(name)
        for array, r in zip(arrays[1:], regs):
            array[i, : len(r)] = r
        text += body(name, *map(len, regs), at=i * 16 * 128)
    kernel(text, ("u64",) * 4).launch(1, arrays)
    return dict(zip(SHAPES, arrays[0]))


@pytest.mark.parametrize("name", SHAPES)
def test_mma_is_a_matrix_product(products, name):
    shape, types, _ = SHAPES[name]
    td = types.split(".")[0]
    want = operands(name)[-1]
    tolerance = 0 if td == "s32" else 1e-5 * dims(shape)[2] if td == "f32" else 0.05
    assert np.abs(read(products[name], len(want), td) - want).max() <= tolerance


def accumulators(c, m, td):
    if td == "f16":
        halves = c.astype(np.float16).view(np.uint16).astype(np.uint32)
        return np.array(
            [[halves[x] | halves[y] << 16 for x, y in zip(positions(m)[r], positions(m)[r + 1])]
             for r in range(0, m // 4, 2)], np.uint32)  # fmt: skip
    c = c.astype(np.float32).view(np.uint32) if td == "f32" else c.astype(np.int32).view(np.uint32)
    return np.array([[c[p] for p in row] for row in positions(m)], np.uint32)


def read(out, m, td):
    got = np.zeros((m, 8))
    for r, row in enumerate(positions(m)):
        if td == "f16":
            halves = np.ascontiguousarray(out[r // 2]).view(np.float16).reshape(32, 2)[:, r % 2]
            values = halves.astype(float)
        else:
            values = out[r].view(np.float32 if td == "f32" else np.int32).astype(float)
        for lane, p in enumerate(row):
            got[p] = values[lane]
    return got


def test_mma_of_doubles():
    k = kernel("""
mad.wide.u32 %d0, %t, 8, %q1;
ld.global.b64 %d1, [%d0];
mad.wide.u32 %d0, %t, 8, %q2;
ld.global.b64 %d2, [%d0];
mov.f64 %d5, 0d0000000000000000;
mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d3, %d4}, {%d1}, {%d2}, {%d5, %d5};
mad.wide.u32 %d0, %t, 16, %q0;
st.global.v2.f64 [%d0], {%d3, %d4};
""", ("u64",) * 3)  # fmt: skip
    a, b = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    out = torch.zeros(8, 8, dtype=torch.float64)
    k.launch(1, [out, a, b])
    assert torch.allclose(out, a @ b.T)


def test_saturating_product_stays_at_the_ends():
    text = body("s8_m8", 1, 1, 2).replace("row.col.s32", "row.col.satfinite.s32")
    k = kernel(text, ("u64",) * 4)
    a = np.full((1, 32), 0x7F7F7F7F, np.uint32)
    c = np.full((2, 32), 2**31 - 1, np.uint32)
    out = np.zeros_like(c)
    k.launch(1, [out, a, a, c])
    assert (out == 2**31 - 1).all()


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_hands_out_tiles(trans):
    """Lanes 8 i to 8 i + 7 name the rows of tile i; lane 4 g + t gets elements 2 t, 2 t + 1 of row g."""
    k = kernel(f"""
.shared .align 16 .b8 s[512];
mad.wide.u32 %d0, %t, 16, %q1;
ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%d0];
mov.u32 %r8, s;
mad.lo.u32 %r9, %t, 16, %r8;
st.shared.v4.b32 [%r9], {{%r0, %r1, %r2, %r3}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x4{".trans" if trans else ""}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r9];
mad.wide.u32 %d1, %t, 16, %q0;
st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
""")  # fmt: skip
    tiles = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    k.launch(1, [out, tiles], check=True)
    want = tiles.transpose(1, 2) if trans else tiles
    assert torch.equal(out.transpose(0, 1).reshape(4, 8, 8), want)
