"""Sizes: text that comes back, evaluation, and what torch's symbolic numbers become."""

from __future__ import annotations

import ast

import pytest
import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as torch_functions

from effc.ir import ParseError, evaluate, symbol
from effc.ir.symbols import (
    dim,
    dim_text,
    floordiv,
    free_symbols,
    from_torch,
    parse_dim,
    product,
    real_symbol,
)

N, H, W = map(symbol, "NHW")
R = real_symbol("r")
Max, Min = torch_functions.Max, torch_functions.Min
Mod, PythonMod = torch_functions.Mod, torch_functions.PythonMod


def parsed(text: str) -> object:
    return parse_dim(ast.parse(text, mode="eval").body, frozenset({"r"}))


# ------------------------------------------------------------------ text

TEXTS = [
    (7, "7"),
    (-3, "-3"),
    (N, "N"),
    (-N, "-N"),
    (N + 1, "N + 1"),
    (2 * N * H, "2*H*N"),
    (N**2 - 3, "N**2 - 3"),
    ((N + 1) * H, "H*(N + 1)"),
    (N / 2, "N/2"),
    (sympy.Rational(3, 8), "3/8"),
    (floordiv(N, 2), "N // 2"),
    (floordiv(N + 1, 2) * 3, "3*((N + 1) // 2)"),
    (floordiv(N, 2) + 1, "(N // 2) + 1"),
    (floordiv(N, H), "N // H"),
    (floordiv(N, -3), "N // (-3)"),
    (floordiv(floordiv(N, 2) + 1, 3), "((N // 2) + 1) // 3"),
    (Mod(N, 3), "N % 3"),
    (Mod(N + 1, 3) * 2, "2*((N + 1) % 3)"),
    (PythonMod(-N, 3), "(-N) % 3"),
    (PythonMod(floordiv(N, 2), 3), "(N // 2) % 3"),
    (Max(1, N), "Max(1, N)"),
    (Min(N, H - 1), "Min(N, H - 1)"),
    (Max(1, Min(N, floordiv(H, 2))), "Max(1, Min(N, H // 2))"),
    (torch_functions.CleanDiv(N, 2), "N // 2"),
    (torch_functions.IntTrueDiv(N, H), "IntTrueDiv(N, H)"),
    (torch_functions.CeilToInt(torch_functions.IntTrueDiv(N, 2)), "CeilToInt(IntTrueDiv(N, 2))"),
    (torch_functions.ToFloat(N) * R, "r*ToFloat(N)"),
    (torch_functions.Where(N > 1, N, H), "Where((N > 1), N, H)"),
    (sympy.Eq(N, 3), "(N == 3)"),
    (sympy.Ne(N, H), "(N != H)"),
    (sympy.And(N > 1, H > 2), "((H > 2)) & ((N > 1))"),
    (sympy.Or(sympy.Eq(N, 1), H <= 2), "(N == 1) | ((H <= 2))"),
    (sympy.Float(0.1) * R, "0.1*r"),
    (sympy.Float(1 / 3) + R, "r + 0.3333333333333333"),
]


@pytest.mark.parametrize("value, text", TEXTS, ids=[text for _, text in TEXTS])
def test_sizes_print_as_python_and_come_back(value, text: str) -> None:
    assert dim_text(value) == text
    assert dim_text(parsed(text)) == text
    env = {N: 7, H: 5, R: 1.5}
    assert evaluate(parsed(text), env) == evaluate(value, env)


@pytest.mark.parametrize("n", range(5))
def test_floor_and_remainder_round_down_as_in_python(n: int) -> None:
    for text in ("N // 3", "N % 3", "(-N) // 3", "(-N) % 3", "(N - 7) // 2", "(N - 7) % 2"):
        assert evaluate(parsed(text), {N: n}) == eval(text, {"N": n}), text


