"""The reference interpreter: sizes bound, misfits named, values dropped, observers called."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from effc.ir import Graph, Input, InputError, Number, Tensor, bind_symbols, interpret, parse, symbol
from effc.ir.interpret import random_input
from effc.ir.op import OPS, Op, Value
from effc.ir.op import op as declare
from effc.ir.ops.aten import Aten
from effc.ir.symbols import real_symbol
from effc.ir.types import DTYPES, Type, boolean, f32, f64, i64

N, H = symbol("N"), symbol("H")


def run(source: str, *inputs: Any, **weights: torch.Tensor) -> Any:
    return interpret(parse(source, weights), inputs)


# ------------------------------------------------------------------ meaning


def test_nodes_run_in_order_and_all_outputs_come() -> None:
    x = torch.randn(3, 4)
    y, z, same = run(
        "def graph(x: f32[N, 4]):\n"
        '    w0: f32[4] = weight("w", digest="")\n'
        "    y0 = mul(x, w0)\n"
        "    y1 = reshape(y0, to=(4*N,))\n"
        "    y2: (f32[2], i64[2]) = aten.topk.default(y1, 2)\n"
        "    y3 = item(y2, 0)\n"
        "    return y0, y3, x\n",
        x,
        w=torch.full((4,), 2.0),
    )
    assert torch.equal(y, 2 * x) and torch.equal(z, (2 * x).flatten().topk(2).values)
    assert same is x


def test_numbers_and_sizes_reach_attributes_operands_and_regions() -> None:
    source = """\
def graph(x: f32[N, 2], s0: size, r: number):
    y0 = mul(x, r)
    def body(a: f32[N, 2], k: size):
        def deeper(b: f32[N, 2]):
            y0 = add(b, s0*N)
            return y0
        y0 = fused((a,), body=deeper)
        y1 = add(y0, k)
        return y1
    y1 = fused((y0, s0), body=body)
    y2 = slice(y1, dim=0, start=s0, size=N - s0)
    return y2, s0
"""
    x = torch.randn(5, 2)
    y, s0 = run(source, x, 2, 0.5)
    assert torch.equal(y, (x * 0.5 + 10 + 2)[2:]) and s0 == 2


def test_a_weight_without_values_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"weight 'w' has no values; pass weights= to parse\(\)"):
        run('def graph():\n    w0: f32[4] = weight("w", digest="")\n    return w0\n')


# ------------------------------------------------------------------ binding


def bound(*given: tuple[Input, Any]) -> dict[Any, Any]:
    return bind_symbols(Graph.of([i for i, _ in given], ()), [v for _, v in given])


def test_sizes_are_read_off_shapes_and_numbers() -> None:
    x = Input("x", Tensor((N, 3, H), f32))
    y = Input("y", Tensor((N + H, 2 * N), f32))
    s, r = Input("s0", Number()), Input("r", Number(False))
    env = bound((y, torch.zeros(9, 8)), (x, torch.zeros(4, 3, 5)), (s, 7), (r, 2))
    assert env == {N: 4, H: 5, symbol("s0"): 7, real_symbol("r"): 2}


MISFITS: list[tuple[Tensor | Number, Any, str]] = [
    (Tensor((2, 3), f32), torch.zeros(2, 4),
     "input x must be f32[2, 3], got size 4 in dimension 1"),
    (Tensor((N, N), f32), torch.zeros(2, 3),
     "input x must be f32[N, N] (N = 2), got size 3 in dimension 1"),
    (Tensor((N, 2 * N + 1), f32), torch.zeros(2, 3),
     "input x must be f32[N, 2*N + 1] (2*N + 1 = 5), got size 3 in dimension 1"),
    (Tensor((2, 3), f32), torch.zeros(2), "input x must be f32[2, 3], got (2,)"),
    (Tensor((2,), f32), [1.0, 2.0], "input x must be f32[2], got [1.0, 2.0]"),
    (Tensor((2,), f32), torch.zeros(2, dtype=torch.float64),
     "input x must be f32[2], got torch.float64\n  fix   cast it: x.to(torch.float32)"),
    (Number(), 2.5, "input x must be a size, got 2.5"),
    (Number(), True, "input x must be a size, got True"),
    (Number(), torch.tensor(3), "input x must be a size, got tensor(3)"),
    (Number(False), "3", "input x must be a number, got '3'"),
]  # fmt: skip


@pytest.mark.parametrize("t, value, text", MISFITS, ids=[text for *_, text in MISFITS])
def test_inputs_that_do_not_fit_are_named(t: Any, value: Any, text: str) -> None:
    with pytest.raises(InputError) as e:
        bound((Input("x", t), value))
    assert str(e.value) == text


def test_the_number_of_inputs_is_checked() -> None:
    with pytest.raises(InputError, match="graph takes 1 inputs, got 2"):
        interpret(Graph.of((Input("x", Tensor((), f32)),), ()), [torch.zeros(()), 3])


def test_a_number_and_a_shape_that_disagree() -> None:
    with pytest.raises(InputError, match=r"x must be f32\[N\] \(N = 5\), got size 4"):
        bound((Input("x", Tensor((N,), f32)), torch.zeros(4)), (Input("N", Number()), 5))


def test_memory_order_of_inputs_does_not_matter() -> None:
    x = torch.randn(2, 3, 4, 5)
    source = "def graph(x: f32[2, 3, 4, 5] @ channels_last):\n    y0 = relu(x)\n    return y0\n"
    (y,) = run(source, x)
    assert torch.equal(y, x.relu())


# ------------------------------------------------------------------ memory


@pytest.fixture
def counted():
    """An op whose results are counted while they are alive."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    peak = [0]

    @declare("counted_for_test")
    class Counted(Op):
        x: Value

        def infer(self) -> Type:
            return self.x.type

        def reference(self, x: Any) -> Any:
            alive.add(result := x + 1)
            peak[0] = max(peak[0], len(alive))
            return result

    yield Counted, peak
    del OPS["counted_for_test"]


