"""Rules and the engine: what matches, what is refused and why, and that rewriting is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effc.ir import (
    Engine,
    Graph,
    Input,
    OpError,
    Origin,
    Rule,
    RuleError,
    Tensor,
    Weight,
    algebraic,
    interpret,
    no,
    parse,
    verify,
    yes,
)
from effc.ir.rewrite import RuleStats
from effc.ir.rewrite import op as ops
from effc.ir.types import f32, f64, i64


class FuseConvBias(Rule):
    """add(conv2d(x, w), b[C, 1, 1]) => conv2d(x, w, flatten(b))

    The rule of the module's own docstring.
    """

    def pattern(self, op, x, w, b):
        return op.add(op.conv2d(x, w).named("conv"), b)

    def check(self, m, x, w, b):
        if b.shape != (w.shape[0], 1, 1):
            return no("b has shape {}, a bias is ({}, 1, 1)", b.shape, w.shape[0], at=b)
        return yes

    def rewrite(self, op, m, x, w, b):
        return m.conv.replace(bias=op.reshape(b, (w.shape[0],)))


CONV = """\
def graph(x: f32[1, 3, 5, 5], w: f32[4, 3, 3, 3], b: f32[4, 1, 1]):
    y0 = conv2d(x, w)
    y1 = add(y0, b)
    return y1
