"""The intermediate representation: typed values, declared ops, immutable graphs, text, rules.

Imports nothing else of effc, and knows no target and no paper.
"""

from . import ops
from .errors import (
    ArtefactError,
    EffcError,
    InputError,
    OpError,
    OptionError,
    ParseError,
    PassError,
    PipelineError,
    RuleError,
    StepPlanError,
    UnsupportedError,
    VerifyError,
    nearest,
)
from .graph import Graph, Input, Item, Weight
from .interpret import bind_symbols, interpret
from .op import OPS, Cost, Op, Operand, Origin, Rates, Value, find_op, op
from .rewrite import Engine, Match, NearMiss, No, Rule, RuleStats, algebraic, no, yes
from .symbols import Dim, evaluate, symbol
from .text import names, node_text, parse, text
from .types import Dense, DType, Format, Layout, Number, Tensor, Type, channels_last, row_major
from .verify import verify

__all__ = [
    "OPS", "ArtefactError", "Cost", "DType", "Dense", "Dim", "EffcError", "Engine", "Format",
    "Graph", "Input", "InputError", "Item", "Layout", "Match", "NearMiss", "No", "Number", "Op",
    "OpError", "Operand", "OptionError", "Origin", "ParseError", "PassError", "PipelineError",
    "Rates", "Rule", "RuleError", "RuleStats", "StepPlanError", "Tensor", "Type",
    "UnsupportedError", "Value", "VerifyError", "Weight", "algebraic", "bind_symbols",
    "channels_last", "evaluate", "find_op", "interpret", "names", "nearest", "no", "node_text",
    "op", "ops", "parse", "row_major", "symbol", "text", "verify", "yes",
]  # fmt: skip