@pytest.mark.parametrize(
    "text", ["f(N)", "'N'", "N @ H", "[N]", "N if H else 3", "a < b < c", "None"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ParseError) as e:
        parsed(text)
    assert str(e.value).startswith("not a size: ") and e.value.where == "line 1"


def test_names_are_sizes_unless_they_are_said_to_be_floats() -> None:
    assert parsed("s0") == symbol("s0") and parsed("s0").is_integer
    assert parsed("r") == real_symbol("r") and parsed("r").is_integer is None


# ------------------------------------------------------------------ values


def test_dim_is_an_int_wherever_the_value_is_known() -> None:
    assert dim(sympy.Integer(4)) == 4 and type(dim(sympy.Integer(4))) is int
    assert type(dim(N - N + 2)) is int
    assert dim(N) is N
    for wrong in (True, 1.0, None, "N"):
        with pytest.raises(TypeError, match="a size must be an int or a sympy expression"):
            dim(wrong)


def test_floordiv_and_product_stay_ints() -> None:
    assert floordiv(-7, 2) == -4 and type(floordiv(7, 2)) is int
    assert floordiv(4 * N, 2) == 2 * N
    assert product(()) == 1 and product((2, 3)) == 6 and type(product((2, 3))) is int
    assert product((N, 2, H)) == 2 * N * H
    assert product((N, 0)) == 0 and type(product((N, 0))) is int


def test_evaluate_goes_into_tuples_and_lists_and_leaves_the_rest() -> None:
    env = {N: 3, H: 4, R: 0.5}
    assert evaluate((N, [H + 1, "N"], None, 2.5), env) == (3, [5, "N"], None, 2.5)
    assert evaluate(N * R, env) == 1.5
    assert evaluate(sympy.Eq(N, 3), env) is True
    assert type(evaluate(floordiv(N, 2), env)) is int
    with pytest.raises(ValueError, match=r"^H \+ W needs values for W$"):
        evaluate(H + W, env)


def test_free_symbols() -> None:
    assert free_symbols((N, [H + 1], 3, "W")) == {N, H}
    assert free_symbols(()) == set()


# ------------------------------------------------------------------ from torch


@pytest.fixture
def shapes() -> tuple[torch.SymInt, torch.SymInt]:
    env = ShapeEnv()

    def size(name: str, hint: int) -> torch.SymInt:
        made = env.create_symbol(hint, source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        return env.create_symintnode(made, hint=hint)

    return size("a", 6), size("b", 10)


def test_plain_numbers_stay_what_they_are() -> None:
    assert from_torch(3) == 3 and from_torch(2.5) == 2.5 and from_torch(True) is True


def test_symbolic_ints_become_our_symbols(shapes) -> None:
    a, b = shapes
    ours = from_torch(a)
    assert ours == symbol(str(a.node.expr)) and ours.is_integer
    env = {from_torch(a): 7, from_torch(b): 9}
    for theirs, want in [
        (a + b, 16), (a * b - 1, 62), (a // 2, 3), ((a + b) % 5, 1), (torch.sym_max(a, b), 9),
        (torch.sym_min(a, 3), 3), (-a, -7), (a * 0 + 4, 4),
    ]:  # fmt: skip
        expr = from_torch(theirs)
        assert evaluate(expr, env) == want
        assert dim_text(parsed(dim_text(expr))) == dim_text(expr)
        assert free_symbols(expr) <= set(env)


def test_symbolic_floats_and_bools(shapes) -> None:
    a, b = shapes
    env = {from_torch(a): 7, from_torch(b): 10}
    assert evaluate(from_torch(a / b), env) == 0.7
    assert evaluate(from_torch(torch.sym_float(a)), env) == 7.0
    assert evaluate(from_torch(a == b), env) is False
    assert from_torch(a >= 0) is True


def test_a_size_that_torch_knows_is_an_int(shapes) -> None:
    known = from_torch(shapes[0] - shapes[0] + 3)
    assert known == 3 and type(known) is int