@pytest.mark.parametrize("observed", [False, True])
def test_values_are_dropped_after_their_last_use(counted, observed: bool) -> None:
    cls, peak = counted
    x = Input("x", Tensor((4,), f32))
    y: Op = x
    for _ in range(10):
        y = cls(y)
    dead = cls(x)
    graph = Graph((x,), (dead, *Graph.of((x,), (y,)).nodes), (y,))
    (result,) = interpret(
        graph, [torch.zeros(4)], observe=(lambda node, value: None) if observed else None
    )
    assert result.tolist() == [10.0] * 4
    assert peak[0] == 2


def test_inputs_of_the_caller_stay_as_they_were() -> None:
    x = torch.ones(4)
    run("def graph(x: f32[4]):\n    y0 = add(x, 1.0)\n    y1 = relu(y0)\n    return y1\n", x)
    assert torch.equal(x, torch.ones(4))


# ------------------------------------------------------------------ observing


def test_observe_sees_every_node_with_its_value() -> None:
    graph = parse(
        "def graph(x: f32[2]):\n"
        "    y0 = add(x, 1)\n"
        "    y1: (f32[1], f32[1]) = aten.split_with_sizes.default(y0, (1, 1))\n"
        "    y2 = item(y1, 1)\n"
        "    return y2\n"
    )
    seen: list[tuple[Op, Any]] = []
    interpret(graph, [torch.zeros(2)], observe=lambda node, value: seen.append((node, value)))
    assert tuple(n for n, _ in seen) == graph.nodes
    assert seen[0][1].tolist() == [1.0, 1.0] and len(seen[1][1]) == 2


def test_random_nodes_draw_in_program_order() -> None:
    x = Input("x", Tensor((3,), f32))
    first, second = (Aten("aten.rand_like.default", (x,), (), of=x.of) for _ in range(2))
    graph = Graph((x,), (first, second), (second, first))
    torch.manual_seed(0)
    want = torch.rand(3), torch.rand(3)
    torch.manual_seed(0)
    got = interpret(graph, [torch.zeros(3)])
    assert torch.equal(got[1], want[0]) and torch.equal(got[0], want[1])


# ------------------------------------------------------------------ random values


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.bits >= 8])
def test_random_input_has_the_type(name: str) -> None:
    t = Tensor((N, 3), DTYPES[name])
    value = random_input(t, {N: 2}, seed=1)
    assert value.shape == (2, 3) and value.dtype == t.dtype.torch
    assert torch.equal(
        value.to(torch.complex128), random_input(t, {N: 2}, seed=1).to(torch.complex128)
    )


def test_random_input_of_tuples_and_numbers() -> None:
    a, b = random_input((Tensor((2,), f64), Tensor((), boolean)), {})
    assert a.dtype == torch.float64 and b.dtype == torch.bool
    assert random_input(Tensor((100,), i64), {}).min() >= 0
    with pytest.raises(ValueError, match="a number input has no random value"):
        random_input(Number(), {})
