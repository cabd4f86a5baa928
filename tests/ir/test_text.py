"""Graphs as text: every graph comes back, and text that is no graph is refused with its line."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from effc.ir import (
    Graph,
    Input,
    Number,
    OpError,
    Origin,
    ParseError,
    Tensor,
    Weight,
    channels_last,
    names,
    node_text,
    parse,
    symbol,
    text,
    verify,
)
from effc.ir.op import OPS, Op, Value
from effc.ir.op import op as declare
from effc.ir.ops.aten import Aten
from effc.ir.rewrite import op
from effc.ir.symbols import real_symbol
from effc.ir.types import f32, i64

N = symbol("N")


def x_of(*shape: Any, key: str = "x", dtype=f32) -> Input:
    return Input(key, Tensor(shape, dtype))


def back(graph: Graph) -> Graph:
    """The graph out of its own text; and the text is Python."""
    compile(graph.text, "dump.py", "exec", dont_inherit=True)
    again = parse(graph.text, {w.key: w.data for w in graph.weights if w.data is not None})
    assert again == graph
    assert again.text == graph.text
    return again


# ------------------------------------------------------------------ printing

PROGRAM = """\
def graph(x: f32[N, 3, H, W], s0: size, r: number):
    w0: f32[4, 3, 3, 3] = weight("conv.weight", digest="0a1b2c3d")
    w1: f32[4] = weight("conv.bias", digest="4e5f6071")
    y0: f32[N, 4, H, W] = conv2d(x, w0, w1, padding=(1, 1))
    y1: f32[N, 4, H, W] = mul(y0, r)
    y2: f32[N, 4, H, W] = add(y1, s0 + 1)
    y3: (f32[N, 4, H, 2], i64[N, 4, H, 2]) = aten.topk.default(y2, 2, -1, sorted=True)
    y4: f32[N, 4, H, 2] = item(y3, index=0)
    y5: f32[N, 8*H] = reshape(y4, to=(N, 8*H))
    return y5, s0, x
