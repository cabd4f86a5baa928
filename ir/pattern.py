"""Patterns: what a node must look like, and the match that says which nodes were found, or why not.

A pattern is written as calls, `op.add(op.conv2d(x, w).named("conv"), b)`; `rewrite` has the rules
that use them. Operands left out must be absent, attributes left out may be anything, and a plain
number stands for itself. Commutative ops match either way round.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, TypeAlias

from .errors import OpError, nearest
from .graph import Graph
from .op import Op, find_op

# ------------------------------------------------------------------ answers


class Yes:
    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return "yes"


@dataclass(frozen=True)
class No:
    """A refusal with its reason, and the node the reason is about."""

    template: str
    args: tuple[object, ...] = ()
    at: Op | None = None

    def __bool__(self) -> bool:
        return False

    @property
    def reason(self) -> str:
        return self.template.format(*map(_show, self.args)) if self.args else self.template

    def __str__(self) -> str:
        return self.reason


Answer: TypeAlias = Yes | No
yes = Yes()


def no(template: str, *args: object, at: Op | None = None) -> No:
    """Refuse, with a reason; `{}` in the template are filled only when the reason is read."""
    return No(template, args, at)


def _show(value: object) -> object:
    if isinstance(value, tuple):
        return f"({', '.join(str(_show(v)) for v in value)}{',' if len(value) == 1 else ''})"
    return value


# ------------------------------------------------------------------ patterns


@dataclass(frozen=True, eq=False)
class Var:
    """Matches any operand (a node, or a number where the op takes one)."""

    name: str


@dataclass(frozen=True, eq=False)
class Pat:
    """Matches a node of one of `ops` whose fields match."""

    ops: tuple[str, ...]
    args: tuple[tuple[str, Any], ...]  # field name -> Var | Pat | literal
    name: str | None = None
    is_shared: bool = False
    _forms: dict[type[Op], Form] = field(default_factory=dict, init=False, repr=False)

    def form(self, cls: type[Op]) -> Form:
        """What it asks of a node of this op; worked out once."""
        if cls not in self._forms:
            self._forms[cls] = Form.of(self, cls)
        return self._forms[cls]

    def named(self, name: str) -> Pat:
        """Call the matched node `m.<name>` in check and rewrite."""
        return Pat(self.ops, self.args, name, self.is_shared)

    def shared(self) -> Pat:
        """Allow the matched node to have users outside the pattern."""
        return Pat(self.ops, self.args, self.name, True)


ANY = Var("_")


@dataclass(frozen=True, eq=False)
class Form:
    """What a pattern wants of the fields of one op."""

    absent: tuple[tuple[str, Any], ...]  # operands left out, and their defaults
    orders: tuple[tuple[tuple[Any, str, str], ...], ...]  # (pattern, field, kind), each way round
    firsts: tuple[tuple[Any, str] | None, ...]  # of each order, what a look at one field can refuse

    @staticmethod
    def of(pat: Pat, cls: type[Op]) -> Form:
        wanted, kinds = dict(pat.args), {f.name: f.kind for f in cls.fields}
        orders = [wanted]
        if getattr(cls, "commutative", False) and wanted.keys() & {"a", "b"}:
            orders.append({{"a": "b", "b": "a"}.get(k, k): p for k, p in wanted.items()})
        ways = tuple(tuple((p, k, kinds[k]) for k, p in order.items()) for order in orders)
        return Form(
            tuple(
                (f.name, f.default)
                for f in cls.fields
                if f.name not in wanted and f.kind == "operand" and f.default is not MISSING
            ),
            ways,
            tuple(map(_first_test, ways)),
        )

    def refuses(self, node: Op) -> bool:
        """Whether a match is seen to fail at this node itself. False says nothing."""
        for name, default in self.absent:
            if getattr(node, name) is not default:
                return True
        for first in self.firsts:
            if first is None or _fits(first[0], getattr(node, first[1])):
                return False
        return True


def _first_test(order: tuple[tuple[Any, str, str], ...]) -> tuple[Any, str] | None:
    """The first field that must be a certain node or number; variables before it cannot match
    deeper than it would."""
    pattern, name, _ = next((p for p in order if not isinstance(p[0], Var)), (None, "", ""))
    return None if pattern is None or isinstance(pattern, tuple) else (pattern, name)


def _fits(pattern: Any, value: Any) -> bool:
    if isinstance(pattern, Pat):
        return isinstance(value, Op) and value.name in pattern.ops
    return _equal(pattern, value)


class PatternOps:
    """`op.conv2d(x, w)` in a pattern. `op.one_of("relu", "gelu")(x)` matches either."""

    any = ANY

    def __getattr__(self, name: str) -> Any:
        return self.one_of(name)

    def one_of(self, *names: str) -> Any:
        fields = [f.name for f in find_op(names[0]).fields if f.kind != "type"]

        def build(*args: Any, **kwargs: Any) -> Pat:
            if len(args) > len(fields):
                raise OpError(f"a pattern gives {names[0]} {len(args)} operands of {len(fields)}")
            bound = dict(zip(fields, args, strict=False)) | kwargs
            for name in names:
                known = {f.name for f in find_op(name).fields}
                for key in bound.keys() - known:
                    raise OpError(f"{name} has no field {key!r}", fix=nearest(key, known))
            return Pat(names, tuple(bound.items()))

        return build


# ------------------------------------------------------------------ matches


@dataclass
class Match:
    """What a pattern matched: `m.root`, nodes by their pattern names, operands by variable name."""

    graph: Graph
    root: Op
    nodes: dict[str, Op] = field(default_factory=dict)
    vars: dict[str, Any] = field(default_factory=dict)
    inner: list[tuple[Op, bool]] = field(default_factory=list)  # matched below root, is_shared
    depth: int = 0  # pattern nodes matched so far
    farthest: int = -1  # and before the failure that `why` tells
    why: No | None = None

    def __getattr__(self, name: str) -> Op:
        try:
            return self.__dict__["nodes"][name]
        except KeyError:
            raise AttributeError(f"the pattern names no node {name!r}") from None

    def uses(self, node: Op) -> int:
        return self.graph.uses(node)

    def is_constant(self, node: Any) -> bool:
        """Known before the first call: a number, a weight, or computed from weights alone."""
        return not isinstance(node, Op) or node in self.graph.constants

    # -- matching; a failed attempt leaves depth and why behind for the nearest-miss report

    def match(self, pattern: Any, value: Any) -> bool:
        return self._solve(((pattern, value, None, "operand"),))

    def _solve(self, goals: tuple[tuple[Any, Any, Op | None, str], ...]) -> bool:
        """goals: (pattern, value, its user, kind of field). Commutative nodes are tried both ways
        round, each with all the goals that follow."""
        while goals:
            (pattern, value, user, kind), goals = goals[0], goals[1:]
            if isinstance(pattern, Pat):
                orders = self._node(pattern, value, user)
                if len(orders) != 1:
                    return any(self._try(order + goals) for order in orders)
                goals = orders[0] + goals
            elif isinstance(pattern, tuple) and isinstance(value, tuple):
                if len(pattern) != len(value):
                    what = f"{{}} {kind}s expected, found {{}}"
                    return self._fail(what, len(pattern), len(value), at=user)
                goals = tuple((p, v, user, kind) for p, v in zip(pattern, value)) + goals
            elif isinstance(pattern, Var):
                if not self._var(pattern, value, kind):
                    return False
            elif not _equal(pattern, value):
                return self._fail("expected {}, found {}", pattern, _brief(value), at=user)
        return True

    def _try(self, goals: tuple[Any, ...]) -> bool:
        """Match, or leave everything but the nearest failure as it was."""
        nearest = (self.farthest, self.why)
        saved = (dict(self.nodes), dict(self.vars), list(self.inner), self.depth)
        if self._solve(goals):
            return True
        self.nodes, self.vars, self.inner, self.depth = saved
        if nearest[0] >= self.farthest:
            self.farthest, self.why = nearest
        return False

    def _var(self, var: Var, value: Any, kind: str) -> bool:
        if var is ANY:
            return True
        if value is None and kind == "operand":
            return self._fail("operand {} is absent", var.name, at=self.root)
        if var.name in self.vars and not _equal(self.vars[var.name], value):
            return self._fail("{} stands for two different values", var.name, at=self.root)
        self.vars[var.name] = value
        return True

    def _node(self, pat: Pat, value: Any, user: Op | None) -> tuple[Any, ...]:
        """The ways to match the fields of a node: goals for one order of operands, or for two."""
        if not isinstance(value, Op) or value.name not in pat.ops:
            self._fail("expected {}, found {}", "|".join(pat.ops), _brief(value), at=user)
            return ()
        self.depth += 1
        form = pat.form(type(value))
        for name, default in form.absent:
            if getattr(value, name) is not default:
                self._fail("{} has a {}", value.name, name, at=value)
                return ()
        if pat.name:
            self.nodes[pat.name] = value
        if user is not None:
            self.inner.append((value, pat.is_shared))
        return tuple(
            tuple([(p, getattr(value, name), value, kind) for p, name, kind in order])
            for order in form.orders
        )

    def _fail(self, template: str, *args: object, at: Op | None) -> bool:
        self.why, self.farthest = no(template, *args, at=at), self.depth
        return False


def _equal(a: Any, b: Any) -> bool:
    """The same node, or equal plain values: 1 is 1.0, and is not True."""
    if isinstance(a, Op) or isinstance(b, Op):
        return a is b
    return a == b and (type(a) is bool) == (type(b) is bool)


def _brief(value: Any) -> str:
    return value.name if isinstance(value, Op) else repr(value)


__all__ = ["ANY", "Answer", "Form", "Match", "No", "Pat", "PatternOps", "Var", "Yes", "no", "yes"]
