"""Rules: pattern, check, rewrite; and the engine that applies them, counts, and explains misses.

    class FuseConvBias(Rule):
        \"\"\"add(conv2d(x, w), b[C, 1, 1]) => conv2d(x, w, flatten(b))\"\"\"

        def pattern(self, op, x, w, b):
            return op.add(op.conv2d(x, w).named("conv"), b)

        def check(self, m, x, w, b):
            if b.shape != (w.shape[0], 1, 1):
                return no("b has shape {}, a bias is ({}, 1, 1)", b.shape, w.shape[0], at=b)
            return yes

        def rewrite(self, op, m, x, w, b):
            return m.conv.replace(bias=op.reshape(b, (w.shape[0],)))

In a pattern, operands left out must be absent, attributes left out may be anything, and a plain
number stands for itself. Commutative ops match either way round. A value inside the pattern that
is also used outside it would be computed twice, so the engine refuses unless `shared = True`.
Reasons are formatted only when someone reads them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, TypeAlias

from .errors import EffcError, OpError, RuleError, nearest
from .graph import Graph
from .op import OPS, Op, find_op
from .text import node_text
from .types import type_text
from .verify import window

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
    _forms: dict[type[Op], _Form] = field(default_factory=dict, init=False, repr=False)

    def form(self, cls: type[Op]) -> _Form:
        """What it asks of a node of this op; worked out once."""
        if cls not in self._forms:
            self._forms[cls] = _Form.of(self, cls)
        return self._forms[cls]

    def named(self, name: str) -> Pat:
        """Call the matched node `m.<name>` in check and rewrite."""
        return Pat(self.ops, self.args, name, self.is_shared)

    def shared(self) -> Pat:
        """Allow the matched node to have users outside the pattern."""
        return Pat(self.ops, self.args, self.name, True)


ANY = Var("_")


@dataclass(frozen=True, eq=False)
class _Form:
    """A pattern's wishes about the fields of one op."""

    absent: tuple[tuple[str, Any], ...]  # operands left out, and their defaults
    orders: tuple[tuple[tuple[Any, str, str], ...], ...]  # (pattern, field, kind), each way round

    @staticmethod
    def of(pat: Pat, cls: type[Op]) -> _Form:
        wanted, kinds = dict(pat.args), {f.name: f.kind for f in cls.fields}
        orders = [wanted]
        if getattr(cls, "commutative", False) and wanted.keys() & {"a", "b"}:
            orders.append({{"a": "b", "b": "a"}.get(k, k): p for k, p in wanted.items()})
        return _Form(
            tuple(
                (f.name, f.default)
                for f in cls.fields
                if f.name not in wanted and f.kind == "operand" and f.default is not MISSING
            ),
            tuple(tuple((p, k, kinds[k]) for k, p in order.items()) for order in orders),
        )


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


class Ops:
    """`op.conv2d(x, w)` in a rewrite makes a node."""

    def __getattr__(self, name: str) -> type[Op]:
        return find_op(name)


op = Ops()
_pattern_ops = PatternOps()


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


# ------------------------------------------------------------------ rules