"""


def apply(source: str | Graph, *rules: Rule, limit: int = 100) -> tuple[Graph, Engine]:
    graph = parse(source) if isinstance(source, str) else source
    verify(graph)
    engine = Engine(rules, limit)
    return verify(engine.run(graph)), engine


def body(graph: Graph) -> list[str]:
    return [line.strip().split(": ", 1)[-1] for line in graph.text.splitlines()[1:-1]]


def reasons(engine: Engine, rule: str) -> list[str]:
    return [m.reason for m in engine.stats[rule].misses]


def of(x: Any, *names: str) -> Any:
    for name in names:
        x = getattr(ops, name)(x)
    return x


X = Input("x", Tensor((4,), f32))
Z = Input("z", Tensor((4,), f32))


# ------------------------------------------------------------------ a hit and a near miss


def test_hit() -> None:
    graph, engine = apply(CONV, FuseConvBias())
    assert body(graph) == [
        "f32[4] = reshape(b, to=(4,))",
        "f32[1, 4, 3, 3] = conv2d(x, w, y0)",
    ]
    stats = engine.stats["FuseConvBias"]
    assert (stats.hits, stats.attempts, stats.misses) == (1, 1, [])
    assert stats.title == "add(conv2d(x, w), b[C, 1, 1]) => conv2d(x, w, flatten(b))"
    assert stats.seconds > 0 and engine.touched == [graph.nodes[-1]]


def test_the_value_stays_the_same() -> None:
    inputs = [torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 1, 1)]
    graph, _ = apply(CONV, FuseConvBias())
    torch.testing.assert_close(interpret(graph, inputs), interpret(parse(CONV), inputs))


def test_near_miss_of_the_check_has_its_reason_and_place() -> None:
    graph = parse(CONV.replace("b: f32[4, 1, 1]", "b: f32[3, 3]"))
    graph.nodes[1].at(Origin("layer1", "model.py:9"))
    after, engine = apply(graph, FuseConvBias())
    (miss,) = engine.stats["FuseConvBias"].misses
    assert after is graph
    assert miss.reason == "b has shape (3, 3), a bias is (4, 1, 1)"
    assert (miss.rule, miss.depth, miss.checked) == ("FuseConvBias", 2, True)
    assert miss.where == "layer1  model.py:9"
    assert miss.node_text == "y1: f32[1, 4, 3, 3] = add(y0, b)  # layer1  model.py:9"


def test_near_miss_of_the_pattern_says_where_it_stopped() -> None:
    _, engine = apply(
        CONV.replace("conv2d(x, w)", "exp(conv)").replace("x: ", "conv: f32[1, 4, 3, 3], x: "),
        FuseConvBias(),
    )
    (miss,) = engine.stats["FuseConvBias"].misses
    assert miss.reason == "expected conv2d, found exp"
    assert (miss.depth, miss.checked) == (1, False)


def test_reasons_are_formatted_only_when_read() -> None:
    class Costly:
        def __format__(self, spec: str) -> str:
            raise AssertionError("nobody asked")

    class Refuses(Rule):
        """relu(x) => x"""

        def pattern(self, op, x):
            return op.relu(x)

        def check(self, m, x):
            return no("because of {}", Costly())

    _, engine = apply(Graph.of((X,), (ops.relu(X),)), Refuses())
    with pytest.raises(AssertionError, match="nobody asked"):
        reasons(engine, "Refuses")
    assert str(no("plain {}")) == "plain {}" and not no("x") and yes


# ------------------------------------------------------------------ patterns


def rule(pattern: Any, rewrite: Any = None, **attrs: Any) -> Rule:
    """A rule of one expression; by default it marks the place with `neg`."""

    class Made(Rule):
        """made => neg"""

        shared = attrs.get("shared", False)

        def rewrite(self, op, m, *args):
            return rewrite(op, m, *args) if rewrite else op.neg(m.root.operands[0])

    made = Made()
    made.pattern = pattern  # type: ignore[method-assign]
    if "check" in attrs:
        made.check = attrs["check"]  # type: ignore[method-assign]
    return made


def hits(graph: Graph, made: Rule) -> int:
    return apply(graph, made)[1].stats["Made"].hits


def why(graph: Graph, made: Rule) -> str:
    (reason,) = reasons(apply(graph, made)[1], "Made")
    return reason


def test_commutative_ops_match_either_way_round() -> None:
    made = rule(lambda op, x, y: op.mul(op.exp(x), y))
    assert hits(Graph.of((X, Z), (ops.mul(ops.exp(X), Z),)), made) == 1
    assert hits(Graph.of((X, Z), (ops.mul(Z, ops.exp(X)),)), made) == 1
    only = rule(lambda op, x, y: op.sub(op.exp(x), y))
    assert hits(Graph.of((X, Z), (ops.sub(Z, ops.exp(X)),)), only) == 0


def test_commutative_ops_match_with_one_operand_left_open() -> None:
    made = rule(lambda op, x: op.add(op.exp(x)))
    assert hits(Graph.of((X, Z), (ops.add(Z, ops.exp(X)),)), made) == 1


def test_the_order_of_an_inner_operand_may_hang_on_an_outer_one() -> None:
    """add(mul(x, cos), mul(neg(x), sin)): only the second product says which operand is x."""
    made = rule(
        lambda op, x, cos, sin: op.add(op.mul(x, cos), op.mul(op.neg(x), sin)),
        lambda op, m, x, cos, sin: op.sub(op.exp(x), op.sub(cos, sin)),
    )
    c, s = Input("c", X.of), Input("s", X.of)
    for product in (ops.mul(X, c), ops.mul(c, X)):
        for turned in (ops.mul(ops.neg(X), s), ops.mul(s, ops.neg(X))):
            for a, b in ((product, turned), (turned, product)):
                graph, _ = apply(Graph.of((X, c, s), (ops.add(a, b),)), made)
                assert body(graph)[0] == "f32[4] = exp(x)", graph.text
                assert body(graph)[1] == "f32[4] = sub(c, s)"


def test_the_nearest_of_two_orders_is_reported() -> None:
    made = rule(lambda op, x: op.add(op.exp(op.sin(x)), op.cos(x)))
    graph = Graph.of((X, Z), (ops.add(of(X, "cos"), of(X, "tanh", "exp")),))
    assert why(graph, made) == "expected sin, found tanh"


def test_a_variable_stands_for_one_value() -> None:
    made = rule(lambda op, x: op.mul(x, op.sigmoid(x)))
    assert hits(Graph.of((X,), (ops.mul(X, ops.sigmoid(X)),)), made) == 1
    graph = Graph.of((X, Z), (ops.mul(X, ops.sigmoid(Z)),))
    assert hits(graph, made) == 0
    assert why(graph, made) == "x stands for two different values"


def test_a_variable_may_stand_for_equal_numbers_and_attributes() -> None:
    made = rule(
        lambda op, x, c, s: op.add(
            op.mul(
                x,
                c,
            ),
            c,
        )
    )
    big, again = float("1e30"), float("1e30")
    assert big is not again
    assert hits(Graph.of((X,), (ops.add(ops.mul(X, big), again),)), made) == 1
    assert hits(Graph.of((X,), (ops.add(ops.mul(X, 2), True),)), made) == 0
    scaled = rule(
        lambda op, q, k, v, scale: op.attention(q, k, v, scale=scale),
        lambda op, m, q, k, v, scale: op.copy(q) if scale is None else op.neg(q),
    )
    q = Input("q", Tensor((2, 3), f32))
    graph, _ = apply(Graph.of((q,), (ops.attention(q, q, q),)), scaled)
    assert body(graph) == ["f32[2, 3] = copy(q)"]


def test_numbers_stand_for_themselves() -> None:
    made = rule(lambda op, x: op.mul(x, 1))
    for number, want in ((1, 1), (1.0, 1), (True, 0), (2, 0), (float("nan"), 0)):
        assert hits(Graph.of((X,), (ops.mul(X, number),)), made) == want, number
    assert why(Graph.of((X,), (ops.sub(X, 2.0),)), rule(lambda op, x: op.sub(x, 1))) == (
        "expected 1, found 2.0"
    )


def test_optional_operands_left_out_must_be_absent() -> None:
    x, w, b = (Input(k, Tensor(s, f32)) for k, s in (("x", (2, 3)), ("w", (4, 3)), ("b", (4,))))
    plain = rule(
        lambda op, x, w: op.linear(x, w), lambda op, m, x, w: op.matmul(x, op.permute(w, (1, 0)))
    )
    with_bias = rule(
        lambda op, x, w, b: op.linear(x, w, b), lambda op, m, x, w, b: op.add(op.linear(x, w), b)
    )
    any_bias = rule(
        lambda op, x, w: op.linear(x, w, op.any),
        lambda op, m, x, w: op.copy(op.matmul(x, op.permute(w, (1, 0)))),
    )
    without, given = (
        Graph.of((x, w), (ops.linear(x, w),)),
        Graph.of((x, w, b), (ops.linear(x, w, b),)),
    )
    assert hits(without, plain) == 1 and why(given, plain) == "linear has a bias"
    assert hits(given, with_bias) == 1 and why(without, with_bias) == "operand b is absent"
    assert hits(without, any_bias) == 1 and hits(given, any_bias) == 1


def test_attributes_left_out_may_be_anything_and_given_ones_must_fit() -> None:
    x = Input("x", Tensor((2, 3), f32))
    graph = Graph.of((x,), (ops.sum(x, (1,), keepdim=True),))

    def same(op, m, x):
        return op.mean(x, (1,), keepdim=True)

    assert hits(graph, rule(lambda op, x: op.sum(x), same)) == 1
    assert hits(graph, rule(lambda op, x: op.sum(x, (1,), keepdim=True), same)) == 1
    assert (
        why(graph, rule(lambda op, x: op.sum(x, keepdim=False), same))
        == "expected False, found True"
    )
    assert why(graph, rule(lambda op, x: op.sum(x, (0,)), same)) == "expected 0, found 1"
    assert why(graph, rule(lambda op, x: op.sum(x, (0, 1)), same)) == "2 attrs expected, found 1"


def test_operands_in_a_tuple_match_one_by_one() -> None:
    made = rule(
        lambda op, a, b: op.cat((op.exp(a), b), 0),
        lambda op, m, a, b: op.flip(m.root, (0,)) if 0 else op.pad(op.add(a, b), (0,), (4,)),
    )
    assert hits(Graph.of((X, Z), (ops.cat((ops.exp(X), Z), 0),)), made) == 1
    assert (
        why(Graph.of((X, Z), (ops.cat((Z, ops.exp(X)), 0),)), made) == "expected exp, found input"
    )
    assert why(Graph.of((X,), (ops.cat((X, X, X), 0),)), made) == "2 operands expected, found 3"


def test_one_of_several_ops() -> None:
    made = rule(
        lambda op, x: op.one_of("relu", "gelu")(op.exp(x)).named("act"),
        lambda op, m, x: op.tanh(m.act.x),
    )
    graph = Graph.of((X,), (of(X, "exp", "relu"), of(X, "exp", "gelu"), of(X, "exp", "silu")))
    after, _ = apply(graph, made)
    assert [o.name for o in after.outputs] == ["tanh", "tanh", "silu"]
    inner = rule(lambda op, x: op.abs(op.one_of("sin", "cos")(x)))
    assert why(Graph.of((X,), (of(X, "tanh", "abs"),)), inner) == "expected sin|cos, found tanh"


def test_alternatives_are_tried_in_order_and_the_nearest_is_kept() -> None:
    made = rule(
        lambda op, x, y: (
            op.add(op.exp(x), op.sin(y)),
            op.add(op.exp(op.cos(x)), op.tanh(y)),
            op.add(op.log(x), y),
        ),
        lambda op, m, x, y: op.sub(x, 1.0) if y is None else op.sub(x, y),
    )
    assert hits(Graph.of((X, Z), (ops.add(ops.log(X), Z),)), made) == 1
    assert hits(Graph.of((X, Z), (ops.add(ops.exp(X), ops.sin(Z)),)), made) == 1
    far = Graph.of((X, Z), (ops.add(of(X, "cos", "exp"), Z),))
    assert why(far, made) == "expected tanh, found input"


def test_variables_that_an_alternative_lacks_are_none() -> None:
    made = rule(
        lambda op, x, y: (op.exp(op.neg(x)), op.exp(op.add(x, y))),
        lambda op, m, x, y: op.tanh(x if y is None else y),
    )
    after, _ = apply(Graph.of((X, Z), (of(X, "neg", "exp"), ops.exp(ops.add(X, Z)))), made)
    assert [o.x for o in after.outputs] == [X, Z]


def test_a_wrong_pattern_is_refused_when_the_engine_is_made() -> None:
    for pattern, text in (
        (lambda op, x: op.rleu(x), "unknown op 'rleu'"),
        (lambda op, x: op.relu(x, x), "a pattern gives relu 2 operands of 1"),
        (lambda op, x: op.relu(y=x), "relu has no field 'y'"),
        (lambda op, x: op.one_of("relu", "gleu")(x), "unknown op 'gleu'"),
        (
            lambda op, x: op.one_of("gelu", "relu")(x, approximate="tanh"),
            "relu has no field 'approximate'",
        ),
    ):
        with pytest.raises(OpError) as e:
            Engine([rule(pattern)])
        assert e.value.what == text


# ------------------------------------------------------------------ values with other users

TWICE = rule(lambda op, x: op.relu(op.exp(x).named("e")), lambda op, m, x: op.tanh(x))


def test_a_value_used_elsewhere_is_not_computed_twice() -> None:
    e = ops.exp(X)
    user = Graph.of((X,), (ops.relu(e), ops.sin(e)))
    assert why(user, TWICE) == "exp is also used by sin"
    assert why(Graph.of((X,), (ops.relu(e), e)), TWICE) == "exp is also an output"
    assert hits(Graph.of((X,), (ops.relu(e),)), TWICE) == 1


def test_a_value_used_twice_inside_the_pattern_is_fine() -> None:
    made = rule(
        lambda op, x: op.mul(op.exp(x).named("e"), op.exp(x)), lambda op, m, x: op.sinh(m.e.x)
    )
    e = ops.exp(X)
    assert hits(Graph.of((X,), (ops.mul(e, e),)), made) == 1


def test_sharing_may_be_allowed_for_a_rule_or_a_value() -> None:
    e = ops.exp(X)
    user = Graph.of((X,), (ops.relu(e), e))
    whole = rule(lambda op, x: op.relu(op.exp(x)), lambda op, m, x: op.tanh(x), shared=True)
    single = rule(lambda op, x: op.relu(op.exp(x).shared()), lambda op, m, x: op.tanh(x))
    for made in (whole, single):
        after, _ = apply(user, made)
        assert [o.name for o in after.outputs] == ["tanh", "exp"]


# ------------------------------------------------------------------ algebraic rules

ONE = algebraic("mul(x, 1) => x", lambda op, x: op.mul(x, 1), lambda op, x: x)


def test_an_algebraic_rule_is_data() -> None:
    graph = Graph.of((X,), (ops.relu(ops.mul(ops.mul(X, 1.0), 1)),))
    after, engine = apply(graph, ONE)
    assert body(after) == ["f32[4] = relu(x)"]
    assert engine.stats["mul(x, 1) => x"].hits == 2 and ONE.title == "mul(x, 1) => x"


def test_several_algebraic_rules_have_a_count_each() -> None:
    twice = algebraic("neg(neg(x)) => x", lambda op, x: op.neg(op.neg(x)), lambda op, x: x)
    after, engine = apply(Graph.of((X,), (of(ops.mul(X, 1), "neg", "neg", "exp"),)), ONE, twice)
    assert body(after) == ["f32[4] = exp(x)"]
    assert [s.hits for s in engine.stats.values()] == [1, 1]


# ------------------------------------------------------------------ the engine


def test_overlapping_matches_in_one_sweep() -> None:
    """neg(neg(neg(neg(neg(x))))): five places overlap; an odd number of signs stays."""
    twice = algebraic("neg(neg(x)) => x", lambda op, x: op.neg(op.neg(x)), lambda op, x: x)
    for n in range(8):
        after, _ = apply(Graph.of((X,), (of(X, *["neg"] * n, "exp"),)), twice)
        assert body(after) == ["f32[4] = neg(x)"] * (n % 2) + [
            f"f32[4] = exp({'y0' if n % 2 else 'x'})"
        ]


def test_matches_that_share_an_operand_in_one_sweep() -> None:
    made = rule(lambda op, x: op.exp(op.neg(x)), lambda op, m, x: op.reciprocal(op.sin(x)))
    inner = of(X, "neg", "exp")
    graph = Graph.of((X,), (ops.add(of(inner, "neg", "exp"), of(inner, "neg", "exp")),))
    after, engine = apply(graph, made)
    assert engine.stats["Made"].hits == 3
    assert [n.name for n in after.nodes] == [
        "sin",
        "reciprocal",
        "sin",
        "reciprocal",
        "sin",
        "reciprocal",
        "add",
    ]


def test_a_shared_inner_value_may_be_the_root_of_the_next_match() -> None:
    made = rule(lambda op, x: op.exp(op.exp(x).shared()), lambda op, m, x: op.tanh(x))
    e = ops.exp(X)
    chain = Graph.of((X,), (of(e, "exp", "exp"), e))
    inputs = [torch.linspace(-1, 1, 4)]
    after, engine = apply(chain, made)
    assert engine.stats["Made"].hits == 1  # exp(exp(exp(x))) => tanh(exp(x)); nothing is left
    assert torch.equal(interpret(after, inputs)[0], inputs[0].exp().tanh())


@pytest.mark.parametrize("seed", range(20))
def test_sweeps_keep_the_value_of_random_chains(seed: int) -> None:
    """Exact rules on a random tree with shared values: the result is the same to the bit."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    values: list[Any] = [X, Z]
    for _ in range(25):
        a, b = values[-1 - draw(min(3, len(values)))], values[draw(len(values))]
        values.append(
            [
                lambda a=a: ops.neg(a), lambda a=a: ops.mul(a, 1), lambda a=a: ops.mul(1.0, a),
                lambda a=a, b=b: ops.maximum(a, b), lambda a=a: ops.abs(a),
                lambda a=a, b=b: ops.sub(a, b), lambda a=a: ops.relu(a),
            ][draw(7)]()
        )  # fmt: skip
    graph = Graph.of((X, Z), (values[-1], values[-4], values[-9]))
    rules = [
        ONE,
        algebraic("neg(neg(x)) => x", lambda op, x: op.neg(op.neg(x)), lambda op, x: x),
        algebraic(
            "abs(neg(x)) => abs(x)", lambda op, x: op.abs(op.neg(x)), lambda op, x: op.abs(x)
        ),
        algebraic(
            "abs(abs(x)) => abs(x)", lambda op, x: op.abs(op.abs(x)), lambda op, x: op.abs(x)
        ),
        algebraic(
            "relu(relu(x)) => relu(x)", lambda op, x: op.relu(op.relu(x)), lambda op, x: op.relu(x)
        ),
        algebraic(
            "neg(a - b) => b - a",
            lambda op, a, b: op.neg(op.sub(a, b)),
            lambda op, a, b: op.sub(b, a),
        ),
        algebraic("max(x, x) => x", lambda op, x: op.maximum(x, x), lambda op, x: x),
    ]
    before = graph.text
    after, _ = apply(graph, *rules)
    inputs = [torch.randn(4, generator=generator) for _ in range(2)]
    for got, want in zip(interpret(after, inputs), interpret(graph, inputs), strict=True):
        assert torch.equal(got + 0.0, want + 0.0)  # 0 - 0 and -(0 - 0) differ in sign only
    assert graph.text == before


