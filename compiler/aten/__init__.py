"""Which ATen operator becomes which op of the IR. One entry an operator; arguments by schema name.

A converter may say `no(reason)`: then the operator stays whole as a generic `aten` node, runs
through ATen, and the reason is in the report. Importing this package registers all of them.
"""

from __future__ import annotations

from dataclasses import replace

from effc.importer import CONVERTERS

from . import images, makers, memory, pointwise, products, reductions, shapes

__all__ = ["images", "makers", "memory", "pointwise", "products", "reductions", "shapes"]

# ------------------------------------------------------------------ second names of the same thing

_SAME = {
    "divide": "div", "subtract": "sub", "multiply": "mul", "absolute": "abs", "negative": "neg",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "fix": "trunc", "arccos": "acos", "arcsin": "asin", "arctan": "atan", "arccosh": "acosh",
    "arcsinh": "asinh", "arctanh": "atanh", "arctan2": "atan2", "special_exp2": "exp2",
    "special_expm1": "expm1", "special_log1p": "log1p", "special_erf": "erf",
    "special_erfc": "erfc", "special_softmax": "softmax", "special_log_softmax": "log_softmax",
}  # fmt: skip


def _second_names() -> None:
    for second, first in _SAME.items():
        for target in [t for t in CONVERTERS if t.split(".")[1] == first]:
            converter = CONVERTERS[target]
            CONVERTERS.setdefault(
                target.replace(f".{first}.", f".{second}."),
                lambda call, _of=(converter, first, second), **arguments: _of[0](
                    replace(call, target=call.target.replace(f".{_of[2]}.", f".{_of[1]}.")),
                    **arguments,
                ),
            )


_second_names()