class Rule:
    """One rewrite. The docstring's first line is the rule, `before => after`."""

    shared: ClassVar[bool] = False  # True: matched inner values may have other users

    def pattern(self, op: Any, *args: Any) -> Any:
        """The pattern, or a tuple of alternatives; parameters after `op` are its variables."""
        raise NotImplementedError

    def check(self, m: Match, *args: Any) -> Answer:
        return yes

    def rewrite(self, op: Any, m: Match, *args: Any) -> Op:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def title(self) -> str:
        return (inspect.getdoc(self) or self.name).splitlines()[0]


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule nearly applied. `depth` counts the pattern nodes that did match."""

    rule: str
    graph: Graph = field(repr=False, compare=False)
    node: Op = field(compare=False)
    depth: int
    checked: bool  # the pattern matched; check said no
    why: No

    @property
    def reason(self) -> str:
        return self.why.reason

    @property
    def where(self) -> str:
        at = self.why.at
        return (at.where if isinstance(at, Op) and at.where else "") or self.node.where

    @property
    def node_text(self) -> str:
        return node_text(self.graph, self.node)


@dataclass
class RuleStats:
    """Counters of one rule over one run."""

    rule: str
    title: str
    attempts: int = 0
    hits: int = 0
    seconds: float = 0.0
    misses: list[NearMiss] = field(default_factory=list)

    KEEP: ClassVar[int] = 8

    def wants(self, node: Op, checked: bool, depth: int) -> bool:
        """Whether a miss is near enough to be kept, asked before one is made."""
        if len(self.misses) < self.KEEP:
            return True
        last = self.misses[-1]
        return (checked, depth) > (last.checked, last.depth) or any(
            m.node is node for m in self.misses
        )

    def missed(self, miss: NearMiss) -> None:
        """Keep the nearest few; one per node, its nearest alternative."""
        seen = next((m for m in self.misses if m.node is miss.node), None)
        if seen and (seen.checked, seen.depth) > (miss.checked, miss.depth):
            return
        self.misses = [m for m in self.misses if m is not seen]
        self.misses.append(miss)
        self.misses.sort(key=lambda m: (m.checked, m.depth), reverse=True)
        del self.misses[self.KEEP :]


@dataclass(frozen=True)
class Rewrite:
    """One applied rule: `graph` before it, the replaced `root` and what stands there now."""

    rule: str
    graph: Graph = field(repr=False, compare=False)
    root: Op
    result: Op


class Journal:
    """While open, records what every engine does: each rewrite, and where each value went.

        with Journal() as journal:
            after = rewrite(before)
        journal.now(before)  # for each value of `before`, what stands for it in `after`

    limit: engines stop after so many rewrites, so the first wrong one can be found by bisection.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.rewrites: list[Rewrite] = []
        self.moves: list[dict[Op, Op]] = []  # one a sweep: value of the old graph -> of the new
        self.replaced: set[Op] = set()

    def __enter__(self) -> Journal:
        self._token = _journal.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _journal.reset(self._token)

    @staticmethod
    def current() -> Journal | None:
        """The one that is open, if any."""
        return _journal.get()

    @property
    def spent(self) -> bool:
        return self.limit is not None and len(self.rewrites) >= self.limit

    def substitute(self, graph: Graph, new: dict[Op, Op]) -> Graph:
        """graph.substitute(new), recorded."""
        moved: dict[Op, Op] = {}

        def replace(node: Op, mapped: Op, remap: Any) -> Op:
            moved[node] = remap(new[node]) if node in new else mapped
            return moved[node]

        result = graph._remap(replace, None, graph.inputs)
        self.moves.append(moved)
        self.replaced |= new.keys()
        return result

    def now(self, graph: Graph) -> Iterator[tuple[Op, Op, bool]]:
        """(node of `graph`, the node that stands for its value at the end, was it rewritten)."""
        for node in graph.nodes:
            current, touched = node, node in self.replaced
            for moved in self.moves:
                current = moved.get(current, current)
                touched = touched or current in self.replaced
            yield node, current, touched


_journal: ContextVar[Journal | None] = ContextVar("effc_journal", default=None)