def test_nothing_to_do_is_the_same_object() -> None:
    graph = Graph.of((X,), (ops.exp(X),))
    assert Engine([ONE]).run(graph) is graph and Engine([]).run(graph) is graph


def test_a_rule_that_does_not_come_to_rest_is_named() -> None:
    endless = rule(lambda op, x: op.exp(x), lambda op, m, x: op.exp(op.neg(x)))
    with pytest.raises(RuleError) as e:
        apply(Graph.of((X,), (ops.exp(X),)), ONE, endless, limit=5)
    assert str(e.value) == (
        "rules do not come to rest after 5 sweeps\n"
        "  why   Made applied most, 5 times\n"
        "  fix   make the rule's result no longer match its own pattern"
    )


def test_a_rule_that_throws_shows_the_ir_around() -> None:
    def fails(op, m, x):
        return op.reshape(x, (5,))

    graph = Graph.of((X,), (of(X, "sin", "exp", "cos"),))
    graph.nodes[1].at(Origin("head", "model.py:3"))
    with pytest.raises(RuleError) as e:
        apply(graph, rule(lambda op, x: op.exp(x), fails))
    assert str(e.value) == (
        "Made.rewrite failed: OpError: reshape(f32[4]): 4 elements do not fill shape [5]\n"
        "  where head  model.py:3\n"
        "  node  y1: f32[4] = exp(y0)  # head  model.py:3\n"
        "  why   made => neg\n"
        "    y0: f32[4] = sin(x)\n"
        "  > y1: f32[4] = exp(y0)  # head  model.py:3\n"
        "    y2: f32[4] = cos(y1)"
    )
    assert isinstance(e.value.__cause__, OpError)


