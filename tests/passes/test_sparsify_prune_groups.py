"""prune-groups: which groups stay, and what is stored of them."""

from __future__ import annotations

import pytest
import torch

from effc.ir import Graph, PassError, Tensor, interpret, parse, verify
from effc.ir.formats import GroupQuant, GroupSparse, bits_per_element, quantize
from effc.ir.types import DTYPES, f16
from effc.passes.base import Context
from effc.passes.quantize.gptq import inverse_root
from effc.passes.quantize.latent import compressed
from effc.passes.quantize.weights import layers
from effc.passes.sparsify.importance import corrected, group_scores, keep
from effc.passes.sparsify.prune_groups import picked
from tests.passes.folding import Decoder, ids, logits, raised, ran

GROUPS = "group=8,score=magnitude"


@pytest.fixture(scope="module")
def graph():
    return raised(Decoder(2))


def weights(graph) -> dict[str, torch.Tensor]:
    return {layer.key: layer.value for layer in layers(graph, Context())}


def inputs(k: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated ones, as those of layers are."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 6, generator=made) @ torch.randn(6, k, generator=made) + (
        0.3 * torch.randn(tokens, k, generator=made)
    )


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("index", ["bitmap", "gap", "u16"])
@pytest.mark.parametrize("budget", ["row", "layer"])
def test_the_matrix_is_mask_times_dequantised_bit_for_bit(graph, index, budget) -> None:
    after, ctx = ran(graph, f"prune-groups{{rate=0.4,{GROUPS},index={index},budget={budget}}}")
    verify(after)
    plain, _ = ran(graph, "quantize-weights{bits=4,group=8,zero=True}")
    dense = {c.key: c.value.decode() for c in compressed(plain)}
    original = weights(graph)
    for c in compressed(after):
        mask = keep(group_scores(original[c.key], 8, "magnitude", None), 0.4, budget)
        assert torch.equal(c.value.decode(), dense[c.key] * mask.repeat_interleave(8, 1))
        assert c.node.type.format.kept == int(mask.sum())
    assert len(compressed(after)) == 7 * 2 and "left out" in ctx.notes[-1]
    named = {w.key: w.data for w in after.weights}
    assert torch.equal(logits(parse(after.text, named), ids()), logits(after, ids()))


@pytest.mark.parametrize("options", ["", ",bits=2", ",bits=2b,zero=False", ",bits=8,index=u16"])
def test_rate_0_is_plain_quantisation(graph, options) -> None:
    plain = options.replace(",index=u16", "").replace(",bits", "bits") or "bits=4"
    zero = "" if "zero" in plain else ",zero=True"
    wanted, _ = ran(graph, f"quantize-weights{{{plain},group=8{zero}}}")
    after, _ = ran(graph, f"prune-groups{{rate=0.0,group=8{options}}}")  # reads no data
    assert after == wanted


def test_bits_16_leaves_numbers_as_they_are(graph) -> None:
    after, _ = ran(graph, f"prune-groups{{rate=0.5,{GROUPS},bits=16}}")
    values = [n for n in after.nodes if n.name == "encoded"]
    assert all(n.type.format == GroupSparse(8, n.type.format.kept) for n in values)
    for key, w in weights(graph).items():
        (node,) = (n for n in values if n.xs[0].key == f"{key}:mask")
        mask = keep(group_scores(w, 8, "magnitude", None), 0.5, "row")
        made = interpret(Graph.of((), (node,)), ())[0].decode()
        assert torch.equal(made, w * mask.repeat_interleave(8, 1))
    assert ran(graph, f"prune-groups{{rate=0.0,{GROUPS},bits=16}}")[0] is graph


@pytest.mark.parametrize(("group", "of"), [(16, 16), (8, 8), (8, 16), (16, 8), (8, None)])
def test_what_is_quantised_already_keeps_its_codes(graph, group, of) -> None:
    """Quantise, then prune, needs no code of its own: types nest."""
    coded, _ = ran(graph, f"quantize-weights{{bits=3,group={of},only=*q.weight|*gate*}}")
    both, ctx = ran(coded, f"prune-groups{{rate=0.5,group={group},score=magnitude,only=*q.weight}}")
    verify(both)
    before = {c.key: c.value for c in compressed(coded)}
    for c in compressed(both):
        if not c.key.endswith("q.weight"):
            assert c.node.type == before[c.key].type
            continue
        dense = before[c.key].decode()
        mask = keep(group_scores(dense, group, "magnitude", None), 0.5, "row")
        assert torch.equal(c.value.decode(), dense * mask.repeat_interleave(group, 1))
        assert c.value.type.dtype == DTYPES["int3"]
    again, ctx = ran(both, f"prune-groups{{rate=0.5,group={group},score=magnitude,only=*q.weight}}")
    assert again is both
    (stats,) = ctx.stats.values()
    assert any("left out already" in m.reason for m in stats.misses)


def test_scales_that_no_group_has_are_a_reason(graph) -> None:
    coded, _ = ran(graph, "quantize-weights{bits=4,group=12}")
    after, ctx = ran(coded, "prune-groups{rate=0.5,group=8,score=magnitude}")
    assert after is coded
    (stats,) = ctx.stats.values()
    assert any("are for 12 elements, which are no groups of 8" in m.reason for m in stats.misses)


