"""Exact algebra: what can go without changing one bit, signed zeros, NaNs and types included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from effc.ir import OPS, Graph, Match, Op, Rule, no, yes
from effc.ir.ops.pointwise import Pointwise
from effc.ir.rewrite import Answer, op

from .analysis.aliases import root_of, shown_values
from .base import Context, Pass, exact
from .common import holds, is_number, power_of_two


@dataclass(frozen=True)
class Simplify(Pass):
    """Drop and shorten what computes nothing, bit for bit.

    rewrite:
        y = reshape(reshape(cast(cast(mul(x, 1), f32), bf16), ...), ...)
        -->
        y = reshape(x, ...)
    """

    name, numerics = "simplify", exact()

    def run(self, g: Graph, ctx: Context) -> Graph:
        claimed: set[Op] = set()
        return ctx.rewrite(g, [rule(claimed) for rule in RULES])


class ExactRule(Rule):
    """Base: refuses where the short form would have another type (element type, shape, layout)."""

    shared = True

    def __init__(self, claimed: set[Op]) -> None:
        self.claimed = claimed  # values that this run made outputs of

    def legal(self, m: Match, *args: Any) -> Answer:
        return yes

    def check(self, m: Match, *args: Any) -> Answer:
        answer = self.legal(m, *args)
        if not answer:
            return answer
        made = self.rewrite(op, m, *args)
        if made.type != m.root.type:
            return no("the short form is {}, not {}", made.type, m.root.type, at=m.root)
        return self.own_memory(m, made)

    def own_memory(self, m: Match, made: Op) -> Answer:
        """No output comes to share memory with an input, a constant or another output."""
        shown = shown_values(m.graph)
        if made not in m.graph.users or m.root not in shown or root_of(made) is root_of(m.root):
            return yes
        owner = root_of(made)
        if owner in m.graph.inputs:
            return no("an output must not share memory with the input", at=owner)
        if owner in m.graph.constants:
            return no("an output must not share memory with a constant", at=owner)
        if owner is not made:
            return no("an output must have packed memory of its own, x is a view", at=made)
        if owner in shown or owner in self.claimed:
            return no("x is also an output, and the two must not share memory", at=owner)
        self.claimed.add(owner)
        return yes


# ------------------------------------------------------------------ arithmetic with numbers


class DropNeutralNumber(ExactRule):
    """x * 1, x / 1, x - 0, x ** 1 => x"""

    def pattern(self, op, x):
        return op.mul(x, 1), op.div(x, 1), op.sub(x, 0), op.pow(x, 1)

    def legal(self, m, x):
        if m.root.name == "sub" and math.copysign(1, m.root.b) < 0:
            return no("x - (-0.0) turns -0.0 into 0.0")
        return yes

    def rewrite(self, op, m, x):
        return x


class DropAddZero(ExactRule):
    """x + 0 => x, for integers and for -0.0"""

    def pattern(self, op, x):
        return op.add(x, 0)

    def legal(self, m, x):
        zero = m.root.b if m.root.a is x else m.root.a
        if x.dtype.is_float and math.copysign(1, zero) > 0:
            return no("x + 0 turns -0.0 into 0.0", at=m.root)
        return yes

    def rewrite(self, op, m, x):
        return x


class MulMinusOneToNeg(ExactRule):
    """x * -1 => neg(x)"""

    def pattern(self, op, x):
        return op.mul(x, -1)

    def rewrite(self, op, m, x):
        return op.neg(x)


class PowToSquare(ExactRule):
    """x ** 2 => square(x)"""

    def pattern(self, op, x):
        return op.pow(x, 2)

    def rewrite(self, op, m, x):
        return op.square(x)


class PowToSqrt(ExactRule):
    """x ** 0.5 => sqrt(x)"""

    def pattern(self, op, x):
        return op.pow(x, 0.5)

    def legal(self, m, x):
        if m.root.dtype.bits < 32:
            return no("torch takes {} through pow, where -0.0 ** 0.5 is 0.0", m.root.dtype)
        return yes

    def rewrite(self, op, m, x):
        return op.sqrt(x)


class DivToMul(ExactRule):
    """x / 2**k => x * 2**-k"""

    def pattern(self, op, x, c):
        return op.div(x, c)

    def legal(self, m, x, c):
        if not power_of_two(c):
            return no("1 / {} is not exact", c if is_number(c) else "a tensor")
        # both numbers must be normal in the narrowest type: f16 spans 2**-14 .. 2**15
        if not 2.0**-14 <= abs(c) <= 2.0**14:
            return no("{} or its reciprocal may not be a normal number", c)
        return yes

    def rewrite(self, op, m, x, c):
        return op.mul(x, 1.0 / c)


class DoubleNeg(ExactRule):
    """neg(neg(x)) => x"""

    def pattern(self, op, x):
        return op.neg(op.neg(x))

    def rewrite(self, op, m, x):
        return x


class AddNegToSub(ExactRule):
    """a + neg(b) => a - b"""

    def pattern(self, op, a, b):
        return op.add(a, op.neg(b))

    def legal(self, m, a, b):
        if not b.dtype.is_float:
            return no("neg wraps in {}", b.dtype)  # uint8: -b is 256 - b before it is widened
        return yes

    def rewrite(self, op, m, a, b):
        return op.sub(a, b)


class SubNegToAdd(AddNegToSub):
    """a - neg(b) => a + b"""

    def pattern(self, op, a, b):
        return op.sub(a, op.neg(b))

    def rewrite(self, op, m, a, b):
        return op.add(a, b)


# ------------------------------------------------------------------ selection and element types


class WhereSame(ExactRule):
    """where(c, a, a) => a"""

    def pattern(self, op, a):
        return op.where(op.any, a, a)

    def legal(self, m, a):
        return yes if isinstance(a, Op) else no("{} is a number", a)

    def rewrite(self, op, m, a):
        return a


class WhereConstant(ExactRule):
    """where(full(True), a, b) => a"""

    def pattern(self, op, a, b):
        return op.where(op.full().named("cond"), a, b)

    def legal(self, m, a, b):
        if not isinstance(m.cond.value, (bool, int)):
            return no("the condition is known only at the call")
        taken = a if m.cond.value else b
        return yes if isinstance(taken, Op) else no("{} is a number", taken)

    def rewrite(self, op, m, a, b):
        return a if m.cond.value else b


class CastOfCast(ExactRule):
    """cast(cast(x, wide), t) => cast(x, t)"""

    def pattern(self, op, x):
        return op.cast(op.cast(x).named("middle"))

    def legal(self, m, x):
        middle, last = m.middle.dtype, m.root.dtype
        if not holds(middle, x.dtype):
            return no("{} does not hold every {}", middle, x.dtype, at=m.middle)
        # float to integer out of range is undefined, so the way there may show
        if not (last.is_float or last.kind == "bool" or holds(last, x.dtype)):
            return no("{} does not hold every {}", last, x.dtype)
        return yes

    def rewrite(self, op, m, x):
        return op.cast(x, m.root.dtype_)


# ------------------------------------------------------------------ shapes


class DropIdentity(ExactRule):
    """reshape | permute | expand | slice | cast | to_layout that changes nothing => x"""

    def pattern(self, op, x):
        return op.one_of("reshape", "permute", "expand", "slice", "cast", "to_layout")(x)

    def legal(self, m, x):
        root = m.root
        if root.name == "permute" and root.dims != tuple(range(len(root.dims))):
            return no("it moves dimensions")
        if root.name == "slice" and (root.start != 0 or root.step != 1):
            return no("it starts at {} with step {}", root.start, root.step)
        return yes

    def rewrite(self, op, m, x):
        return x


class OneOfTwo(ExactRule):
    """reshape(reshape(x)) => reshape(x); expand, permute, slice, to_layout likewise"""

    def pattern(self, op, x):
        names = ("reshape", "expand", "permute", "slice", "to_layout")
        return tuple(getattr(op, n)(getattr(op, n)(x).named("first")) for n in names)

    def legal(self, m, x):
        if m.root.name == "slice":
            rank = x.tensor.rank
            if m.root.dim % rank != m.first.dim % rank:
                return no("the slices are along dimensions {} and {}", m.first.dim, m.root.dim)
        return yes

    def rewrite(self, op, m, x):
        first, last = m.first, m.root
        match last.name:
            case "permute":
                return op.permute(x, tuple(first.dims[d] for d in last.dims))
            case "slice":
                start = first.start + last.start * first.step
                return op.slice(x, last.dim, start, last.size, first.step * last.step)
        return last.replace(x=x)


BINARY = tuple(
    name
    for name, cls in OPS.items()
    if issubclass(cls, Pointwise) and {"a", "b"} == {f.name for f in cls.fields}
)


class DropExpand(ExactRule):
    """add(x, expand(b)) => add(x, b), for every op that broadcasts"""

    def pattern(self, op, x, b):
        of = op.one_of(*BINARY)
        return of(x, op.expand(b).named("wide")), of(op.expand(b).named("wide"), x)

    def legal(self, m, x, b):
        made = self.rewrite(op, m, x, b)
        if made.compute_dtype != m.root.compute_dtype:
            return no("a 0-d operand computes in {}", made.compute_dtype)
        return yes

    def rewrite(self, op, m, x, b):
        side = "b" if m.root.b is m.wide else "a"
        return m.root.replace(**{side: b})


class DropPad(ExactRule):
    """pad(x) by nothing => x"""

    def pattern(self, op, x):
        return op.pad(x)

    def legal(self, m, x):
        if any(p != 0 for p in (*m.root.before, *m.root.after)):
            return no("it adds or crops elements")
        return yes

    def rewrite(self, op, m, x):
        return x


class CatOfOne(ExactRule):
    """cat((x,)) => x"""

    def pattern(self, op, xs):
        return op.cat(xs)

    def legal(self, m, xs):
        return yes if len(xs) == 1 else no("{} operands", len(xs))

    def rewrite(self, op, m, xs):
        return xs[0]


class SliceOfCat(ExactRule):
    """slice(cat(a, b), exactly b) => b"""

    def pattern(self, op, xs):
        return op.slice(op.cat(xs).named("joined"))

    def part(self, m: Match, xs: tuple[Op, ...]) -> Op | None:
        rank = m.joined.tensor.rank
        axis, start = m.joined.dim % rank, 0
        if m.root.dim % rank != axis or m.root.step != 1:
            return None
        for x in xs:
            if m.root.start == start and m.root.size == x.shape[axis]:
                return x
            start = start + x.shape[axis]
        return None

    def legal(self, m, xs):
        return yes if self.part(m, xs) else no("the slice is not one of the joined values")

    def rewrite(self, op, m, xs):
        part = self.part(m, xs)
        assert part is not None
        return part


class DropCopy(ExactRule):
    """copy(x) => x, where no caller sees whose memory it is"""

    def pattern(self, op, x):
        return op.copy(x)

    def rewrite(self, op, m, x):
        return x


RULES = (
    DropNeutralNumber, DropAddZero, MulMinusOneToNeg, PowToSquare, PowToSqrt, DivToMul,
    DoubleNeg, AddNegToSub, SubNegToAdd, WhereSame, WhereConstant, CastOfCast,
    DropIdentity, OneOfTwo, DropExpand, DropPad, CatOfOne, SliceOfCat, DropCopy,
)  # fmt: skip