class Engine:
    """Applies rules to a graph until none matches, and keeps the counts.

    Raises RuleError when a rule throws or when `limit` sweeps do not come to rest.
    """

    def __init__(self, rules: Sequence[Rule], limit: int = 100) -> None:
        self.rules, self.limit = tuple(rules), limit
        self.stats = {r.name: RuleStats(r.name, r.title) for r in self.rules}
        self.touched: list[Op] = []
        self._variables = {id(r): _variables(r) for r in self.rules}
        self._by_root: dict[str, list[tuple[Rule, Pat]]] = {}
        for rule in self.rules:
            for alternative in _alternatives(rule):
                for name in alternative.ops:
                    self._by_root.setdefault(name, []).append((rule, alternative))

    def run(self, graph: Graph) -> Graph:
        journal = _journal.get() or Journal()
        for _ in range(self.limit):
            replaced = self._sweep(graph, journal)
            if not replaced:
                return graph
            for stats in self.stats.values():
                stats.misses.clear()  # the next sweep sees the same places again
            graph = journal.substitute(graph, replaced)
        hottest = max(self.stats.values(), key=lambda s: s.hits).rule
        raise RuleError(
            f"rules do not come to rest after {self.limit} sweeps",
            why=f"{hottest} applied most, {self.stats[hottest].hits} times",
            fix="make the rule's result no longer match its own pattern",
        )

    def _sweep(self, graph: Graph, journal: Journal) -> dict[Op, Op]:
        replaced: dict[Op, Op] = {}
        consumed: set[Op] = set()  # took part in a rewrite of this sweep
        for node in reversed(graph.nodes):
            if node in consumed or journal.spent:
                continue
            for rule, pattern in self._by_root.get(node.name, ()):
                m = self._attempt(graph, rule, pattern, node, consumed)
                if m is None:
                    continue
                result = self._rewrite(graph, rule, m)
                _inherit(graph, result, (*(n for n, _ in reversed(m.inner)), node))
                replaced[node] = result
                consumed |= {node, *(n for n, _ in m.inner)}
                self.stats[rule.name].hits += 1
                self.touched.append(result)
                journal.rewrites.append(Rewrite(rule.name, graph, node, result))
                break
        return replaced

    def _attempt(
        self, graph: Graph, rule: Rule, pattern: Pat, node: Op, taken: set[Op]
    ) -> Match | None:
        stats = self.stats[rule.name]
        start = time.perf_counter()
        stats.attempts += 1
        m = Match(graph, node)
        matched = m.match(pattern, node)
        answer: Answer = yes if matched or m.why is None else m.why  # No is falsy: no `or` here
        if matched and any(n in taken for n, _ in m.inner):
            stats.seconds += time.perf_counter() - start
            return None  # another rewrite of this sweep took part of it; the next sweep looks again
        if matched:
            answer = self._single_use(rule, m) and self._check(graph, rule, m)
        if isinstance(answer, No):
            depth = m.depth if matched else m.farthest
            if stats.wants(node, matched, depth):
                stats.missed(NearMiss(rule.name, graph, node, depth, matched, answer))
        stats.seconds += time.perf_counter() - start
        return m if answer else None

    def _single_use(self, rule: Rule, m: Match) -> Answer:
        inside = {m.root, *(n for n, _ in m.inner)}
        for node, is_shared in m.inner:
            if rule.shared or is_shared:
                continue
            outside = [u for u in m.graph.users[node] if u not in inside]
            if any(o is node for o in m.graph.outputs):
                return no("{} is also an output", node.name, at=node)
            if outside:
                return no("{} is also used by {}", node.name, outside[0].name, at=node)
        return yes

    def _arguments(self, rule: Rule, m: Match) -> list[Any]:
        """Matched variables in the order of the pattern's parameters; None for those that the
        alternative does not have."""
        return [m.vars.get(name) for name in self._variables[id(rule)]]

    def _check(self, graph: Graph, rule: Rule, m: Match) -> Answer:
        try:
            answer = rule.check(m, *self._arguments(rule, m))
            if not isinstance(answer, (Yes, No)):
                raise TypeError(f"it must return yes or no(reason), not {answer!r}")
        except Exception as e:
            raise _rule_error(graph, rule, m.root, "check", e) from e
        return answer

    def _rewrite(self, graph: Graph, rule: Rule, m: Match) -> Op:
        try:
            result = rule.rewrite(op, m, *self._arguments(rule, m))
            if not isinstance(result, Op):
                raise TypeError(f"it must return a node, not {result!r}")
        except Exception as e:
            raise _rule_error(graph, rule, m.root, "rewrite", e) from e
        if result.type != m.root.type:
            was, now = type_text(m.root.type), type_text(result.type)
            raise RuleError(
                f"{rule.name} changes the type of a value from {was} to {now}",
                node=node_text(graph, m.root), where=m.root.where, context=window(graph, m.root),
            )  # fmt: skip
        return result


def _inherit(graph: Graph, result: Op, sources: tuple[Op, ...]) -> None:
    """Every node that a rewrite made, and no node that was there before, takes the origins."""
    seen: set[Op] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node not in seen and node not in graph.users:
            seen.add(node)
            node.from_(*sources)
            stack += node.operands


def _rule_error(graph: Graph, rule: Rule, node: Op, step: str, e: Exception) -> RuleError:
    said = e.what if isinstance(e, EffcError) else e
    return RuleError(
        f"{rule.name}.{step} failed: {type(e).__name__}: {said}",
        node=node_text(graph, node), where=node.where, why=rule.title, context=window(graph, node),
    )  # fmt: skip


def _variables(rule: Rule) -> tuple[str, ...]:
    """Names of the pattern's variables: its parameters after `op`."""
    return tuple(inspect.signature(rule.pattern).parameters)[1:]


def _alternatives(rule: Rule) -> tuple[Pat, ...]:
    made = rule.pattern(_pattern_ops, *map(Var, _variables(rule)))
    return made if isinstance(made, tuple) else (made,)


def algebraic(title: str, before: Any, after: Any) -> Rule:
    """A rule without conditions, as data: `algebraic("mul(x, 1) => x", before, after)`.

    before, after: functions of (op, x, ...) written as calls, as `pattern` and `rewrite` are.
    """

    class Algebraic(Rule):
        __doc__ = title

        def pattern(self, op: Any, *args: Any) -> Any:
            return before(op, *args)

        def rewrite(self, op: Any, m: Match, *args: Any) -> Op:
            return after(op, *args)

        @property
        def name(self) -> str:
            return title

    rule = Algebraic()
    rule.pattern = before  # type: ignore[method-assign]  # its signature names the variables
    return rule


__all__ = [
    "ANY", "OPS", "Answer", "Engine", "Journal", "Match", "NearMiss", "No", "Pat", "Rewrite",
    "Rule", "RuleStats", "Yes", "algebraic", "no", "op", "yes",
]  # fmt: skip
