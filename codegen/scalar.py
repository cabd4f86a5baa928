"""Pointwise ops as expressions of a kernel's language: one element of the result, as torch has it.

What differs between languages is small: how a number is written, how types are converted, and the
prefix of the functions, which carry torch's names in all of them. 16-bit floats are computed in
float32 and rounded where they are stored or cast, not between the ops of one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effc.ir import DType, Op, no, yes
from effc.ir.ops.common import promote
from effc.ir.rewrite import Answer
from effc.ir.symbols import symbolic
from effc.ir.types import Tensor

TYPES = ("f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "bool")  # of elements
LIMITS = {"i64": 63, "i32": 31, "i16": 15, "i8": 7, "u8": 8}
Number = Callable[[Any], str]  # a symbolic number known at the call -> the text that reads it
Expression = Callable[..., str]  # (node, compute type, *operands as text)

FUNCTIONS = (
    "abs acos acosh add asin asinh atan atan2 atanh cos cosh erf erfc exp exp2 expm1 fmod "
    "hardsigmoid hardswish lerp log log10 log1p log2 log_sigmoid maximum minimum mish mul neg "
    "reciprocal relu remainder rsqrt sigmoid sign silu sin sinh sqrt square sub tan tanh"
).split()
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@dataclass(frozen=True)
class Language:
    """How a language says elements, numbers and conversions.

    prefix: of its functions. literal: a Python number beside elements of a type. constant: one with
    a type of its own. number: a symbolic one, from the text that reads it. convert: an element of
    one type as one of another, not yet rounded to 16-bit floats; rounded: as it is after a store.
    more: expressions that differ from the common ones, or add to them.
    """

    name: str
    prefix: str
    literal: Callable[[Any, DType], str]
    constant: Callable[[Any, DType], str]
    number: Callable[[str, DType], str]
    convert: Callable[[str, DType, DType], str]
    rounded: Callable[[str, DType], str]
    more: dict[str, Expression]
    expressions: dict[str, Expression] = field(default_factory=dict)

    def __post_init__(self) -> None:
        call = self.call
        self.expressions.update({name: call(name) for name in FUNCTIONS})
        for name in ("floor", "ceil", "trunc", "round"):
            self.expressions[name] = self._only_floats(name)
        for name, sign in COMPARISONS.items():
            self.expressions[name] = infix(sign)
        self.expressions.update({
            "div_floor": call("floor_divide"),
            "div_trunc": call("trunc_divide"),
            "pow": self._pow,
            "clamp": self._clamp,
            "cast": lambda node, c, x: x,
            "gelu": lambda node, c, x: (
                f"{self.prefix}{'gelu_tanh' if node.approximate == 'tanh' else 'gelu'}({x})"
            ),
            "leaky_relu": self._attributes("leaky_relu", "slope"),
            "elu": self._attributes("elu", "alpha", "scale", "input_scale"),
            "softplus": self._attributes("softplus", "beta", "threshold"),
            "isnan": lambda node, c, x: f"({x} != {x})",
            "logical_and": self.logical("&"),
            "logical_or": self.logical("|"),
            "logical_xor": self.logical("!="),
        })  # fmt: skip
        self.expressions.update(self.more)

    # -------------------------------------------------------------- the common expressions

    def call(self, name: str) -> Expression:
        return lambda node, c, *args: f"{self.prefix}{name}({', '.join(args)})"

    def truth(self, text: str, c: DType) -> str:
        return text if c.kind == "bool" else f"({text} != {self.literal(0, c)})"

    def logical(self, sign: str) -> Expression:
        return lambda node, c, a, b: f"({self.truth(a, c)} {sign} {self.truth(b, c)})"

    def _only_floats(self, name: str) -> Expression:
        """Rounding does nothing to integers."""
        return lambda node, c, x: f"{self.prefix}{name}({x})" if c.is_float else x

    def _attributes(self, name: str, *fields: str) -> Expression:
        def express(node: Any, c: DType, *args: str) -> str:
            given = [self.literal(getattr(node, f), c) for f in fields]
            return f"{self.prefix}{name}({', '.join([*args, *given])})"

        return express

    def _pow(self, node: Any, c: DType, a: str, b: str) -> str:
        """torch computes these exponents by multiplication and root; half without the roots."""
        exponent, p = node.b, self.prefix
        if c.is_float and isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
            known = {
                0.5: f"{p}sqrt({a})", -0.5: f"{p}rsqrt({a})", 1.0: a, 2.0: f"({a} * {a})",
                3.0: f"({a} * {a} * {a})", -1.0: f"{p}reciprocal({a})",
                -2.0: f"{p}reciprocal({a} * {a})",
            }  # fmt: skip
            if float(exponent) in known and not (c.name == "f16" and abs(exponent) == 0.5):
                return known[float(exponent)]
        return f"{p}pow({a}, {b})"

    def _clamp(self, node: Any, c: DType, x: str, *bounds: str) -> str:
        given = list(bounds)
        if node.low is not None:
            x = f"{self.prefix}maximum({x}, {given.pop(0)})"
        return f"{self.prefix}minimum({x}, {given.pop(0)})" if node.high is not None else x

    # -------------------------------------------------------------- nodes

    def express(self, node: Any, args: Sequence[tuple[str, DType] | Any], number: Number) -> str:
        """The expression of one element; args are (variable, element type) or numbers."""
        c = node.compute_dtype
        if node.name == "cast":
            (text, source), to = args[0], node.dtype_
            text = self.convert(text, source, to)
            if to.bits == 16 and to.is_float and source != to:
                return self.rounded(text, to)
            return text
        texts = []
        for i, arg in enumerate(args):
            if isinstance(arg, tuple):
                text, source = arg
                condition = node.name == "where" and i == 0
                made = self.truth(text, source) if condition else self.convert(text, source, c)
            elif symbolic(arg):
                made = self.number(number(arg), c)
            else:
                made = self.constant(arg, c)
            if not isinstance(arg, tuple) and node.result == "bool" and c.bits == 16 and c.is_float:
                made = self.rounded(made, c)  # a comparison sees the number as an element
            texts.append(made)
        return self.expressions[node.name](node, c, *texts)

    def check(self, node: Any) -> Answer:
        """Whether a pointwise node can be said with torch's exact meaning."""
        if node.name not in self.expressions:
            return no("op {} has no {} expression", node.name, self.name, at=node)
        types = [v.tensor for v in node.values if isinstance(v, Op)]
        for t in (*types, node.tensor):
            if not isinstance(t, Tensor) or t.dtype.name not in TYPES:
                return no("{} is not taken", t.dtype, at=node)
        c = promote(*node.values) if node.name != "where" else node.compute_dtype
        for value in node.values:
            if isinstance(value, complex) or (
                symbolic(value) and (value.is_Boolean or value.is_Relational)
            ):
                return no("operand {} is neither a tensor nor a real number", value, at=node)
            if not isinstance(value, Op) and not _fits(value, c):
                return no("{} does not fit {}", value, c, at=node)
        if node.name.startswith("bitwise") and c.is_float:
            return no("{} of {}", node.name, c, at=node)
        booleans = ("sub", "neg", "square", "abs", "div")
        if node.compute_dtype.kind == "bool" and node.name in booleans:
            return no("{} of bool", node.name, at=node)
        if node.name in ("div_floor", "div_trunc", "remainder", "fmod") and not c.is_float:
            if not isinstance(node.b, (int, float)) or node.b == 0:
                return no("torch raises on a zero among integer divisors", at=node)
        if node.name == "pow" and c.kind in ("int", "bool"):
            if not isinstance(node.b, int) or node.b < 0 or c.kind == "bool":
                return no("torch raises on a negative integer power", at=node)
        return yes


def infix(sign: str) -> Expression:
    return lambda node, c, a, b: f"({a} {sign} {b})"


def _fits(value: Any, dtype: DType) -> bool:
    """Torch refuses a number that an integer type cannot hold."""
    if dtype.kind != "int" or symbolic(value):
        return True
    top = 2 ** LIMITS[dtype.name]
    return (0 if dtype.name == "u8" else -top) <= value < top


# In units of a vector multiply-add, roughly: decides how much work is worth a second thread.
_COSTS = dict.fromkeys(("div", "sqrt", "rsqrt", "reciprocal"), 4)
_COSTS |= dict.fromkeys(
    "exp exp2 expm1 log log2 log10 log1p tanh sigmoid silu gelu erf sin cos mish".split(), 12
)
_COSTS |= dict.fromkeys("pow atan2 fmod remainder div_floor tan asin acos atan erfc".split(), 60)


def cost(node: Op) -> int:
    """Of one element."""
    return _COSTS.get(node.name, 1)


__all__ = ["LIMITS", "Expression", "Language", "Number", "cost", "infix"]