"""


def test_a_whole_program() -> None:
    graph = parse(PROGRAM)
    assert graph.text == PROGRAM
    back(graph)
    assert [o.name for o in graph.outputs] == ["reshape", "input", "input"]
    verify(graph)


def test_the_text_is_a_python_program() -> None:
    """Dumps are files that run: with annotations as text, defining the function costs nothing."""
    graph = parse(PROGRAM)
    source = "from __future__ import annotations\n\n" + graph.text
    space: dict[str, Any] = {}
    exec(compile(source, "000_capture.py", "exec"), space)
    assert space["graph"].__code__.co_argcount == 3
    assert parse(source) == graph


def test_header_and_origins_are_comments() -> None:
    x = x_of(2)
    y = op.relu(x).at(Origin("layer1.act", "model.py:41", "x = self.act(x)"))
    graph = Graph.of((x,), (y,))
    shown = text(graph, header="stage 3: made by nothing\n2 rewrites")
    assert shown == (
        "# stage 3: made by nothing\n# 2 rewrites\n"
        "def graph(x: f32[2]):\n"
        "    y0: f32[2] = relu(x)  # layer1.act  model.py:41\n"
        "    return y0,\n"
    )
    assert parse(shown) == graph
    odd = Graph.of((x,), (op.relu(x).at(Origin("a\nb", "c\rd")),))
    assert odd.text.count("\n") == 3 and parse(odd.text) == odd


def test_names_are_stable_and_avoid_inputs_and_sizes() -> None:
    y0, w0 = x_of(symbol("y1"), key="y0"), Weight("a", Tensor((), f32), "00")
    graph = Graph.of((y0,), (op.add(op.relu(y0), w0),))
    assert graph.text == (
        "def graph(y0: f32[y1]):\n"
        "    y2: f32[y1] = relu(y0)\n"
        '    w0: f32[()] = weight("a", digest="00")\n'
        "    y3: f32[y1] = add(y2, w0)\n"
        "    return y3,\n"
    )
    back(graph)
    assert list(names(graph).values()) == ["y0", "y2", "w0", "y3"]
    assert node_text(graph, graph.nodes[0]) == "y2: f32[y1] = relu(y0)"
    assert node_text(graph, y0) == "y0: f32[y1]"


def test_states_come_back_as_states() -> None:
    source = (
        "def graph(x: f32[n, 4], k: State[f32[C, 4] @ channels_last], past: i64[()]):\n"
        "    y0: f32[C, 4] @ channels_last = update(k, x, past, dim=0)\n"
        "    y1: f32[n, 4] = attention(x, y0, y0, causal=True, past=past)\n"
        "    return y1, y0\n"
    )
    graph = back(parse(source))
    verify(graph)
    assert graph.text == source
    assert graph.states == (graph.inputs[1],)
    assert node_text(graph, graph.inputs[1]) == "k: State[f32[C, 4] @ channels_last]"
    plain = parse(source.replace("State[f32[C, 4] @ channels_last]", "f32[C, 4] @ channels_last"))
    assert plain != graph and plain.states == ()


@pytest.mark.parametrize(
    "note, what",
    [
        ("State[size]", "x is size; a state is one tensor"),
        ("State[State[f32[2]]]", "unknown element type 'State'"),
        ("State", "not a type: State"),
    ],
)
def test_a_state_is_one_tensor(note: str, what: str) -> None:
    with pytest.raises(ParseError, match=re.escape(what)):
        parse(f"def graph(x: {note}):\n    return x,\n")


def test_two_inputs_of_one_name_have_no_text() -> None:
    graph = Graph.of((x_of(2), x_of(2)), ())
    with pytest.raises(ValueError, match="'x' names two inputs, or an input and a size"):
        graph.text
    with pytest.raises(ValueError, match="'N' names two inputs, or an input and a size"):
        Graph.of((x_of(N, key="N"),), ()).text


def test_no_inputs_no_outputs() -> None:
    assert Graph((), (), ()).text == "def graph():\n    return\n"
    back(Graph((), (), ()))
    back(Graph.of((), (op.full((2,), 1.0, f32),)))


# ------------------------------------------------------------------ literals

LITERALS = [
    None, True, False, 0, -7, 1 << 70, 0.0, -0.0, 0.1, 1e-45, 1e308, math.inf, -math.inf, math.nan,
    1j, -1j, complex(0.0, -1.0), complex(-0.0, 2.5), complex(math.inf, math.nan), complex(1, -2),
    "", "a b", 'say "hi"', "it's", "both ' and \"", "back\\slash",
    "tab\tnew\nline\r\0\x85\u2028é🙂",
    (), (1,), (1, (2.0, None), "x"), torch.float32, torch.int64, torch.bool, torch.strided,
    torch.channels_last, torch.contiguous_format, torch.preserve_format, torch.device("cpu"),
    torch.device("cuda", 1), torch.device("meta"), N, N + 1, (N, 2 * N), real_symbol("r") * 2.5,
]  # fmt: skip


@pytest.mark.parametrize("value", LITERALS, ids=repr)
def test_generic_nodes_keep_every_literal(value: Any) -> None:
    x, r = x_of(N), Input("r", Number(False))
    node = Aten("aten.cumsum.default", (x, value), (("k", value),), of=x.of)
    again = back(Graph.of((x, r), (node,))).nodes[0]
    assert isinstance(again, Aten)
    for got in (again.args[1], again.kwargs[0][1]):
        assert type(got) is type(value) or value is N + 1 or N in getattr(value, "free_symbols", ())
        assert repr(got) == repr(value)


def test_generic_nodes_keep_nested_operands() -> None:
    a, b = x_of(2, key="a"), x_of(2, key="b")
    stack = Aten("aten.stack.default", ((a, b, a),), (("dim", 1),), of=Tensor((2, 3), f32))
    index = Aten("aten.index.Tensor", (stack, (None, op.cast(a, i64))), (), of=Tensor((2, 2), f32))
    graph = Graph.of((a, b), (index,))
    assert graph.text.splitlines()[1:4] == [
        "    y0: f32[2, 3] = aten.stack.default((a, b, a), dim=1)",
        "    y1: i64[2] = cast(a, dtype_=i64)",
        "    y2: f32[2, 2] = aten.index.Tensor(y0, (None, y1))",
    ]
    back(graph)


def test_a_value_without_text_says_so() -> None:
    graph = Graph.of((), (Aten("aten.cumsum.default", ([1],), (), of=Tensor((), f32)),))
    with pytest.raises(TypeError, match=r"an attribute of type list has no text: \[1\]"):
        graph.text


@pytest.mark.parametrize("number", [1, 1.0, True, -2, math.inf, -math.inf, math.nan, 1.5j])
def test_numbers_as_operands_keep_their_kind(number: Any) -> None:
    x = x_of(2)
    again = back(Graph.of((x,), (op.add(x, number),)))
    assert type(again.nodes[0].b) is type(number)


def test_names_that_are_also_words_of_the_text() -> None:
    """An input may be called as an element type, a layout or an op is."""
    values = [x_of(2, key=k) for k in ("f32", "channels_last", "relu", "torch", "size", "device")]
    total: Op = values[0]
    for value in values[1:]:
        total = op.add(total, value)
    graph = Graph.of(values, (op.cast(op.to_layout(total, channels_last), f32),))
    back(graph)


# ------------------------------------------------------------------ number inputs


def test_a_size_input_is_a_symbol_in_attributes_and_a_value_elsewhere() -> None:
    graph = parse(
        "def graph(x: f32[N], s0: size, r: number):\n"
        "    y0 = add(x, s0)\n"
        "    y1 = mul(y0, r)\n"
        "    y2 = expand(y1, to=(s0, N))\n"
        "    def body(a: f32[s0, N], k: size):\n"
        "        y0 = add(a, k)\n"
        "        return y0\n"
        "    y3 = fused((y2, s0), body=body)\n"
        "    return y3, s0\n"
    )
    verify(graph)
    assert graph.nodes[0].b == symbol("s0") and graph.nodes[1].b == real_symbol("r")
    assert graph.nodes[3].xs == (graph.nodes[2], graph.inputs[1])
    assert graph.outputs[1] is graph.inputs[1]
    back(graph)


# ------------------------------------------------------------------ regions


@pytest.fixture
def two_bodies():
    """An op of a plug-in with two regions, as a loop with a condition has."""

    @declare("branch_for_test")
    class Branch(Op):
        x: Value
        then: Graph
        other: Graph

        def infer(self):
            return self.then.outputs[0].type

    yield Branch
    del OPS["branch_for_test"]


def test_regions_nest_and_print_as_functions() -> None:
    source = """\