def test_rows_that_are_no_whole_groups_are_quantised_alone(graph) -> None:
    after, ctx = ran(graph, "prune-groups{rate=0.5,group=16,score=magnitude}")
    for c in compressed(after):
        sparse = isinstance(c.node.type.format, GroupSparse)
        assert sparse is (not c.key.endswith("down.weight"))
    (stats,) = ctx.stats.values()
    assert any("rows of 56 are no whole groups of 16" in m.reason for m in stats.misses)


def test_bits_an_element_are_those_of_the_paper() -> None:
    """Its table for 16 bits of scale, 4 of zero point, 16 of column, and 50 % left out."""
    w = torch.randn(256, 4096)
    mask = keep(group_scores(w, 16, "magnitude", None), 0.5, "row")
    t = Tensor((256, 4096), DTYPES["uint4"], format=GroupQuant(16, f16, DTYPES["uint4"]))
    found = {
        i: bits_per_element(picked(quantize(w, t), mask, 16, i).type) for i in ("u16", "bitmap")
    }
    assert found["u16"] == pytest.approx(3.125 + 32 / 4096, abs=1e-3)
    assert found["bitmap"] == pytest.approx(2.625 + 1 / 16, abs=1e-3)


# ------------------------------------------------------------------ which groups stay


def test_rows_or_the_matrix_share_a_budget() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert keep(scores, 0.5, "row").tolist() == [[False, False, True, True]] * 2
    assert keep(scores, 0.5, "layer").tolist() == [[False] * 4, [True] * 4]
    assert keep(torch.ones(1, 4), 0.5, "row").tolist() == [[True, True, False, False]]
    assert keep(scores, 0.0, "layer").all()


def test_obs_is_the_error_that_the_best_correction_leaves() -> None:
    """w_j^2 / [H^-1]_jj = min over the other columns of |X (w - w')|^2 with w'_j = 0."""
    x = inputs(12).double()
    h, w = x.T @ x, torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    scores = group_scores(w, 1, "obs", h.float(), 1e-9)[0]
    for j in range(12):
        others = [i for i in range(12) if i != j]
        y = x[:, j] * float(w[0, j])
        best = torch.linalg.lstsq(x[:, others], y[:, None]).solution
        error = (y - (x[:, others] @ best)[:, 0]).square().sum()
        assert scores[j].item() == pytest.approx(float(error), rel=1e-3)


def test_hessian_is_the_error_that_columns_to_the_right_leave() -> None:
    x = inputs(12).double()
    h, w = x.T @ x, torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    scores = group_scores(w, 1, "hessian", h.float(), 1e-9)[0]
    for j in range(12):
        y, later = x[:, j] * float(w[0, j]), x[:, j + 1 :]
        best = torch.linalg.lstsq(later, y[:, None]).solution
        error = (y - (later @ best)[:, 0]).square().sum()
        assert scores[j].item() == pytest.approx(float(error), rel=1e-3)


def test_a_group_scores_the_mean_of_its_elements() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert group_scores(w, 2, "magnitude", None).tolist() == [[2.5, 12.5]]
    h = torch.eye(4)
    for score in ("hessian", "obs"):  # of uncorrelated inputs both are the magnitude, but a factor
        found = group_scores(w, 2, score, h)[0]
        assert (found[1] / found[0]).item() == pytest.approx(5.0)


# ------------------------------------------------------------------ correction


def error(w, made, x) -> float:
    return float(((w - made) @ x.T).norm() / (w @ x.T).norm())


@pytest.mark.parametrize("zero", [True, False])
def test_later_columns_make_up_for_what_is_lost(zero) -> None:
    x, w = inputs(48), torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    h = x.T @ x
    codes = DTYPES["uint4" if zero else "int4"]
    t = Tensor((20, 48), codes, format=GroupQuant(8, f16, codes if zero else None))
    mask = keep(group_scores(w, 8, "hessian", h), 0.5, "row")
    spread = mask.repeat_interleave(8, 1)
    made = corrected(w, h, mask, 8, t, 0.01)
    without = error(w, quantize(w, t).decode() * spread, x)
    assert error(w, made.decode() * spread, x) < 0.5 * without
    everything = torch.ones_like(mask)
    rounded = error(w, quantize(w, t).decode(), x)
    assert error(w, corrected(w, h, everything, 8, t, 0.01).decode(), x) < 0.8 * rounded


def test_scores_and_correction_read_the_data(graph) -> None:
    data = [[ids(4, 24, s)] for s in range(2)]
    found = {}
    for name, options in {"plain": "", "corrected": ",correct=True", "obs": ",score=obs"}.items():
        after, _ = ran(graph, f"prune-groups{{rate=0.25,group=8{options}}}", data)
        verify(after)
        found[name] = float((logits(after, ids()) - logits(graph, ids())).norm())
    assert len(set(found.values())) == 3  # whose error is lower is told above, matrix by matrix


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(PassError, match="no inverse covariance"):
        inverse_root(torch.full((3, 3), float("nan")), 0.01)


def test_bad_options_are_refused(graph) -> None:
    for options, reason in {
        "rate=1.0": "no share", "group=0": "group=0", "score=size": "score=size",
        "budget=model": "budget=model", "index=csr": "index=csr", "bits=2b": "zero=True",
        "bits=16,correct=True": "needs codes",
    }.items():  # fmt: skip
        with pytest.raises(PassError, match=reason):
            ran(graph, f"prune-groups{{{options}}}", [[ids()]])
    with pytest.raises(PassError, match="needs calibration data"):
        ran(graph, "prune-groups")
