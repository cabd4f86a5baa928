"""What an element is by its indices: against the interpreter, at several sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from effc.ir import Graph, Input, Number, Tensor, Weight, interpret, symbol
from effc.ir.ops.aten import Aten
from effc.ir.rewrite import op
from effc.ir.types import bf16, boolean, f32, i64
from effc.passes.analysis.index_values import AtMost, Linear, Where, value_at

T = symbol("T")
SIZES = (1, 2, 7)


def predicted(at: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if isinstance(at, AtMost):
        return predicted(at.value, shape) <= 0
    if isinstance(at, Where):
        return torch.where(predicted(at.test, shape), at.number, 0.0)
    total = torch.full(shape, at.const)
    for axis, (size, coef) in enumerate(zip(shape, at.coefs, strict=True)):
        total += coef * torch.arange(size).reshape(-1, *(1,) * (len(shape) - axis - 1))
    return total


def assert_is_so(node: Any) -> None:
    at = value_at(node)
    graph = Graph.of((Input("T", Number()),), (node,))
    for size in SIZES:
        (value,) = interpret(graph, [size])
        assert torch.equal(value.double(), predicted(at, tuple(value.shape)).double()), node


STEPS = op.arange(T, i64)
ROW, COLUMN = op.reshape(STEPS, (T, 1)), op.reshape(STEPS, (1, T))
FLAT = op.full((T, T), -torch.inf, f32)


def triangle(x: Any, name: str, *diagonal: int) -> Any:
    return Aten(f"aten.{name}.default", (x, *diagonal), (), of=x.tensor)


FIRST = op.sub(op.slice(STEPS, 0, 0, 1), 1)
KNOWN = [
    op.arange(T, f32, 3, -2),
    op.slice(op.arange(T + 4, i64), 0, 2, T),
    op.le(COLUMN, ROW),
    op.gt(COLUMN, op.sub(ROW, 5)),
    op.bitwise_not(op.lt(op.mul(COLUMN, 2), op.add(ROW, 1))),
    op.logical_and(op.ge(ROW, COLUMN), op.full((), True, boolean)),
    op.slice(op.cat((FIRST, STEPS), 0), 0, 0, T),
    op.sub(STEPS, op.slice(op.cat((FIRST, STEPS), 0), 0, 0, T)),
    op.expand(op.reshape(STEPS, (1, T, 1)), (3, T, 2)),
    op.permute(op.sub(ROW, COLUMN), (1, 0)),
    op.where(op.le(COLUMN, ROW), op.full((), 0.0, f32), -3e38),
    op.where(op.le(COLUMN, ROW), -torch.inf, 0.0),
    triangle(FLAT, "triu", 1),
    triangle(op.full((2, T, T), True, boolean), "tril"),
    op.eq(triangle(op.full((T, T), 1.0, f32), "tril", -1), 0),
    op.ne(op.cast(op.le(COLUMN, ROW), f32), 0.0),
    op.cast(op.cast(op.le(COLUMN, ROW), f32), boolean),
    Aten(
        "aten.cumsum.default", (op.ne(op.full((2, T), 1, i64), 1), -1), (), of=Tensor((2, T), i64)
    ),
    Aten("aten.cumsum.default", (op.full((T,), 2, i64), 0), (), of=Tensor((T,), i64)),
    op.neg(STEPS),
]


@pytest.mark.parametrize("node", KNOWN, ids=range(len(KNOWN)))
def test_values_that_are_known(node: Any) -> None:
    assert_is_so(node)


UNKNOWN = [
    op.arange(T, bf16),  # positions are rounded there
    op.arange(T, i64, T - 1, -1),
    op.div_floor(STEPS, 2),
    op.eq(ROW, COLUMN),
    op.bitwise_and(op.le(COLUMN, ROW), op.gt(COLUMN, op.sub(ROW, 5))),
    op.cat((op.full((1,), 7, i64), STEPS), 0),
    op.reshape(op.add(ROW, COLUMN), (T * T,)),
    op.add(STEPS, Weight("w", Tensor((1,), i64), "00")),
    op.where(op.le(COLUMN, ROW), 2.0, 1.0),
]


@pytest.mark.parametrize("node", UNKNOWN, ids=range(len(UNKNOWN)))
def test_values_that_are_not(node: Any) -> None:
    assert value_at(node) is None


@pytest.mark.parametrize("seed", range(60))
def test_random_values_of_indices(seed: int) -> None:
    """Whatever is said of a value is so."""
    chance, said = random.Random(seed), 0
    values: list[Any] = [ROW, COLUMN, STEPS, op.full((T, T), 2, i64)]
    tests: list[Any] = [op.le(COLUMN, ROW)]

    def pick() -> Any:
        return chance.choice([*values[-4:], chance.randint(-3, 3)])

    for _ in range(12):
        x = chance.choice(values[-4:])
        make = chance.choice(["add", "sub", "mul", "neg", "permute", "slice", "cat", "test", "and"])
        if make in ("add", "sub", "mul"):
            values.append(getattr(op, make)(x, pick()))
        elif make == "neg":
            values.append(op.neg(x))
        elif make == "permute":
            values.append(op.permute(x, tuple(reversed(range(len(x.shape))))))
        elif make == "slice" and x.shape[-1] == T:
            longer = op.cat((op.full((*x.shape[:-1], 2), 1, i64), x), len(x.shape) - 1)
            values.append(op.slice(longer, -1, chance.choice([0, 1, 2]), T))
        elif make == "cat" and x.shape[0] == T:
            before = op.sub(op.slice(x, 0, 0, 1), chance.choice([0, 1]))
            values.append(op.slice(op.cat((before, x), 0), 0, chance.choice([0, 1]), T))
        elif make == "test":
            name = chance.choice(["le", "lt", "ge", "gt", "eq", "ne"])
            tests.append(getattr(op, name)(x, pick()))
        elif make == "and":
            tests.append(op.bitwise_and(chance.choice(tests), op.bitwise_not(tests[-1])))
    for node in (*values, *tests):
        if value_at(node) is not None:
            said += 1
            assert_is_so(node)
    assert said > 3


def test_negation_is_of_whole_numbers() -> None:
    at = AtMost(Linear((1, -1), 0))
    assert at.negated() == AtMost(Linear((-1, 1), 1)) and at.negated().negated() == at
    assert AtMost(Linear((0, 0), 0)).known and AtMost(Linear((), 1)).known is False