@pytest.mark.parametrize(
    "error", [KeyError("scale"), OpError("no such thing"), ZeroDivisionError("division by zero")]
)
def test_a_check_that_throws_shows_the_ir_around(error: Exception) -> None:
    def check(m, x):
        raise error

    with pytest.raises(RuleError) as e:
        apply(Graph.of((X,), (ops.exp(X),)), rule(lambda op, x: op.exp(x), check=check))
    assert e.value.what == f"Made.check failed: {type(error).__name__}: {error}"
    assert e.value.context == "  > y0: f32[4] = exp(x)"


@pytest.mark.parametrize("answer", [None, True, False, "no"])
def test_a_check_answers_yes_or_no(answer: Any) -> None:
    with pytest.raises(RuleError) as e:
        apply(
            Graph.of((X,), (ops.exp(X),)), rule(lambda op, x: op.exp(x), check=lambda m, x: answer)
        )
    assert e.value.what == (
        f"Made.check failed: TypeError: it must return yes or no(reason), not {answer!r}"
    )


@pytest.mark.parametrize("result", [None, 0, "x"])
def test_a_rewrite_returns_a_node(result: Any) -> None:
    with pytest.raises(RuleError) as e:
        apply(Graph.of((X,), (ops.exp(X),)), rule(lambda op, x: op.exp(x), lambda op, m, x: result))
    assert e.value.what == f"Made.rewrite failed: TypeError: it must return a node, not {result!r}"


