"""Gathers, made tensors and rotary embedding on GPUs against the interpreter."""

from __future__ import annotations

import pytest
import torch

MADE = """
def graph(x: f32[A, B], t: bf16[V, D], ids: i64[A, B], small: i32[A], n: size, r: number):
    y0 = embedding(t, ids)
    y1 = arange(size=A, dtype_=f32, start=2, step=0.5)
    y2 = arange(size=B, dtype_=i64, start=n, step=-3)
    y3 = full(to=(A, 3), value=B, dtype_=i64)
    y4 = full(to=(A, B), value=0.1, dtype_=bf16)
    y5 = permute(t, dims=(1, 0))
    y6 = embedding(y5, small)
    y7 = full(to=(B,), value=r, dtype_=f32)
    return y0, y1, y2, y3, y4, y6, y7
"""


def test_lookups_and_made_tensors_of_all_sizes(compiled) -> None:
    run = compiled(MADE, backend="ptx-host")
    for a, b, n, r in ((3, 5, 2, 0.5), (1, 1, 0, 3.0), (17, 2, 5, -1e-3), (4, 0, 1, 2)):
        ids, small = torch.randint(0, 7, (a, b)), torch.randint(0, 4, (a,), dtype=torch.int32)
        run(torch.randn(a, b), torch.randn(7, 4).bfloat16(), ids, small, n, r)


@pytest.mark.parametrize("bad", [7, -1, 2**40])
def test_an_index_outside_the_table_raises(compiled, bad) -> None:
    run = compiled(
        "\ndef graph(t: f32[7, 20], ids: i64[N]):\n    y0 = embedding(t, ids)\n    return y0,\n",
        backend="ptx-host",
    )
    run(torch.randn(7, 20), torch.tensor([0, 6, 3]))
    with pytest.raises(IndexError):
        run.bound([torch.randn(7, 20), torch.tensor([0, bad, 3])])
    run(torch.randn(7, 20), torch.tensor([0, 6, 3]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(compiled, interleaved) -> None:
    """Heads in another order, as projections leave them, and cos and sin that are shared."""
    run = compiled(
        f"""
def graph(x: f32[B, N, 4, 16], c: f32[N, 16], s: f32[N, 16], h: f16[2, 3, 5, 6], z: f16[5, 6]):
    y0 = permute(x, dims=(0, 2, 1, 3))
    y1 = rope(y0, c, s, interleaved={interleaved})
    y2 = rope(h, z, z, interleaved={interleaved})
    return y1, y2
""",
        backend="ptx-host",
    )
    h, z = torch.randn(2, 3, 5, 6).half(), torch.randn(5, 6).half()
    for batch, n in ((1, 1), (2, 7), (0, 3), (3, 130)):
        run(torch.randn(batch, n, 4, 16), torch.randn(n, 16), torch.randn(n, 16), h, z)


UPDATE = """
def graph(x: f32[3, C, 5], a: f32[5, N, 3], at: i64[()], s: State[f16[2, 4, C]], b: f16[2, 4, 1]):
    t = permute(a, dims=(2, 1, 0))
    y0 = update(x, t, at, dim=1)
    u = update(s, b, at, dim=-1)
    y1 = sum(x, dims=(0,))
    return y0, y1, u
"""


def test_update(compiled) -> None:
    """Into a copy where the old value stays, into the state's own memory else; only `at` differs."""
    run = compiled(UPDATE, backend="ptx-host")
    for capacity, new, at in ((7, 2, 3), (7, 7, 0), (40, 1, 39), (9, 0, 8)):
        x, a, b = torch.randn(3, capacity, 5), torch.randn(5, new, 3), torch.randn(2, 4, 1).half()
        s = torch.randn(2, 4, capacity).half()
        got = run.bound([x, a, torch.tensor(at), s, b])
        want = x.clone()
        want[:, at : at + new] = a.permute(2, 1, 0)
        assert torch.equal(got[0], want) and got[2].data_ptr() == s.data_ptr()
        torch.testing.assert_close(got[1], x.sum(0))
        assert torch.equal(s[..., at], b[..., 0])
    copies = [e for e in run.executable.launches if e.kind == "copy"]
    assert len(copies) == 1, "of x, which is read later, and of no state"


@pytest.mark.parametrize("at", [6, 2**40, -1, -(2**63)])
def test_an_update_that_does_not_fit_raises_and_writes_nothing(compiled, at) -> None:
    run = compiled(UPDATE, backend="ptx-host")
    x, a, b = torch.randn(3, 7, 5), torch.randn(5, 2, 3), torch.randn(2, 4, 1).half()
    s = torch.randn(2, 4, 7).half()
    before = s.clone()
    with pytest.raises(IndexError):
        run.bound([x, a, torch.tensor(at), s, b])
    assert torch.equal(s, before) or at == 6  # one position fits there, two do not
    run.bound([x, a, torch.tensor(0), s, b])