def graph(x: f32[N], s0: size):
    def outer(a: f32[N]):
        y0: f32[N] = relu(a)
        def inner(b: f32[N]):
            w0: f32[()] = weight("c", digest="00112233")
            y0: f32[N] = add(b, s0)
            y1: f32[N] = mul(y0, w0)
            return y1,
        y1: f32[N] = fused((y0,), body=inner)
        return y1, y0
    y0: (f32[N], f32[N]) = fused((x,), body=outer)
    y1: f32[N] = item(y0, index=1)
    return y1,
"""
    graph = parse(source)
    assert back(graph).text == source
    verify(graph)
    assert node_text(graph, graph.nodes[0]) == "y0: (f32[N], f32[N]) = fused((x,), body=outer)"


def test_weights_inside_regions_get_their_values() -> None:
    a = x_of(2, key="a")
    inner = Graph.of((a,), (op.add(a, Weight.holding("c", torch.ones(2))),), "body")
    x = x_of(2)
    graph = Graph.of((x,), (OPS["fused"]((x,), inner),))
    again = parse(graph.text, {"c": torch.ones(2)})
    assert again == graph and again.nodes[0].body.weights[0].data is not None


def test_two_regions_of_one_name_stay_two(two_bodies) -> None:
    x, a = x_of(2), x_of(2, key="a")
    graph = Graph.of(
        (x,),
        (
            two_bodies(
                x, Graph.of((a,), (op.relu(a),), "body"), Graph.of((a,), (op.neg(a),), "body")
            ),
        ),
    )
    assert "then=body, other=body_" in graph.text
    again = back(graph)
    assert [g.nodes[0].name for g in again.nodes[0].regions] == ["relu", "neg"]


# ------------------------------------------------------------------ weights


def test_weights_print_as_name_type_and_digest() -> None:
    data = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    graph = Graph.of((), (Weight.holding("a.weight", data),))
    line = graph.text.splitlines()[1]
    assert line == '    w0: f32[2, 3] = weight("a.weight", digest="c3ce6a9d")'.replace(
        "c3ce6a9d", graph.weights[0].content
    )
    without = parse(graph.text)
    assert without == graph and without.weights[0].data is None
    assert parse(graph.text, {"a.weight": data}) == graph
    assert parse(graph.text, {"a.weight": data + 1}) != graph


def test_digests_see_type_shape_and_values_but_not_memory() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4)

    def content(t: torch.Tensor) -> str:
        return Weight.holding("w", t).content

    seen = [
        base, base + 1, base.reshape(4, 6), base.double(), base.to(torch.int64), base > 3,
        base.bfloat16(), base.to(torch.complex64), torch.empty(0), torch.tensor(1.0),
    ]  # fmt: skip
    assert len({content(t) for t in seen}) == len(seen)
    assert content(base) == content(base.clone().to(memory_format=torch.channels_last))
    assert content(base[..., ::2]) == content(base[..., ::2].contiguous())
    assert content(base.requires_grad_()) == content(base.detach())
    assert content(torch.view_as_complex(torch.ones(2, 2)).conj()) == content(
        torch.full((2,), 1 - 1j)
    )


# ------------------------------------------------------------------ text that is no graph


def program(line: str) -> str:
    head = "def graph(x: f32[N, 4], w: f32[8, 4], s0: size):\n    y0 = relu(x)\n"
    return f"{head}    {line}\n    return y0\n"


REFUSED = {
    "y1 = conv2(x, w)": (
        "unknown op 'conv2'\n  where line 3: y1 = conv2(x, w)\n  fix   did you mean 'conv2d'?"
    ),
    "y1 = linear(x, w, bia=x)": (
        "linear has no field 'bia'\n  where line 3: y1 = linear(x, w, bia=x)\n"
        "  fix   did you mean 'bias'?"
    ),
    "y1: f32[N, 5] = linear(x, w)": (
        "linear gives f32[N, 8], declared f32[N, 5]\n  where line 3: y1: f32[N, 5] = linear(x, w)"
    ),
    "y1: f32[N, 8] @ channels_last = linear(x, w)": (
        "linear gives f32[N, 8], declared f32[N, 8] @ channels_last\n"
        "  where line 3: y1: f32[N, 8] @ channels_last = linear(x, w)"
    ),
    "y1 = relu(y3)": (
        "undefined name 'y3'\n  where line 3: y1 = relu(y3)\n  fix   did you mean 'y0'?"
    ),
    "y1 = add(x, M + 1)": (
        "undefined name 'M'\n  where line 3: y1 = add(x, M + 1)\n  fix   known: N, s0, w, x, y0"
    ),
    "y1 = reshape(x, to=(y0, 4))": (
        "y0 is a tensor, not a size\n  where line 3: y1 = reshape(x, to=(y0, 4))"
    ),
    "y1 = add(x, y0 + 1)": "y0 is a tensor, not a size\n  where line 3: y1 = add(x, y0 + 1)",
    "y1 = relu(3)": (
        "relu: x must be a value of a graph, not 3\n  where line 3: y1 = relu(3)"
    ),
    "y1 = relu(s0 + 1)": (
        "relu: x must be a value of a graph, not s0 + 1\n  where line 3: y1 = relu(s0 + 1)"
    ),
    "y1 = linear(x)": (
        "linear: Linear.__init__() missing 1 required positional argument: 'w'\n"
        "  where line 3: y1 = linear(x)"
    ),
    "y1 = relu(x, x)": "relu takes 1 arguments, not 2\n  where line 3: y1 = relu(x, x)",
    "y1 = relu(x, x=x)": "relu: x is given twice\n  where line 3: y1 = relu(x, x=x)",
    "y1 = relu(**x)": "** is not allowed in a graph\n  where line 3: y1 = relu(**x)",
    "y1 = matmul(w, w)": (
        "matmul(f32[8, 4], f32[8, 4]): inner sizes differ\n  where line 3: y1 = matmul(w, w)"
    ),
    "y1 = softmax(x, dim='a')": (
        "softmax: '<' not supported between instances of 'str' and 'int'\n"
        "  where line 3: y1 = softmax(x, dim='a')"
    ),
    "y1 = permute(x, dims=3)": (
        "permute: 'int' object is not iterable\n  where line 3: y1 = permute(x, dims=3)"
    ),
    "y1 = fused((x,), body=b)": (
        "no region 'b' above this line\n  where line 3: y1 = fused((x,), body=b)"
    ),
    'y1 = weight("a", digest="")': (
        "weight must be given a type, `name: type = ...`\n"
        '  where line 3: y1 = weight("a", digest="")'
    ),
    "y1 = aten.relu.default(x)": (
        "aten.relu.default must be given a type, `name: type = ...`\n"
        "  where line 3: y1 = aten.relu.default(x)"
    ),
    "y1: f32[N, 4] = aten.rleu.default(x)": (
        "this torch has no operator aten.rleu.default\n"
        "  where line 3: y1: f32[N, 4] = aten.rleu.default(x)\n"
        "  fix   check the name, or the torch version"
    ),
    "y1: f32[N, 4] = aten.relu.default(x, dtype=torch.load)": (
        "torch.load is not an element type or memory format\n"
        "  where line 3: y1: f32[N, 4] = aten.relu.default(x, dtype=torch.load)"
    ),
    "y1: f33[N] = relu(x)": (
        "unknown element type 'f33' (did you mean 'f32'?): f33[N]\n  where line 3"
    ),
    "y1 = x": "not a graph statement\n  where line 3: y1 = x",
    "x.y = relu(x)": "not a graph statement\n  where line 3: x.y = relu(x)",
    "for i in x: pass": "not a graph statement\n  where line 3: for i in x: pass",
    "return 3": "a graph returns values of its own only\n  where line 3: return 3",
    "return N": "a graph returns values of its own only\n  where line 3: return N",
    "return y9": "undefined name 'y9'\n  where line 3: return y9\n  fix   did you mean 'y0'?",
    "y1 = add(x, [1])": "not a size: [1]\n  where line 3",
    "y1 = add(x, ...)": "not a size: ...\n  where line 3",
}  # fmt: skip


@pytest.mark.parametrize("call", REFUSED)
def test_a_wrong_line_is_named_with_the_reason(call: str) -> None:
    with pytest.raises((ParseError, OpError)) as e:
        parse(program(call))
    assert str(e.value) == REFUSED[call]


WHOLE = {
    "def graph(x: f32[2]):\n    return x +\n": "not Python: invalid syntax\n  where line 2",
    "x = 3": "expected one graph function, found 0",
    "def a():\n    return\ndef b():\n    return\n": "expected one graph function, found 2",
    "def graph(x):\n    return x\n": "input x has no type\n  where line 1: def graph(x):",
    "def graph(x: f32[2]):\n    pass\n": "not a graph statement\n  where line 2: pass",
    "def graph(x: f32[2]):\n    'doc'\n": (
        "graph returns nothing\n  where line 1: def graph(x: f32[2]):"
    ),
    "def graph(x: f32[2], *y):\n    return x\n": (
        "inputs are plain names with types\n  where line 1: def graph(x: f32[2], *y):"
    ),
    "def graph(x: f32[2] = 3):\n    return x\n": (
        "inputs are plain names with types\n  where line 1: def graph(x: f32[2] = 3):"
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", WHOLE)
def test_what_is_no_graph_at_all(source: str) -> None:
    with pytest.raises(ParseError) as e:
        parse(source)
    assert str(e.value) == WHOLE[source]


def test_the_line_is_right_after_odd_line_ends() -> None:
    with pytest.raises(ParseError) as e:
        parse("# \x85 \u2028 \x0c\ndef graph(x: f32[2]):\n    y0 = relu(z)\n    return y0\n")
    assert e.value.where == "line 3: y0 = relu(z)"


def test_types_may_be_left_out_and_docstrings_and_comments_are_ignored() -> None:
    graph = parse(
        "# made by hand\n"
        "def graph(x: f32[2, 3]):\n"
        '    """What it is for."""\n'
        "    y = relu(x)  # the name is not kept\n"
        "    z = sum(y, dims=(1,))\n"
        "    return z"
    )
    assert graph.text == (
        "def graph(x: f32[2, 3]):\n"
        "    y0: f32[2, 3] = relu(x)\n"
        "    y1: f32[2] = sum(y0, dims=(1,))\n"
        "    return y1,\n"
    )
