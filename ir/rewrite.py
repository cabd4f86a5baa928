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

How patterns match is told in `pattern`. A value inside the pattern that is also used outside it
would be computed twice, so the engine refuses unless `shared = True`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import EffcError, RuleError
from .graph import Graph
from .op import OPS, Op, find_op
from .pattern import ANY, Answer, Form, Match, No, Pat, PatternOps, Var, Yes, no, yes
from .text import node_text
from .types import type_text
from .verify import window


class Ops:
    """`op.conv2d(x, w)` in a rewrite makes a node."""

    def __getattr__(self, name: str) -> type[Op]:
        return find_op(name)


op = Ops()
_pattern_ops = PatternOps()

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
        if (checked, depth) > (last.checked, last.depth):
            return True
        return node in [m.node for m in self.misses]

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
        self._by_root: dict[str, list[tuple[Rule, Pat, Form, RuleStats]]] = {}
        for rule in self.rules:
            for pattern in _alternatives(rule):
                for name in pattern.ops:
                    entry = (rule, pattern, pattern.form(find_op(name)), self.stats[rule.name])
                    self._by_root.setdefault(name, []).append(entry)

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
            for rule, pattern, form, stats in self._by_root.get(node.name, ()):
                stats.attempts += 1
                if form.refuses(node) and not stats.wants(node, False, 1):
                    continue  # as nearly all attempts end
                m = self._attempt(graph, rule, pattern, node, consumed)
                if m is None:
                    continue
                result = self._rewrite(graph, rule, m)
                _inherit(graph, result, (*(n for n, _ in reversed(m.inner)), node))
                replaced[node] = result
                consumed |= {node, *(n for n, _ in m.inner)}
                stats.hits += 1
                self.touched.append(result)
                journal.rewrites.append(Rewrite(rule.name, graph, node, result))
                break
        return replaced

    def _attempt(
        self, graph: Graph, rule: Rule, pattern: Pat, node: Op, taken: set[Op]
    ) -> Match | None:
        stats = self.stats[rule.name]
        start = time.perf_counter()
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