def test_a_rewrite_keeps_the_type() -> None:
    made = rule(lambda op, x: op.exp(x), lambda op, m, x: op.cast(x, f64))
    with pytest.raises(RuleError) as e:
        apply(Graph.of((X,), (ops.exp(X),)), made)
    assert str(e.value) == (
        "Made changes the type of a value from f32[4] to f64[4]\n"
        "  node  y0: f32[4] = exp(x)\n"
        "  > y0: f32[4] = exp(x)"
    )


# ------------------------------------------------------------------ counts and misses


def test_attempts_and_hits_are_counted_over_sweeps() -> None:
    graph = Graph.of((X,), (of(ops.mul(ops.mul(X, 1), 1), "exp"), ops.mul(X, 2.0)))
    _, engine = apply(graph, ONE)
    stats = engine.stats["mul(x, 1) => x"]
    assert stats.hits == 2
    assert stats.attempts == 4  # three products, then the one that is left
    assert [m.reason for m in stats.misses] == ["expected 1, found 2.0"]


def test_the_nearest_misses_are_kept_sorted_one_a_node() -> None:
    deep = rule(lambda op, x: op.exp(op.sin(op.cos(op.tanh(x)))))
    outputs = [of(X, *names) for names in (
        ("exp",), ("sin", "exp"), ("cos", "sin", "exp"), *[("abs", "exp")] * 9,
    )]  # fmt: skip
    _, engine = apply(Graph.of((X,), outputs), deep)
    misses = engine.stats["Made"].misses
    assert len(misses) == RuleStats.KEEP == 8
    assert [m.depth for m in misses] == [3, 2, 1, 1, 1, 1, 1, 1]
    assert [m.reason for m in misses[:2]] == [
        "expected tanh, found input",
        "expected cos, found input",
    ]
    assert len({m.node for m in misses}) == 8


