"""Values that follow from where an element stands: positions, differences of them, and masks.

`value_at(node)` says what element (i, j, ...) of a value is, for values made of sizes alone: a sum
of multiples of indices (Linear), a test of one (AtMost), or a number where a test holds and 0
elsewhere (Where). It holds at every size, known or not; None says that it is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from effc.ir import Dim, Op, Tensor

from .roles import groups, title

EXACT = {"i64", "i32", "f32", "f64"}  # types that hold every position
LOW = -1e30  # added to a score, it takes the score's place


@dataclass(frozen=True)
class Linear:
    """sum of coefs[d] * index d, plus const."""

    coefs: tuple[int, ...]
    const: int

    def scaled(self, by: int) -> Linear:
        return Linear(tuple(c * by for c in self.coefs), self.const * by)

    def plus(self, other: Linear) -> Linear:
        a, b = self.aligned(len(other.coefs)), other.aligned(len(self.coefs))
        return Linear(
            tuple(x + y for x, y in zip(a.coefs, b.coefs, strict=True)), a.const + b.const
        )

    def aligned(self, rank: int) -> Linear:
        """With more dimensions in front."""
        return Linear((0,) * (rank - len(self.coefs)) + self.coefs, self.const)

    @property
    def fixed(self) -> bool:
        return not any(self.coefs)


@dataclass(frozen=True)
class AtMost:
    """value <= 0."""

    value: Linear

    @property
    def known(self) -> bool | None:
        """True or False where it is so everywhere."""
        return self.value.const <= 0 if self.value.fixed else None

    def negated(self) -> AtMost:
        return AtMost(self.value.scaled(-1).plus(Linear((), 1)))


@dataclass(frozen=True)
class Where:
    """`number` where the test holds, 0 elsewhere."""

    test: AtMost
    number: float


At: TypeAlias = "Linear | AtMost | Where | None"
_KNOWN: WeakKeyDictionary[Op, At] = WeakKeyDictionary()


def value_at(node: Any) -> At:
    """What an element is, by its indices."""
    if not isinstance(node, Op):
        whole = isinstance(node, (bool, int)) or (isinstance(node, float) and node.is_integer())
        return Linear((), int(node)) if whole else None
    if node not in _KNOWN:
        rule = RULES.get(title(node))
        found = None if rule is None or not isinstance(node.type, Tensor) else rule(node)
        _KNOWN[node] = _mapped(found, lambda v: _here(v, node.shape))
    return _KNOWN[node]


def _mapped(at: At, fn: Callable[[Linear], Linear | None]) -> At:
    """The same kind of value of other indices."""
    match at:
        case Linear():
            return fn(at)
        case AtMost(value):
            new = fn(value)
            return None if new is None else AtMost(new)
        case Where(test, number):
            new = fn(test.value)
            return None if new is None else Where(AtMost(new), number)
    return None


def _here(value: Linear, shape: tuple[Dim, ...]) -> Linear:
    """With every dimension of the shape; the index of a dimension of 1 is 0."""
    value = value.aligned(len(shape))
    return Linear(
        tuple(0 if s == 1 else c for s, c in zip(shape, value.coefs, strict=True)), value.const
    )


# ------------------------------------------------------------------ numbers and tests


def _arange(node: Any) -> At:
    if not (isinstance(node.start, int) and isinstance(node.step, int)) or not _exact(node):
        return None
    return Linear((node.step,), node.start)


def _exact(node: Any) -> bool:
    return node.dtype.name in EXACT


def _full(node: Any) -> At:
    if isinstance(node.value, bool) and node.dtype.kind == "bool":
        return AtMost(Linear((), 0 if node.value else 1))
    whole = isinstance(node.value, int) or (
        isinstance(node.value, float) and node.value.is_integer()
    )
    return Linear((), int(node.value)) if whole and node.dtype.kind != "bool" else None


def _numbers(node: Any) -> tuple[Linear, Linear] | None:
    a, b = value_at(node.a), value_at(node.b)
    return (a, b) if isinstance(a, Linear) and isinstance(b, Linear) else None


def _sum(sign: int) -> Callable[[Any], At]:
    def rule(node: Any) -> At:
        both = _numbers(node) if _exact(node) else None
        return None if both is None else both[0].plus(both[1].scaled(sign))

    return rule


def _mul(node: Any) -> At:
    both = _numbers(node) if _exact(node) else None
    if both is None or not (both[0].fixed or both[1].fixed):
        return None
    a, b = both if both[1].fixed else both[::-1]
    return a.scaled(b.const)


def _compared(make: Callable[[Linear, Linear], Linear]) -> Callable[[Any], At]:
    def rule(node: Any) -> At:
        both = _numbers(node)
        return None if both is None else AtMost(make(*both))

    return rule


def _minus(a: Linear, b: Linear) -> Linear:
    return a.plus(b.scaled(-1))


ONE = Linear((), 1)


def _equal(same: bool) -> Callable[[Any], At]:
    def rule(node: Any) -> At:
        a, b = value_at(node.a), value_at(node.b)
        if isinstance(b, Where):
            a, b = b, a
        if isinstance(a, Where) and b == Linear((), 0) and a.number:
            return a.test.negated() if same else a.test
        if not (isinstance(a, Linear) and isinstance(b, Linear)):
            return None
        difference = _minus(a, b)
        holds = (difference.const == 0) == same
        return AtMost(Linear((), 0 if holds else 1)) if difference.fixed else None

    return rule


def _not(node: Any) -> At:
    x = value_at(node.x)
    return x.negated() if isinstance(x, AtMost) else None


def _and(node: Any) -> At:
    a, b = value_at(node.a), value_at(node.b)
    if not (isinstance(a, AtMost) and isinstance(b, AtMost)):
        return None
    for x, y in ((a, b), (b, a)):
        if x.known is not None:
            return y if x.known else x
    return a if a == b else None


def _where(node: Any) -> At:
    cond, a, b = value_at(node.cond), _number(node.a), _number(node.b)
    if not isinstance(cond, AtMost) or a is None or b is None or (a and b):
        return None
    return Where(cond, a) if a else Where(cond.negated(), b)


def _number(value: Any) -> float | None:
    if isinstance(value, Op):
        value = value.value if value.name == "full" else None  # type: ignore[attr-defined]
    return float(value) if isinstance(value, (int, float)) else None


def _cast(node: Any) -> At:
    x = value_at(node.x)
    if isinstance(x, AtMost):
        if node.dtype.kind == "bool":
            return x
        if x.known is not None:
            return Linear((), int(x.known))
        return Where(x, 1.0)
    if node.dtype.kind == "bool":
        return x.test if isinstance(x, Where) and x.number else None
    return x if isinstance(x, Where) or _exact(node) else None


def _triangle(upper: bool) -> Callable[[Any], At]:
    """aten.triu and tril of one number."""

    def rule(node: Any) -> At:
        x, *rest = node.args
        diagonal = rest[0] if rest else dict(node.kwargs).get("diagonal", 0)
        number = _number(x)
        rank = len(node.shape)
        if number is None or not isinstance(diagonal, int) or rank < 2:
            return None
        beyond = Linear((*(0,) * (rank - 2), -1, 1), -diagonal)  # column - row - diagonal
        inside = AtMost(beyond.scaled(-1) if upper else beyond)
        return inside if node.dtype.kind == "bool" and number else Where(inside, number)

    return rule


def _cumsum(node: Any) -> At:
    x, axis = value_at(node.args[0]), node.args[1] % len(node.shape)
    if isinstance(x, AtMost) and x.known is not None:
        x = Linear((), int(x.known))
    if not isinstance(x, Linear) or not x.fixed:
        return None
    return Linear(tuple(x.const if d == axis else 0 for d in range(len(node.shape))), x.const)


# ------------------------------------------------------------------ shapes


def _same(node: Any) -> At:
    return value_at(node.x)


def _permute(node: Any) -> At:
    return _mapped(
        value_at(node.x), lambda v: Linear(tuple(v.coefs[d] for d in node.dims), v.const)
    )


def _reshape(node: Any) -> At:
    def moved(v: Linear) -> Linear | None:
        coefs = [0] * len(node.to)
        for before, after in groups(node.x.shape, node.to):
            wide = [i for i in before if node.x.shape[i] != 1]
            made = [i for i in after if node.to[i] != 1]
            if len(wide) == len(made) == 1 and node.x.shape[wide[0]] == node.to[made[0]]:
                coefs[made[0]] = v.coefs[wide[0]]
            elif any(v.coefs[i] for i in wide):
                return None
        return Linear(tuple(coefs), v.const)

    return _mapped(value_at(node.x), moved)


def _slice(node: Any) -> At:
    if not isinstance(node.start, int):
        return None
    axis = node.dim % len(node.shape)

    def moved(v: Linear) -> Linear:
        coefs = list(v.coefs)
        coefs[axis] *= node.step
        return Linear(tuple(coefs), v.const + v.coefs[axis] * node.start)

    return _mapped(value_at(node.x), moved)


SHORT = 8  # elements of a first operand of cat that are looked at one by one


def _cat(node: Any) -> At:
    """Where what comes first continues what follows: -1 before 0, 1, 2 ..."""
    axis = node.dim % len(node.shape)
    *firsts, last = (value_at(x) for x in node.xs)
    sizes = [x.shape[axis] for x in node.xs[:-1]]
    if not isinstance(last, Linear) or not all(isinstance(s, int) and s <= SHORT for s in sizes):
        return None
    step = last.coefs[axis]
    whole = Linear(last.coefs, last.const - step * sum(sizes))
    start = 0
    for first, size in zip(firsts, sizes, strict=True):
        if not isinstance(first, Linear):
            return None
        for i in range(size):
            a = first.const + first.coefs[axis] * i
            b = whole.const + step * (start + i)
            if a != b or _without(first, axis) != _without(whole, axis):
                return None
        start += size
    return whole


def _without(value: Linear, axis: int) -> tuple[int, ...]:
    return value.coefs[:axis] + value.coefs[axis + 1 :]


def _negative(node: Any) -> At:
    x = value_at(node.x)
    return x.scaled(-1) if isinstance(x, Linear) else None


RULES: dict[str, Callable[[Any], At]] = {
    "arange": _arange, "full": _full, "add": _sum(1), "sub": _sum(-1), "mul": _mul,
    "neg": _negative,
    "le": _compared(_minus), "ge": _compared(lambda a, b: _minus(b, a)),
    "lt": _compared(lambda a, b: _minus(a, b).plus(ONE)),
    "gt": _compared(lambda a, b: _minus(b, a).plus(ONE)),
    "eq": _equal(True), "ne": _equal(False), "bitwise_not": _not, "logical_not": _not,
    "bitwise_and": _and, "logical_and": _and, "where": _where, "cast": _cast,
    "aten.tril.default": _triangle(False), "aten.triu.default": _triangle(True),
    "aten.cumsum.default": _cumsum,
    "copy": _same, "expand": _same, "permute": _permute, "reshape": _reshape, "slice": _slice,
    "cat": _cat,
}  # fmt: skip

__all__ = ["LOW", "AtMost", "Linear", "Where", "value_at"]
