"""The precision of float32 products, from torch's switch or an option to what runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import effc
from effc import dynamo
from effc.ir import OptionError
from tests.backends.amx import pretend


@pytest.fixture(autouse=True)
def _tiles(monkeypatch) -> None:
    pretend(monkeypatch)


def notes(module: nn.Module) -> set[str]:
    """What the products of a compiled module say of themselves."""
    (record,) = module._effc_records
    products = ("effc_linear", "effc_convolution", "effc_winograd")
    return {e.note for e in record.executable.launches if e.call.startswith(products)}


@pytest.fixture
def plans(monkeypatch) -> list[str]:
    """Text of every plan that Dynamo's backend makes."""
    made: list[str] = []
    compile_captured = dynamo.compile_captured

    def noted(captured, options, record, *more):
        result = compile_captured(captured, options, record, *more)
        made.append(record.executable.text)
        return result

    monkeypatch.setattr(dynamo, "compile_captured", noted)
    return made


def test_dynamo_compiles_again_where_torchs_switch_leaves_highest(plans) -> None:
    run = torch.compile(nn.Linear(8, 8).requires_grad_(False), backend="effc")
    x = torch.randn(3, 8)
    torch.set_float32_matmul_precision("highest")
    run(x)
    torch.set_float32_matmul_precision("high")
    run(x)
    torch.set_float32_matmul_precision("medium")  # one of the two that Dynamo does not tell apart
    run(x)
    assert ["bf16 x3" in p for p in plans] == [False, True]


def test_the_option_overrules_torchs_switch(plans) -> None:
    options = {"float32_matmul_precision": "medium"}
    run = torch.compile(nn.Linear(8, 8).requires_grad_(False), backend="effc", options=options)
    run(torch.randn(3, 8))
    assert len(plans) == 1 and "# bf16" in plans[0]


def test_an_unknown_precision_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="hihg") as error:
        effc.compile(nn.Linear(2, 2), float32_matmul_precision="hihg")
    assert "high" in error.value.fix


def test_a_saved_model_keeps_its_precision(tmp_path: Path) -> None:
    net, x = nn.Linear(40, 8).eval().requires_grad_(False), torch.randn(3, 40)
    compiled = effc.compile(net, example_inputs=(x,), float32_matmul_precision="medium")
    compiled.save(tmp_path / "net.effc")
    torch.set_float32_matmul_precision("high")
    assert effc.load(tmp_path / "net.effc")(x).equal(compiled(x))


def test_a_super_resolution_network() -> None:
    """RLFN with two blocks: `high` errs as float32 does, `medium` less than a pixel value of 255."""
    from examples.rlfn.model import RLFN

    net, x = (
        RLFN(channels=28, blocks=2).eval().requires_grad_(False),
        torch.rand(1, 3, 17, 22) * 255,
    )
    exact = net.double()(x.double())
    net.float()
    span = (exact.max() - exact.min()).item()
    for precision, note, worst, least in (
        ("high", "bf16 x3", 1e-4, 90),
        ("medium", "bf16", 1e-2, 50),
    ):
        run = effc.compile(
            net, example_inputs=(x,), float32_matmul_precision=precision, measure=False
        )
        assert notes(run) == {note}
        error = (run(x) - exact).abs() / span
        assert error.max() < worst
        assert -10 * math.log10((error**2).mean()) > least