def test_a_refused_check_is_nearer_than_a_pattern_that_stopped() -> None:
    made = rule(lambda op, x: op.exp(x), check=lambda m, x: no("never"))
    longer = rule(lambda op, x: op.relu(op.sin(op.cos(x))))
    engine = Engine([made])
    graph = Graph.of((X,), (of(X, "exp"), of(X, "sin", "relu")))
    engine.run(graph)
    other = Engine([longer])
    other.run(graph)
    stats = RuleStats("both", "both")
    for miss in (*other.stats["Made"].misses, *engine.stats["Made"].misses):
        stats.missed(miss)
    assert [m.checked for m in stats.misses] == [True, False]


# ------------------------------------------------------------------ origins


def test_a_replacement_inherits_all_origins_in_program_order() -> None:
    graph = parse(CONV)
    graph.nodes[0].at(Origin("conv", "model.py:1"))
    graph.nodes[1].at(Origin("bias", "model.py:2"))
    after, _ = apply(graph, FuseConvBias())
    assert [str(o) for o in after.nodes[-1].origins] == ["conv  model.py:1", "bias  model.py:2"]
    assert after.nodes[0].where == "conv  model.py:1"  # the new reshape has a place, too
    assert after.nodes[-1].where == "conv  model.py:1"


def test_a_value_that_was_there_before_keeps_its_own() -> None:
    graph = Graph.of((X,), (ops.mul(ops.exp(X), 1),))
    graph.nodes[1].at(Origin("scale"))
    before = graph.text
    after, _ = apply(graph, ONE)
    assert body(after) == ["f32[4] = exp(x)"] and graph.text == before


