"""quantize-cache: keys and values are kept as codes, with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from effc.ir import DType, Graph, Input, No, Op, PassError, Tensor, evaluate, nearest, no, yes
from effc.ir.formats import GroupQuant, quantize
from effc.ir.interpret import bind_symbols
from effc.ir.rewrite import Answer, op
from effc.ir.types import DTYPES
from effc.passes.base import Context, Numerics, Pass, lossy
from effc.passes.cache.insert_kv_cache import STATES
from effc.passes.common import missed

from .quantize_weights import FLOAT
from .weights import SCALES, code_type

RULE = "QuantizeState"
TITLE = "update(keys, k, past) => decode(encoded((update(codes, k's codes), update(scales, ...))))"


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keep keys and values of a cache in fewer bits.

    rewrite:
        k1 = update(k0, k, past, dim=2); y = attention(q, k1, v1, past=past)
        return ..., k1, v1
        -->
        a = quantize(k, dtype_=i8, format=GroupQuant(None, f16))
        c1 = update(k0_codes, item(a, 0), past, dim=2)
        s1 = update(k0_scale, item(a, 1), past, dim=2)
        y = attention(q, decode(encoded((c1, s1))), ..., past=past)
        return ..., c1, s1, ...

    A row is rounded once, when its token is new. bits: 1 to 8; codes are held a byte each in a
    state, so fewer than 8 cost accuracy and save no memory yet. zero: a zero point for each row.
    """

    bits: int = 8
    zero: bool = False
    scale: str = "f16"

    name: ClassVar[str] = "quantize-cache"
    numerics: ClassVar[Numerics] = lossy("relative_l2")
    needs: ClassVar[tuple[str, ...]] = (STATES,)
    changes_interface: ClassVar[bool] = True

    def run(self, g: Graph, ctx: Context) -> Graph:
        if self.bits >= FLOAT:
            ctx.note(f"bits={self.bits}: the cache stays as it is")
            return g
        format, codes = self.format, code_type(self.bits, self.zero)
        parts: dict[Input, tuple[Input, ...]] = {}
        values: dict[Op, tuple[Op, ...]] = {}  # of an update: what its state's parts become
        read: dict[Op, Op] = {}
        for state in g.states:
            answer = _legal(g, state)
            if isinstance(answer, No):
                missed(ctx, RULE, TITLE, g, state, answer)
                continue
            (update,) = g.users[state]
            of = state.tensor.with_(dtype=codes, format=format)
            parts[state] = self.states(g, state, of)
            values[update] = _updates(update, parts[state], codes, format)
            read[update] = op.decode(op.encoded(values[update], of), state.dtype)
            ctx.counted(RULE, TITLE)
        if not parts:
            return g
        ctx.note(_said(parts, self.bits))
        inputs = tuple(p for i in g.inputs for p in parts.get(i, (i,)))
        outputs = tuple(v for o in g.outputs for v in values.get(o, (o,)))
        both = (*g.inputs, *(p for made in parts.values() for p in made))
        wide = Graph(both, (), outputs, g.name).with_nodes(g.nodes)
        return replace(ctx.substitute(wide, read), inputs=inputs)

    @property
    def format(self) -> GroupQuant:
        if self.scale not in SCALES:
            raise PassError(f"scale={self.scale}", fix=nearest(self.scale, SCALES))
        zero = code_type(self.bits, True) if self.zero else None
        return GroupQuant(None, DTYPES[self.scale], zero)

    def states(self, g: Graph, state: Input, of: Tensor) -> tuple[Input, ...]:
        taken = {i.key for i in g.inputs} | {s.name for s in g.all_symbols}
        made = []
        for name, t in of.format.parts(of).items():
            key = f"{state.key}_{name}"
            while key in taken:
                key += "_"
            made.append(Input(key, t, state=True))
        return tuple(made)

    def inputs_after(self, before: Graph, after: Graph, inputs: Sequence[Any]) -> list[Any]:
        """The contents of states as codes."""
        env, kept = bind_symbols(before, inputs), {i.key for i in after.inputs}
        codes = code_type(self.bits, self.zero)
        made: list[Any] = []
        for node, value in zip(before.inputs, inputs, strict=True):
            if node.key in kept:
                made.append(value)
                continue
            shape: Any = evaluate(node.shape, env)
            made += quantize(value.nan_to_num(), Tensor(shape, codes, format=self.format)).parts
        return made


def _legal(g: Graph, state: Input) -> Answer:
    """A state that one `update` writes, and only attention reads."""
    users = g.users[state]
    if len(users) != 1 or users[0].name != "update" or users[0].operands[0] is not state:
        return no("it is read otherwise than by one update", at=state)
    update: Any = users[0]
    rank = state.tensor.rank
    if not state.dtype.is_float:
        return no("it holds {}", state.dtype, at=state)
    if update.dim % rank == rank - 1:
        return no("tokens are its last dimension, where a row would be one number", at=update)
    for user in g.users[update]:
        if user.name != "attention" or update not in (user.k, user.v):
            return no("{} reads it, which is no attention", user.name, at=user)
    if sum(o is update for o in g.outputs) != 1:
        return no("it is an output of the graph beside a state", at=update)
    return yes


def _updates(
    update: Any, states: Sequence[Input], codes: DType, format: GroupQuant
) -> tuple[Op, ...]:
    rounded = op.quantize(update.new, codes, format)
    return tuple(
        update.replace(x=state, new=op.item(rounded, place)) for place, state in enumerate(states)
    )


def _said(parts: dict[Input, tuple[Input, ...]], bits: int) -> str:
    row = next(iter(parts)).shape[-1]
    text = f"{len(parts)} states in {bits} bits, with a scale for each row of {row}"
    return text if bits == 8 else f"{text}; held a byte a code"


__all__ = ["QuantizeCache"]
