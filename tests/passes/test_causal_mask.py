"""CausalMask: masks of positions at sizes that only a call knows become causal=True."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.ir import Graph, Input, Tensor, interpret, symbol, verify
from effc.ir.ops.aten import Aten
from effc.ir.rewrite import op
from effc.ir.types import boolean, f32, i64
from effc.passes.base import Context, Pipeline

T = symbol("T")
X, PAD = Input("x", Tensor((2, T, 8), f32)), Input("pad", Tensor((2, 1, T), boolean))
STEPS = op.arange(T, i64)
ROW, COLUMN = op.reshape(STEPS, (T, 1)), op.reshape(STEPS, (1, T))
BEFORE, WINDOW = op.le(COLUMN, ROW), op.gt(COLUMN, op.sub(ROW, 3))
LOWEST = torch.finfo(torch.float32).min


def raised(mask: Any) -> tuple[Any, Context]:
    """The attention after raise-ops; its values are those from before."""
    graph = Graph.of((X, PAD), (op.attention(X, X, X, mask),))
    ctx = Context()
    (p,) = Pipeline.parse("raise-ops").passes
    after = verify(p.run(graph, ctx))
    pad = torch.rand(2, 1, 6, generator=torch.manual_seed(0)) < 0.5
    x = torch.randn(2, 6, 8, generator=torch.manual_seed(0))
    (got,), (want,) = interpret(after, [x, pad]), interpret(graph, [x, pad])
    torch.testing.assert_close(got, want)
    return after.outputs[0], ctx


def chosen(keep: Any, low: float) -> Any:
    return op.where(keep, op.full((), 0.0, f32), low)


def test_the_triangle_is_causal() -> None:
    above = Aten(
        "aten.triu.default", (op.full((T, T), -torch.inf, f32), 1), (), of=Tensor((T, T), f32)
    )
    hidden = op.where(op.gt(COLUMN, ROW), -torch.inf, 0.0)
    for mask in (BEFORE, chosen(BEFORE, LOWEST), chosen(BEFORE, -torch.inf), above, hidden):
        found, ctx = raised(mask)
        assert found.causal and found.mask is None
        assert ctx.stats["CausalMask"].hits == 1


def test_the_rest_stays() -> None:
    everywhere = op.full((), True, boolean)
    for low in (None, -torch.inf):
        keep = op.bitwise_and(op.bitwise_and(everywhere, BEFORE), PAD)
        found, _ = raised(keep if low is None else chosen(keep, low))
        assert found.causal and found.mask is PAD
    both = op.expand(op.logical_and(op.logical_and(WINDOW, BEFORE), PAD), (2, T, T))
    found, _ = raised(both)
    assert found.causal and found.mask.name == "bitwise_and"
    assert {found.mask.a, found.mask.b} == {WINDOW, PAD}
    found, _ = raised(chosen(op.bitwise_and(BEFORE, WINDOW), LOWEST))
    assert found.causal and found.mask is WINDOW


@pytest.mark.parametrize(
    "mask, why",
    [
        (chosen(op.bitwise_and(BEFORE, PAD), LOWEST),
         "a row of the mask may be -3.4028234663852886e+38 everywhere"),
        (chosen(BEFORE, -1.0), "the mask chooses between 0.0 and -1.0"),
        (op.le(COLUMN, op.add(ROW, 1)), "no part of the mask is j <= i"),
        (op.lt(COLUMN, ROW), "no part of the mask is j <= i"),
        (op.le(ROW, COLUMN), "no part of the mask is j <= i"),
        (WINDOW, "no part of the mask is j <= i"),
        (op.bitwise_or(BEFORE, WINDOW), "no part of the mask is j <= i"),
        (op.mul(op.cast(BEFORE, f32), 2.0), "the mask is mul"),
    ],
)  # fmt: skip
def test_other_masks_stay_as_they_are(mask: Any, why: str) -> None:
    found, ctx = raised(mask)
    assert not found.causal and found.mask is not None
    assert [m.reason for m in ctx.stats["CausalMask"].misses] == [why]


def test_a_rectangle_is_not_looked_at() -> None:
    q = Input("q", Tensor((2, symbol("S"), 8), f32))
    rows = op.reshape(op.arange(symbol("S"), i64), (symbol("S"), 1))
    graph = Graph.of((q, X), (op.attention(q, X, X, op.le(COLUMN, rows)),))
    ctx = Context()
    assert Pipeline.parse("raise-ops").passes[0].run(graph, ctx).outputs == graph.outputs
    assert [m.reason for m in ctx.stats["CausalMask"].misses] == ["S queries, T keys"]