# ------------------------------------------------------------------ what a check may ask


def test_constants_and_uses() -> None:
    w = Weight("w", Tensor((4,), f32), "00")
    seen: list[Any] = []

    def check(m, x, y):
        seen.append((m.is_constant(x), m.is_constant(y), m.uses(m.root)))
        return no("looked")

    made = rule(lambda op, x, y: op.sub(x, y), check=check)
    value = ops.sub(X, ops.exp(w))
    apply(Graph.of((X,), (value, value, ops.sub(X, 2.0))), made)
    assert sorted(seen) == [(False, True, 1), (False, True, 2)]


def test_a_name_that_the_pattern_does_not_give() -> None:
    made = rule(lambda op, x: op.exp(x), check=lambda m, x: no("{}", m.inner_conv))
    with pytest.raises(RuleError, match="AttributeError: the pattern names no node 'inner_conv'"):
        apply(Graph.of((X,), (ops.exp(X),)), made)


def test_integer_rules_do_not_see_float_numbers_as_sizes() -> None:
    i = Input("i", Tensor((4,), i64))
    after, _ = apply(Graph.of((i,), (ops.mul(i, 1),)), ONE)
    assert after.outputs == (i,)
    with pytest.raises(RuleError, match=r"changes the type of a value from f32\[4\] to i64\[4\]"):
        apply(Graph.of((i,), (ops.mul(i, 1.0),)), ONE)
